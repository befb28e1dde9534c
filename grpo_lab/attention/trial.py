"""Whether a layer would compute the same in another way: tried with a few numbers, values and gradients."""

import copy
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# How far values and gradients may differ from the layer's own, as a share of the largest.
_TOLERANCE = 1e-5

_GIVEN: set[Callable[..., Any]] = set()


def given(function: FunctionType) -> FunctionType:
    """Mark a function that layers are given as their `forward`.

    Its name is that, too: a bound method is pickled as its object's attribute of that name, so that a layer which is sent
    to another process arrives with its own way, and is tried there anew.
    """
    function.__name__ = "forward"
    _GIVEN.add(function)
    return function


def is_given(function: Callable[..., Any]) -> bool:
    """Whether a function is marked so."""
    return function in _GIVEN


def same(theirs: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether two functions give the same values, and the same gradients with regard to the inputs."""
    results = []
    try:
        for function in (theirs, ours):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            made = function(*leaves)
            outputs = [made] if isinstance(made, Tensor) else list(made)
            grads = torch.autograd.grad(outputs, leaves, [some(*output.shape) for output in outputs])
            results.append([*outputs, *grads])
    except (TypeError, ValueError, RuntimeError):  # called in another way, or made of other parts
        return False
    pairs = zip(*results, strict=True)
    return all(bool((one - other).abs().max() <= _TOLERANCE * one.abs().max()) for one, other in pairs)


def some(*shape: int) -> Tensor:
    """Numbers to try with, always the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def small(module: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """The same code with small linear layers, so that trying it costs nothing whatever the model's size and device."""
    smaller = copy.copy(module)
    linears = {name: nn.Linear(*of, device="meta") for name, of in sizes.items()}
    for linear in linears.values():
        linear.weight, linear.bias = (nn.Parameter(some(*p.shape)) for p in (linear.weight, linear.bias))
    smaller._modules = {**module._modules, **linears}
    return smaller
