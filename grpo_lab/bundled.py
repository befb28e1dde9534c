"""Finds the rewards and recipes that come with grpo-lab: inside an installed wheel, or beside the package."""

import difflib
import os
import re
from itertools import takewhile
from pathlib import Path

from grpo_lab.errors import RecipeError, SetupError

_PACKAGE = Path(__file__).parent


def rewards_folder() -> Path:
    """The folder with one file per shipped reward."""
    return _shipped_folder("rewards")


def recipes_folder() -> Path:
    """The folder with the shipped recipes."""
    return _shipped_folder("recipes")


def _shipped_folder(name: str) -> Path:
    candidates = (_PACKAGE / "_bundled" / name, _PACKAGE.parent / name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked_in = " and ".join(str(folder) for folder in candidates)
    raise SetupError(f"the shipped {name} are missing (looked in {looked_in}); install grpo-lab again")


def shipped_recipes() -> list[Path]:
    """The shipped recipes by name. A file whose name starts with `_` is only there to be extended."""
    return sorted(path for path in recipes_folder().glob("*.yaml") if not path.name.startswith("_"))


def find_recipe(name_or_path: str | Path) -> Path:
    """An existing file as given, else the shipped recipe: `quickstart`, `quickstart.yaml`, `recipes/quickstart.yaml`.

    Raises:
        RecipeError: it is neither; the message offers the nearest name.
    """
    if os.path.isfile(name_or_path):
        return Path(name_or_path)
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    name = str(name_or_path).removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    nearest = difflib.get_close_matches(name, shipped, n=1)
    hint = f'; did you mean "{nearest[0]}"?' if nearest else ""
    raise RecipeError(f'no recipe or file "{name_or_path}"{hint} (shipped: {", ".join(shipped) or "none"})')


def describe(path: Path) -> str:
    """The first sentence of a recipe's header comment, empty if it has none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("#").strip() for line in header).strip()
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
