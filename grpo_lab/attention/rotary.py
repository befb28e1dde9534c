"""Attention layers with rotary positions: queries and keys turned in fewer passes, and by one product with the values.

Made by one product, queries, keys and values stand side by side, and a packed pass moves them to its tables all at once.
Two numbers that are turned together stand side by side as well, as one complex number: turning is one multiplication.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lab.attention.layout import packed_prompts
from grpo_lab.attention.packed import PackedAttention, PackedLayers, Projections, attending_to
from grpo_lab.attention.trial import given, same, small, some

_ROTARY = "apply_rotary_pos_emb"  # what transformers' models call to rotate queries and keys
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


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


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys at their positions, as transformers' `apply_rotary_pos_emb`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


def rotating(layer: nn.Module) -> FunctionType | None:
    """The function that computes what this attention layer does in fewer passes; None if it is not one or not the same."""
    theirs: Any = type(layer).forward
    if _ROTARY not in theirs.__code__.co_names:
        return None
    q, k, angles = some(1, 2, 3, 8), some(1, 1, 3, 8), {"cos": some(1, 3, 8), "sin": some(1, 3, 8)}
    if not same(partial(theirs.__globals__[_ROTARY], **angles), partial(rotated, **angles), q, k):
        return None
    return _from_one_product(theirs) if _same_from_one_product(layer) else _turning(theirs)


@cache
def _turning(theirs: FunctionType) -> FunctionType:
    """The same function, in which the name of their rotation means ours."""
    their_rotation = theirs.__globals__[_ROTARY]

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if cos.dtype != q.dtype or cos.shape[-1] != q.shape[-1]:  # only some of the coordinates are turned
            return their_rotation(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]
        return rotated(q, k, cos, sin, unsqueeze_dim)

    return given(_with_rotation(theirs, rotation))


@cache
def _from_one_product(theirs: FunctionType) -> FunctionType:
    """The same function, with queries, keys and values made by one product, and turned, where they are attended to.

    All else is still their code: it runs with projections and a rotation that do nothing.
    """
    otherwise, around = _turning(theirs), _with_rotation(theirs, _as_they_are)

    @given
    def forward(self: Any, *positional: Any, **options: Any) -> Any:
        attending = options.get("attending")
        projections = None
        if isinstance(attending, PackedLayers) and not positional:
            projections = one_product(self, *options["position_embeddings"])
        if projections is None:
            return otherwise(self, *positional, **options)
        states = options["hidden_states"]
        idle = copy.copy(self)
        for name in _PROJECTIONS:
            nothing = states.new_full((), torch.nan).expand(*states.shape[:-1], self.get_submodule(name).out_features)
            vars(idle)[name] = partial(_handing_out, nothing)
        return around(idle, **{**options, "attending": _OfStates(attending, states, projections)})

    return forward


class _OfStates:
    """Attends to what is made of a layer's states, whatever it is handed."""

    def __init__(self, attending: PackedLayers, states: Tensor, projections: Projections) -> None:
        self.longest = attending.longest
        self._attending, self._of = attending, (states, projections)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        return self._attending.attend_states(module, *self._of, scaling=scaling)


def one_product(layer: Any, cos: Tensor, sin: Tensor) -> Projections | None:
    """The three projections of a layer as one, for angles [1, L, D]; None where they cannot be.

    They can where the layers run nothing but a linear layer's own code (no adapter, and no hook that fetches weights), and
    where both numbers of a pair are turned by the same angle.
    """
    linears = [layer.q_proj, layer.k_proj, layer.v_proj]
    size, half = layer.head_dim, layer.head_dim // 2
    plain = all(
        type(linear) is nn.Linear
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
        for linear in linears
    )
    if not plain or len({linear.bias is None for linear in linears}) > 1 or cos.shape[-1] != size:
        return None
    if not all(torch.equal(angle[..., :half], angle[..., half:]) for angle in (cos, sin)):
        return None

    def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = (rows.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2) for rows in (q, k))
        return torch.cat([*pairs, v])

    return Projections(
        joined(*(linear.weight for linear in linears)),
        None if linears[0].bias is None else joined(*(linear.bias for linear in linears)),
        torch.complex(cos[0, :, :half], sin[0, :, :half]),
        layer.q_proj.out_features // size,
    )


def _same_from_one_product(layer: Any) -> bool:
    """Tried with two query heads for one of keys and values. What is large may be cut off by a layer, so that is tried."""
    if {name for name, _ in layer.named_children()} != {*_PROJECTIONS, "o_proj"} or "head_dim" not in vars(layer):
        return False
    size: int = layer.head_dim
    tried = small(layer, {"q_proj": (8, 2 * size), "k_proj": (8, size), "v_proj": (8, size), "o_proj": (2 * size, 8)})
    vars(tried)["scaling"] = 1e-3  # of large numbers
    cos = some(1, 3, size // 2).repeat(1, 1, 2)
    angles = cos, 0.5 + cos.flip(1)
    packed = packed_prompts([[0, 0, 0]], torch.device("cpu"))

    def outcome(function: Callable[..., Any], attending: PackedAttention, states: Tensor) -> Tensor:
        options = {"position_embeddings": angles, "attention_mask": None, "attending": attending}
        return function(tried, hidden_states=states, **options)[0]  # type: ignore[no-any-return]

    theirs = partial(outcome, type(layer).forward, PackedAttention(packed))
    return same(
        theirs, partial(outcome, _from_one_product(type(layer).forward), attending_to(packed)), 10 * some(1, 3, 8)
    )


def _handing_out(tensor: Tensor, hidden_states: Tensor) -> Tensor:
    return tensor


def _as_they_are(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return q, k


def _with_rotation(theirs: FunctionType, rotation: Callable[..., Any]) -> FunctionType:
    names = {**theirs.__globals__, _ROTARY: rotation}
    ours = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return ours
