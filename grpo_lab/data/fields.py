"""What a row says in the places that the recipe names: prompt, completion, messages, text, answer.

Errors here do not say which row it is; `examples.py` puts that in front.
"""

from collections.abc import Collection, Mapping
from string import Formatter
from typing import Any

from grpo_lab.data.chat import check_messages
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.problems import did_you_mean
from grpo_lab.recipe.schema import Answer, Data
from grpo_lab.text import extract
from grpo_lab.types import Message

Row = Mapping[str, Any]


def check_columns(data: Data, columns: Collection[str], key_columns: Collection[str] = ()) -> None:
    """Raises one RecipeError with a line for every column that the recipe names and the data does not have.

    `key_columns` are named elsewhere, under `key_tokens.column`.
    """
    wanted = [(f"data.{key}", column) for key, column in (("messages", data.messages), ("text", data.text)) if column]
    for key, spec in (("data.prompt", data.prompt), ("data.completion", data.completion)):
        if spec is not None:
            wanted += [(key, column) for _, column in _parts(spec, key, columns) if column is not None]
    if data.answer is not None:
        wanted.append(("data.answer.column", data.answer.column))
    wanted += [("key_tokens.column", column) for column in key_columns]
    problems = [_missing(key, column, columns) for key, column in wanted if column not in columns]
    if problems:
        raise RecipeError(problems)


def text_field(row: Row, spec: str, key: str) -> str:
    """The text that `spec` means in this row: a column, or a template whose {column} places are filled.

    A column must hold text; in a template numbers will do. Literal braces of a template are written twice.

    >>> text_field({"a": 7, "b": "x"}, "{a} {{and}} {b}", "data.prompt")
    '7 {and} x'
    """
    parts = _parts(spec, key, row.keys())
    kinds, wanted = (str, "text") if parts == [("", spec)] else (str | int | float, "text or a number")
    text = ""
    for literal, column in parts:
        text += literal
        if column is not None:
            value = _value(row, column, key)
            if not isinstance(value, kinds):
                raise RecipeError(f'{key}: "{column}" should be {wanted}, found {_shown(value)}')
            text += str(value)
    if not text.strip():
        raise RecipeError(f"{key}: the text is empty")
    return text


def messages_field(row: Row, data: Data) -> tuple[Message, ...]:
    """The row's messages, checked, after the recipe's system prompt."""
    assert data.messages is not None
    messages = check_messages(_value(row, data.messages, "data.messages"))
    if data.system_prompt is not None and messages[0]["role"] == "system":
        raise RecipeError("data.system_prompt: the messages have a system message of their own; leave one of them out")
    return with_system(messages, data)


def with_system(messages: tuple[Message, ...], data: Data) -> tuple[Message, ...]:
    """`messages` after the recipe's system prompt, if there is one."""
    if data.system_prompt is None:
        return messages
    return ({"role": "system", "content": data.system_prompt}, *messages)


def answer_field(row: Row, answer: Answer) -> Any:
    """The gold answer, cut out of its column as the recipe says. Numbers become text.

    >>> answer_field({"solution": "6 * 7 = 42\\n#### 42"}, Answer(column="solution", extract="hash"))
    '42'
    """
    value = _value(row, answer.column, "data.answer")
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str):
        if answer.extract == "none":
            return value
        raise RecipeError(f'data.answer: "{answer.column}" should be text, found {_shown(value)}')
    found = extract(value, answer.extract, answer.pattern)
    if found is None or not found.strip():
        raise RecipeError(f'data.answer: extract: {answer.extract} finds nothing in "{answer.column}": {_shown(value)}')
    return found


def _parts(spec: str, key: str, columns: Collection[str]) -> list[tuple[str, str | None]]:
    """`spec` as (literal text, column after it); a plain column name is one column without text."""
    if spec in columns or not set("{}") & set(spec):
        return [("", spec)]
    try:
        parsed = list(Formatter().parse(spec))
    except ValueError as error:
        raise RecipeError(f'{key}: "{spec}" is no template: {error}; write a literal brace twice') from None
    if any(column == "" or form or conversion for _, column, form, conversion in parsed):
        raise RecipeError(f'{key}: "{spec}": a place holds a column name and nothing else; write a literal brace twice')
    if all(column is None for _, column, _, _ in parsed):
        raise RecipeError(f'{key}: "{spec}" names no column, so all rows would be the same; write {{column}}')
    return [(literal, column) for literal, column, _, _ in parsed]


def _missing(key: str, column: str, columns: Collection[str]) -> str:
    hint = did_you_mean(column, columns)
    has = f" it has: {', '.join(columns)}" if hint.endswith("?") else ""
    return f'{key}: column "{column}" is not in the data{hint}{has}'


def _value(row: Row, column: str, key: str) -> Any:
    value = row.get(column)
    if value is None:
        raise RecipeError(f'{key}: there is no "{column}"')
    return value


def _shown(value: Any) -> str:
    """A value for a message; of a long one its end, because answers stand there."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"...{shown[-77:]}"
