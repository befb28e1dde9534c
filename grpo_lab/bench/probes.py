"""Answers that a good reward tells apart: golds, wrong ones in the right form, and junk that must not pay."""

from collections.abc import Sequence
from fractions import Fraction

from grpo_lab.bench.dressing import Dressed, Row, hollow
from grpo_lab.text import parse_number

GOLD, WRONG, ONE_PLACE, OWN = "gold", "wrong, well-formed", "guesses in one place", "own solution, gold in place"
NUM_GUESSES = 3


def probe_texts(rows: Sequence[Row], dressed: Dressed) -> dict[str, list[str]]:
    """Every probe with its text for each row. Those that need golds are left out where the data has none."""
    golds = [row.gold for row in rows]
    probes: dict[str, list[str]] = {
        "empty": ["" for _ in rows],
        "prompt echoed": [question(row) for row in rows],
        "numbers 0 to 9": [" ".join(map(str, range(10))) for _ in rows],
    }
    known = [gold for gold in golds if gold is not None]
    if len(known) < len(rows):
        return probes
    wrongs = [wrong_answers(gold, known) for gold in known]

    def dress(index: int, answer: str) -> str:
        return dressed.dressing.write(rows[index], answer, dressed.reasoning[index])

    def several(index: int, answers: Sequence[str]) -> str:
        return "\n".join(dress(index, answer) for answer in answers)

    probes = {
        GOLD: [dress(index, gold) for index, gold in enumerate(known)],
        WRONG: [dress(index, wrong[0]) for index, wrong in enumerate(wrongs)],
        **probes,
        "gold repeated": [several(index, [gold] * 5) for index, gold in enumerate(known)],
        "marks, no content": [hollow(dress(index, gold)) for index, gold in enumerate(known)],
        "boxed spam": ["".join(rf"\boxed{{{each}}} " for each in [*range(10), gold]) for gold in known],
        "guesses, gold between": [
            several(i, [*w[:-1], g, w[-1]]) for i, (w, g) in enumerate(zip(wrongs, known, strict=True))
        ],
        "guesses, gold last": [several(i, [*w, g]) for i, (w, g) in enumerate(zip(wrongs, known, strict=True))],
        ONE_PLACE: [
            dress(i, ", ".join([*w[:-1], g, w[-1]])) for i, (w, g) in enumerate(zip(wrongs, known, strict=True))
        ],
    }
    own = [row.demonstration for row in rows]
    if all(own):
        probes[OWN] = [text or "" for text in own]
    return probes


def question(row: Row) -> str:
    """What the user asked: the last message of a chat, or the prompt."""
    messages = row.example.messages
    return str(messages[-1]["content"]) if messages else row.example.prompt


def wrong_answers(gold: str, golds: Sequence[str]) -> list[str]:
    """Answers of the same kind that are not the gold: other numbers (far off, for rewards with a tolerance), or other rows'.

    >>> wrong_answers("-0.5", []), wrong_answers("B", ["A", "B", "C", "B"])
    (['0.5', '1.5', '2.5'], ['A', 'C', 'not B'])
    """
    value = parse_number(gold)
    if value is not None:
        return [_written(value + (index + 1) * max(Fraction(1), abs(value))) for index in range(NUM_GUESSES)]
    others = [each for each in dict.fromkeys(golds) if each.casefold() != gold.casefold()]
    return [*others[:NUM_GUESSES], *(f"{'not ' * (index + 1)}{gold}" for index in range(NUM_GUESSES))][:NUM_GUESSES]


def _written(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"


def is_junk(name: str, *, judged: bool) -> bool:
    """Whether a probe must never pay as a gold does. Without a reward that reads the data, a well-formed guess is no junk."""
    return name not in (GOLD, WRONG, OWN, *(() if judged else (ONE_PLACE,)))
