"""Whether the final answer is what an expression of the data comes to."""

from typing import Literal

from grpo_lab.answers import final_answers, plain_quantity
from grpo_lab.expressions import calculate
from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def arithmetic(
    completion: Completion,
    *,
    expression: str | None,
    tolerance: float = 0.0,
    extract: Literal["auto", "hash", "boxed", "xml", "last"] = "auto",
    strict: bool = True,
) -> float | None:
    r"""1.0 if the final answer is the value of the column `expression`, else 0.0; None where that column is null.

    For data that holds the calculation and no answer, such as `(76.0 - 25.0) * 2`. The value is exact (1/3 is not
    0.333, but for a `tolerance`). + - * / ^ and brackets are understood in the column; in the answer only a number
    counts, so that the calculation cannot be handed back unsolved. The places are those of the reward accuracy.

    Args:
        extract: "xml" in <answer> tags, "boxed" in \boxed{}, "hash" after `####`, "auto" the first of these that occurs; "last" the last number
            anywhere, which pays for guessing.
        strict: what counts if the place occurs more than once: nothing, or (false) the last one, or the last number.
    """
    if expression is None:
        return None
    calculation = calculate(expression, powers=True)
    if calculation is None:
        raise ValueError(f"arithmetic needs a calculation in the column expression, got {expression!r}")
    found = [plain_quantity(each) for each in final_answers(completion.text, place=extract, strict=strict)]
    return float(any(each is not None and abs(each - calculation.value) <= tolerance for each in found))
