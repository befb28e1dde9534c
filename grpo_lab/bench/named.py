"""A reward as the command line names it: by name, by dotted path, or by its file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.recipe import written_value
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import RewardSet, bind, discover, problems


def named_reward(name: str, options: Sequence[str], plugins: Sequence[Path]) -> RewardSet:
    """The one reward of that name with options `key=value`. A file that holds one reward stands for it.

    Raises:
        RecipeError: there is no such reward, or it does not take these options.
        UsageError: an option without `=`, or a file with several rewards.
    """
    if name.endswith(".py"):
        plugins = [*plugins, Path(name)]
        own = sorted(set(discover([Path(name)]).names()) - set(discover().names()))
        if len(own) != 1:
            raise UsageError(f"{name} holds {', '.join(own)}; name one of them and give the file as --plugin {name}")
        name = own[0]
    registry = discover(plugins)
    term = RewardTerm(name=name, options=option_values(options))
    found = problems([term], registry, columns=None)
    if found:
        raise RecipeError([": ".join([".".join(map(str, loc[1:])), text]) for loc, text in found])
    return bind([term], registry)


def option_values(written: Sequence[str]) -> Mapping[str, Any]:
    """`target=60 unit=tokens` as values, read as overrides of a recipe are."""
    values = {}
    for each in written:
        key, equals, text = each.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--options {each}: write key=value, for example --options target=60")
        values[key.strip()] = written_value(text, f"--options {each}")
    return values
