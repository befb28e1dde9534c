"""What stands between the matrix products of a transformers model, in fewer passes over memory.

RMS norms, rotary positions and gated MLPs take a pass for every operation and keep what each of them made. Here each is
one function with a gradient of its own, which keeps its inputs only. A layer is given one after it was compared with
what the layer did before, values and gradients; elsewhere it stays as it is.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# How far values and gradients may differ from the layer's own, as a share of the largest.
_TOLERANCE = 1e-5
_ROTARY = "apply_rotary_pos_emb"  # what transformers' models call to rotate queries and keys
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


class _Rotation(torch.autograd.Function):
    """Each pair (x_i, x_{i + D/2}) turned by its angle: y = x * cos + (-x_2, x_1) * sin, over the last axis D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if x.is_cuda:
            from grpo_lab.kernels import layers

            return layers.rotate(x, cos, sin)
        (x_1, x_2), (sin_1, sin_2) = x.chunk(2, -1), sin.chunk(2, -1)
        y = x * cos
        y_1, y_2 = y.chunk(2, -1)
        y_1.addcmul_(x_2, sin_1, value=-1)
        y_2.addcmul_(x_1, sin_2)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if grad.is_cuda:
            from grpo_lab.kernels import layers

            return layers.rotate(grad, cos, sin, backward=True), None, None
        (grad_1, grad_2), (sin_1, sin_2) = grad.chunk(2, -1), sin.chunk(2, -1)
        d_x = grad * cos
        d_1, d_2 = d_x.chunk(2, -1)
        d_1.addcmul_(grad_2, sin_2)
        d_2.addcmul_(grad_1, sin_1, value=-1)
        return d_x, None, None


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


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys at their positions, as transformers' `apply_rotary_pos_emb`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _Gated.apply(gate, up)  # type: ignore[no-any-return]


_GIVEN: set[Callable[..., Any]] = set()


def given(function: FunctionType) -> FunctionType:
    """Mark a function that layers are given as their `forward`.

    Its name is that, too: a bound method is pickled as its object's attribute of that name, so that a layer which is sent
    to another process arrives with its own way, and is tried there anew.
    """
    function.__name__ = "forward"
    _GIVEN.add(function)
    return function


@given
def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != self.weight.dtype:  # theirs knows how to compute in another type than the weights'
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


@given
def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


def fuse(model: nn.Module) -> None:
    """Give a model's norms, attention and MLPs the functions above, wherever nothing but rounding changes.

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
    ways = {module: way for module, way in found.items() if isinstance(way, MethodType) and way.__func__ in _GIVEN}
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
        small = _small_mlp(module)
        return _mlp_forward if same(partial(theirs, small), partial(_mlp_forward, small), some(3, 8)) else None
    if isinstance(theirs, FunctionType) and _ROTARY in theirs.__code__.co_names:
        q, k, angles = some(1, 2, 3, 8), some(1, 1, 3, 8), {"cos": some(1, 3, 8), "sin": some(1, 3, 8)}
        if same(partial(theirs.__globals__[_ROTARY], **angles), partial(rotated, **angles), q, k):
            return _rotating(theirs)
    return None


@cache
def _rotating(theirs: FunctionType) -> FunctionType:
    """The same function, in which the name of their rotation means ours."""
    their_rotation = theirs.__globals__[_ROTARY]

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if cos.dtype != q.dtype or cos.shape[-1] != q.shape[-1]:  # only some of the coordinates are turned
            return their_rotation(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]
        return rotated(q, k, cos, sin, unsqueeze_dim)

    names = {**theirs.__globals__, _ROTARY: rotation}
    ours = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return given(ours)


def _small_mlp(module: nn.Module) -> nn.Module:
    """The same code with small linear layers, so that trying it costs nothing whatever the model's size and device."""
    small = copy.copy(module)
    linears = {name: nn.Linear(*sizes, device="meta") for name, sizes in _SMALL.items()}
    for linear in linears.values():
        linear.weight, linear.bias = (nn.Parameter(some(*p.shape)) for p in (linear.weight, linear.bias))
    small._modules = {**module._modules, **linears}
    return small


def _same_norm(module: Any) -> bool:
    """Also for a weight other than the module's own, which may well be all ones."""
    weight = module.weight

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, (x,))  # type: ignore[no-any-return]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, module.variance_epsilon)

    return same(theirs, ours, some(3, len(weight)), some(len(weight)))


def same(theirs: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether two functions give the same values, and the same gradients with regard to the inputs."""
    results = []
    try:
        for function in (theirs, ours):
            given = [tensor.clone().requires_grad_() for tensor in inputs]
            made = function(*given)
            outputs = [made] if isinstance(made, Tensor) else list(made)
            grads = torch.autograd.grad(outputs, given, [some(*output.shape) for output in outputs])
            results.append([*outputs, *grads])
    except (TypeError, ValueError, RuntimeError):  # called in another way, or made of other parts
        return False
    pairs = zip(*results, strict=True)
    return all(bool((one - other).abs().max() <= _TOLERANCE * one.abs().max()) for one, other in pairs)


def some(*shape: int) -> Tensor:
    """Numbers to try a function with, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
