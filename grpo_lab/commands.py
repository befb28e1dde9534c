"""What the commands do, between the command line and the parts; imported only when a command runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_lab.assemble import assemble
from grpo_lab.bundled import find_recipe
from grpo_lab.compare import report, runs
from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.inspection import describe_plan, show_plan
from grpo_lab.pipeline import quiet_libraries, train_recipe
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe import LoadedRecipe, Recipe, load
from grpo_lab.recipe.schema import GrpoStage, Model
from grpo_lab.stages.grpo import measure_policy
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.summary import show, summarise
from grpo_lab.tracking.console import QuietPipeConsole
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder


def load_with_limit(recipe: str, overrides: Sequence[str], max_steps: int | None) -> LoadedRecipe:
    """The recipe, with every stage's steps capped at `max_steps`."""
    path = find_recipe(recipe)
    loaded = load(path, overrides)
    if max_steps is None:
        return loaded
    caps = [f"stages.{name}.steps={min(stage.steps, max_steps)}" for name, stage in loaded.recipe.stages.items()]
    return load(path, [*overrides, *caps])


def train(loaded: LoadedRecipe, recipe: str, *, go_on: bool, as_json: bool, quiet: bool) -> None:
    """Train, then show what came of it."""
    quiet_libraries()
    console = QuietPipeConsole(stderr=True)
    text = find_recipe(recipe).read_text(encoding="utf-8")
    summary = summarise(train_recipe(loaded, text, go_on=go_on, console=console, quiet=quiet))
    output(summary, as_json=as_json, quiet=quiet)


def output(summary: Any, *, as_json: bool, quiet: bool) -> None:
    """The outcome on standard output."""
    if as_json:
        print_json(summary)
    elif not quiet:
        show(summary, wide_console())


def dry_run(loaded: LoadedRecipe, *, as_json: bool) -> None:
    """Everything but training: one prompt token by token, rewards on gold and empty answers, sizes."""
    quiet_libraries()
    plan = assemble(loaded)
    found = describe_plan(plan)
    if as_json:
        print_json(found)
    else:
        show_plan(found, wide_console())


def validate(recipes: Sequence[str], *, as_json: bool) -> int:
    """Check each recipe with its data and rewards; 3 if any has problems."""
    quiet_libraries()
    results = []
    for recipe in recipes:
        try:
            assemble(load(find_recipe(recipe)))
            results.append({"recipe": recipe, "problems": []})
        except RecipeError as error:
            results.append({"recipe": recipe, "problems": error.problems})
    console = Console()
    if as_json:
        print_json(results)
    for result in [] if as_json else results:
        for line in result["problems"] or [f"{result['recipe']}: fine"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 3 if any(result["problems"] for result in results) else 0


def evaluate(
    target: str, *, recipe: str | None, stage: str | None, samples: int, limit: int | None, as_json: bool
) -> None:
    """Measure a run's final model, or any model on a recipe's held-out data."""
    quiet_libraries()
    run = Path(target)
    is_run = (run / RUN).is_file()
    if not is_run and recipe is None:
        raise UsageError(f"{target}: is no run folder; a model needs --recipe, for its held-out data and rewards")
    loaded = load(run / RESOLVED if recipe is None else find_recipe(recipe))
    name = measured_stage(loaded.recipe, stage)
    if is_run:
        folder = StageFolder(run / name).final
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not there; the stage is not finished (grpo-lab train --resume goes on)")
        of_stage = loaded.recipe.model_of(loaded.recipe.stages[name])
        model = of_stage.model_copy(update={"path": str(folder), "config": None, "tokenizer": None})
    else:
        model = Model(path=target, dtype=loaded.recipe.model.dtype)
    loaded = LoadedRecipe(loaded.recipe.model_copy(update={"model": model}), loaded.sources)
    plan = assemble(loaded)
    found = next(each for each in plan.stages if isinstance(each, GrpoPlan) and each.name == name)
    if limit is not None:
        found = GrpoPlan(**{**vars(found), "held_out": found.held_out[:limit]})
    policy = load_policy(model, plan.tokenizer, seed=plan.recipe.seed)
    counts = tuple(k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples)
    result = measure_policy(policy, found, seed=plan.recipe.seed, num_samples=samples, pass_at=counts)
    if as_json:
        print_json({"target": target, "stage": found.name, "metrics": result.metrics})
    else:
        show_metrics(result.metrics, Console())


def measured_stage(recipe: Recipe, name: str | None) -> str:
    """The GRPO stage of that name, or the last one, that has held-out data."""
    names = [
        key for key, stage in recipe.stages.items() if isinstance(stage, GrpoStage) and stage.evaluation is not None
    ]
    chosen = [each for each in names if name in (None, each)]
    if not chosen:
        wanted = f"stage {name}" if name is not None else "stage"
        raise UsageError(f"no GRPO {wanted} with an evaluation block; there are: {', '.join(names) or 'none'}")
    return chosen[-1]


def compare_engines(
    targets: Sequence[str], *, parity: bool, presets: bool, itself: bool, stage: str | None, prompts: int, as_json: bool
) -> bool:
    """Both engines on one batch (`parity`), or the native one against itself; whether all gates were passed."""
    recipe, *overrides = targets
    if parity and itself:
        raise UsageError("--parity and --self are two checks; ask for one at a time")
    quiet_libraries()
    of = report.subject(assemble(load(find_recipe(recipe), overrides)), stage, prompts)
    measure, show_report = REPORTS["self" if itself else "presets" if presets else "parity"]
    found = measure(of)
    if as_json:
        print_json(found)
    else:
        show_report(found, wide_console())
    return bool(found["passed"])


REPORTS = {
    "parity": (report.parity_report, report.show_parity),
    "presets": (report.presets_report, report.show_presets),
    "self": (report.self_report, report.show_self),
}


def compare_runs(targets: Sequence[str], *, as_json: bool) -> None:
    """Finished runs side by side."""
    if len(targets) < 2:
        raise UsageError("give two or more run folders to compare, or --parity or --self with a recipe")
    found = runs.compare_runs([Path(target) for target in targets])
    if as_json:
        print_json(found)
    else:
        runs.show_runs(found, wide_console())


def show_metrics(metrics: dict[str, float], console: Console) -> None:
    """One line per quantity, with its interval where it has one."""
    for name, value in metrics.items():
        if name.endswith(("/low", "/high")):
            continue
        base = name.removesuffix("/mean")
        bounds = f" [{metrics[f'{base}/low']:.4f}, {metrics[f'{base}/high']:.4f}]" if f"{base}/low" in metrics else ""
        console.print(f"{base:32} {value:.4f}{bounds}", markup=False, highlight=False, soft_wrap=True)


def wide_console() -> Console:
    """Standard output; a pipe or file, which has no width, gets tables whole."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_json(values: Any) -> None:
    """JSON and nothing else on standard output."""
    Console(soft_wrap=True).out(json.dumps(values, indent=1), highlight=False)
