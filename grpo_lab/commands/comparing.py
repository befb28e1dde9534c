"""Engines and runs against each other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_lab.assemble import assemble
from grpo_lab.bundled import find_recipe
from grpo_lab.commands.showing import print_json, wide_console
from grpo_lab.compare import race, race_report, report, runs, sft_parity
from grpo_lab.errors import UsageError
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.recipe import load
from grpo_lab.tracking.console import QuietPipeConsole
from grpo_lab.tracking.files import write_atomic


def compare_engines(
    targets: Sequence[str],
    *,
    parity: bool,
    presets: bool,
    itself: bool,
    stage: str | None,
    prompts: int,
    processes: int,
    as_json: bool,
) -> bool:
    """Both engines on one batch (`parity`), or the native one against itself; whether all gates were passed.

    A supervised stage is meant if it is named, or if the recipe has no other.
    """
    recipe, *overrides = targets
    if parity and itself:
        raise UsageError("--parity and --self are two checks; ask for one at a time")
    quiet_libraries()
    plan = assemble(load(find_recipe(recipe), overrides))
    learnt = sft_parity.supervised(plan, stage)
    if learnt is not None and not itself and not presets:
        found = report.sft_report(sft_parity.sft_subject(plan, learnt, prompts))
        return _shown(found, report.show_parity, as_json=as_json)
    of = report.subject(plan, stage, prompts)
    if itself:
        found, show_report = report.self_report(of, processes=processes), report.show_self
    elif presets:
        found, show_report = report.presets_report(of), report.show_presets
    else:
        found, show_report = report.parity_report(of), report.show_parity
    return _shown(found, show_report, as_json=as_json)


def _shown(found: dict[str, Any], show_report: Callable[[Any, Any], None], *, as_json: bool) -> bool:
    if as_json:
        print_json(found)
    else:
        show_report(found, wide_console(width=150))
    return bool(found["passed"])


def race_engines(
    targets: Sequence[str],
    *,
    stage: str | None,
    seeds: str | None,
    control: str | None,
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """The recipe through both engines, then what came of it."""
    recipe, *overrides = targets
    if control not in (None, "random", "shuffled"):
        raise UsageError(f"--control {control}: use random or shuffled")
    overrides += [f"output_dir={output_dir}"] if output_dir is not None else []
    quiet_libraries()
    loaded = load(find_recipe(recipe), overrides)
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds is not None else [loaded.recipe.seed]
    except ValueError as error:
        raise UsageError(f"--seeds {seeds}: give whole numbers with commas between them, as in 0,1,2") from error
    console = QuietPipeConsole(stderr=True)
    planned = race.plan_race(loaded, stage, numbers, control)  # type: ignore[arg-type]
    race.run_race(planned, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    found = race_report.race_report(planned)
    if as_json:
        print_json(found)
    else:
        race_report.show_race(found, wide_console(width=190))


def compare_runs(targets: Sequence[str], *, picture: Path | None, as_json: bool) -> None:
    """Finished runs side by side."""
    if len(targets) < 2:
        raise UsageError("give two or more run folders to compare, or --parity, --race or --self with a recipe")
    found = runs.compare_runs([Path(target) for target in targets])
    if picture is not None:
        write_atomic(picture, runs.picture(found))
    if as_json:
        print_json(found)
    else:
        runs.show_runs(found, wide_console())
