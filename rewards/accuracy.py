"""Whether the final answer is right."""

import re
import threading
from functools import lru_cache
from typing import Any, Literal

from grpo_lab.scoring import reward
from grpo_lab.text import boxed, hash_answer, last_number, parse_number, tag
from grpo_lab.types import Completion

# In the order in which "auto" looks for them: how each place is recognised.
_MARKERS = {"xml": "<answer>", "boxed": r"\boxed", "hash": "####"}

# The fine print of reading answers as mathematics, where math-verify alone is too kind or too slow.
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^0-9\\=+*/^<>|()\[\]{}_]+")  # as a product of letters, Pairs would be Paris
_ASSIGNED = re.compile(r"^[A-Za-z](?:_\w+|\([A-Za-z]\))?\s*=\s*(?=.)")
_SUM = re.compile(r"[0-9]\s*(?:[-+*]|\\cdot|\\times|\\div)\s*[0-9(\\]")  # 16-3-4 is the question, not the answer
_SUSPECT = (
    re.compile(r"=|\\equiv"),  # 1 = 12 would count as 12
    re.compile(r"[0-9](?:\s|~|\\[,;: ]|\\q?quad)+[0-9]"),  # 12 13 would be added up
    re.compile(r"!|\^\s*\{?\s*(?:[0-9]{2}|[0-9]+\s*\^)|(?:[({\[]\s*){4}"),  # seconds of work: 9^{9^9}, ((((1))))
)


@reward(range=(0.0, 1.0))
def accuracy(
    completion: Completion,
    *,
    answer: str | int | float | None,
    extract: Literal["auto", "hash", "boxed", "xml", "last"] = "auto",
    strict: bool = True,
) -> float | None:
    r"""1.0 if the final answer equals the column `answer`, else 0.0; None where that column is null.

    The answer stands in <answer> tags ("xml"), in \boxed{} ("boxed") or after `####` ("hash"); "auto" takes the first
    of these that occurs, in this order. It must stand there exactly once: of several guesses none counts. With
    `strict: false` the last such place counts, and the last number in it or, without such a place, in the completion.
    "last" is the last number anywhere, strict or not: it pays for guessing, so measure with it, do not train on it.

    Plain numbers are compared exactly (1,080 = 1080 = $1,080, 0.5 = 1/2; 50% is 0.5 and 50). Words are compared as
    text. All else goes to math-verify. A number must be worked out: 3*4 is not accepted for 12.
    """
    if answer is None:
        return None
    gold = _gold_text(answer)
    return float(any(_is_right(gold, found) for found in _found(completion.text, extract, strict=strict)))


def _gold_text(answer: str | int | float) -> str:
    gold = f"{answer:.12f}".rstrip("0") if isinstance(answer, float) else str(answer).strip()
    if gold in ("", "nan", "inf", "-inf"):
        raise ValueError(f"the column answer holds no answer, but {answer!r}")
    for marker, how in (("####", "hash"), (r"\boxed", "boxed"), ("<answer>", "xml")):
        if marker in gold:
            raise ValueError(f"the column answer holds a whole solution; set data.answer.extract: {how}")
    return gold


def _found(text: str, extract: str, *, strict: bool) -> list[str]:
    """The answers to compare with: at most one if strict."""
    if extract == "last":
        return _present(last_number(text))
    place = next((kind for kind, mark in _MARKERS.items() if extract in ("auto", kind) and mark in text), None)
    content = None if place is None else _content(text, place)
    if strict:
        return _present(content if place is not None and text.count(_MARKERS[place]) == 1 else None)
    says_something = content is not None and any(char.isalnum() for char in content)
    return _present(content, last_number(content if content is not None and says_something else text))


def _present(*answers: str | None) -> list[str]:
    return [answer for answer in answers if answer is not None]


def _content(text: str, place: str) -> str | None:
    if place == "hash":
        return hash_answer(text)
    if place == "boxed":
        return boxed(text)
    inside = tag(text, "answer")
    return inside if inside is None else boxed(inside) or inside


@lru_cache(maxsize=8192)
def _is_right(gold: str, found: str) -> bool:
    gold, found = _clean(gold), _clean(found)
    if gold.casefold() == found.casefold():
        return True
    gold_number, found_number = parse_number(gold), parse_number(found)
    if gold_number is not None and found_number is not None:
        gold_percent, found_percent = gold.endswith("%"), found.endswith("%")
        return gold_number == found_number or (
            gold_percent != found_percent
            and gold_number * (100 if gold_percent else 1) == found_number * (100 if found_percent else 1)
        )
    if not found or _WORDS.fullmatch(gold) or not found.isprintable() or len(found) > 64 + 4 * len(gold):
        return False
    bare = found if "=" in gold else _ASSIGNED.sub("", found)
    if gold_number is not None and _SUM.search(bare):
        return False
    if any(suspect.search(bare) and not suspect.search(gold) for suspect in _SUSPECT):
        return False
    return _math_verify(gold, bare)


def _clean(text: str) -> str:
    """Without what only dresses an answer up: white space, dollars, bold marks, \\text{} and a full stop."""
    plain = _TEXT_COMMAND.sub(r" \1 ", text.replace(r"\!", "").replace("\u2212", "-"))
    plain = " ".join(plain.split()).removeprefix(r"\(").removesuffix(r"\)")
    return plain.strip("$*` ").rstrip(".$*` ")


def _math_verify(gold: str, found: str) -> bool:
    """Compare as mathematics; the gold answer goes first, and what takes more than 5 seconds is wrong."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("accuracy runs on the main thread only: math-verify keeps its time limit by signal.alarm")
    from math_verify import verify  # half a second to import, and plain numbers do not need it

    expected = _parse_gold(gold)
    return bool(expected) and bool(verify(expected, _parse(found)))


@lru_cache(maxsize=8192)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    expressions: list[Any] = parse(f"${text}$", extraction_config=[LatexExtractionConfig()])
    return expressions
