"""How an answer is dressed up as the completion that a recipe wants: in the form of its demonstrations, or in tags, after
####, in a box; and how much is written before it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_lab.data.fields import text_field
from grpo_lab.errors import RecipeError
from grpo_lab.scoring import RewardSet
from grpo_lab.text import boxed, tag
from grpo_lab.types import Completion, Example, Group

OWN_COLUMNS = ("completion", "solution", "response")  # where data sets keep whole solutions
EPSILON = 1e-5  # totals are float32
_COARSE, _FINE = 48, 8
_WORDS = "Let us think about it step by step, write every step down and look at each of them once more. "

Encode = Callable[[str], Completion]


@dataclass(frozen=True)
class Row:
    """An example with its gold answer and, in its own words, a whole solution that ends in it (None: the data has none)."""

    example: Example
    gold: str | None
    demonstration: str | None


class Dressing(NamedTuple):
    """A way to write an answer to a row; `reasoning` stands before it where the form has room for that."""

    name: str
    write: Callable[[Row, str, str], str]
    has_room: bool = True


def gold_of(columns: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The gold answer as text: the first of these columns that has one; of several golds the first."""
    for name in names:
        value = columns.get(name)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, str | int | float) and str(value).strip():
            return str(value).strip()
    return None


def demonstration(row: Mapping[str, Any], specs: Sequence[str], gold: str | None, tags: Sequence[str]) -> str | None:
    """What a supervised stage would learn from this row (`specs` are such stages' data.completion), else the row's own
    solution; with the gold answer in its place, as demonstrations may be wrong. None where there is no such place."""
    for spec in [*specs, *OWN_COLUMNS]:
        try:
            text = text_field(row, spec, "completion")
        except RecipeError:  # these columns belong to other data
            continue
        found = None if gold is None else with_answer(text, gold, tags)
        if found is not None:
            return found
    return None


def with_answer(text: str, answer: str, tags: Sequence[str]) -> str | None:
    r"""The text with another answer in the place where it has one; None where none can be seen.

    >>> with_answer("<think>1+1=3</think><answer>3</answer>", "2", ["think", "answer"])
    '<think>1+1=3</think><answer>2</answer>'
    >>> with_answer("so \\boxed{3}.", "2", []), with_answer("1+1=3\n#### 3", "2", []), with_answer("3", "2", [])
    ('so \\boxed{2}.', '1+1=3\n#### 2', None)
    """
    for name in dict.fromkeys([*tags[-1:], "answer"]):
        if tag(text, name) is not None:
            head, _, rest = text.rpartition(f"<{name}>")
            return f"{head}<{name}>{answer}</{name}>{rest.partition(f'</{name}>')[2]}"
    content = boxed(text)
    if content is not None:
        head, _, tail = text.rpartition(r"\boxed")
        return f"{head}\\boxed{{{answer}}}{tail.partition(content + '}')[2]}"
    if "####" in text:
        head, _, rest = text.rpartition("####")
        return f"{head}#### {answer}{rest[len(rest.partition(chr(10))[0]) :]}"
    return None


def dressings(rewards: RewardSet, rows: Sequence[Row], tags: Sequence[str], *, prefilled: bool) -> list[Dressing]:
    """The forms to try, the likeliest first."""

    def own(row: Row, answer: str, reasoning: str) -> str:
        return with_answer(row.demonstration or "", answer, tags) or answer

    def in_tags(row: Row, answer: str, reasoning: str) -> str:
        *before, last = tags
        text = "".join(f"<{name}>{reasoning}</{name}>\n" for name in before) + f"<{last}>{answer}</{last}>"
        return text.removeprefix(f"<{tags[0]}>") if prefilled else text

    found = (
        [Dressing("the data's own solutions, with the gold in its place", own, has_room=False)]
        if all(row.demonstration for row in rows)
        else []
    )
    return [
        *found,
        Dressing(f"tags {', '.join(tags)}", in_tags),
        Dressing(
            f"tags {', '.join(tags)}, boxed inside",
            lambda row, a, reasoning: in_tags(row, rf"\boxed{{{a}}}", reasoning),
        ),
        Dressing("after ####", lambda row, answer, reasoning: f"{reasoning}\n#### {answer}"),
        Dressing("boxed", lambda row, answer, reasoning: f"{reasoning}\n\\boxed{{{answer}}}"),
        Dressing("the bare answer", lambda row, answer, reasoning: answer, has_room=False),
    ]


