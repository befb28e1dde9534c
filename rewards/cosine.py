"""Right answers are worth more when short, wrong ones cost less when long, along a cosine."""

import math
from typing import Literal

from grpo_lab.answers import Gold, final_answers, gold_answers, same_answer
from grpo_lab.scoring import reward
from grpo_lab.types import Completion


@reward
def cosine(
    completion: Completion,
    *,
    answer: Gold | None,
    max_length: int | None = None,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float | None = None,
    extract: Literal["auto", "hash", "boxed", "xml", "last"] = "auto",
    strict: bool = True,
) -> float | None:
    """The cosine-scaled length reward: accuracy and length in one number (arXiv:2502.03373); None where answer is null.

    `right` and `wrong` each say what an answer is worth at 0 tokens and at `max_length` tokens; in between

        r(n) = at_max + (at_0 - at_max) * (1 + cos(pi * n / max_length)) / 2

    so a right answer should be short, and a wrong one is better spent thinking. Beyond `max_length` (the sampling's
    max_completion_length) the value at the maximum stays: the cosine does not turn round. `exceeded` is what a
    completion of `max_length` tokens or more gets instead, right or wrong. `answer`, `extract` and `strict` are those
    of the reward accuracy. n counts all sampled ids.
    """
    if max_length is None or max_length <= 0:
        raise ValueError(
            f"cosine needs max_length above 0 (the sampling's max_completion_length), in tokens; got {max_length}"
        )
    if answer is None:
        return None
    golds = gold_answers(answer)  # before anything else: an unusable gold answer is an error at any length
    num_tokens = len(completion.token_ids)
    if exceeded is not None and num_tokens >= max_length:
        return exceeded
    answers = final_answers(completion.text, place=extract, strict=strict)
    at_zero, at_max = right if any(same_answer(gold, each) for gold in golds for each in answers) else wrong
    return at_max + (at_zero - at_max) * (1 + math.cos(math.pi * min(num_tokens / max_length, 1.0))) / 2
