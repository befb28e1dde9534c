"""A control: points for nothing."""

import hashlib

from grpo_lab.scoring import reward
from grpo_lab.types import Group


@reward(range=(0.0, 1.0))
def random(group: Group, *, seed: int = 0) -> list[float]:
    """A number from 0 up to 1 that depends on nothing but the example, the text and `seed`, evenly spread.

    The control arm of an experiment: whatever still improves under it does not come from the reward. The same text for
    the same example always scores the same, so runs repeat and resume exactly; siblings that say the same get the same.
    """
    return [_uniform(f"{seed}\0{group.example.id}\0{completion.text}") for completion in group.completions]


def _uniform(key: str) -> float:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
