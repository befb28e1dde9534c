"""Attention over a packed batch on a GPU: two calls of the flash kernel for runs of any length.

As in packed.py, a completion's token sees its prompt and its own completion so far, computed apart and joined exactly by
their log-sum-exps. The kernel takes runs of tokens that stand one after the other, so that here all runs of a batch are
one call, and the completions of all prompts, each against its own, another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """S runs of tokens, one after the other: run s is tokens `starts[s]` to `starts[s + 1]`; `longest` has most tokens."""

    starts: Int[Tensor, "n"]
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Runs":
        """Runs of these lengths; some may be 0."""
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(starts, max(lengths, default=0))


@dataclass(frozen=True)
class VarlenLayout:
    """Which tokens see which: all prompts come first, then all completions, in the order of their prompts.

    `own`: each prompt and each completion, whose tokens see what stands before them in their run. `prompts`: the first
    `num_prompt_tokens` tokens by prompt; `answers`: the others by the prompt that they answer, all of which they see.
    """

    num_prompt_tokens: int
    own: Runs
    prompts: Runs
    answers: Runs


def varlen_attention(
    q: Float[Tensor, "L H D"],
    k: Float[Tensor, "L Hk D"],
    v: Float[Tensor, "L Hk D"],
    layout: VarlenLayout,
    scaling: float,
) -> Float[Tensor, "L H D"]:
    """The attention of every token, with its gradient; `H` is a multiple of `Hk`."""
    return _VarlenFunction.apply(q, k, v, layout, scaling)  # type: ignore[no-any-return, no-untyped-call]


def flash(
    q: Tensor, k: Tensor, v: Tensor, queries: Runs, keys: Runs, *, causal: bool, scaling: float
) -> tuple[Float[Tensor, "L H D"], Float[Tensor, "H L"]]:
    """Each run of queries against the run of keys of the same number: output and log-sum-exp."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal, False, scale=scaling
    )
    return out, lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Runs,
    keys: Runs,
    *,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with regard to q, k and v, of an output that may have been joined with others."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        grad, q, k, v, out, lse, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal, *no_dropout,
        scale=scaling,
    )  # fmt: skip


def flash_cached(
    q: Float[Tensor, "R H D"],
    k: Tensor,
    v: Tensor,
    queries: Runs,
    keys: Runs,
    used: Int[Tensor, "R"],
    *,
    scaling: float,
) -> Float[Tensor, "R H D"]:
    """One query for each run of keys, of which it sees the first `used[r]`."""
    return torch.ops.aten._flash_attention_forward(  # type: ignore[no-any-return]
        q, k, v, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, False, False,
        scale=scaling, seqused_k=used,
    )[0]  # fmt: skip


def join_(out: Tensor, part: Tensor, lse: Tensor, part_lse: Tensor) -> None:
    """Join attention over some keys with that over others, in place; out and part [n, H, D], their lse [n, H]."""
    if out.is_cuda:
        from grpo_lab.kernels import layers

        layers.join_(out, part, lse.T, part_lse.T)
        return
    share = torch.sigmoid(part_lse - lse)[..., None]  # exp(lse_2) / (exp(lse_1) + exp(lse_2))
    out.lerp_(part, share.to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))


class _VarlenFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scaling: float) -> Tensor:
        out, lse = flash(q, k, v, layout.own, layout.own, causal=True, scaling=scaling)
        first = layout.num_prompt_tokens
        if first < len(q):
            part, part_lse = flash(
                q[first:], k[:first], v[:first], layout.answers, layout.prompts, causal=False, scaling=scaling
            )
            out = out.contiguous()
            join_(out[first:], part, lse[:, first:].T, part_lse.T)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, scaling, grad = ctx.layout, ctx.scaling, grad.contiguous()
        d_q, d_k, d_v = flash_backward(grad, q, k, v, out, lse, layout.own, layout.own, causal=True, scaling=scaling)
        first = layout.num_prompt_tokens
        if first < len(q):
            parts = flash_backward(
                grad[first:], q[first:], k[:first], v[:first], out[first:], lse[:, first:].contiguous(),
                layout.answers, layout.prompts, causal=False, scaling=scaling,
            )  # fmt: skip
            for whole, part in zip((d_q[first:], d_k[:first], d_v[:first]), parts, strict=True):
                whole += part
        return d_q, d_k, d_v, None, None
