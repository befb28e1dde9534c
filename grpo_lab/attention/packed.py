"""Attention over a packed batch: every needed product once, no mask, no copy of a prompt per completion.

A completion's token sees the prompt and its own completion so far. Both parts are computed apart, each with the fused
kernel, and joined by their log-sum-exps, which is exact:

    out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse),   lse = log(exp(lse_1) + exp(lse_2))

Given the joined `out` and `lse`, the kernel's backward pass recomputes the true probabilities of each part, so that the
parts' gradients add up to the whole one (Dao et al., FlashAttention, arXiv:2205.14135).
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grpo_lab.attention.layout import Crossing, Layout, PackedBatch
from grpo_lab.attention.varlen import VarlenLayout, join_, varlen_attention

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# What padding's log-sum-exp is said to be: exp(score - this) is 0, so padding has no part in a gradient.
_NO_PART = 1e30


class Projections(NamedTuple):
    """What makes H queries, H' keys and H' values of states in one product: `weight` [(H + 2 H') D, E], and `bias`.

    Two numbers of a query or key that are turned together stand side by side; `turns` [L, D/2] says how far, as complex
    numbers.
    """

    weight: Tensor
    bias: Tensor | None
    turns: Tensor
    num_heads: int


class PackedAttention:
    """How a model's layers attend while they compute a packed batch. `asked` are the layers that did."""

    def __init__(self, packed: PackedBatch) -> None:
        self.packed = packed
        self.asked: list[nn.Module] = []
        self._layout = packed.layout

    @property
    def longest(self) -> int:
        """The most tokens that one token sees."""
        return self.packed.longest

    def in_last_layer(self) -> "PackedAttention":
        """How the last layer attends: right where logits are needed, finite elsewhere."""
        last = copy.copy(self)
        last._layout = self.packed.last
        return last

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float
    ) -> Float[Tensor, "1 L H D"]:
        """The attention of one layer; query [1, H, L, D], key and value [1, H or fewer, L, D]."""
        self.asked.append(module)
        if isinstance(self._layout, VarlenLayout):
            q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            return varlen_attention(q, k, v, self._layout, scaling)[None]
        qkv = torch.cat([tensor[0].transpose(0, 1) for tensor in (query, key, value)], 1)
        return _Attention.apply(qkv, query.shape[1], self._layout, scaling)[None]  # type: ignore[no-any-return]


class PackedLayers(PackedAttention):
    """One that can also begin with the states a layer is given, where nobody else wants its queries, keys and values."""

    def attend_states(
        self, module: nn.Module, states: Tensor, projections: Projections, *, scaling: float
    ) -> Float[Tensor, "1 L H D"]:
        """The attention of one layer of the states [1, L, E]."""
        self.asked.append(module)
        return _StatesAttention.apply(states[0], *projections, self._layout, scaling)[None]  # type: ignore[no-any-return]


def attending_to(packed: PackedBatch) -> PackedAttention:
    """How a model's layers attend to this batch: on a GPU from their queries, keys and values, elsewhere also from states."""
    return PackedAttention(packed) if isinstance(packed.layout, VarlenLayout) else PackedLayers(packed)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, layout: Layout, scaling: float) -> Tensor:
        attended = _attended(qkv, heads, layout, scaling)
        ctx.save_for_backward(*attended)
        ctx.how = heads, layout, scaling
        return attended.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(grad, _Attended(*ctx.saved_tensors), *ctx.how), None, None, None


