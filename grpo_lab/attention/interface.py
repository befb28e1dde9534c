"""Our attention, as transformers' models call it: theirs as it is, unless a forward pass brings its own way to attend."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grpo_lab"
# What some models add to attention and a packed pass does not compute.
_REFUSED = ("softcap", "s_aux", "position_bias")


@runtime_checkable
class Attending(Protocol):
    """A way to attend, handed to a model as the keyword `attending`: it knows which token sees which.

    `longest` is the most tokens that one of them sees, itself included.
    """

    @property
    def longest(self) -> int: ...

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        """One layer's attention: query [B, H, L, D], key and value [B, H or fewer, L, D] to [B, L, H, D]."""
        ...


class NotPackableError(Exception):
    """A layer wants what a packed pass does not compute; the plain pass is the way then."""


def packed_arguments(ids: Tensor, positions: Tensor, attending: Attending) -> dict[str, Any]:
    """What a decoder is called with for a packed pass over ids [B, L] at positions [B, L].

    A mask of four dimensions is what transformers takes for ready and hands on as it is; nobody reads this one.
    """
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": torch.zeros(1, 1, 1, 1, device=ids.device),
        "use_cache": False,
        "attending": attending,
    }


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attending: Attending | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if attending is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in _REFUSED:
        if options.get(name) is not None:
            raise NotPackableError(f"its attention has {name}")
    if options.get("dropout"):
        raise NotPackableError("its attention has dropout")
    window = options.get("sliding_window")
    if window is not None and attending.longest > window:
        raise NotPackableError(f"a text of {attending.longest} tokens is longer than its attention window of {window}")
    scaling = options.get("scaling")
    return attending.attend(module, query, key, value, scaling=scaling or query.shape[-1] ** -0.5), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
