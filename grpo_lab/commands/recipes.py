"""Which recipe a command is about, and which of its stages. Needs no torch: a wrong recipe is refused at once."""

from collections.abc import Sequence

from grpo_lab.bundled import find_recipe
from grpo_lab.errors import UsageError
from grpo_lab.recipe import LoadedRecipe, Recipe, load
from grpo_lab.recipe.schema import GrpoStage


def load_with_limit(recipe: str, overrides: Sequence[str], max_steps: int | None) -> LoadedRecipe:
    """The recipe, with every stage's steps capped at `max_steps`."""
    path = find_recipe(recipe)
    loaded = load(path, overrides)
    if max_steps is None:
        return loaded
    caps = [f"stages.{name}.steps={min(stage.steps, max_steps)}" for name, stage in loaded.recipe.stages.items()]
    return load(path, [*overrides, *caps])


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
