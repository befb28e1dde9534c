"""A corpus as one run of tokens, cut into pieces of equal length."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from grpo_lab.data.stream import Mapped, Stream

T = TypeVar("T")
Ids = tuple[int, ...]


def chunks(texts: Iterable[Ids], length: int, row: Callable[[Ids], T]) -> Mapped[T] | Stream[T]:
    """All texts joined and cut into pieces of `length` tokens, each made a row.

    A piece begins with the last token of the one before it, so that every token but the very first is predicted exactly
    once. The last piece may be shorter. Streamed texts give a stream of pieces, none of which is held; to start in its
    middle, the texts before are read and tokenised again.

    >>> list(chunks([(1, 2, 3), (4, 5), (6, 7)], 4, list))
    [[1, 2, 3, 4], [4, 5, 6, 7]]
    >>> list(chunks(Stream(lambda: iter([(1, 2, 3), (4, 5, 6)])), 4, list))
    [[1, 2, 3, 4], [4, 5, 6]]
    """
    if isinstance(texts, Stream):
        return Stream(lambda: map(row, cut(texts, length)))
    ids = array("l", (token for text in texts for token in text))
    step = length - 1
    return Mapped(lambda index: row(tuple(ids[index * step : index * step + length])), -(-(len(ids) - 1) // step))


def cut(texts: Iterable[Ids], length: int) -> Iterator[Ids]:
    """The same pieces, one after the other."""
    held: list[int] = []
    for text in texts:
        held += text
        start = 0
        while len(held) - start >= length:
            yield tuple(held[start : start + length])
            start += length - 1
        held = held[start:]
    if len(held) > 1:
        yield tuple(held)
