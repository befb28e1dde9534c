"""Whether the right one of several lettered choices was taken."""

import re
from typing import Literal

from grpo_lab.answers import final_answers, gold_answers, plain_answer
from grpo_lab.scoring import reward
from grpo_lab.types import Completion

_LONGEST = 1000  # characters of an answer: a letter and what the choice says


@reward(range=(0.0, 1.0))
def choice(
    completion: Completion,
    *,
    answer: str | list[str] | None,
    letters: str = "ABCDE",
    extract: Literal["auto", "hash", "boxed", "xml", "none"] = "auto",
    strict: bool = True,
) -> float | None:
    r"""1.0 if the final answer is the letter in the column `answer` (or one of a list), else 0.0; None where null.

    The answer may be written B, b, (B), B), B., **B**, `Option B` or with the choice's text after it (`B) 12 km`).
    Exactly one letter must be chosen: `A or B` and `A) B) C)` are no choice. The places are those of the reward
    accuracy. With `strict: false` a completion without such a place is read for the last `answer is B` or, failing
    that, the last letter that stands in brackets; a bare A may be an article and never counts there.

    Args:
        letters: the letters that can be chosen.
        extract: "xml" in <answer> tags, "boxed" in \boxed{}, "hash" after `####`, "auto" the first of these that occurs; "none" the whole
            completion.
    """
    if answer is None:
        return None
    golds = {_gold(gold, letters) for gold in gold_answers(answer)}
    found = final_answers(completion.text, place=extract, strict=strict)
    chosen = _chosen(found[0], letters) if found else None
    if chosen is None and not strict:
        chosen = _mentioned(completion.text, letters)
    return float(chosen in golds)


def _gold(text: str, letters: str) -> str:
    gold = _chosen(text, letters)
    if gold is None:
        raise ValueError(f"choice needs one of the letters {letters} in the column answer, got {text!r}")
    return gold


def _chosen(text: str, letters: str) -> str | None:
    """The letter that an answer starts with, if it is the only one that is chosen."""
    if len(text) > _LONGEST:
        return None
    plain = re.sub(
        r"^(?:(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)?\s*:?\s*)+",
        "",
        plain_answer(text),
        flags=re.I,
    )
    one = f"[{re.escape(letters)}]"
    match = re.match(rf"\*{{0,2}}(?:\(\s*({one})\s*\)|({one})(?=$|\s*[).:*]))", plain, re.I)
    if match is None:
        return None
    letter = str(match[1] or match[2]).upper()
    return letter if _others(plain[match.end() :].lstrip(").:* "), one) <= {letter} else None


def _others(rest: str, one: str) -> set[str]:
    """The letters that stand as choices in what follows the first, which may be the choice's text."""
    listed = re.findall(
        rf"(?:\b(?:or|and)|[,/])\s*({one})(?=\s*(?:$|[).:;,/]|or\b|and\b))|\(\s*({one})\s*\)", rest, re.I
    )
    lettered = [  # as in `B) 12`, but not the end of (a + b)
        match[1]
        for match in re.finditer(rf"(?<![^\W_])({one})\)", rest, re.I)
        if rest.count("(", 0, match.start()) <= rest.count(")", 0, match.start())
    ]
    return {letter.upper() for letter in [*(first or second for first, second in listed), *lettered]}


def _mentioned(text: str, letters: str) -> str | None:
    one = f"[{re.escape(letters)}]"
    for pattern in (rf"(?i:answer|option|choice)(?i:\s+is|:)*\s*\**\(?({one})(?![^\W_])", rf"\(({one})\)"):
        found = re.findall(pattern, text)
        if found:
            return str(found[-1])
    return None
