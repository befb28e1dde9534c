"""Calling a reward: the one place where reward code runs, and what its answer or its failure is taken for."""

import math
import traceback
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from grpo_lab.errors import RewardError, SetupError, StopRequested
from grpo_lab.scoring.mark import invoke
from grpo_lab.scoring.terms import BoundTerm

FAILURES = frozenset({"error", "timeout", "bad_type", "non_finite", "crashed"})
# A group's std squares and sums rewards in float32, which ends at 3.4e38: 1e18 leaves room for G = 300.
LARGEST = 1e18
_LONGEST_MESSAGE = 300


class Outcome(NamedTuple):
    """What one term says about one completion: a value with status "ok", or nan and why there is none."""

    value: float
    status: str
    reason: str = ""


class Job(NamedTuple):
    """One call to be made: its arguments but for the options, and how many completions it scores."""

    arguments: Mapping[str, Any]
    num_completions: int


ABSTAINED = Outcome(math.nan, "abstained")
GATED = Outcome(0.0, "gated")


def call(
    term: BoundTerm,
    arguments: Mapping[str, Any],
    *,
    num_completions: int,
    passing: type[BaseException] = StopRequested,
) -> list[Outcome]:
    """One call of a reward function and its outcome for each of the completions it was given.

    An exception (also SystemExit) is the failure of every completion of the call, unless it is a `passing` one, or an
    error of ours about the machine. The function runs in this process, on the calling thread, without a time limit.

    Raises:
        RewardError: it returned more or fewer values than completions; which belongs to which cannot be known.
        SetupError: it needs a package that is not installed.
    """
    several = "" if term.reward.scope == "completion" else f" in one call over {num_completions} completions,"
    try:
        result = invoke(term.reward.function, {**arguments, **(term.options or {})})
    except (StopRequested, SetupError, passing):
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: a failure is counted, not raised
        return [Outcome(math.nan, "error", f"raised {_described(error, term)}{several}")] * num_completions
    if term.reward.scope == "completion":
        return [outcome_of(result)]
    values = result.tolist() if isinstance(result, Tensor | np.ndarray) else result
    if not isinstance(values, list | tuple):
        return [Outcome(math.nan, "bad_type", f"returned {_shown(result)}, not a list,{several}")] * num_completions
    if len(values) != num_completions:
        raise RewardError(
            f'reward "{term.label}" returned {len(values)} values for {num_completions} completions; '
            "it must return one for each, None where it does not apply"
        )
    return [outcome_of(value) for value in values]


def outcome_of(value: object) -> Outcome:
    """What a returned value means. Numbers, booleans and 0-d arrays count; None abstains; all else is a failure.

    >>> outcome_of(True)
    Outcome(value=1.0, status='ok', reason='')
    >>> outcome_of("1.0")
    Outcome(value=nan, status='bad_type', reason="returned '1.0', not a number or None")
    """
    if value is None:
        return ABSTAINED
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        return Outcome(math.nan, "bad_type", f"returned {_shown(value)}, not a number or None")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Outcome(math.nan, "non_finite", f"returned {number}")
    if abs(number) > LARGEST:
        return Outcome(math.nan, "non_finite", f"returned {number:g}, more than {LARGEST:g},")
    return Outcome(number, "ok")


def _described(error: BaseException, term: BoundTerm) -> str:
    """`ValueError: message (file.py:12)`, with the line of the reward's own file that led to it."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(term.reward.path)]
    where = f" ({term.reward.path.name}:{own[-1].lineno})" if own else ""
    return _inert(f"{type(error).__name__}: {error}".removesuffix(": ")) + where


def _shown(value: object) -> str:
    return _inert(repr(value))


def _inert(text: str) -> str:
    """One line, cut, without control characters: messages may quote what a model wrote."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:_LONGEST_MESSAGE])
    return line + ("..." if len(text) > _LONGEST_MESSAGE else "")
