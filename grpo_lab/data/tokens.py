"""Texts as tokens: many at once on all cores, and remembered.

All rows are looked at before a run starts, stages share prompts, and training draws a row more than once.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

MOST_KNOWN = 2**25  # bytes, about, that are remembered of one tokenizer's texts
PER_TEXT = 400  # bytes of Python's own for a text, its tokens and their places in the dictionaries
MOST_TEXTS, MOST_CHARACTERS = 256, 2**20  # in one call of the library; it makes 100 bytes of a token for a while
_PROCESS = os.getpid()  # that imported this


@dataclass
class Known:
    """What was made of texts with one tokenizer."""

    prompts: dict[Any, str] = field(default_factory=dict)
    """Templated prompts by chat template and messages."""
    ids: dict[str, "array[int]"] = field(default_factory=dict)
    size: int = 0
    """Bytes, about."""


_known: WeakKeyDictionary[PreTrainedTokenizerBase, Known] = WeakKeyDictionary()


def known(tokenizer: PreTrainedTokenizerBase) -> Known:
    """What is remembered of a tokenizer."""
    return _known.setdefault(tokenizer, Known())


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of a text, no special ones added."""
    ids = known(tokenizer).ids.get(text)
    if ids is None:
        (ids,) = _encoded(tokenizer, [text])
        _remember(_with_room(tokenizer), text, ids)
    return tuple(ids)


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Find the tokens of many texts; `token_ids` knows them then, however many they are.

    The library works beside the iterator that makes the texts, which may have work of its own to do.
    """
    memory = _with_room(tokenizer)
    with all_cores(), ThreadPoolExecutor(1) as library:
        batches = _batches(text for text in texts if text not in memory.ids)
        found = [(batch, library.submit(_encoded, tokenizer, batch)) for batch in batches]
    for batch, encoded in found:
        for text, ids in zip(batch, encoded.result(), strict=True):
            _remember(memory, text, ids)


@contextmanager
def all_cores() -> Iterator[None]:
    """Lets the tokenizers library use its threads, which the command line otherwise forbids.

    Not in a forked process: the library would wait for threads that its parent had, for ever.
    """
    if os.getpid() != _PROCESS:
        yield
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if len(batch) == MOST_TEXTS or length > MOST_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _with_room(tokenizer: PreTrainedTokenizerBase) -> Known:
    """What is remembered; nothing, if it was more than `MOST_KNOWN` bytes."""
    if known(tokenizer).size > MOST_KNOWN:
        del _known[tokenizer]
    return known(tokenizer)


def _remember(memory: Known, text: str, ids: "array[int]") -> None:
    if text not in memory.ids:
        memory.ids[text] = ids
        memory.size += PER_TEXT + len(text) + ids.itemsize * len(ids)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> "list[array[int]]":
    """As `tokenizer(texts, add_special_tokens=False)`, whose own work takes three times as long as the tokenizer's."""
    if not tokenizer.is_fast:
        return [array("i", tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:  # left by whoever used it before
        backend.no_truncation()
        backend.no_padding()
    if len(texts) == 1:
        return [array("i", backend.encode(texts[0], add_special_tokens=False).ids)]
    return [array("i", found.ids) for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
