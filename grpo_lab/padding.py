"""The only place that pads. Masks come from lengths, never from `ids == pad_id`, so EOS may serve as padding."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Tensor, "N S"], Bool[Tensor, "N S"]]:
    """Token rows as one tensor with padding on the left, and the mask of real tokens.

    >>> pad_left([[5, 6, 7], [8]], pad_id=0)[0].tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) >= (width - lengths)[:, None]
    return _laid(rows, mask, pad_id, torch.long), mask


def pad_right(rows: Sequence[Sequence[int | float]], fill: int | float, dtype: torch.dtype) -> Shaped[Tensor, "N T"]:
    """Rows of numbers as one tensor with `fill` on the right.

    >>> pad_right([[5, 6, 7], [8]], 0, torch.long).tolist()
    [[5, 6, 7], [8, 0, 0]]
    """
    return _laid(rows, length_mask([len(row) for row in rows]), fill, dtype)


def length_mask(lengths: Sequence[int]) -> Bool[Tensor, "N T"]:
    """True for the first `length` columns of each row.

    >>> length_mask([1, 2]).tolist()
    [[True, False], [True, True]]
    """
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _laid(rows: Sequence[Sequence[int | float]], mask: Tensor, fill: int | float, dtype: torch.dtype) -> Tensor:
    """The numbers of all rows where the mask is, `fill` elsewhere."""
    values = torch.from_numpy(np.array([*chain.from_iterable(rows)])).to(dtype)  # torch is slow to read lists
    return torch.full(mask.shape, fill, dtype=dtype).masked_scatter_(mask, values)
