"""Measures how far the answer rewards can be trusted on real data: right answers refused, wrong ones paid, answers per
second.

    .venv/bin/python scripts/reward_rates.py            # all rows, one to two minutes
    .venv/bin/python scripts/reward_rates.py --show     # also every refused and every wrongly paid answer

The data (gsm8k, svamp, math500, aqua) are looked for in GRPO_LAB_DATA, by default `shared/data` beside the project.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from grpo_lab.answers import same_answer
from grpo_lab.scoring import discover
from grpo_lab.text import hash_answer, parse_number
from grpo_lab.types import Completion

DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SETS = ("gsm8k", "svamp", "math500", "aqua")


class Row(NamedTuple):
    """A gold answer, the data's own solution, and (aqua) the text of the right choice and all letters."""

    gold: str | float
    solution: str = ""
    choice: str = ""


def rows(name: str) -> list[Row]:
    """The answers of one data set's test part (svamp: all, aqua: test and dev)."""
    if name == "gsm8k":
        return [Row(hash_answer(each["answer"]) or "", each["answer"]) for each in _lines("gsm8k/test.jsonl")]
    if name == "svamp":
        return [Row(each["Answer"]) for each in json.loads((DATA / "svamp" / "SVAMP.json").read_text())]
    if name == "math500":
        return [Row(each["answer"], each["solution"]) for each in _lines("math500/test.jsonl")]
    return [
        Row(each["correct"], "", each["options"]["ABCDE".index(each["correct"])].partition(")")[2])
        for part in ("test", "dev")
        for each in _lines(f"aqua/{part}.jsonl")
    ]


def _lines(file: str) -> Iterator[dict]:
    return (json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines())


def score(name: str, text: str, gold: str | float, *, strict: bool = True) -> float:
    """What the reward for that data set says: choice for aqua, accuracy for the others."""
    reward = discover_once("choice" if name == "aqua" else "accuracy")
    return reward(Completion(text, (1,), True), answer=gold, strict=strict)


def discover_once(name: str, known: dict[str, Callable[..., float]] = {}) -> Callable[..., float]:  # noqa: B006 - the memory
    if name not in known:
        known[name] = discover().get(name).function
    return known[name]


def is_number(row: Row) -> bool:
    return parse_number(_text(row.gold)) is not None


def _text(gold: str | float) -> str:
    return f"{gold:.6f}".rstrip("0").rstrip(".") if isinstance(gold, float) else gold


def _grouped(row: Row) -> str | None:
    value = parse_number(_text(row.gold))
    return f"{int(value):,}" if value is not None and value.denominator == 1 and abs(value) >= 1000 else None


def _latex(row: Row, command: str) -> str | None:
    return _text(row.gold).replace(r"\frac", command) if r"\frac" in _text(row.gold) else None


# How a model may dress a right answer up. Every function gives the content of the place, None where it does not apply.
CONTENTS: dict[str, Callable[[Row], str | None]] = {
    "as it is": lambda row: _text(row.gold),
    "with a full stop": lambda row: f"{_text(row.gold)}.",
    "between dollars": lambda row: f"${_text(row.gold)}$",
    "after $ (money)": lambda row: f"${_text(row.gold)}" if is_number(row) and "$" not in _text(row.gold) else None,
    "thousands separators": _grouped,
    "a unit behind": lambda row: f"{_text(row.gold)} apples" if re.fullmatch(r"[-0-9.,]+", _text(row.gold)) else None,
    "x = before": lambda row: f"x = {_text(row.gold)}" if is_number(row) else None,
    "**bold**": lambda row: f"**{_text(row.gold)}**",
    "18.00 for 18": lambda row: f"{_text(row.gold)}.00" if re.fullmatch(r"-?[0-9]+", _text(row.gold)) else None,
    r"\dfrac for \frac": lambda row: _latex(row, r"\dfrac"),
}
CHOICES: dict[str, Callable[[Row], str | None]] = {
    "as it is": lambda row: str(row.gold),
    "with a full stop": lambda row: f"{row.gold}.",
    "**bold**": lambda row: f"**{row.gold}**",
    "(B)": lambda row: f"({row.gold})",
    r"\text{(B)}": lambda row: rf"\text{{({row.gold})}}",
    "small letter": lambda row: str(row.gold).lower(),
    "B) and the choice's text": lambda row: f"{row.gold}) {row.choice}",
    "Option B": lambda row: f"Option {row.gold}",
}
PLACES: dict[str, Callable[[str], str]] = {
    "tags": lambda content: f"<think>\nhm, 7?\n</think>\n<answer>{content}</answer>",
    "boxed": lambda content: rf"so it is \boxed{{{content}}}.",
    "####": lambda content: f"3 + 4 = 7\n#### {content}",
}


