"""Recipes: what they may say (schema/), how they are read (load.py) and written out (resolved.py)."""

from grpo_lab.recipe.load import LoadedRecipe, load, load_recipe, written_value
from grpo_lab.recipe.problems import SourceMap, did_you_mean
from grpo_lab.recipe.resolved import difference, resolved_yaml
from grpo_lab.recipe.schema import Recipe

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "SourceMap",
    "did_you_mean",
    "difference",
    "load",
    "load_recipe",
    "resolved_yaml",
    "written_value",
]
