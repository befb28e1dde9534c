import pytest

from grpo_lab.bundled import describe, shipped_recipes
from grpo_lab.recipe import load_recipe, resolved_yaml

RECIPES = shipped_recipes()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    assert load_recipe(path).stages


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_says_what_it_is_for(path):
    assert describe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_survives_being_written_out(path, tmp_path):
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(load_recipe(path)), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(path)
