"""Key tokens: those of a learnt text that weigh more (or less) than the others."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import KeyTokens

Span = tuple[int, int]
"""Characters from the first to before the second."""


def key_weights(
    tokenizer: PreTrainedTokenizerBase, text: str, row: Mapping[str, Any], settings: KeyTokens
) -> list[float]:
    """How much each token of `text` weighs: `settings.weight` if at least one of its characters is key, otherwise 1."""
    spans = list(key_spans(text, row, settings))
    offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    return [settings.weight if any(a < stop and start < b for a, b in spans) else 1.0 for start, stop in offsets]


def key_spans(text: str, row: Mapping[str, Any], settings: KeyTokens) -> Iterator[Span]:
    """Where the key parts of a text are.

    >>> list(key_spans("so 4+3=7. <answer>7</answer>", {}, KeyTokens(weight=2, tag="answer")))
    [(18, 19)]
    >>> list(key_spans("7 and 17", {"gold": "7"}, KeyTokens(weight=2, column="gold")))
    [(0, 1), (7, 8)]
    """
    if settings.column is not None:
        for part in _texts(row, settings.column):
            yield from (match.span() for match in re.finditer(re.escape(part), text))
        return
    pattern = (
        settings.pattern if settings.tag is None else f"<{re.escape(settings.tag)}>(.*?)</{re.escape(settings.tag)}>"
    )
    assert pattern is not None
    expression = re.compile(pattern, re.DOTALL)
    for match in expression.finditer(text):
        yield match.span(1 if expression.groups else 0)


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    value = row.get(column)
    parts = value if isinstance(value, list) else [value]
    if value is None or not all(isinstance(part, str | int) for part in parts):
        raise RecipeError(f'key_tokens.column: "{column}" should be a text or a list of texts, found {value!r}')
    return [str(part) for part in parts if str(part)]
