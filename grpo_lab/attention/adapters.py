"""Linear layers with an adapter beside them, in fewer passes over memory: y = x W^T + b + s (x A^T) B^T.

peft computes the adapter in float32 in passes of its own: a copy of the inputs, the update, its scaling, the sum, and the
sum rounded. On a GPU, where those passes cost more than the products, the update here is added by the product itself, in
the inputs' dtype, with float32 sums; the adapter and its gradients stay float32.
"""

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grpo_lab.attention.trial import given, same, small, some


class Low(NamedTuple):
    """An adapter's scale * A [r, I] and B [V, r] in the dtype of the inputs, and the two that they were made of."""

    scaled_a: Tensor
    b: Tensor
    made_of: tuple[Tensor, Tensor]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, low: Low
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = rows @ low.scaled_a.T
        out = nn.functional.linear(rows, weight, bias).addmm_(inner, low.b.T)
        ctx.save_for_backward(rows, weight, inner)
        ctx.shape, ctx.scale, ctx.low = x.shape, scale, low
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inner = ctx.saved_tensors
        grad, low = grad.flatten(0, -2), ctx.low
        d_inner = grad @ low.b
        d_x = (grad @ weight).addmm_(d_inner, low.scaled_a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_a = _wide_product(d_inner.T, rows).mul_(ctx.scale)
        return d_x, None, None, d_a, _wide_product(grad.T, inner), None, None


def adapted_linear(
    x: Float[Tensor, "*n I"],
    weight: Float[Tensor, "V I"],
    bias: Float[Tensor, "V"] | None,
    a: Float[Tensor, "r I"],
    b: Float[Tensor, "V r"],
    scale: float,
    low: Low | None = None,
) -> Float[Tensor, "*n V"]:
    """x W^T + b + scale (x A^T) B^T, with gradients for x, A and B; the weight and its bias have none.

    `low`: A and B in the dtype of x, if they are there already.
    """
    low = low or Low((scale * a).to(x.dtype), b.to(x.dtype), (a, b))
    return _AdaptedLinear.apply(x, weight, bias, a, b, scale, low)  # type: ignore[no-any-return, no-untyped-call]


def _wide_product(one: Tensor, other: Tensor) -> Tensor:
    """A product as its sums are, float32, where the device gives them so."""
    if one.is_cuda and one.dtype == torch.bfloat16:
        return torch.mm(one, other, out_dtype=torch.float32)
    return (one @ other).to(torch.promote_types(one.dtype, torch.float32))


class Lows:
    """The adapters of a model in the dtype of its weights, written anew, all at once, whenever its decoder is called."""

    @torch.inference_mode(False)  # a model may first be used while it samples
    def __init__(self, modules: Sequence[Any], dtype: torch.dtype) -> None:
        names = [next(iter(module.lora_A)) for module in modules]
        self.a = [module.lora_A[name].weight for module, name in zip(modules, names, strict=True)]
        self.b = [module.lora_B[name].weight for module, name in zip(modules, names, strict=True)]
        self.scales = [float(module.scaling[name]) for module, name in zip(modules, names, strict=True)]
        self.scaled_a, self.low_b = ([torch.empty_like(t, dtype=dtype) for t in which] for which in (self.a, self.b))
        for module, scaled_a, low_b, *made_of in zip(modules, self.scaled_a, self.low_b, self.a, self.b, strict=True):
            module.low = Low(scaled_a, low_b, tuple(made_of))

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        scaled = torch._foreach_mul(self.a, self.scales)
        torch._foreach_copy_([*self.scaled_a, *self.low_b], [*scaled, *self.b])


def adapt(model: nn.Module, decoder: nn.Module) -> None:
    """Have a model's adapted layers compute as above, where they are of the usual kind and nothing but rounding changes.

    `decoder`: the module through which all of them are called.
    """
    hooks = decoder._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Lows)]:  # of the model that this is a copy of
        del hooks[key]
    same_as_peft: dict[tuple[Any, ...], bool] = {}
    given_to = []
    for module in model.modules():
        if _is_plain(module):
            (name,) = module.lora_A
            kind = type(module.lora_dropout[name]), module.scaling[name]
            if kind not in same_as_peft:
                same_as_peft[kind] = _same_as_peft(module)
            if same_as_peft[kind]:
                module.forward = MethodType(_forward, module)
                given_to.append(module)
    if given_to:
        decoder.register_forward_pre_hook(Lows(given_to, given_to[0].base_layer.weight.dtype))


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
    low = vars(self).get("low")
    if low is not None and (low.b.dtype != x.dtype or low.made_of[0] is not a or low.made_of[1] is not b):
        low = None
    return adapted_linear(x, base.weight, base.bias, a, b, self.scaling[name], low)


@torch.inference_mode(False)  # a model may first be used while it samples
@torch.enable_grad()
def _same_as_peft(module: Any) -> bool:
    """Compared on a copy with small layers."""
    (name,) = module.lora_A
    tried: Any = small(module, {"base_layer": (8, 6)})
    for inner, sizes in (("lora_A", (8, 2)), ("lora_B", (2, 6))):
        tried._modules[inner] = small(module._modules[inner], {name: sizes})
        tried._modules[inner][name].bias = None
    vars(tried).pop("low", None)
    return same(partial(type(module).forward, tried), partial(_forward, tried), some(3, 8))
