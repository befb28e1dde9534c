"""A penalty that grows with the distance from a wanted length."""

from typing import Literal

from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward(range=(float("-inf"), 0.0))
def length(
    completion: Completion,
    *,
    goal: Literal["target", "shorter", "longer"] = "target",
    target: int = 100,
    unit: Literal["tokens", "characters"] = "tokens",
    scale: float | None = None,
) -> float:
    """How far the completion is from its target length: -|n - target| / scale, so 0 at the target and -1 one scale off.

    With the goal "shorter" only what exceeds the target is charged (`target: 0` and a scale charge every token), with
    "longer" only what is missing, so nothing is gained by going on beyond it. Tokens are all sampled ids, the
    end-of-sequence token included; they are never counted by characters or by chat messages. `scale` is in the same
    unit; null takes the target itself.

    Args:
        goal: "target", "shorter" or "longer", as above.
        unit: what is counted.
    """
    size = len(completion.token_ids if unit == "tokens" else completion.text)
    divisor = target if scale is None else scale
    if divisor <= 0:
        raise ValueError(f"length needs a scale above 0 (the target, if scale is not given), got {divisor}")
    if goal == "shorter":
        return -max(0, size - target) / divisor
    if goal == "longer":
        return -max(0, target - size) / divisor
    return -abs(size - target) / divisor
