r"""Final answers: where a completion gives one, and whether two of them say the same.

The judges in `rewards/` (accuracy, exact, numeric, choice, cosine, brevity) share these functions; a reward of one's
own may use them, too. Nothing that a model wrote is evaluated as Python here.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from grpo_lab.text import boxed, hash_answer, last_number, parse_number, tag

Place = Literal["auto", "hash", "boxed", "xml", "last", "none"]
Gold = str | int | float | Sequence[str | int | float]

# In the order in which "auto" looks for them: how each place is recognised.
_MARKERS = {"xml": "<answer>", "boxed": r"\boxed", "hash": "####"}
_THOUGHTS_END = ("</think>", "</reasoning>")

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm|textit)\s*\{([^{}]*)\}")
_SIZES = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_SPACING = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~")  # but not the end of a matrix's row
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")  # but not a common space
_BRACED = re.compile(r"\{([^{},;]*)\}")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^0-9\\=+*/^<>|()\[\]{}_]+")  # as a product of letters, Pairs would be Paris
_ASSIGNED = re.compile(r"(?P<name>[A-Za-z](?:_\w+|\([A-Za-z]\))?)\s*=\s*(?P<value>.+)")
_ALTERNATIVES = re.compile(r"(?:,|\bor\b|\band\b)\s*(?=[A-Za-z]\s*=)")
_MEMBER = re.compile(r"^[A-Za-z]\s*(?:\\in(?![a-zA-Z])|∈)\s*(?=.)")
_ORDERED = re.compile(r"[(\[].*,.*[)\]]")  # a pair or an interval, where a list of roots or a set has no order
_RELATION = re.compile(r"[<>≤≥∈]|\\(?:le|ge|lt|gt|in)(?:q|qslant)?(?![a-zA-Z])")
_BASE = re.compile(r"(?P<digits>[0-9]+)_(?:\{(?P<base>[0-9]+)\}|(?P<base1>[0-9]))")
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°)")
_SUM = re.compile(r"[0-9]\s*(?:[-+*]|\\cdot|\\times|\\div)\s*[0-9(\\]")  # 16-3-4 is the question, not the answer
_FORMULA = re.compile(r"[\\^√²³/(]")
_UNSOLVED = re.compile(  # 2^3 and \binom{4}{2} are questions, too; powers of ten and commands that only dress up are not
    r"[√²³]|(?<!\b10)(?<!\b10 )\^(?!\s*\{?\s*\\circ)|"
    r"\\(?!(?:[dt]?frac|displaystyle|text[a-z]*|math[a-z]+|boldsymbol|bm|underline|circ|degree|cdot|times)(?![a-z]))[a-zA-Z]+"
)
_SUSPECT = (  # where math-verify alone is too kind or too slow
    re.compile(r"=|\\equiv"),  # 1 = 12 would count as 12
    re.compile(r"[0-9](?:\s|~|\\[,;: ]|\\q?quad)+[0-9]"),  # 12 13 would be added up
    re.compile(r"!|\^\s*\{?\s*(?:[0-9]{2}|[0-9]+\s*\^)|(?:[({\[]\s*){4}"),  # seconds of work: 9^{9^9}, ((((1))))
)
_QUANTITY = re.compile(
    r"(?P<number>[^A-Za-z°]*?[0-9.,}%])(?P<gap>\s*)(?P<unit>[A-Za-z][A-Za-z ]*)(?P<power>(?:\^ ?\{?[23]\}?|[²³])?)\.?"
)
_UNIT_BEHIND = re.compile(
    r"(?P<formula>.*(?:[0-9})]|\\pi)) (?P<unit>[A-Za-z]+(?: [A-Za-z]+){0,3})(?: ?\^ ?\{?[23]\}?|[²³])?\.?"
)
_PER = re.compile(
    r"(?<=[A-Za-z0-9}]) ?/ ?(?=(?:second|sec|minute|min|hour|hr|day|week|month|year|mile|km|kg|lb|gallon|person|item)s?\b)|"
    r"(?<=[A-Za-z]) ?/ ?(?=[shmlLg]\b)"
)
_ONE_LETTER_UNITS = frozenset("mgshlLJNWVAKCF")
# What may follow a number without a space: 12cm is a length, but 2ab a product. Longer words are no products.
_GLUED = re.compile(
    r"[cmkdn]m|[km]g|[mcd][lL]|[kM]?Hz|[kM]W|lbs?|oz|ft|yds?|mi|mph|hrs?|mins?|secs?|am|pm|st|nd|rd|th|[A-Za-z]{4,}"
)
_POWERS = {"2": "2", "3": "3", "²": "2", "³": "3", "square": "2", "sq": "2", "cubic": "3"}
_FACTORS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|pi|half|halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|"
    r"thousandth)s?|mod|squared|cubed|times \w+|plus|minus|over|by|than|is|vs|versus|maybe|unless|wait|negative|factorial|sqrt|"
    r"root|log|ln|exp|sin|cos|tan|[u-z]{2,3})\b"
)
_LONGEST = 1000  # characters of an answer, with its dress
_LONGEST_UNIT = 4  # words


def final_answers(text: str, *, place: Place = "auto", strict: bool = True) -> list[str]:
    r"""The answers that a completion gives, to be compared one by one: none, or one, or (lenient) up to two readings.

    The place is <answer> tags ("xml"), \boxed{} ("boxed"), after `####` ("hash"), the last number anywhere ("last") or
    the whole text ("none"); "auto" takes the first of tags, box and hash that occurs. What stands before the first `</think>` (or
    `</reasoning>`) is thinking and not looked at. Strict: the place must occur exactly once, of several guesses none
    counts. Lenient: the last such place counts, or the last number in it, or in the text if there is no such place.

    >>> final_answers(r"<think>\boxed{1}?</think> It is \boxed{12}.")
    ['12']
    >>> final_answers("#### 1 #### 12"), final_answers("#### 1 #### 12 eggs", strict=False)
    ([], ['12 eggs', '12'])
    """
    text = _after_thoughts(text)
    if place == "none":
        return [text.strip()] if text.strip() else []
    if place == "last":
        return _present(last_number(text))
    found = next((kind for kind, mark in _MARKERS.items() if place in ("auto", kind) and mark in text), None)
    content = None if found is None else _content(text, found)
    if strict:
        return _present(content if found is not None and _is_only(text, found) else None)
    says_something = content is not None and any(char.isalnum() for char in content)
    return _present(content, last_number(content if content is not None and says_something else text))


def gold_answers(answer: Gold) -> list[str]:
    """A gold answer of the data as text, several if any of several is right.

    >>> gold_answers(18.0), gold_answers(["1/2", "0.5"])
    (['18.'], ['1/2', '0.5'])

    Raises:
        ValueError: it is empty, or a whole solution whose answer was not cut out.
    """
    if isinstance(answer, str | int | float):
        return [_gold_text(answer)]
    golds = [_gold_text(each) for each in answer]
    if not golds:
        raise ValueError("the column answer holds an empty list")
    return golds


def plain_answer(text: str) -> str:
    r"""Without what only dresses an answer up: white space, dollars, bold marks, \text{} and a full stop.

    >>> plain_answer(r"$\text{Paris}$."), plain_answer("**12** ")
    ('Paris', '12')
    """
    plain = text.replace(r"\!", "").replace("\u2212", "-").replace(r"\langle", "(").replace(r"\rangle", ")")
    plain = _THOUSANDS.sub(",", plain).replace(r"\varnothing", r"\emptyset").replace("∅", r"\emptyset")
    plain = " ".join(_SPACING.sub(" ", _TEXT_COMMAND.sub(r" \1 ", _SIZES.sub("", plain))).split())
    plain = plain.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
    plain = plain.strip("$*` ").rstrip(".$*` ")
    braced = _BRACED.fullmatch(plain)
    return braced[1].strip() if braced else plain


def same_answer(gold: str, found: str, *, timeout_seconds: int = 5) -> bool:
    r"""Whether two answers say the same; the gold answer goes first.

    Plain numbers are compared exactly (1,080 = 1080 = $1,080, 0.5 = 1/2; 50% is 0.5 and 50). A unit may be left out or
    added, but not exchanged; `5 million` is 5000000. Words are compared as text. All else (LaTeX, sets, intervals,
    formulas) goes to math-verify, and what takes it longer than the time limit is wrong. A number must be worked out:
    3*4 is not accepted for 12, nor 2^3 for 8.

    >>> same_answer("12", "12 cm"), same_answer("5.4 cents", "5.4 dollars"), same_answer("9", "16-3-4")
    (True, False, False)

    Raises:
        RuntimeError: math-verify was needed off the main thread, where its time limit does not work.
    """
    if len(found) > _LONGEST + 4 * len(gold):  # before it is kept in a cache
        return False
    return _same(gold, found, timeout_seconds)


def plain_quantity(text: str) -> Fraction | None:
    """The number that an answer is, without its dress and its unit; None if it is something else.

    >>> [str(plain_quantity(text)) for text in ["$18 ", "x = 3.5 km", "5 million", "12 or 13"]]
    ['18', '7/2', '5000000', 'None']
    """
    if len(text) > _LONGEST:
        return None
    quantity = _quantity(_unnamed(plain_answer(text)))
    return None if quantity is None else parse_number(quantity[0])


def _after_thoughts(text: str) -> str:
    for end in _THOUGHTS_END:  # the first one: a later one would hide the guesses before it
        text = text.partition(end)[2] if end in text else text
    return text


def _gold_text(answer: str | int | float) -> str:
    gold = f"{answer:.12f}".rstrip("0") if isinstance(answer, float) else str(answer).strip()
    if gold in ("", "nan", "inf", "-inf"):
        raise ValueError(f"the column answer holds no answer, but {answer!r}")
    for marker, how in (("####", "hash"), (r"\boxed", "boxed"), ("<answer>", "xml")):
        if marker in gold:
            raise ValueError(f"the column answer holds a whole solution; set data.answer.extract: {how}")
    return gold


def _present(*answers: str | None) -> list[str]:
    return list(dict.fromkeys(answer for answer in answers if answer is not None))


def _is_only(text: str, place: str) -> bool:
    """Whether there is one such place, and in tags at most one box."""
    boxes = (tag(text, "answer") or "").count(_MARKERS["boxed"]) if place == "xml" else 0
    return text.count(_MARKERS[place]) == 1 and boxes < 2


def _content(text: str, place: str) -> str | None:
    if place == "hash":
        return hash_answer(text)
    if place == "boxed":
        return boxed(text)
    inside = tag(text, "answer")
    return inside if inside is None else boxed(inside) or inside


@lru_cache(maxsize=16384)
def _same(gold: str, found: str, timeout_seconds: int) -> bool:
    gold, found = plain_answer(gold), plain_answer(found)
    if gold.casefold() == found.casefold():
        return True
    if not found or not found.isprintable() or len(found) > 64 + 4 * len(gold):
        return False
    gold, bare = _MEMBER.sub("", gold), _MEMBER.sub("", found if "=" in gold else _unnamed(found))
    gold_number, found_number = parse_number(gold), parse_number(bare)
    if gold_number is None or found_number is None:
        compared = _same_quantity(gold, bare)
        if compared is not None:
            return compared
    else:
        gold_percent, found_percent = gold.endswith("%"), bare.endswith("%")
        return gold_number == found_number or (
            gold_percent != found_percent
            and gold_number * (100 if gold_percent else 1) == found_number * (100 if found_percent else 1)
        )
    if _WORDS.fullmatch(gold) or (gold_number is not None and _SUM.search(bare)):
        return False
    if gold_number is not None and not _FORMULA.search(bare):
        return False  # nothing that mathematics could turn into a number: math-verify need not even be imported
    if gold_number is not None and _UNSOLVED.search(bare):
        return False
    if gold.startswith(r"\{") and _ORDERED.fullmatch(bare):
        return False
    if _ORDERED.fullmatch(gold) and not _ORDERED.fullmatch(bare) and not _RELATION.search(bare):
        return False
    if any(suspect.search(bare) and not suspect.search(gold) for suspect in _SUSPECT):
        return False
    return _same_formula(gold, bare, timeout_seconds)


def _same_formula(gold: str, found: str, timeout_seconds: int) -> bool:
    """What math-verify says; also where one of them has a unit behind, that it knows as a product of letters only."""
    if _math_verify(gold, found, timeout_seconds):
        return True
    (bare_gold, gold_unit), (bare_found, found_unit) = _split_unit(gold), _split_unit(found)
    one_has_unit = (gold_unit == "") != (found_unit == "")
    added = found_unit if len(found_unit) > 1 or found_unit in _ONE_LETTER_UNITS else ""
    return one_has_unit and (len(gold_unit) > 1 or added != "") and _math_verify(bare_gold, bare_found, timeout_seconds)


def _split_unit(formula: str) -> tuple[str, str]:
    r"""A formula and the unit that stands behind it after a space: `2\sqrt{3} cm`."""
    match = _UNIT_BEHIND.fullmatch(formula)
    if match is None or _NO_UNIT.search(match["unit"]):
        return formula, ""
    return match["formula"], match["unit"]


def _unnamed(found: str) -> str:
    """12 for x = 12, and 1, 2 for x = 1 or x = 2."""
    values = [_ASSIGNED.fullmatch(each) for each in _ALTERNATIVES.split(found)]
    names = {value["name"] for value in values if value is not None}
    if len(names) != 1 or None in values:
        return found
    return ", ".join(value["value"] for value in values if value is not None)


def _same_quantity(gold: str, found: str) -> bool | None:
    """Numbers with units; None where either is something else."""
    golds, founds = _quantity(gold), _quantity(found)
    if golds is None or founds is None:
        return None
    units = {each[1] for each in (golds, founds) if each[1]}
    return len(units) < 2 and _same(golds[0], founds[0], 0)


@lru_cache(maxsize=16384)
def _quantity(text: str) -> tuple[str, str] | None:
    """A number as text, its factor worked in, and its unit in the singular ("" if it has none)."""
    if parse_number(text) is not None:
        return text, ""
    based = _BASE.fullmatch(text)
    if based is not None:
        return based["digits"], f"base {based['base'] or based['base1']}"
    match = _QUANTITY.fullmatch(_PER.sub(" per ", _DEGREES.sub(" degree", text)))
    value = None if match is None else parse_number(match["number"])
    if match is None or value is None:
        return None
    words = match["unit"].casefold().split()
    if words[0] in ("percent", "pct"):
        return _quantity(f"{match['number']}% {' '.join(words[1:])}".strip())
    if words[0].rstrip("s") in _FACTORS:
        factor = _FACTORS[words[0].rstrip("s")]
        return _quantity(f"{value * factor} {' '.join(words[1:])}".strip())
    if not match["gap"] and _GLUED.fullmatch(match["unit"].split()[0]) is None:
        return None
    if len(words[0]) == 1 and (match["unit"][0] not in _ONE_LETTER_UNITS or words[1:2] not in ([], ["per"])):
        return None  # 3 m is a length, but 3 x and 3 m n are products
    if len(words) > _LONGEST_UNIT or _NO_UNIT.search(" ".join(words)):
        return None
    return match["number"], _unit(words, match["power"])


def _unit(words: list[str], power: str) -> str:
    """In the singular, and `square inches` as inches^2 is written."""
    exponent = "".join(_POWERS.get(char, "") for char in power)
    if words[0] in _POWERS and len(words) > 1:
        exponent, words = _POWERS[words[0]], words[1:]
    return " ".join(re.sub(r"(?<=..)(?:(?<=ch)es|(?<=sh)es|s)$", "", word) for word in words) + exponent


def _math_verify(gold: str, found: str, timeout_seconds: int) -> bool:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("accuracy runs on the main thread only: math-verify keeps its time limit by signal.alarm")
    from math_verify import verify  # half a second to import, and plain numbers do not need it

    expected = _parse(gold, timeout_seconds)
    answer = _parse(found, timeout_seconds) if expected else []
    return bool(expected) and bool(
        verify(expected, answer, timeout_seconds=timeout_seconds, allow_set_relation_comp=True)
    )


@lru_cache(maxsize=8192)  # a gold answer comes back every epoch, a found one among the siblings
def _parse(text: str, timeout_seconds: int) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # its own way with units takes the h off x + 3h and the ab off 2ab
    config = LatexExtractionConfig()
    config = replace(config, normalization_config=replace(config.normalization_config, units=False))
    expressions: list[Any] = parse(f"${text}$", extraction_config=[config], parsing_timeout=timeout_seconds)
    return expressions
