"""Rows for TRL that are made when they are asked for."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset


class LazyRows(Dataset):
    """Row i is what a function of i says.

    Nothing is held, and nothing is changed on the way: an Arrow table would give every chat message the keys of all
    others.
    """

    row: Callable[[int], dict[str, Any]]

    @classmethod
    def of(cls, size: int, row: Callable[[int], dict[str, Any]]) -> "LazyRows":
        """`size` rows, each as `row` makes it."""
        made = cls.from_dict({"position": range(size)})
        made.row = row
        return made

    def __getitem__(self, key: Any) -> Any:
        return self.row(key)

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        return [self.row(key) for key in keys]
