"""Extractive question answering: SQuAD's questions with their answers where they stand, and long contexts in windows."""

import re
from collections.abc import Iterator
from typing import Any

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Questions

Row = dict[str, Any]
UNANSWERABLE = "unanswerable"
_WORD = re.compile(r"\S+")


def squad_rows(document: Any, place: str) -> Iterator[Row]:
    """Rows {id, title, context, question, answers} of SQuAD 1.1 or 2.0 json, as the hub's sets have them.

    `answers` is `{text: [...], answer_start: [...]}` with every gold, empty for a question that its context does not
    answer: those stay. `plausible_answers` are wrong answers, and left out.

    Raises:
        RecipeError: the json is not SQuAD's, or a question counts as answerable and has no answer.
    """
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    golds = asked["answers"]
                    if not golds and asked.get("is_impossible") is not True:
                        raise RecipeError(f"{place}: question {asked['id']} has no answer, nor is it is_impossible")
                    yield {
                        "id": asked["id"],
                        "title": article["title"],
                        "context": paragraph["context"],
                        "question": asked["question"].strip(),
                        "answers": {key: [gold[key] for gold in golds] for key in ("text", "answer_start")},
                    }
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{place}: not SQuAD's json: {type(error).__name__}: {error}") from None


def question_rows(row: Row, shape: Questions) -> Iterator[Row]:
    """The question with each window of its context; `golds` and `answer` are what that window answers.

    Rows of one question share their `question_id`; together their golds are the question's.

    >>> row = {"id": "q", "context": "Ann met Bob . Bob left", "answers": {"text": ["left"], "answer_start": [19]}}
    >>> shape = Questions(kind="questions", window=4, stride=2)
    >>> [(each["context"], each["golds"]) for each in question_rows(row, shape)]  # "left" stands at 18
    [('Ann met Bob .', []), ('Bob . Bob left', ['left'])]
    """
    context, golds = row["context"], row["answers"]
    spans = [
        located(context, text, start, repair=shape.repair, question=row["id"])
        for text, start in zip(golds["text"], golds["answer_start"], strict=True)
    ]
    windows = [(0, len(context))]
    if shape.window is not None:
        windows = word_windows(context, shape.window, shape.stride or (shape.window + 1) // 2)
    kept: set[tuple[int, int]] = set()
    for first, last in windows:
        inside = [span for span in spans if first <= span[0] and span[1] <= last]
        kept.update(inside)
        found = list(dict.fromkeys(context[start:stop] for start, stop in inside))
        yield {
            **row,
            "question_id": row["id"],
            "context": context[first:last],
            "golds": found,
            "answer": found[0] if found else UNANSWERABLE,
        }
    lost = [context[start:stop] for start, stop in spans if (start, stop) not in kept]
    if lost:
        raise RecipeError(
            f'data.shape: question {row["id"]}: no window holds all of the answer "{lost[0]:.60}"; '
            "raise window, or lower stride"
        )


def located(context: str, text: str, start: int, *, repair: int, question: str) -> tuple[int, int]:
    """Where the answer stands in the context, at most `repair` characters from where it says.

    >>> located("Ann met Bob", "Bob", 9, repair=2, question="q")
    (8, 11)
    """
    for shift in sorted(range(-repair, repair + 1), key=abs):
        first = start + shift
        if first >= 0 and text and context[first : first + len(text)] == text:
            return first, first + len(text)
    raise RecipeError(
        f'data.shape: question {question}: the answer "{text:.60}" stands neither at {start} nor within {repair} '
        "characters of it; correct the data, or raise repair"
    )


def word_windows(text: str, size: int, stride: int) -> list[tuple[int, int]]:
    """Windows of at most `size` words, one every `stride` words, as character ranges; the last one ends with the text.

    >>> [("a bb c dd e"[first:last]) for first, last in word_windows("a bb c dd e", size=3, stride=2)]
    ['a bb c', 'c dd e']
    """
    words = [match.span() for match in _WORD.finditer(text)]
    starts = [0]
    while starts[-1] + size < len(words):
        starts.append(starts[-1] + stride)
    return [(words[first][0], words[min(first + size, len(words)) - 1][1]) for first in starts]