def refused(name: str, *, every: int = 1) -> Iterator[tuple[str, str, int, list[str]]]:
    """(dressing, place, tried, refused answers): right answers that do not get the maximum."""
    data = rows(name)[::every]
    for dressing, content in (CHOICES if name == "aqua" else CONTENTS).items():
        for place, around in PLACES.items():
            shown = [(row, text) for row in data if (text := content(row)) is not None]
            if shown:
                wrong = [text for row, text in shown if score(name, around(text), row.gold) != 1.0]
                yield dressing, place, len(shown), wrong
    for strict in (True, False):
        shown = [(row, row.solution) for row in data if row.solution]
        if shown:
            wrong = [_text(row.gold) for row, text in shown if score(name, text, row.gold, strict=strict) != 1.0]
            yield "the data's own solution", "strict" if strict else "lenient", len(shown), wrong
    said = [row for row in data if name == "aqua" or is_number(row)]
    wrong = [
        _text(row.gold)
        for row in said
        if score(name, f"So the answer is {_text(row.gold)}.", row.gold, strict=False) != 1.0
    ]
    yield "a sentence without a place", "lenient", len(said), wrong


def paid(name: str, *, shifts: int = 10, every: int = 1) -> Iterator[tuple[str, int, list[str]]]:
    """(kind of wrong answer, tried, paid ones): other rows' gold answers, and the gold changed in one place."""
    data = [_text(row.gold) for row in rows(name)]
    some = range(0, len(data), every)
    pairs = [(data[index], data[(index + shift) % len(data)]) for index in some for shift in range(1, shifts + 1)]
    pairs = [(gold, other) for gold, other in pairs if _differ(gold, other)]
    yield "another row's answer", len(pairs), _paid(name, pairs)
    if name != "aqua":
        changed = [(gold, other) for gold in data[::every] for other in near_misses(gold)]
        yield "changed in one place", len(changed), _paid(name, changed)
        guesses = [(gold, f"{other}, {gold}") for gold, other in pairs[::shifts] if "," not in gold]
        yield "two guesses in one place", len(guesses), _paid(name, guesses)


def _paid(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{other} for {gold}" for gold, other in pairs if score(name, rf"\boxed{{{other}}}", gold) != 0.0]


def _differ(gold: str, other: str) -> bool:
    """By number where both are numbers, else by text without spaces and the kind of fraction."""
    left, right = parse_number(gold), parse_number(other)
    if left is not None and right is not None:
        return left != right
    left_text, right_text = (re.sub(r"\s|^x=|\^\\circ|(?<=\\)[dt](?=frac)", "", each) for each in (gold, other))
    return left_text != right_text


def near_misses(gold: str) -> Iterator[str]:
    """The answer with a digit raised by one, without its sign or with one, and with a bracket of the other kind."""
    for match in re.finditer(r"[0-9]", gold):
        changed = gold[: match.start()] + str((int(match.group()) + 1) % 10) + gold[match.end() :]
        if _differ(gold, changed):
            yield changed
    value = parse_number(gold)
    if value is not None and value != 0:
        yield gold.replace("-", "") if "-" in gold else f"-{gold}"
        if value not in (Fraction(1), Fraction(-1)):
            yield f"1/{gold}" if value.denominator == 1 and "," not in gold and value > 0 else f"1{gold.lstrip('-')}"
    if re.fullmatch(r"\\?(?:left)?[(\[].*,.*[)\]]", gold) and "infty" not in gold and "cup" not in gold:
        yield gold.translate(str.maketrans("([", "[("))


def speed(pairs: list[tuple[str, str]]) -> float:
    """Comparisons per second of CPU time, of pairs that were not seen before."""
    start = time.process_time()
    for gold, found in pairs:
        same_answer(gold, found)
    return len(pairs) / (time.process_time() - start)


def repeated(n: int) -> float:
    """The mean share of repeated n-grams of words in GSM8K's own solutions."""
    reward = discover_once("repetition")
    shares = [-reward(Completion(row.solution, (1,), True), n=n, unit="words") for row in rows("gsm8k")]
    return sum(shares) / len(shares)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--show", action="store_true", help="print every refused and every wrongly paid answer")
    show = arguments.parse_args().show
    for name in SETS:
        for dressing, place, tried, wrong in refused(name):
            _print(f"{name:8} right  {dressing:28} {place:8}", tried, wrong, show)
        for kind, tried, wrong in paid(name):
            _print(f"{name:8} wrong  {kind:28} {'boxed':8}", tried, wrong, show)
    numbers = [(str(number), f"{number:,}.0") for number in range(20_000, 40_000)]
    golds = [_text(row.gold) for row in rows("math500") if not is_number(row)]
    right = [(gold, f"{gold} + 0") for gold in golds if re.search(r"\\(?:sqrt|pi)|[a-z]\^", gold)]
    speed(right[:50])  # the first parses build math-verify's tables
    right = [(gold, f"0 + {found}") for gold, found in right]
    wrong = [(gold, golds[(index + 50) % len(golds)]) for index, gold in enumerate(golds)]
    print(  # noqa: T201 - a script's output
        f"comparisons per CPU second, none seen before: plain numbers {speed(numbers):.0f}; "
        f"LaTeX of MATH-500, right {speed(right):.0f}, wrong {speed(wrong):.0f}"
    )
    print(f"repeated 4-grams of words in GSM8K's solutions: {repeated(4):.3f}")  # noqa: T201 - a script's output


def _print(about: str, tried: int, wrong: list[str], show: bool) -> None:
    print(f"{about} {len(wrong):5} of {tried:5}  {len(wrong) / max(tried, 1):7.2%}")  # noqa: T201 - a script's output
    for each in wrong if show else []:
        print(f"           {each!r}")  # noqa: T201 - a script's output


if __name__ == "__main__":
    main()
