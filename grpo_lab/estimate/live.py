"""How many bytes of tensors are alive while something is computed; on the meta device, where nothing really is."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside `with`: `now` bytes of what was made inside are alive, `peak` is the most there were. `known` is not counted.

    Counted are storages, each once however many tensors view it, from the operation that makes it until nobody,
    the backward pass included, holds it any more.

    >>> import torch
    >>> with LiveBytes() as live:
    ...     _ = (torch.zeros(256, device="meta") + 1).sum()
    >>> live.peak
    2048
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size
