from pathlib import Path

import pytest

from grpo_lab import bundled
from grpo_lab.errors import RecipeError, SetupError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A checkout with two recipes and one that is only extended; the working folder is elsewhere and empty."""
    package = tmp_path / "checkout" / "grpo_lab"
    (package.parent / "recipes").mkdir(parents=True)
    package.mkdir()
    for name in ("quickstart", "countdown", "_base"):
        (package.parent / "recipes" / f"{name}.yaml").write_text(f"# The {name} recipe.\nname: {name}\n")
    monkeypatch.setattr(bundled, "_PACKAGE", package)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return package


def test_a_checkout_has_the_folders_beside_the_package(package):
    assert bundled.recipes_folder() == package.parent / "recipes"


def test_a_wheel_has_the_folders_inside_the_package(package):
    (package / "_bundled" / "recipes").mkdir(parents=True)
    (package / "_bundled" / "rewards").mkdir()
    assert bundled.recipes_folder() == package / "_bundled" / "recipes"
    assert bundled.rewards_folder() == package / "_bundled" / "rewards"


def test_missing_folders_are_a_broken_installation(package):
    with pytest.raises(SetupError) as caught:
        bundled.rewards_folder()
    assert str(caught.value) == (
        f"the shipped rewards are missing (looked in {package}/_bundled/rewards and {package.parent}/rewards); "
        "install grpo-lab again"
    )


def test_this_installation_has_both_folders():
    assert bundled.rewards_folder().is_dir()
    assert bundled.recipes_folder().is_dir()


def test_recipes_are_listed_by_name_without_the_ones_that_are_only_extended(package):
    assert [path.stem for path in bundled.shipped_recipes()] == ["countdown", "quickstart"]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "recipes/quickstart"])
def test_a_shipped_recipe_is_found_by_name(package, name):
    assert bundled.find_recipe(name) == package.parent / "recipes" / "quickstart.yaml"


def test_an_existing_file_comes_first(package):
    Path("quickstart.yaml").write_text("name: mine\n")
    assert bundled.find_recipe("quickstart.yaml") == Path("quickstart.yaml")
    assert bundled.find_recipe("quickstart") == package.parent / "recipes" / "quickstart.yaml"


def test_a_folder_of_that_name_hides_no_recipe(package):
    Path("quickstart").mkdir()
    assert bundled.find_recipe("quickstart") == package.parent / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    "name, message",
    [
        ("quikstart", 'no recipe or file "quikstart"; did you mean "quickstart"? (shipped: countdown, quickstart)'),
        ("zzz", 'no recipe or file "zzz" (shipped: countdown, quickstart)'),
        ("mine/zzz.yaml", 'no recipe or file "mine/zzz.yaml" (shipped: countdown, quickstart)'),
    ],
)
def test_an_unknown_recipe_offers_the_nearest(package, name, message):
    with pytest.raises(RecipeError) as caught:
        bundled.find_recipe(name)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["other/quickstart.yaml", "x" * 5000])
def test_a_path_elsewhere_is_not_taken_for_a_shipped_recipe(package, name):
    with pytest.raises(RecipeError):
        bundled.find_recipe(name)


def test_a_recipe_is_described_by_the_first_sentence_of_its_header(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# A tiny model learns to add,\n# on a laptop. Needs nothing.\nname: x\n# Not this.\n")
    assert bundled.describe(path) == "A tiny model learns to add, on a laptop."
    path.write_text("# No full stop\nname: x\n")
    assert bundled.describe(path) == "No full stop"
    path.write_text("name: x\n# Not a header.\n")
    assert bundled.describe(path) == ""
