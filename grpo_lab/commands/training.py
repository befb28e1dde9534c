"""Reading, checking, training and evaluating recipes."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from grpo_lab.assemble import Plan, assemble
from grpo_lab.bundled import find_recipe
from grpo_lab.commands.recipes import measured_stage
from grpo_lab.commands.showing import output, print_json, show_metrics, wide_console
from grpo_lab.distributed.ranks import joined
from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.inspection import describe_plan, show_plan
from grpo_lab.pipeline import quiet_libraries, train_recipe
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe import LoadedRecipe, load
from grpo_lab.recipe.schema import Model
from grpo_lab.scoring.composition import in_words
from grpo_lab.stages.grpo import measure_policy
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.summary import summarise
from grpo_lab.tracking.console import QuietPipeConsole
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder


def train(loaded: LoadedRecipe, recipe: str, *, go_on: bool, as_json: bool, quiet: bool) -> None:
    """Train, then show what came of it: alone, or as one of several processes that were started together."""
    quiet_libraries()
    console = QuietPipeConsole(stderr=True)
    text = find_recipe(recipe).read_text(encoding="utf-8")
    with joined(loaded.recipe.distributed.strategy) as ranks:
        run = train_recipe(loaded, text, go_on=go_on, console=console, quiet=quiet, ranks=ranks)
        if ranks.is_first:
            output(summarise(run), as_json=as_json, quiet=quiet)


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
            plan = assemble(load(find_recipe(recipe)))
            results.append({"recipe": recipe, "problems": [], "rewards": reward_ranges(plan)})
        except RecipeError as error:
            results.append({"recipe": recipe, "problems": error.problems})
    console = Console()
    if as_json:
        print_json(results)
    for result in [] if as_json else results:
        stages = [f"  {name}: reward {said}" for name, said in result.get("rewards", {}).items()]
        for line in result["problems"] or [f"{result['recipe']}: fine", *stages]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 3 if any(result["problems"] for result in results) else 0


def reward_ranges(plan: Plan) -> dict[str, str]:
    """For every GRPO stage in words: the range of the total, and what each term adds to it."""
    return {
        stage.name: f"{in_words(stage.rewards.range)} = "
        + " + ".join(f"{term.label} ({in_words(term.weighted_range)})" for term in stage.rewards.terms)
        for stage in plan.stages
        if isinstance(stage, GrpoPlan)
    }


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
