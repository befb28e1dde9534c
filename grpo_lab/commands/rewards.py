"""Rewards on the bench."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_lab.assemble import assemble
from grpo_lab.bench.cases import cases_beside, run_cases, show_cases
from grpo_lab.bench.named import named_reward
from grpo_lab.bench.recipes import recipe_report
from grpo_lab.bench.rescore import rescored
from grpo_lab.bench.tables import show_recipe_report, show_rescored
from grpo_lab.bundled import find_recipe, shipped_recipes
from grpo_lab.commands.showing import print_json, wide_console
from grpo_lab.errors import UsageError
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.scoring import bind, discover
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.tracking.run_folder import RESOLVED, RUN


def check_reward(
    target: str,
    overrides: Sequence[str],
    *,
    cases: Path | None,
    options: Sequence[str],
    plugins: Sequence[Path],
    stage: str | None,
    limit: int,
    as_json: bool,
) -> bool:
    """One reward against written cases, or a recipe's reward against its own data; whether everything passed."""
    quiet_libraries()
    if cases is None and target.endswith(".py") and cases_beside(target).is_file():
        cases = cases_beside(target)
    if cases is not None:
        if overrides:
            raise UsageError(f"{' '.join(overrides)}: overrides are for recipes; a reward takes --options key=value")
        found = run_cases(named_reward(target, options, plugins), cases)
        show_found: Callable[[Any, Console], None] = show_cases
    else:
        if options or plugins or target.endswith(".py") or target in discover().names():
            raise UsageError(f"{target}: a reward is tested with --cases FILE, a recipe takes key=value overrides only")
        found = recipe_report(assemble(load(find_recipe(target), overrides)), stage=stage, limit=limit)
        show_found = show_recipe_report
    if as_json:
        print_json(found)
    else:
        show_found(found, wide_console())
    return bool(found["passed"])


def score_again(
    run: Path, *, other: str, options: Sequence[str], plugins: Sequence[Path], stage: str | None, as_json: bool
) -> None:
    """A run's stored answers under another recipe's reward, or another reward."""
    quiet_libraries()
    if not (run / RUN).is_file():
        raise UsageError(f"{run}: is no run folder")
    base = run / "base"
    plan = assemble(load(run / RESOLVED), tokenizer_folder=base if base.exists() else None)
    stages = [each for each in plan.stages if isinstance(each, GrpoPlan) and stage in (None, each.name)]
    if not stages:
        raise UsageError(f"{run}: no GRPO stage{'' if stage is None else f' {stage}'}")
    chosen = stages[-1]
    shipped = {path.stem for path in shipped_recipes()}
    if other.endswith((".yaml", ".yml")) or other in shipped:
        recipe = load(find_recipe(other)).recipe
        same = {name: each for name, each in recipe.stages.items() if isinstance(each, GrpoStage)}
        if not same:
            raise UsageError(f"{other}: has no GRPO stage")
        name = chosen.name if chosen.name in same else list(same)[-1]
        rewards = bind(same[name].reward_terms, discover(recipe.plugins))
        said = f"scored with stage {name} of {other}"
    else:
        rewards, said = named_reward(other, options, plugins), f"scored with {' '.join([other, *options])}"
    found = rescored(run, plan, chosen, rewards, said=said)
    if as_json:
        print_json(found)
    else:
        show_rescored(found, wide_console())
