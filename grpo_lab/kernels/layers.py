"""Rotary positions, gated MLPs, joined attention, the gradient of RMS norms: each in one pass. Sums are float32 whatever the tensors' dtype."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_BLOCK = 1024
_PROGRAMS = 512  # of a norm's gradient, each of which adds up its rows' share of the weight's


@triton.jit
def _gated(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, x * tl.sigmoid(x) * u, mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    x = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    s = tl.sigmoid(x)
    tl.store(d_gate + at, g * u * s * (1 + x * (1 - s)), mask=inside)
    tl.store(d_up + at, g * x * s, mask=inside)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x, y, cos, sin, tokens, heads, x_batch, x_head, x_token, y_batch, y_head, y_token, c_batch, c_token, half,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    angle = batch * c_batch + token * c_token + column
    cos_1 = tl.load(cos + angle, mask=column < half).to(tl.float32)
    cos_2 = tl.load(cos + angle + half, mask=column < half).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=column < half).to(tl.float32)
    sin_2 = tl.load(sin + angle + half, mask=column < half).to(tl.float32)
    source = x + batch * x_batch + token * x_token + head * x_head + column
    x_1 = tl.load(source, mask=inside).to(tl.float32)
    x_2 = tl.load(source + half, mask=inside).to(tl.float32)
    target = y + batch * y_batch + token * y_token + head * y_head + column
    if BACKWARD:
        tl.store(target, x_1 * cos_1 + x_2 * sin_2, mask=inside)
        tl.store(target + half, x_2 * cos_2 - x_1 * sin_1, mask=inside)
    else:
        tl.store(target, x_1 * cos_1 - x_2 * sin_1, mask=inside)
        tl.store(target + half, x_2 * cos_2 + x_1 * sin_2, mask=inside)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    out, part, lse, part_lse, heads, size, stride, part_stride, HEADS: tl.constexpr, SIZE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.arange(0, SIZE)[None, :]
    one = tl.load(lse + head * stride + token, mask=head < heads, other=0.0)
    other = tl.load(part_lse + head * part_stride + token, mask=head < heads, other=0.0)
    higher = tl.maximum(one, other)
    tl.store(
        lse + head * stride + token,
        higher + tl.log(tl.exp(one - higher) + tl.exp(other - higher)),
        mask=head < heads,
    )
    share = tl.sigmoid(other - one)[:, None]
    at = (token * heads + head[:, None]) * size + column
    inside = (head[:, None] < heads) & (column < size)
    y = tl.load(out + at, mask=inside).to(tl.float32)
    z = tl.load(part + at, mask=inside).to(tl.float32)
    tl.store(out + at, y + share * (z - y), mask=inside)


def join_(
    out: Float[Tensor, "n H D"], part: Float[Tensor, "n H D"], lse: Float[Tensor, "H n"], part_lse: Float[Tensor, "H n"]
) -> None:
    """Join attention over some keys with that over others, in place: `out` and `lse` become those of all keys."""
    tokens, heads, size = out.shape
    assert out.is_contiguous()
    part = part.contiguous()
    _join[(tokens,)](
        out, part, lse, part_lse, heads, size, lse.stride(0), part_lse.stride(0),
        HEADS=triton.next_power_of_2(heads), SIZE=triton.next_power_of_2(size),
    )  # fmt: skip


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, scale, d_x, d_weight, rows, size, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    wide, inside = tl.full((1,), 1, tl.int64), column < size
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = wide * row * size + column
        s = tl.load(scale + row)
        n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * s
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(w * g * n, 0) / size
        tl.store(d_x + at, (w * g - n * mean) * s, mask=inside)
        total += g * n
    if WEIGHT:
        tl.store(d_weight + program * size + column, total, mask=inside)


def norm_backward(
    grad: Float[Tensor, "*n V"],
    x: Float[Tensor, "*n V"],
    weight: Float[Tensor, "V"],
    scale: Tensor,
    *,
    wants_weight: bool,
) -> tuple[Float[Tensor, "*n V"], Float[Tensor, "V"] | None]:
    """The gradients of w x s, s = 1 / sqrt(mean(x^2) + eps), with regard to x and, if it is wanted, w."""
    grad, x = grad.contiguous(), x.contiguous()
    size = x.shape[-1]
    rows = x.numel() // size
    programs = min(_PROGRAMS, rows)
    d_x = torch.empty_like(x)
    parts = x.new_empty(programs if wants_weight else 0, size, dtype=torch.float32)
    _norm_backward[(programs,)](
        grad, x, weight, scale, d_x, parts, rows, size, WEIGHT=wants_weight, BLOCK=triton.next_power_of_2(size)
    )
    return d_x, parts.sum(0).to(weight.dtype) if wants_weight else None


def gated(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = gate.new_empty(gate.shape)
    _gated[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK)
    return out


def gated_backward(
    grad: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The gradients with regard to `gate` and `up`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    grid = (triton.cdiv(gate.numel(), _BLOCK),)
    _gated_backward[grid](grad, gate, up, d_gate, d_up, gate.numel(), BLOCK=_BLOCK)
    return d_gate, d_up


def rotate(
    x: Float[Tensor, "B H L D"], cos: Tensor, sin: Tensor, *, backward: bool = False
) -> Float[Tensor, "B H L D"]:
    """Each pair (x_i, x_{i + D/2}) turned by the angle of its token, or `backward`: the gradient of that.

    cos and sin are [B or 1, 1, L, D].
    """
    batches, heads, tokens, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = x.new_empty(batches, tokens, heads, size).transpose(1, 2)  # as the projections and the attention have it
    _rotate[(batches * tokens,)](
        x, y, cos, sin, tokens, heads,
        x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(2), size // 2,
        BACKWARD=backward, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return y
