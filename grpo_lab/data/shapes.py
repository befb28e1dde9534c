"""What rows are, where that is more than columns: texts cut in two, classes, tagged words, questions, several golds."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, assert_never

from grpo_lab.data.questions import question_rows
from grpo_lab.data.tagged import entity_types, tagged
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Classes, Cut, Gathered, Questions, Tagged

Row = dict[str, Any]
Shape = Cut | Classes | Tagged | Questions | Gathered


def shaped(rows: Iterable[Row], shape: Shape, *, row_name: Callable[[int], str]) -> Iterator[Row]:
    """The rows with the columns that the shape adds; one row may become none or several, several may become one.

    Raises:
        RecipeError: a row is not of that shape; `row_name(index)` stands in front of the problem.
    """
    shared: dict[Any, Row] = {}
    for index, row in enumerate(rows):
        missing = [column for column in needed(shape) if column not in row]
        try:
            if missing:
                raise RecipeError(f'data.shape: column "{missing[0]}" is not in the data; it has: {", ".join(row)}')
            match shape:
                case Cut():
                    yield from cut(row, shape)
                case Classes():
                    yield {**row, shape.column: class_name(row[shape.column], shape)}
                case Tagged():
                    yield tagged(row, shape)
                case Questions():
                    yield from question_rows(row, shape)
                case Gathered():
                    first = shared.setdefault(row[shape.by], {**row, shape.column: []})
                    first[shape.column].append(row[shape.column])
                case _:
                    assert_never(shape)
        except RecipeError as error:
            raise RecipeError(f"{row_name(index)}: {error}") from error
    yield from shared.values()


def needed(shape: Shape) -> list[str]:
    """The columns that a shape reads."""
    match shape:
        case Cut() | Classes():
            return [shape.column]
        case Tagged():
            return [shape.tokens, shape.tags]
        case Questions():
            return ["id", "context", "question", "answers"]
        case Gathered():
            return [shape.by, shape.column]
        case _:
            assert_never(shape)


def cut(row: Row, shape: Cut) -> Iterator[Row]:
    """The row with one more column for every named group of the pattern; nothing if it does not match and may not.

    >>> shape = Cut(kind="cut", column="text", pattern=r"(?P<story>.*[.]) (?P<asked>[^.]*[?])")
    >>> next(cut({"text": "Ann has 3 pens. How many has she?"}, shape))["asked"]
    'How many has she?'
    """
    try:
        match = re.fullmatch(shape.pattern, row[shape.column], re.DOTALL)
    except re.error as error:
        raise RecipeError(f"data.shape.pattern: no regular expression: {error}") from None
    if match is not None:
        if not match.groupdict():
            raise RecipeError("data.shape.pattern: it has no named group, (?P<name>...), so there is nothing to cut")
        yield {**row, **match.groupdict("")}
    elif not shape.drop:
        raise RecipeError(f"data.shape.pattern: does not match {row[shape.column]!r:.80}; or set drop: true")


def class_name(value: Any, shape: Classes) -> str:
    """What the recipe calls a class.

    >>> class_name(1, Classes(kind="classes", column="label", names={"0": "negative", "1": "positive"}))
    'positive'
    """
    if not shape.names and isinstance(value, str):
        return value
    if str(value) not in shape.names:
        known = ", ".join(f"{key}: {name}" for key, name in shape.names.items()) or "none"
        raise RecipeError(
            f'data.shape.names: "{shape.column}" is {value!r}, which has no name here; there are: {known}'
        )
    return shape.names[str(value)]


def label_map(rows: Iterable[Row], shape: Shape | None) -> dict[str, int] | None:
    """The classes or entity types in the rows, sorted, each with its number; None for rows without labels.

    Sorted, because the order of a set differs from process to process: numbers must not.
    """
    match shape:
        case Classes():
            names = {row[shape.column] for row in rows}
        case Tagged():
            names = entity_types(rows, shape)
        case _:
            return None
    return {name: number for number, name in enumerate(sorted(names))}
