"""Token classification: words with tags as files and hub sets hold them, and the entities that the tags mark."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Tagged
from grpo_lab.text_metrics import NO_ENTITIES, bio_spans

Row = dict[str, Any]
_DOCUMENT = "-DOCSTART-"


def conll_rows(lines: Iterable[tuple[int, str]], place: str) -> Iterator[Row]:
    """Rows {tokens, tags} of a CoNLL file: a word per line, its tag in the last field, a blank line after a sentence.

    W-NUT 17 has two fields with a tab between them, CoNLL-2003 four with spaces (word, part of speech, chunk, entity);
    its lines `-DOCSTART-` are no words. A line of white space is blank.

    >>> list(conll_rows(enumerate(["Ann\\tB-PER", "", "-DOCSTART- -X- O O", "", "in IN I-PP O"], 1), "x.conll"))
    [{'tokens': ['Ann'], 'tags': ['B-PER']}, {'tokens': ['in'], 'tags': ['O']}]
    """
    words: list[tuple[str, str]] = []
    for number, line in lines:
        fields = line.split()
        if not fields:
            yield from _sentence(words)
            words = []
        elif len(fields) == 1:
            raise RecipeError(f"{place}:{number}: a word without a tag: {fields[0]}")
        elif fields[0] != _DOCUMENT:
            words.append((fields[0], fields[-1]))
    yield from _sentence(words)


def _sentence(words: Sequence[tuple[str, str]]) -> Iterator[Row]:
    if words:
        yield {"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]}


def tagged(row: Row, shape: Tagged) -> Row:
    """The row with its `sentence` (the words between spaces) and its `entities`, written as the recipe says.

    >>> tagged({"tokens": ["Ann", "Lee", "left"], "tags": ["I-PER", "I-PER", "O"]}, Tagged(kind="tagged"))["entities"]
    'PER: Ann Lee'
    """
    words, tags = _listed(row, shape.tokens), _listed(row, shape.tags)
    if len(words) != len(tags):
        raise RecipeError(f"data.shape: {len(words)} words, but {len(tags)} tags")
    try:
        spans = bio_spans([_name(tag, shape.names) for tag in tags])
    except ValueError as error:
        raise RecipeError(f"data.shape.tags: {error}") from None
    found = [(span.type, " ".join(words[span.start : span.stop])) for span in spans]
    return {**row, "sentence": " ".join(words), "entities": written(found, shape.form)}


def written(entities: Sequence[tuple[str, str]], form: str) -> str:
    """Entities as the reward `entities` reads them."""
    if form == "json":
        return json.dumps([{"type": kind, "text": text} for kind, text in entities], ensure_ascii=False)
    return "\n".join(f"{kind}: {text}" for kind, text in entities) or NO_ENTITIES


def entity_types(rows: Iterable[Row], shape: Tagged) -> set[str]:
    """The types that the rows' tags name."""
    return {_name(tag, shape.names).partition("-")[2] for row in rows for tag in row[shape.tags]} - {""}


def _listed(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, list):
        raise RecipeError(
            f'data.shape: "{column}" should be a list, found {value!r:.80}; the row has: {", ".join(row)}'
        )
    return value


def _name(tag: str | int, names: Sequence[str]) -> str:
    if isinstance(tag, str):
        return tag
    if not 0 <= tag < len(names):
        raise RecipeError(f"data.shape.names: tag {tag} has no name; {len(names)} names are given, from 0")
    return names[tag]
