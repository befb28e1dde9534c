"""Which rows a step sees, as a function of the step: a resumed run needs no replay."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

from grpo_lab.errors import RecipeError
from grpo_lab.seeds import derive_seed

T = TypeVar("T")
U = TypeVar("U")
AHEAD = 1024  # items that are prepared together
POOL = 50  # batches that are sorted by length together, where steps hold items of similar length


class Mapped(Generic[T]):
    """The sequence `function(0), ..., function(size - 1)`, each item computed when it is asked for.

    Whoever goes through all of it calls `prepare(index)` before each item: what is quicker for many items at once than
    for each alone is then done for the next `AHEAD` of them, by the function `ahead`.
    """

    def __init__(
        self, function: Callable[[int], T], size: int, *, ahead: Callable[[range], None] = lambda _: None
    ) -> None:
        self._function = function
        self._size = size
        self._ahead = ahead

    def __len__(self) -> int:
        return self._size

    def prepare(self, index: int) -> None:
        """Items are asked for in their order, and this one comes next."""
        if index % AHEAD == 0:
            self._ahead(range(index, min(index + AHEAD, self._size)))

    def __iter__(self) -> Iterator[T]:
        for index in range(self._size):
            self.prepare(index)
            yield self._function(index)

    def __getitem__(self, index: Any) -> Any:
        place = range(self._size)[index]
        return [self._function(part) for part in place] if isinstance(place, range) else self._function(place)


Sequence.register(Mapped)  # not a subclass: type checkers at run time would compute an item to look at it


class Stream(Generic[T]):
    """Items in file order, of unknown number, none of them held: `stream[i]` reads on to item i.

    Reading forward is cheap; an earlier index opens the source again. `length` is None until the end was reached.
    """

    def __init__(self, open_items: Callable[[], Iterator[T]]) -> None:
        self.length: int | None = None
        self._open = open_items
        self._items: Iterator[T] = iter(())
        self._next: int | None = None  # the index of the item that `_items` gives next; None = open again

    def __iter__(self) -> Iterator[T]:
        return self._open()

    def __getitem__(self, index: int) -> T:
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(index)
        start = self._next
        if start is None or index < start:
            self._items, start = self._open(), 0
        self._next = None  # stays so if the source fails: a broken generator looks like one at its end
        for position, item in enumerate(self._items, start):
            if position == index:
                self._next = index + 1
                return item
            start = position + 1
        self.length = start
        raise IndexError(index)


class MappedStream(Stream[U]):
    """A stream's items, each converted by `function(index, item)` when it is asked for (not when it is passed over)."""

    def __init__(self, source: Stream[T], function: Callable[[int, T], U]) -> None:
        self._source = source
        self._function = function

    @property
    def length(self) -> int | None:
        return self._source.length

    def __iter__(self) -> Iterator[U]:
        return (self._function(index, item) for index, item in enumerate(self._source))

    def __getitem__(self, index: int) -> U:
        return self._function(index, self._source[index])


class PromptStream(Generic[T]):
    """The rows of every step: a pure function of (seed, step).

    Epochs are permutations that follow each other without a gap: each holds every item exactly once, and a batch may
    hold the end of one and the start of the next. A `Stream` is read in file order and starts again at its end.
    """

    def __init__(
        self,
        items: Sequence[T] | Stream[T],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """With `lengths`, one for each item, a step's items are of similar length; otherwise they are any."""
        self.items = items
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._lengths = lengths
        # a step may hold the end of one epoch and the next one's start
        self._order = lru_cache(maxsize=2)(self._order_of)
        # a sampler may ask for a step ahead of the loop, and a `Stream` would be read again from its start
        self._at = lru_cache(maxsize=2)(self._items_of)
        if not isinstance(items, Stream):
            self._need(len(items))

    def at(self, step: int) -> list[T]:
        """The `batch_size` items of one step; steps count from 0."""
        return list(self._at(step))

    def others(self, step: int, attempt: int) -> list[T]:
        """`batch_size` items to sample in place of others of the step: a function of (seed, step, attempt), attempt >= 1.

        Each attempt walks through permutations of its own, so the items may be ones that the step has seen already.
        """
        if isinstance(self.items, Stream):
            raise TypeError("a Stream is read in file order; it cannot be asked for other items")
        seed = derive_seed(self._seed, "attempt", attempt)
        return PromptStream(self.items, self.batch_size, seed=seed).at(step)

    def _items_of(self, step: int) -> list[T]:
        first = step * self.batch_size
        return [self._item(position) for position in range(first, first + self.batch_size)]

    def _item(self, position: int) -> T:
        if isinstance(self.items, Stream):
            return self._streamed(self.items, position)
        epoch, offset = divmod(position, len(self.items))
        if not self._shuffle:
            return self.items[offset]
        return self.items[self._order(epoch)[offset]]

    def _order_of(self, epoch: int) -> list[int]:
        size, seed = len(self.items), derive_seed(self._seed, "epoch order", epoch)  # type: ignore[arg-type]
        order = _permutation(size, seed)
        if self._lengths is None:
            return order
        started = -epoch * size % self.batch_size  # of these the step before took the others
        return order[:started] + by_length(order[started:], self._lengths, self.batch_size, seed=seed)

    def _streamed(self, items: Stream[T], position: int) -> T:
        if items.length is None:
            try:
                return items[position]
            except IndexError:  # the end is known now
                return self._streamed(items, position)
        self._need(items.length)
        return items[position % items.length]

    def _need(self, found: int) -> None:
        if found < self.batch_size:
            raise RecipeError(f"data: a step needs {self.batch_size} prompts, the data has {found}")


def by_length(order: Sequence[int], lengths: Sequence[int], batch_size: int, *, seed: int) -> list[int]:
    """`order` rearranged so that each run of `batch_size` items has similar lengths; the runs are in random order.

    Runs of `POOL` batches are sorted by length and cut, so what meets in a batch still changes from epoch to epoch. What
    is left at the end of `order`, less than a batch, stays there.

    >>> by_length([0, 1, 2, 3, 4], [1, 9, 1, 9, 5], 2, seed=0)
    [0, 2, 1, 3, 4]
    """
    whole = len(order) - len(order) % batch_size
    batches: list[list[int]] = []
    for first in range(0, whole, POOL * batch_size):
        pool = sorted(order[first : min(first + POOL * batch_size, whole)], key=lambda item: lengths[item])
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    shuffled = _permutation(len(batches), derive_seed(seed, "batches"))
    return [item for at in shuffled for item in batches[at]] + list(order[whole:])


def _permutation(size: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
