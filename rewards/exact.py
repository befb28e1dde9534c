"""Whether the answer is, letter for letter, one of the expected texts."""

import string
from typing import Literal

from grpo_lab.answers import Gold, final_answers, gold_answers, plain_answer
from grpo_lab.scoring import reward
from grpo_lab.types import Completion

_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’«»…–—")


@reward(range=(0.0, 1.0))
def exact(
    completion: Completion,
    *,
    answer: Gold | None,
    extract: Literal["auto", "hash", "boxed", "xml", "none"] = "auto",
    strict: bool = True,
    ignore_case: bool = True,
    ignore_punctuation: bool = False,
) -> float | None:
    r"""1.0 if the final answer is the text in the column `answer` (or one of a list of texts), else 0.0; None where null.

    White space is squeezed, and what only dresses an answer up ($, **, \text{}, a full stop at the end) is taken off
    both sides; 18 and 18.0 differ. The places are those of the reward accuracy, and "none" takes the whole completion.

    Args:
        extract: "xml" in <answer> tags, "boxed" in \boxed{}, "hash" after `####`, "auto" the first of these that occurs; "none" the whole
            completion.
        strict: what counts if the place occurs more than once: nothing, or (false) the last one, or the last number.
        ignore_case: whether new york is New York.
        ignore_punctuation: whether punctuation is left out on both sides.
    """
    if answer is None:
        return None
    golds = {_plain(gold, ignore_case, ignore_punctuation) for gold in gold_answers(answer)}
    # Lenient readings beyond the first are numbers found inside the place, which no text asks for.
    found = final_answers(completion.text, place=extract, strict=strict)[:1]
    return float(any(_plain(each, ignore_case, ignore_punctuation) in golds for each in found))


def _plain(text: str, ignore_case: bool, ignore_punctuation: bool) -> str:
    plain = plain_answer(text)
    if ignore_punctuation:
        plain = " ".join(plain.translate(_PUNCTUATION).split()) or plain
    return plain.casefold() if ignore_case else plain