class _StatesAttention(torch.autograd.Function):
    """From the states, so that what is made on the way may be turned in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        turns: Tensor,
        heads: int,
        layout: Layout,
        scaling: float,
    ) -> Tensor:
        qkv = nn.functional.linear(states, weight, bias).unflatten(1, (-1, 2 * turns.shape[1]))
        _turn(qkv, heads, turns)
        attended = _attended(qkv, heads, layout, scaling)
        ctx.save_for_backward(states, weight, turns, *attended)
        ctx.how = heads, layout, scaling
        return attended.out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, turns, *attended = ctx.saved_tensors
        d_qkv = _gradient(grad, _Attended(*attended), *ctx.how)
        _turn(d_qkv, ctx.how[0], turns.conj())
        made, wanted = d_qkv.flatten(1), ctx.needs_input_grad
        d_states = made @ weight if wanted[0] else None
        d_weight = made.T @ states if wanted[1] else None
        return d_states, d_weight, made.sum(0) if wanted[2] else None, None, None, None, None


class _Attended(NamedTuple):
    """Queries, keys and values side by side [L, H + 2 H', D], the same at the tables' entries [BW, H + 2 H', D], and what
    attention made of them: `out` [L, H, D] and `lse` [L, H]."""

    qkv: Tensor
    gathered: Tensor
    out: Tensor
    lse: Tensor


def _attended(qkv: Tensor, heads: int, layout: Layout, scaling: float) -> _Attended:
    gathered = _gathered(qkv, layout)
    parts = [flash(*_split(table, heads), 0.0, True, scale=scaling) for table in _tables(gathered, layout)]
    out, lse = (_put_back(_entries(both), layout) for both in zip(*parts, strict=True))
    for bundle in layout.crossings:
        rows = slice(bundle[0].rows.start, bundle[-1].rows.stop)
        crossed = [flash(*_crossed(qkv, heads, crossing), scale=scaling) for crossing in bundle]
        part, part_lse = (torch.cat([one[0].transpose(0, 1) for one in both]) for both in zip(*crossed, strict=True))
        join_(out[rows], part, lse[rows], part_lse)
    return _Attended(qkv, gathered, out, lse)


def _gradient(grad: Tensor, attended: _Attended, heads: int, layout: Layout, scaling: float) -> Tensor:
    """The gradient of `qkv`, given that of `out`."""
    qkv, gathered, out, lse = attended
    lse_seen = _gathered(lse, layout).masked_fill_(layout.filling[:, None], _NO_PART)
    d_gathered = gathered.new_empty(len(gathered) + 1, *gathered.shape[1:])
    d_gathered[-1] = 0
    entries = (gathered, d_gathered[:-1], _gathered(grad, layout), _gathered(out, layout), lse_seen)
    for table, d_table, *rest in zip(*(_tables(tensor, layout) for tensor in entries), strict=True):
        g, o, table_lse = (tensor.transpose(1, 2) for tensor in rest)
        parts = flash_backward(g, *_split(table, heads), o, table_lse, 0.0, True, scale=scaling)
        torch.cat(_fewer_heads(parts, qkv.shape[1]), 2, out=d_table)
    d_qkv = _put_back(d_gathered, layout)
    fewer = (qkv.shape[1] - heads) // 2
    for bundle in layout.crossings:
        grads = []
        for crossing in bundle:
            g, o, seen = (tensor[crossing.rows].transpose(0, 1)[None] for tensor in (grad, out, lse))
            parts = flash_backward(g, *_crossed(qkv, heads, crossing), o, seen, 0.0, False, scale=scaling)
            grads.append(_fewer_heads(parts, qkv.shape[1]))
        rows = slice(bundle[0].rows.start, bundle[-1].rows.stop)
        prompts = slice(bundle[0].prompt.start, bundle[-1].prompt.stop)
        wholes = zip(
            (rows, prompts, prompts), d_qkv.split([heads, fewer, fewer], 1), zip(*grads, strict=True), strict=True
        )
        for places, whole, parts in wholes:
            whole[places] += torch.cat(parts, 1)[0]
    return d_qkv


def _turn(qkv: Tensor, heads: int, turns: Tensor) -> None:
    """Turn queries and keys, in place: their numbers two by two, as complex ones, times [L, D/2]."""
    pairs = torch.view_as_complex(qkv[:, : (heads + qkv.shape[1]) // 2].unflatten(2, (-1, 2)))
    pairs.mul_(turns[:, None])


def _gathered(tensor: Tensor, layout: Layout) -> Tensor:
    """[L, H, ...] at each entry of the tables: [BW, H, ...]."""
    return tensor.flatten(1).index_select(0, layout.places).unflatten(1, tensor.shape[1:])


def _tables(entries: Tensor, layout: Layout) -> list[Tensor]:
    """[BW, H, ...] as the tables [B, W, H, ...], which are views."""
    parts = entries.split([rows * columns for rows, columns in layout.shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, layout.shapes, strict=True)]


def _entries(tables: Sequence[Tensor]) -> Tensor:
    """Tables [B, H, W, ...] as their entries [BW + 1, H, ...], the last of which is 0."""
    entries = [table.transpose(1, 2).flatten(0, 1) for table in tables]
    return torch.cat([*entries, torch.zeros_like(entries[0][:1])])


def _put_back(entries: Tensor, layout: Layout) -> Tensor:
    """[BW + 1, H, ...] to where the entries stand in the long row: [L, H, ...], the last for a token that is in no table."""
    return entries.flatten(1).index_select(0, layout.entries).unflatten(1, entries.shape[1:])


def _split(table: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values side by side [B, W, H + 2 H', D] as the kernel wants them, [B, H, W, D] each.

    In grouped-query attention keys and values have fewer heads H', and each is repeated for its queries.
    """
    fewer = (table.shape[2] - heads) // 2
    q, *kv = table.split([heads, fewer, fewer], 2)
    more = kv if fewer == heads else [tensor.repeat_interleave(heads // fewer, 2) for tensor in kv]
    return [tensor.transpose(1, 2) for tensor in (q, *more)]


def _crossed(qkv: Tensor, heads: int, crossing: Crossing) -> list[Tensor]:
    """The completions' queries and their prompt's keys and values."""
    q = qkv[None, crossing.rows, :heads].transpose(1, 2)
    return [q, *_split(qkv[None, crossing.prompt], heads)[1:]]


def _fewer_heads(grads: Sequence[Tensor], whole: int) -> list[Tensor]:
    """Gradients [B, H, W, D] of queries, keys and values as they stand side by side in `whole` heads, [B, W, H or H', D].

    Those of repeated heads are summed over the copies.
    """
    d_q, *d_kv = (grad.transpose(1, 2) for grad in grads)
    fewer = (whole - d_q.shape[2]) // 2
    return [d_q, *(grad if grad.shape[2] == fewer else grad.unflatten(2, (fewer, -1)).sum(3) for grad in d_kv)]
