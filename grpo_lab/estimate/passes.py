"""Passes through a model that has shapes and no values: what they hold, as the packed passes on the CPU hold it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo_lab.algorithm.linear_logps import LOGITS_HELD
from grpo_lab.attention.fused import fuse
from grpo_lab.attention.interface import NAME, packed_arguments
from grpo_lab.attention.probe import parts
from grpo_lab.estimate.live import LiveBytes
from grpo_lab.policy.forward import learn_without_dropout
from grpo_lab.policy.load import DTYPES
from grpo_lab.recipe.schema import Model

_LOGITS_AT_ONCE = 1 << 23  # as in linear_logps, where logits are not held


def shapes_of(config: Any, model: Model) -> Any:
    """The model that a recipe asks for, without its adapter, on the meta device."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype], attn_implementation=NAME)
    if network.dtype == torch.float32:  # as where a packed pass is tried
        fuse(network)
    if model.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network


@dataclass
class StandIn:
    """Attention that makes what the packed attention makes and computes nothing; it may keep keys and values."""

    longest: int = 0
    keep: bool = False
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        """One layer; shapes as in `Attending`."""
        if self.keep:
            self.kept.append((key, value))
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return _Attention.apply(q, k, v)[None]  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        tables = [q.new_empty(q.shape) for _ in range(4)]  # queries, keys, values with as many heads, and the output
        del tables
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        grads = tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v))
        tables = [q.new_empty(q.shape) for _ in range(8)]  # gradient, q, k, v and output in, three gradients out
        del tables
        return grads


class _Head(torch.autograd.Function):
    """What `linear_logps` holds."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.held = len(hidden) * len(weight) <= LOGITS_HELD
        ctx.save_for_backward(hidden, weight, *_logits(hidden, weight, ctx.held))
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *logits = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        logits = logits or _logits(hidden, weight, True, rows=_at_once(hidden, weight))
        cast = [each.to(weight.dtype) for each in logits]
        del cast
        return d_hidden, d_weight


def _logits(hidden: Tensor, weight: Tensor, kept: bool, *, rows: int | None = None) -> list[Tensor]:
    raw = hidden.new_empty(rows or (len(hidden) if kept else _at_once(hidden, weight)), len(weight))
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return [wide] if kept else []


def _at_once(hidden: Tensor, weight: Tensor) -> int:
    return min(len(hidden), max(1, _LOGITS_AT_ONCE // len(weight)))


def _hidden(network: Any, num_tokens: int, attending: StandIn) -> Tensor:
    ids = torch.empty(1, num_tokens, dtype=torch.long, device="meta")
    decoder, _ = parts(network)
    return decoder(**packed_arguments(ids, ids, attending)).last_hidden_state[0]  # type: ignore[no-any-return]


def learning_bytes(network: Any, *, num_tokens: int, num_logits: int, num_parts: int, dropout: bool = False) -> int:
    """The most bytes that one optimiser step holds beside weights and optimiser: activations, logits, gradients.

    Args:
        num_tokens: of a micro-batch, packed; `num_logits` of them have logits.
        num_parts: micro-batches in the step. From the second on the gradient of the first is there as well.
        dropout: as a supervised stage computes, and not as GRPO does.
    """
    network.train()
    if not dropout:
        learn_without_dropout(network)
    network.zero_grad()
    with LiveBytes([*network.parameters(), *network.buffers()]) as live:
        for _ in range(min(num_parts, 2)):
            hidden = _hidden(network, num_tokens, StandIn())
            at = torch.empty(num_logits, dtype=torch.long, device="meta")
            logps = _Head.apply(hidden.index_select(0, at), parts(network).head.weight)  # type: ignore[no-untyped-call]
            del hidden
            logps.sum().backward()
    network.zero_grad()
    return live.peak


@dataclass(frozen=True)
class Prefill:
    """`peak` bytes while prompts are computed, of which `cache` are the keys and values that stay."""

    peak: int
    cache: int


@torch.no_grad()
def prefill_bytes(network: Any, num_tokens: int) -> Prefill:
    """What computing some prompts takes, all of them in one row."""
    network.eval()
    attending = StandIn(keep=True)
    with LiveBytes([*network.parameters(), *network.buffers()]) as live:
        _hidden(network, num_tokens, attending)
    return Prefill(live.peak, sum(key.nbytes + value.nbytes for key, value in attending.kept))
