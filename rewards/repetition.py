"""A penalty for saying the same thing again."""

from collections.abc import Sequence
from typing import Literal

from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward(range=(-1.0, 0.0))
def repetition(
    completion: Completion,
    *,
    n: int = 4,
    unit: Literal["tokens", "words", "characters"] = "tokens",
    free: float = 0.0,
) -> float:
    """Minus the share of n-grams that occurred before in the completion: 0 if none did, towards -1 in a loop.

    Tokens need no spaces between words, so loops count in any language; words are told apart by white space, whatever
    their case. `free` is the share that costs nothing (what is above it is stretched to -1): honest text repeats
    itself, too; in GSM8K's own solutions 2 % of the 4-grams of words are repeats. Less than n units is no repetition.

    Args:
        n: how many units make an n-gram.
        unit: what is counted: sampled ids, words between white space, or characters.
    """
    if n < 1 or not 0 <= free < 1:
        raise ValueError(f"repetition needs n of at least 1 and free from 0 to below 1, got {n} and {free}")
    units: Sequence[object] = completion.token_ids
    if unit != "tokens":
        units = completion.text.casefold().split() if unit == "words" else completion.text
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    if not grams:
        return 0.0
    share = 1 - len(set(grams)) / len(grams)
    return -max(0.0, share - free) / (1 - free)
