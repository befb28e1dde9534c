"""Whether a sum made of the given numbers reaches the target."""

from collections import Counter
from fractions import Fraction
from typing import Literal

from grpo_lab.answers import final_answers, plain_answer
from grpo_lab.expressions import Calculation, calculate
from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward
def countdown(
    completion: Completion,
    *,
    nums: list[int],
    target: int,
    use_all: bool = True,
    attempt: float = 0.0,
    extract: Literal["auto", "hash", "boxed", "xml", "none"] = "xml",
) -> float:
    r"""1.0 if the answer is a sum over the column `nums` that comes to the column `target`, else 0.0.

    Allowed are + - * / between numbers, and brackets; every given number once (`use_all: false`: at most once), no
    others, none joined (1 and 2 are not 12), no signs of its own (-3). Divisions are exact. `= target` may stand
    behind the sum; what stands there must be true. The answer must stand in its place exactly once, as in the reward
    accuracy. `attempt` is what a sum of the right numbers with another value gets. The text is parsed by
    `grpo_lab.expressions` and never run.

    Args:
        extract: "xml" in <answer> tags, "boxed" in \boxed{}, "hash" after `####`, "auto" the first of these that occurs; "none" the whole
            completion.
    """
    found = final_answers(completion.text, place=extract)
    sum_found = _sum(plain_answer(found[0])) if found else None
    if sum_found is None or sum_found.has_signs or not _allowed(sum_found, nums, use_all=use_all):
        return 0.0
    return 1.0 if sum_found.value == target else attempt


def _sum(text: str) -> Calculation | None:
    left, equals, right = text.partition("=")
    found, claimed = calculate(left), calculate(right) if equals else None
    if found is None or (equals and (claimed is None or len(claimed.numbers) != 1 or claimed.value != found.value)):
        return None
    return found


def _allowed(found: Calculation, nums: list[int], *, use_all: bool) -> bool:
    used, given = Counter(found.numbers), Counter(map(Fraction, nums))
    return used == given if use_all else used <= given
