"""Attention over a packed batch: every needed product once, no mask, no copy of a prompt per completion.

A completion's token sees the prompt and its own completion so far. Both parts are computed apart, each with the fused
kernel, and joined by their log-sum-exps, which is exact:

    out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse),   lse = log(exp(lse_1) + exp(lse_2))

Given the joined `out` and `lse`, the kernel's backward pass recomputes the true probabilities of each part, so that the
parts' gradients add up to the whole one (Dao et al., FlashAttention, arXiv:2205.14135).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grpo_lab.attention.layout import Crossing, Layout, PackedBatch, Segments
from grpo_lab.attention.varlen import VarlenLayout, varlen_attention

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# What padding's log-sum-exp is said to be: exp(score - this) is 0, so padding has no part in a gradient.
_NO_PART = 1e30


class PackedAttention:
    """How a model's layers attend while they compute a packed batch. `num_calls` counts the layers that asked."""

    def __init__(self, packed: PackedBatch) -> None:
        self.packed = packed
        self.num_calls = 0

    @property
    def longest(self) -> int:
        """The most tokens that one token sees."""
        return self.packed.longest

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float
    ) -> Float[Tensor, "1 L H D"]:
        """The attention of one layer; query [1, H, L, D], key and value [1, H or fewer, L, D]."""
        return self._attend(query, key, value, self.packed.layout, scaling)

    def attend_last(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float
    ) -> Float[Tensor, "1 L H D"]:
        """The attention of the last layer: right where logits are needed, finite elsewhere."""
        return self._attend(query, key, value, self.packed.last, scaling)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout | VarlenLayout, scaling: float
    ) -> Tensor:
        self.num_calls += 1
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [L, H, D]
        if isinstance(layout, VarlenLayout):
            return varlen_attention(q, k, v, layout, scaling)[None]
        return _PackedFunction.apply(q, k, v, layout, scaling)[None]  # type: ignore[no-any-return]


class _PackedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
        out = q.new_empty(q.shape) if layout.is_full else q.new_zeros(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        heads = q.shape[1]
        for segments in layout.segments:
            tables = [_table(tensor, segments, heads) for tensor in (q, k, v)]
            part, part_lse = flash(*tables, 0.0, True, scale=scaling)
            _put(out, part, segments)
            _put(lse, part_lse, segments)
        for crossing in layout.crossings:
            rows = crossing.rows
            part, part_lse = flash(*_crossed(q, k, v, crossing), scale=scaling)
            part_lse = part_lse[0].T  # [rows, H]
            joined = torch.logaddexp(lse[rows], part_lse)
            out[rows] *= (lse[rows] - joined).exp()[..., None]
            out[rows] += part[0].transpose(0, 1) * (part_lse - joined).exp()[..., None]
            lse[rows] = joined
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        empty = torch.empty_like if ctx.layout.is_full else torch.zeros_like
        grads = [empty(tensor) for tensor in (q, k, v)]
        heads = q.shape[1]
        for segments in ctx.layout.segments:  # if every token is in one segment, these fill all places
            g, tq, tk, tv, o = (_table(tensor, segments, heads) for tensor in (grad, q, k, v, out))
            table_lse = _table(lse, segments, heads).masked_fill_(segments.filling[:, None], _NO_PART)
            parts = flash_backward(g, tq, tk, tv, o, table_lse, 0.0, True, scale=ctx.scaling)
            for whole, part in zip(grads, parts, strict=True):
                _put(whole, _fewer_heads(part, whole.shape[1]), segments)
        for crossing in ctx.layout.crossings:
            rows, prompt = crossing.rows, crossing.prompt
            tables = _crossed(q, k, v, crossing)
            parts = flash_backward(
                _row(grad[rows]), *tables, _row(out[rows]), lse[rows].T[None], 0.0, False, scale=ctx.scaling
            )
            for whole, part, places in zip(grads, parts, (rows, prompt, prompt), strict=True):
                whole[places] += _fewer_heads(part, whole.shape[1])[0].transpose(0, 1)
        return *grads, None, None


def _row(tensor: Tensor) -> Tensor:
    """[L, H, D] as the kernel wants it, [1, H, L, D]."""
    return tensor.transpose(0, 1)[None]


def _table(tensor: Tensor, segments: Segments, heads: int) -> Tensor:
    """[L, H, ...] as the segments' table [B, heads, W, ...], each of fewer heads repeated."""
    gathered = tensor.flatten(1).index_select(0, segments.table)
    table = gathered.view(segments.num_runs, -1, *tensor.shape[1:])
    return _more_heads(table, heads).transpose(1, 2)


def _put(whole: Tensor, table: Tensor, segments: Segments) -> None:
    """Write a table [B, H, W, ...] to its places in [L, H, ...]."""
    values = table.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, segments.tokens)
    whole.flatten(1).index_copy_(0, segments.places, values)


def _crossed(q: Tensor, k: Tensor, v: Tensor, crossing: Crossing) -> tuple[Tensor, Tensor, Tensor]:
    rows, prompt = crossing.rows, crossing.prompt
    more = (_row(_more_heads(tensor[prompt][None], q.shape[1])[0]) for tensor in (k, v))
    return _row(q[rows]), *more


def _more_heads(table: Tensor, heads: int) -> Tensor:
    """Keys or values [B, W, H', D] of grouped-query attention with one head for each query head."""
    return table if table.shape[2] == heads else table.repeat_interleave(heads // table.shape[2], dim=2)


def _fewer_heads(grad: Tensor, heads: int) -> Tensor:
    """The gradient [B, H, W, D] of repeated heads, summed over the copies: [B, heads, W, D]."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
