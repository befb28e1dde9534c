"""Whether the final answer is the right number, within a tolerance."""

from fractions import Fraction
from typing import Literal

from grpo_lab.answers import Gold, final_answers, gold_answers, plain_quantity
from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def numeric(
    completion: Completion,
    *,
    answer: Gold | None,
    tolerance: float = 0.0,
    relative: float = 0.0,
    integer: bool = False,
    extract: Literal["auto", "hash", "boxed", "xml", "last"] = "auto",
    strict: bool = True,
) -> float | None:
    r"""1.0 if the final answer is a number at most `tolerance` (or `relative` times the gold) away from it, else 0.0.

    None where the column `answer` is null; it holds a number, or a list of which any will do. Only numbers count (also
    1,080, 1/2, 50% and 12 cm, by the rules of the reward accuracy but without math-verify): no formulas, no infinity.
    With `integer` the answer must be a whole number (18.0 is). A percent sign makes 50% the number 0.5. Both bounds
    are inclusive; the wider one holds.

    Args:
        extract: "xml" in <answer> tags, "boxed" in \boxed{}, "hash" after `####`, "auto" the first of these that occurs; "last" the last number
            anywhere, which pays for guessing.
        strict: what counts if the place occurs more than once: nothing, or (false) the last one, or the last number.
    """
    if min(tolerance, relative) < 0:
        raise ValueError(f"numeric needs tolerances of 0 or more, got {tolerance} and {relative}")
    if answer is None:
        return None
    golds = [_gold(gold) for gold in gold_answers(answer)]
    readings = (plain_quantity(each) for each in final_answers(completion.text, place=extract, strict=strict))
    found = [number for number in readings if number is not None and not (integer and number.denominator != 1)]
    margins = [(gold, max(Fraction(str(tolerance)), Fraction(str(relative)) * abs(gold))) for gold in golds]
    return float(any(abs(number - gold) <= margin for number in found for gold, margin in margins))


def _gold(text: str) -> Fraction:
    number = plain_quantity(text)
    if number is None:
        raise ValueError(f"numeric needs numbers in the column answer, got {text!r}")
    return number
