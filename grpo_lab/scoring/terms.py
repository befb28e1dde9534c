"""From a recipe's list of rewards to functions with their options: every problem is found before anything is scored."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from inspect import Parameter
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from grpo_lab.errors import RecipeError
from grpo_lab.recipe import did_you_mean
from grpo_lab.recipe.schema import RewardTerm, WeightSchedule
from grpo_lab.scoring.composition import ANY, Range, shaped, weight_at, weighted
from grpo_lab.scoring.mark import Option, Reward
from grpo_lab.scoring.registry import Registry
from grpo_lab.types import FINISHED, Progress

Loc = tuple[str | int, ...]
Problem = tuple[Loc, str]


@dataclass(frozen=True)
class BoundTerm:
    """One reward in the sum: the function, its checked options, and what the sum makes of its value.

    `label` is its name in metrics; `only_if` is the label of the term that gates it. `weight`, `scale` and `clip` are
    the recipe's: the sum adds weight * clip(scale * value).
    """

    reward: Reward
    label: str
    weight: float | WeightSchedule = 1.0
    only_if: str | None = None
    options: Mapping[str, Any] | None = None
    scale: float = 1.0
    clip: tuple[float | None, float | None] | None = None

    def weight_at(self, progress: Progress = FINISHED) -> float:
        """Its weight in the step after `progress`; without one, the weight that it ends with."""
        return weight_at(self.weight, progress)

    def shaped(self, value: float) -> float:
        """What stands in the metrics for a value that the reward gave."""
        return shaped(value, self.scale, self.clip)

    @property
    def range(self) -> Range:
        """What the shaped value can be; a closed gate makes it 0. A reward that declares no range can be anything."""
        ends = [self.shaped(end) for end in self.reward.range or ANY]
        gated = [] if self.only_if is None else [0.0]
        return min(*ends, *gated), max(*ends, *gated)

    @property
    def weighted_range(self) -> Range:
        """What the term can add to the total, at any time of a schedule."""
        weight = self.weight
        return weighted(self.range, (weight.start, weight.end) if isinstance(weight, WeightSchedule) else (weight,))


def problems(terms: Sequence[RewardTerm], registry: Registry, columns: Collection[str] | None) -> list[Problem]:
    """Everything that keeps these terms from being scored, each with its place in the recipe's list of rewards.

    `columns` are the columns that the data has; None leaves that check out.

    Raises:
        SetupError: the machine lacks what a reward needs.
    """
    found: list[Problem] = []
    for index, term in enumerate(terms):
        if isinstance(term.weight, float) and not math.isfinite(term.weight):
            found.append(((index, "weight"), f"should be a finite number, got {term.weight}"))
        try:
            reward = registry.get(term.name)
        except RecipeError as error:
            found += [((index, "name"), problem) for problem in error.problems]
            continue
        options, wrong = _check_options(reward, term.options)
        found += [((index, "options", *loc), problem) for loc, problem in wrong]
        if not wrong:
            try:
                note(reward, options)
            except RecipeError as error:
                found += [((index,), f'"{term.name}" {problem}') for problem in error.problems]
        if columns is not None:
            found += [((index,), _missing(term, column, columns)) for column in reward.columns if column not in columns]
    return found + _gate_problems(terms)


def note(reward: Reward, options: Mapping[str, Any]) -> str:
    """What the reward's own check has to say about itself with these options.

    Raises:
        RecipeError: the options do not go together.
        SetupError: the machine lacks something.
    """
    if reward.check is None:
        return ""
    return reward.check(**{**{name: option.default for name, option in reward.options.items()}, **options})


def bound_terms(terms: Sequence[RewardTerm], registry: Registry) -> tuple[BoundTerm, ...]:
    """The terms with their functions.

    Raises:
        RecipeError: all that `problems` finds.
    """
    found = problems(terms, registry, columns=None)
    if found:
        raise RecipeError([f"rewards{_path(loc)}: {problem}" for loc, problem in found])
    return tuple(_bound(term, registry.get(term.name)) for term in terms)


def gate_order(only_if: Mapping[str, str | None]) -> list[str]:
    """Labels in an order in which every gate comes before the term that it gates.

    Raises:
        CycleError: terms gate each other.
    """
    graph = {label: [gate] if gate is not None else [] for label, gate in only_if.items()}
    return [label for label in TopologicalSorter(graph).static_order() if label in only_if]


def _bound(term: RewardTerm, reward: Reward) -> BoundTerm:
    options = _check_options(reward, term.options)[0]
    return BoundTerm(reward, term.key, term.weight, term.only_if, options, term.scale, term.clip)


def _missing(term: RewardTerm, column: str, columns: Collection[str]) -> str:
    return f'"{term.name}" needs a dataset column "{column}"; the data has: {", ".join(sorted(columns)) or "none"}'


def _gate_problems(terms: Sequence[RewardTerm]) -> list[Problem]:
    labels = [term.key for term in terms]
    try:
        gate_order({term.key: term.only_if for term in terms})
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return [((labels.index(cycle[0]), "only_if"), f"terms gate each other: {' <- '.join(cycle)}")]
    return [
        ((index, "only_if"), f'unknown term "{term.only_if}"{did_you_mean(term.only_if, labels)}')
        for index, term in enumerate(terms)
        if term.only_if is not None and term.only_if not in labels
    ]


def _check_options(reward: Reward, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The options with their declared types (a list for a tuple is one), and what is wrong with them."""
    checked: dict[str, Any] = {}
    found: list[Problem] = []
    for name, value in options.items():
        if name not in reward.options:
            found.append(((name,), _unknown_option(reward, name)))
            continue
        try:
            checked[name] = _check(reward.options[name], value)
        except ValidationError as error:
            found += [((name, *each["loc"]), _wrong_type(each["msg"], each["input"])) for each in error.errors()]
        except (TypeError, PydanticUserError) as error:
            found.append(((name,), f"cannot be checked: {str(error).splitlines()[0]}"))
    return checked, found


def _check(option: Option, value: Any) -> Any:
    """Strict, by way of json, which is what yaml can write: an int passes for a float, a list for a tuple."""
    annotation = Any if option.annotation is Parameter.empty else option.annotation
    return TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)


def _unknown_option(reward: Reward, name: str) -> str:
    if not reward.options:
        why = ": every parameter of a batched reward is a column" if reward.scope == "completions" else ""
        return f'unknown option "{name}"; "{reward.name}" takes no options{why}'
    return f'unknown option "{name}"{did_you_mean(name, reward.options)}'


def _wrong_type(message: str, value: Any) -> str:
    return f"{message[:1].lower()}{message[1:]}, got {json.dumps(value, default=str)}"


def _path(loc: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
