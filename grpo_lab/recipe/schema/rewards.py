"""The terms of a reward."""

from math import inf
from typing import Annotated, Any

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import LIST, Block, Name, PositiveInt


class WeightSchedule(Block):
    """A weight that moves in a line from `start` to `end` and then stays there."""

    start: Annotated[float, Field(allow_inf_nan=False)]
    """The weight in the stage's first step."""
    end: Annotated[float, Field(allow_inf_nan=False)]
    """The weight after `steps` steps, and in every evaluation, so that those can be compared."""
    steps: PositiveInt
    """Steps from start to end."""


class RewardTerm(Block):
    """One reward in the sum: weight * clip(scale * value)."""

    name: str
    """A file in rewards/, a plugin's function, an installed package's entry point, or a dotted path."""
    weight: float | WeightSchedule = 1.0
    """What the reward is multiplied by: a number, or {start, end, steps}."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """The reward's own value is multiplied by this before it is clipped; metrics and `only_if` see the result."""
    clip: Annotated[tuple[float | None, float | None], LIST] | None = None
    """[lowest, highest]: the scaled value is cut off there; null on one side leaves that side open."""
    only_if: str | None = None
    """The label of another term: this one counts only where that one is above 0."""
    options: dict[str, Any] = {}
    """The reward's options; `grpo-lab rewards ls` lists them."""
    label: Name | None = None
    """The term's name in metrics, needed when one reward is used twice; null = its name."""

    @model_validator(mode="after")
    def _clip_leaves_room(self) -> "RewardTerm":
        if self.clip is not None:
            low, high = (
                bound if bound is not None else open_ for bound, open_ in zip(self.clip, (-inf, inf), strict=True)
            )
            if not low < high:
                raise ValueError(f"clip should be [lowest, highest] with lowest below highest, got {list(self.clip)}")
        return self

    @property
    def key(self) -> str:
        """The term's name in metrics and in `only_if`."""
        return self.label or self.name.rsplit(".", 1)[-1]
