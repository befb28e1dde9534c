"""What stands between the matrix products of a transformers model, in fewer passes over memory.

RMS norms, rotary positions and gated MLPs take a pass for every operation and keep what each of them made. Here each is
one function with a gradient of its own, which keeps its inputs only (`rotary.py` is about attention layers). A layer is
given one after it was compared with what the layer did before, values and gradients; elsewhere it stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from grpo_lab.attention.rotary import rotating
from grpo_lab.attention.trial import given, is_given, same, small, some

_SMALL = {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)}
_MLP = {*_SMALL, "act_fn"}
_AT_ONCE = 1 << 18  # numbers that stay in the cores' cache over some passes, and are enough work for each core


class _RmsNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps), over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.is_cuda:
            y, scale = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return y  # type: ignore[no-any-return]
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        if x.is_cuda:
            from grpo_lab.kernels import layers

            return *layers.norm_backward(grad, x, weight, scale, wants_weight=ctx.needs_input_grad[1]), None
        d_x = x * scale  # the normalised x, n; dx = scale * (w g - n mean(w g n))
        product = grad * d_x
        mean = torch.matmul(product, weight).div_(-x.shape[-1])[..., None]
        return d_x.mul_(mean).addcmul_(grad, weight).mul_(scale), product.flatten(0, -2).sum(0), None


class _Gated(torch.autograd.Function):
    """y = silu(gate) * up = gate * sigmoid(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if gate.is_cuda:
            from grpo_lab.kernels import layers

            return layers.gated(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if gate.is_cuda:
            from grpo_lab.kernels import layers

            return layers.gated_backward(grad, gate, up)
        d_gate, d_up = (gate.new_empty(gate.shape) for _ in range(2))
        rows = max(1, _AT_ONCE // gate.shape[-1])
        parts = (tensor.flatten(0, -2).split(rows) for tensor in (gate, up, grad, d_gate, d_up))
        for x, u, g, d_x, d_u in zip(*parts, strict=True):
            torch.mul(g, nn.functional.silu(x), out=d_u)
            torch.ops.aten.silu_backward.grad_input(g * u, x, grad_input=d_x)
        return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps), over the last axis.

    The same sums with and without gradient: at step 0 the KL to the reference, which has none, is exactly 0.
    """
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _Gated.apply(gate, up)  # type: ignore[no-any-return]


@given
def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != self.weight.dtype:  # theirs knows how to compute in another type than the weights'
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


@given
def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


def fuse(model: nn.Module) -> None:
    """Give a model's norms, attention and MLPs their functions of fewer passes, wherever nothing but rounding changes.

    On the CPU they are for float32; on a GPU for every type, since they sum in float32 there.
    """
    proved: dict[tuple[type, Any, type], Callable[..., Any] | None] = {}
    for module in model.modules():
        activation = dict(module.named_children()).get("act_fn")
        kind = (type(module), vars(module).get("variance_epsilon"), type(activation))
        if kind not in proved:
            proved[kind] = _fewer_passes(module)
        forward = proved[kind]
        if forward is not None:
            module.forward = MethodType(forward, module)


def unfuse(model: nn.Module) -> dict[nn.Module, MethodType]:
    """Give every layer its own way back; the ways that they had been given."""
    found = {module: vars(module).get("forward") for module in model.modules()}
    ways = {module: way for module, way in found.items() if isinstance(way, MethodType) and is_given(way.__func__)}
    for module in ways:
        del module.forward
    return ways


@contextmanager
def as_theirs(model: nn.Module) -> Iterator[None]:
    """Have every layer compute in its own way for a while, so that two models that are the same give the same bits."""
    ways = unfuse(model)
    try:
        yield
    finally:
        for module, way in ways.items():
            module.forward = way


@torch.inference_mode(False)  # a model may first be used while it samples
@torch.enable_grad()
def _fewer_passes(module: nn.Module) -> Callable[..., Any] | None:
    """The function that computes what this layer does in fewer passes; None where there is none or it is not the same."""
    theirs = type(module).forward
    if "variance_epsilon" in vars(module) and [name for name, _ in module.named_parameters()] == ["weight"]:
        return _norm_forward if _same_norm(module) else None
    if {name for name, _ in module.named_children()} == _MLP:
        tried = small(module, _SMALL)
        return _mlp_forward if same(partial(theirs, tried), partial(_mlp_forward, tried), some(3, 8)) else None
    return rotating(module) if isinstance(theirs, FunctionType) else None


def _same_norm(module: Any) -> bool:
    """Also for a weight other than the module's own, which may well be all ones."""
    weight = module.weight

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, (x,))  # type: ignore[no-any-return]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, module.variance_epsilon)

    return same(theirs, ours, some(3, len(weight)), some(len(weight)))
