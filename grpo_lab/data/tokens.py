"""Texts as tokens: many at once on all cores, and remembered.

All rows are looked at before a run starts, stages share prompts, and training draws a row more than once.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

MOST_KNOWN = 2**22  # tokens of one tokenizer's texts that are remembered: 4 bytes each, and their characters
MOST_AT_ONCE = 2**20  # characters in one call of the library, which makes some 100 bytes of each token for a while


@dataclass
class Known:
    """What was made of texts with one tokenizer; all is forgotten when it holds more than `MOST_KNOWN` tokens."""

    prompts: dict[Any, str] = field(default_factory=dict)
    """Templated prompts by chat template and messages."""
    ids: dict[str, "array[int]"] = field(default_factory=dict)
    num_tokens: int = 0


_known: WeakKeyDictionary[PreTrainedTokenizerBase, Known] = WeakKeyDictionary()


def known(tokenizer: PreTrainedTokenizerBase) -> Known:
    """What is remembered of a tokenizer."""
    found = _known.get(tokenizer)
    if found is None or found.num_tokens > MOST_KNOWN:
        found = _known[tokenizer] = Known()
    return found


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of a text, no special ones added."""
    memory = known(tokenizer)
    if text not in memory.ids:
        _remember(memory, tokenizer, [text])
    return tuple(memory.ids[text])


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Find the tokens of many texts at once; `token_ids` knows them then."""
    memory = known(tokenizer)
    new = [text for text in dict.fromkeys(texts) if text not in memory.ids]
    with all_cores():
        for batch in _batches(new):
            _remember(memory, tokenizer, batch)


@contextmanager
def all_cores() -> Iterator[None]:
    """Lets the tokenizers library use its threads, which the command line otherwise forbids: forks do not survive them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length > MOST_AT_ONCE:
            yield batch
            batch, length = [], 0
    yield batch


def _remember(memory: Known, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    for text, ids in zip(texts, _encoded(tokenizer, texts), strict=True):
        memory.ids[text] = array("i", ids)
        memory.num_tokens += len(ids)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """As `tokenizer(texts, add_special_tokens=False)`, whose own work takes three times as long as the tokenizer's."""
    if not tokenizer.is_fast:
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:  # left by whoever used it before
        backend.no_truncation()
        backend.no_padding()
    if len(texts) == 1:
        return [backend.encode(texts[0], add_special_tokens=False).ids]
    return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
