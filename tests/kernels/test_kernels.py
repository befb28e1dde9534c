"""The Triton kernels against the CPU's functions: on a GPU where there is one, else in Triton's interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds; bash scripts/test_kernels.sh installs it")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":  # read when torch imports Triton
    pytest.skip(
        "no GPU; TRITON_INTERPRET=1 interprets kernels, as bash scripts/test_kernels.sh does", allow_module_level=True
    )

from grpo_lab.algorithm.linear_logps import linear_logps
from grpo_lab.attention import fused, rotary
from grpo_lab.kernels import head, layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)
ROWS, IDS = [3, 0, 1, 0, 0, 5, 7, 8, 2], [1, 299, 4, 4, 7, 256, 63, 64, 0]  # row 0 has three tokens, two rows none


def some(*shape, dtype=torch.float32, seed=0):
    """The same numbers, exactly those of `dtype`, in float32 on the CPU and in `dtype` on the device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.float(), values.to(DEVICE)


@dtypes
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("held", [1 << 31, 0])
@pytest.mark.parametrize("at_once", [1 << 29, 1000])
def test_log_probs_entropies_and_gradients_are_the_cpu_s(monkeypatch, dtype, with_entropy, held, at_once):
    monkeypatch.setattr(head, "LOGITS_HELD", held)
    monkeypatch.setattr(head, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(head, "_BLOCK", 64)
    found = []
    for place, function in enumerate((linear_logps, head.linear_logps)):
        given = [some(*shape, dtype=dtype, seed=seed)[place] for seed, shape in enumerate([(9, 16), (300, 16), (300,)])]
        given = [tensor.requires_grad_() for tensor in given]
        ids, rows = (torch.tensor(values, device=given[0].device) for values in (IDS, ROWS))
        out = function(*given, ids, rows, temperature=0.7)
        weights = torch.linspace(-1, 1, 9, device=given[0].device)
        total = (out.logps * weights).sum() + with_entropy * (out.entropy * weights.flip(0)).sum()
        found.append([t.detach().float().cpu() for t in (*out, *torch.autograd.grad(total, given))])
    for ours, expected in zip(found[1], found[0], strict=True):
        size = float(expected.abs().max())
        torch.testing.assert_close(ours / size, expected / size, **CLOSE[dtype])


def test_a_logit_of_minus_infinity_has_no_mass_and_one_that_is_not_finite_is_seen():
    hidden = torch.eye(2, device=DEVICE)
    weight = torch.tensor([[1.0, 0.0], [-torch.inf, 0.0], [2.0, 0.0]], device=DEVICE)
    bias = torch.zeros(3, device=DEVICE)
    weight[1] = 0.0
    bias[1] = -torch.inf
    out = head.linear_logps(
        hidden, weight, bias, torch.tensor([0, 2], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    )
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).log_softmax(-1)
    torch.testing.assert_close(out.logps.cpu(), expected[[0, 1], [0, 1]])
    torch.testing.assert_close(out.entropy.cpu(), -(expected.exp() * expected).sum(-1))
    bias[0] = torch.nan
    out = head.linear_logps(
        hidden, weight, bias, torch.tensor([0, 2], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    )
    assert out.logps.isnan().all()


@dtypes
def test_gated_and_its_gradients_are_the_cpu_s(dtype):
    (gate, gate_), (up, up_), (grad, grad_) = (some(7, 5, 300, dtype=dtype, seed=seed) for seed in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    expected = fused.gated(gate, up)
    torch.testing.assert_close(layers.gated(gate_, up_).float().cpu(), expected, **CLOSE[dtype])
    gradients = torch.autograd.grad(expected, [gate, up], grad)
    for ours, theirs in zip(layers.gated_backward(grad_, gate_, up_), gradients, strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, **CLOSE[dtype])


@dtypes
def test_attention_over_two_sets_of_keys_is_joined_in_place(dtype):
    """Also where one of them has all the weight; the log-sum-exps are a part of a wider table."""
    (out, out_), (part, part_) = (some(4, 3, 12, dtype=dtype, seed=seed) for seed in range(2))
    (wide, wide_), (other, other_) = some(3, 7, seed=2), some(3, 4, seed=3)
    for each in (other, other_):
        each[0, 0], each[1, 1] = 90.0, -90.0
    share = torch.sigmoid(other - wide[:, 3:]).T[..., None]
    expected = out + share * (part - out)
    lse = torch.cat([wide[:, :3], torch.logaddexp(wide[:, 3:], other)], 1)
    layers.join_(out_, part_, wide_[:, 3:], other_)
    torch.testing.assert_close(out_.float().cpu(), expected, **CLOSE[dtype])
    torch.testing.assert_close(wide_.cpu(), lse)


@dtypes
@pytest.mark.parametrize("programs", [3, 512])
def test_the_gradient_of_a_norm_is_the_cpu_s(monkeypatch, dtype, programs):
    """Also where a program adds up several rows; 300 columns are no power of two."""
    monkeypatch.setattr(layers, "_PROGRAMS", programs)
    (x, x_), (grad, grad_) = (some(2, 5, 300, dtype=dtype, seed=seed) for seed in range(2))
    weight, weight_ = some(300, dtype=dtype, seed=2)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(fused.rms_norm(x, weight, 1e-6), [x, weight], grad)
    scale = (x_.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    found = layers.norm_backward(grad_, x_, weight_, scale, wants_weight=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, **CLOSE[dtype])
    assert layers.norm_backward(grad_, x_, weight_, scale, wants_weight=False)[1] is None


@dtypes
@pytest.mark.parametrize("batches", [1, 2])
def test_rotation_and_its_gradient_are_the_cpu_s(dtype, batches):
    """With one table of angles for all rows, or one for each; 3 heads, of 12 coordinates: neither a power of two."""
    (x, x_), (grad, grad_) = (some(2, 5, 3, 12, dtype=dtype, seed=seed) for seed in range(2))
    (cos, cos_), (sin, sin_) = (some(batches, 1, 5, 12, dtype=dtype, seed=seed) for seed in (2, 3))
    x, x_, grad, grad_ = (tensor.transpose(1, 2) for tensor in (x, x_, grad, grad_))
    x = x.requires_grad_()
    expected = rotary._Rotation.apply(x, cos, sin)
    ours = layers.rotate(x_, cos_, sin_)
    assert ours.stride() == x_.stride()  # as the projection made it, and as attention wants it
    torch.testing.assert_close(ours.float().cpu(), expected, **CLOSE[dtype])
    (gradient,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(layers.rotate(grad_, cos_, sin_, backward=True).float().cpu(), gradient, **CLOSE[dtype])
