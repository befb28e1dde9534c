"""The head and the softmax in one, against the two apart."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from grpo_lab.algorithm import linear_logps as module
from grpo_lab.algorithm.linear_logps import linear_logps
from grpo_lab.algorithm.logps import entropy, selected_logps

ROWS = torch.tensor([2, 0, 0, 4, 1, 2, 2])  # row 3 is read by no token, row 2 by three
IDS = torch.tensor([5, 6, 0, 3, 3, 5, 1])
HELD = {"held": 1 << 20, "computed again": 0}


def inputs(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (7, 4), (7,))
    )
    tensors = [hidden, 2 * weight, offset if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_(True) for t in tensors]


def apart(hidden, weight, bias, *, temperature):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logps = selected_logps(logits[ROWS][None], IDS[None], temperature=temperature)[0]
    return logps, entropy(logits[None] / temperature)[0]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 14, 1 << 20])
def test_values_and_gradients_are_those_of_the_two_apart(monkeypatch, held, temperature, bias, chunk):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", chunk)
    monkeypatch.setattr(module, "_IN_CACHE", chunk)
    g_logps = torch.linspace(-1, 2, len(IDS), dtype=torch.float64)
    g_entropy = torch.linspace(3, -1, 5, dtype=torch.float64)
    results = []
    for function in (
        apart,
        lambda *args, temperature: linear_logps(*args[:3], IDS, ROWS, temperature=temperature, held=HELD[held]),
    ):
        tensors = inputs(bias=bias)
        logps, spread, *_ = function(*tensors, temperature=temperature)
        ((logps * g_logps).sum() + (spread * g_entropy).sum()).backward()
        results.append([logps, spread, *(t.grad for t in tensors if t is not None)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_the_largest_is_the_log_probability_of_the_first_choice():
    hidden, weight, bias = inputs()
    out = linear_logps(hidden, weight, bias, IDS, ROWS, temperature=0.7)
    logps = (torch.nn.functional.linear(hidden, weight, bias) / 0.7).log_softmax(-1)
    torch.testing.assert_close(out.largest, logps.amax(-1), atol=1e-12, rtol=1e-12)
    assert ((out.logps >= out.largest[ROWS]) == (logps.argmax(-1)[ROWS] == IDS)).all()
    assert not out.largest.requires_grad


def test_finite_differences_agree():
    def function(hidden, weight, bias):
        return tuple(linear_logps(hidden, weight, bias, IDS, ROWS, temperature=0.9, held=0))

    assert torch.autograd.gradcheck(function, inputs())


def test_only_what_learns_gets_a_gradient():
    hidden, weight, bias = inputs()
    weight.requires_grad_(False)
    linear_logps(hidden, weight, bias, IDS, ROWS).logps.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_without_a_gradient_no_logits_are_kept():
    with torch.no_grad():
        out = linear_logps(*inputs(), IDS, ROWS)
    assert out.logps.grad_fn is None


def test_half_precision_is_computed_in_float32_and_its_gradient_is_half_precision():
    hidden, weight, bias = inputs(torch.bfloat16)
    out = linear_logps(hidden, weight, bias, IDS, ROWS, temperature=0.7)
    assert out.logps.dtype == out.entropy.dtype == torch.float32
    expected, _ = apart(hidden, weight, bias, temperature=0.7)
    torch.testing.assert_close(out.logps, expected)
    out.logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_large_logits_do_not_overflow_and_a_token_without_mass_harms_nothing():
    hidden = torch.tensor([[1e4, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.9999, 0.0], [-torch.inf, 0.0]])
    out = linear_logps(hidden, weight, None, torch.tensor([0, 1]), torch.tensor([0, 0]))
    torch.testing.assert_close(out.logps, torch.tensor([-0.3132617, -1.3132617]), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.entropy, torch.tensor([0.5822031]), atol=1e-3, rtol=0)


def test_a_temperature_of_zero_is_an_error():
    with pytest.raises(ValueError, match="must be above 0"):
        linear_logps(*inputs(), IDS, ROWS, temperature=0.0)


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that was made inside."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(t.untyped_storage().nbytes() for t in tree_iter(out) if torch.is_tensor(t))])
        return out


@pytest.mark.parametrize("gradient", [True, False])
def test_there_are_never_more_logits_at_once_than_the_stated_bound(monkeypatch, gradient):
    rows, vocabulary, bound = 40, 50, 200  # four rows of logits at a time
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", bound)
    hidden, weight = torch.randn(rows, 3, requires_grad=gradient), torch.randn(vocabulary, 3, requires_grad=gradient)
    at = torch.arange(rows)
    with Largest() as largest:
        logps = linear_logps(hidden, weight, None, at, at, held=rows * vocabulary - 1).logps
        if gradient:
            logps.sum().backward()
    assert 4 * vocabulary <= largest.nbytes <= 4 * bound
