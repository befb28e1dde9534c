"""Generated tasks: verifiable problems without a download. One file per task; the file's name is the task's name.

A task file defines `Options`, a pydantic Block with a documented default for every option, and
`rows(split, options) -> list[dict]`, a pure function whose train and test problems never overlap.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.problems import did_you_mean

TASKS: dict[str, ModuleType] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
}


def task_rows(name: str, *, split: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one task's split; every unknown or impossible option is named.

    >>> task_rows("addition", split="train", options={"size": 1, "seed": 3})[0]["prompt"]
    '46+68='
    """
    if name not in TASKS:
        raise RecipeError(f'data.path: unknown task "{name}"{did_you_mean(name, TASKS)}')
    task = TASKS[name]
    try:
        return list(_rows(name, split, task.Options.model_validate(options).model_dump_json()))
    except ValidationError as error:
        known = list(task.Options.model_fields)
        raise RecipeError([_problem(item, known) for item in error.errors()]) from None


@lru_cache(maxsize=4)  # a recipe's stages often share their data
def _rows(name: str, split: str, options: str) -> Sequence[dict[str, Any]]:
    task = TASKS[name]
    return task.rows(split, task.Options.model_validate_json(options))  # type: ignore[no-any-return]


def _problem(item: Any, known: list[str]) -> str:
    key = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        return f'data.options: unknown option "{key}"{did_you_mean(key, known)}'
    return f"data.options.{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"
