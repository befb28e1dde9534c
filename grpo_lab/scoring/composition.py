"""What the sum makes of a reward's value (scale, clip, weight), and the range that a total can have."""

import math
from collections.abc import Iterable

from grpo_lab.recipe.schema import GrpoStage, WeightSchedule
from grpo_lab.types import FINISHED, Progress

Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)


def before_step(stage: GrpoStage, step: int) -> Progress:
    """Where a stage stands when it scores the completions of a step; steps count from 0."""
    algorithm = stage.algorithm
    return Progress(step, stage.steps, algorithm.num_iterations * algorithm.num_minibatches)


def weight_at(weight: float | WeightSchedule, progress: Progress = FINISHED) -> float:
    """A term's weight in the step that comes after `progress`: a schedule goes in a line from its start to its end.

    >>> schedule = WeightSchedule(start=0.0, end=1.0, steps=4)
    >>> [weight_at(schedule, Progress(step, 100)) for step in (0, 1, 4, 50)], weight_at(schedule)
    ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    if not isinstance(weight, WeightSchedule):
        return weight
    share = 1.0 if progress == FINISHED else min(1.0, progress.step / weight.steps)
    return (1 - share) * weight.start + share * weight.end


def shaped(value: float, scale: float, clip: tuple[float | None, float | None] | None) -> float:
    """The value times `scale`, cut off at the bounds of `clip`.

    >>> shaped(250.0, 0.01, (None, 1.0)), shaped(-3.0, 1.0, (-1.0, None))
    (1.0, -1.0)
    """
    low, high = clip or (None, None)
    scaled = times(scale, value)
    return max(-math.inf if low is None else low, min(math.inf if high is None else high, scaled))


def weighted(range_: Range, weights: Iterable[float]) -> Range:
    """The range of weight * value, whichever of the weights it is.

    >>> weighted((0.0, 2.0), [1.0, -0.5])
    (-1.0, 2.0)
    """
    ends = [times(weight, end) for weight in weights for end in range_]
    return min(ends), max(ends)


def summed(ranges: Iterable[Range]) -> Range:
    """The range of a sum.

    >>> summed([(0.0, 1.0), (-math.inf, 0.5)])
    (-inf, 1.5)
    """
    lows, highs = zip(*ranges, strict=True)
    return sum(lows), sum(highs)


def in_words(range_: Range) -> str:
    """A range for people.

    >>> in_words((0.0, 1.2)), in_words((-math.inf, 1.0)), in_words(ANY)
    ('0 to 1.2', 'at most 1', 'unknown')
    """
    low, high = range_
    if range_ == ANY:
        return "unknown"
    if math.isinf(low):
        return f"at most {high:g}"
    return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def times(factor: float, value: float) -> float:
    """Their product, where a factor of 0 leaves nothing of infinity either."""
    return factor * value if factor else 0.0
