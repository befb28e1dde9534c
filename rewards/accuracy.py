"""Whether the final answer is right."""

from typing import Literal

from grpo_lab.answers import Gold, final_answers, gold_answers, same_answer
from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward(range=(0.0, 1.0))
def accuracy(
    completion: Completion,
    *,
    answer: Gold | None,
    extract: Literal["auto", "hash", "boxed", "xml", "last"] = "auto",
    strict: bool = True,
    timeout_seconds: int = 5,
) -> float | None:
    r"""1.0 if the final answer equals the column `answer`, else 0.0; None where that column is null.

    The column holds one gold answer, or a list of which any will do. The answer stands in <answer> tags ("xml"), in
    \boxed{} ("boxed") or after `####` ("hash"); "auto" takes the first of these that occurs, in this order. It must
    stand there exactly once (what comes before `</think>` is not looked at): of several guesses none counts. With
    `strict: false` the last such place counts, and the last number in it or, without such a place, in the completion.
    "last" is the last number anywhere, strict or not: it pays for guessing, so measure with it, do not train on it.

    Plain numbers are compared exactly (1,080 = 1080 = $1,080, 0.5 = 1/2; 50% is 0.5 and 50), with or without a unit.
    Words are compared as text. All else goes to math-verify, for `timeout_seconds` at most (a whole number from 1).
    A number must be worked out: 3*4 is not accepted for 12, nor 2^3 for 8.

    Args:
        extract: "xml" in <answer> tags, "boxed" in \boxed{}, "hash" after `####`, "auto" the first of these that occurs; "last" the last number
            anywhere, which pays for guessing.
    """
    if answer is None:
        return None
    if timeout_seconds < 1:
        raise ValueError(f"accuracy needs timeout_seconds of at least 1, got {timeout_seconds}")
    golds = gold_answers(answer)
    answers = final_answers(completion.text, place=extract, strict=strict)
    return float(any(same_answer(gold, each, timeout_seconds=timeout_seconds) for gold in golds for each in answers))