def form_options(rewards: RewardSet) -> tuple[list[str], bool]:
    """The tags that the recipe's `format` asks for, and whether the prompt already has the first of them."""
    for term in rewards.terms:
        if term.reward.name == "format":
            options = {name: option.default for name, option in term.reward.options.items()} | dict(term.options or {})
            if options["style"] == "tags":
                return list(options["tags"]), bool(options["prefilled"])
    return ["think", "answer"], False


class Dressed(NamedTuple):
    """The chosen form, how much reasoning each row's gold got, and how it is called."""

    dressing: Dressing
    reasoning: list[str]
    name: str


def choose(
    rewards: RewardSet, rows: Sequence[Row], forms: Sequence[Dressing], encode: Encode, *, maximum: float, longest: int
) -> Dressed:
    """The form in which the golds score best. Where none reaches the maximum, as a reward may want a certain length, the
    reasoning before each gold gets the length (in characters, at most `longest` tokens in all) that scores best."""
    plain = _WORDS.strip()
    means = [_mean(rewards, [(row, form.write(row, row.gold or "", plain)) for row in rows], encode) for form in forms]
    best = forms[means.index(max(means))]
    if max(means) >= maximum - EPSILON:
        return Dressed(best, [plain] * len(rows), best.name)
    roomy = [form for form in forms if form.has_room]
    first = [_best_length(rewards, rows[0], form, encode, longest, around=None) for form in roomy]
    (total, length), form = max(zip(first, roomy, strict=True), key=lambda each: each[0][0])
    if total <= max(means) + EPSILON:
        return Dressed(best, [plain] * len(rows), best.name)
    lengths = [_best_length(rewards, row, form, encode, longest, around=length)[1] for row in rows]
    return Dressed(
        form, [filler(each) for each in lengths], f"{form.name}, with reasoning of the length that scores best"
    )


def filler(length: int) -> str:
    """So many characters of words without a number in them."""
    return (_WORDS * (length // len(_WORDS) + 1))[:length]


def _best_length(
    rewards: RewardSet, row: Row, form: Dressing, encode: Encode, longest: int, *, around: int | None
) -> tuple[float, int]:
    """The best total and its length: a coarse look at all lengths, then ever finer ones around the best."""
    widest = 6 * longest
    step = max(1, widest // _COARSE) if around is None else 16
    lengths = list(range(0, widest, step)) if around is None else _near(around, step)
    best = (-float("inf"), around or 0)
    while True:
        best = max(best, _best_of(rewards, row, form, encode, longest, lengths))
        if step == 1:
            return best
        step = max(1, step // 4)
        lengths = _near(best[1], step)


def _near(length: int, step: int) -> list[int]:
    return [each for each in range(length - _FINE * step, length + _FINE * step + 1, step) if each >= 0]


def _best_of(
    rewards: RewardSet, row: Row, form: Dressing, encode: Encode, longest: int, lengths: Sequence[int]
) -> tuple[float, int]:
    made = [(length, encode(form.write(row, row.gold or "", filler(length)))) for length in lengths]
    made = [(length, completion) for length, completion in made if len(completion.token_ids) <= longest]
    if not made:
        return -float("inf"), 0
    totals = rewards.score([Group(row.example, (completion,)) for _, completion in made]).total.flatten().tolist()
    return max(
        (total if total == total else -float("inf"), length) for total, (length, _) in zip(totals, made, strict=True)
    )


def _mean(rewards: RewardSet, texts: Sequence[tuple[Row, str]], encode: Encode) -> float:
    total = rewards.score([Group(row.example, (encode(text),)) for row, text in texts]).total
    return float(total.nanmean()) if not total.isnan().all() else -float("inf")


def hollow(text: str) -> str:
    r"""Only the marks of a form: its tags, boxes and ####.

    >>> hollow("<think>1+1=2</think>\n<answer>2</answer>"), hollow("so \\boxed{2}"), hollow("1+1\n#### 2"), hollow("2")
    ('<think></think>\n<answer></answer>', '\\boxed{}', '####', '')
    """
    tags = "\n".join(f"<{name}></{name}>" for name in re.findall(r"<(\w+)>.*?</\1>", text, re.DOTALL))
    return tags or (r"\boxed{}" if r"\boxed" in text else "####" if "####" in text else "")
