"""Linear layers with an adapter beside them, in fewer passes over memory: y = x W^T + b + s (x A^T) B^T.

peft computes the adapter in float32 in passes of its own: a copy of the inputs, the update, its scaling, the sum, and the
sum rounded. On a GPU, where those passes cost more than the products, the update here is added by the product itself, in
the inputs' dtype, with float32 sums; the adapter and its gradients stay float32.
"""

import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grpo_lab.attention.fused import given, same, some


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)
        down, up = a.to(x.dtype), b.to(x.dtype)
        inner = rows @ down.T
        out = nn.functional.linear(rows, weight, bias).addmm_(inner, up.T, alpha=scale)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.shape, ctx.scale, ctx.dtype = x.shape, scale, a.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        d_inner = (grad @ up).mul_(ctx.scale)
        d_x = (grad @ weight).addmm_(d_inner, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_a = _product(d_inner.T, rows, ctx.dtype)
        d_b = _product(grad.T, inner, ctx.dtype).mul_(ctx.scale)
        return d_x, None, None, d_a, d_b, None


def adapted_linear(
    x: Float[Tensor, "*n I"],
    weight: Float[Tensor, "V I"],
    bias: Float[Tensor, "V"] | None,
    a: Float[Tensor, "r I"],
    b: Float[Tensor, "V r"],
    scale: float,
) -> Float[Tensor, "*n V"]:
    """x W^T + b + scale (x A^T) B^T, with gradients for x, A and B; the weight and its bias have none."""
    return _AdaptedLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-any-return, no-untyped-call]


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """A product as its sums are, where the device has it so."""
    if one.is_cuda and one.dtype != dtype == torch.float32:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


def adapt(model: nn.Module) -> None:
    """Have a model's adapted layers compute as above, where they are of the usual kind and nothing but rounding changes."""
    same: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        if _is_plain(module):
            (name,) = module.lora_A
            kind = type(module.lora_dropout[name]), module.scaling[name]
            if kind not in same:
                same[kind] = _same_as_peft(module)
            if same[kind]:
                module.forward = MethodType(_forward, module)


def _is_plain(module: Any) -> bool:
    """Whether this is peft's linear layer with one usual adapter beside frozen weights of the usual kind."""
    if (type(module).__module__, type(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return False
    linears = [*module.lora_A.values(), *module.lora_B.values()]
    frozen = not any(parameter.requires_grad for parameter in module.base_layer.parameters())
    one = len(module.lora_A) == 1 and not len(module.lora_variant) and all(linear.bias is None for linear in linears)
    return frozen and one and type(module.base_layer) is nn.Linear


@given
def _forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    (name,) = self.lora_A
    dropout = self.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    if args or options or drops or self.disable_adapters or self.merged or list(self.active_adapters) != [name]:
        return type(self).forward(self, x, *args, **options)  # type: ignore[no-any-return]
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    return adapted_linear(x, base.weight, base.bias, a, b, self.scaling[name])


@torch.inference_mode(False)  # a model may first be used while it samples
@torch.enable_grad()
def _same_as_peft(module: Any) -> bool:
    """Compared on a copy with small layers, which costs nothing whatever the model's size and device."""
    (name,) = module.lora_A
    small = copy.copy(module)
    linears = {"base_layer": nn.Linear(8, 6), "lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 6)}
    for linear in linears.values():
        linear.weight, linear.bias = (
            nn.Parameter(some(*p.shape), requires_grad=False) for p in (linear.weight, linear.bias)
        )
    for inner in ("lora_A", "lora_B"):
        linears[inner].bias = None
        linears[inner] = nn.ModuleDict({name: linears[inner]})  # type: ignore[assignment]
    small._modules = {**module._modules, **linears}
    return same(partial(type(module).forward, small), partial(_forward, small), some(3, 8))
