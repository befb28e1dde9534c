"""From hidden states to log-probabilities on a GPU: `linear_logps` with each logit read once, or read and written once."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from grpo_lab.algorithm.linear_logps import HeadGradients, LogpsAndSpread, chunks

# The most logits kept for the backward pass, in the model's dtype (bfloat16: 4 GiB); beyond it they are computed again.
LOGITS_HELD = 1 << 31
_LOGITS_AT_ONCE = 1 << 29  # in one product
_BLOCK = 4096


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    logits, vocabulary, temperature, starts, ids, log_total, entropy, largest, chosen, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    # the running maximum, and sums of exp(z - maximum) and of (z - maximum) exp(z - maximum)
    top, total, weighted = -1e30, 0.0, 0.0
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32) / temperature
        higher = tl.maximum(top, tl.max(z, 0))
        below = z - higher
        exp = tl.exp(below)
        shrunk = tl.exp(top - higher)
        # -inf logits have no mass: 0 * -inf would be nan
        weighted = (weighted + total * (top - higher)) * shrunk + tl.sum(exp * tl.maximum(below, -1e30), 0)
        total = total * shrunk + tl.sum(exp, 0)
        top = higher
    tl.store(log_total + row, top + tl.log(total))
    tl.store(entropy + row, tl.log(total) - weighted / total)
    tl.store(largest + row, -tl.log(total))
    for token in range(tl.load(starts + row), tl.load(starts + row + 1)):
        z = tl.load(logits + tl.load(ids + token)).to(tl.float32) / temperature
        tl.store(chosen + token, z - top - tl.log(total))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, vocabulary, temperature, starts, ids, log_total, entropy, grads, row_grad, entropy_grad,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * vocabulary
    z = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32) / temperature
    logp = z - tl.load(log_total + row)
    p = tl.exp(logp)
    d = -tl.load(row_grad + row) * p
    if HAS_ENTROPY:  # dH/dlogit = -p (log p + H)
        d -= tl.load(entropy_grad + row) * p * (tl.maximum(logp, -1e30) + tl.load(entropy + row))
    for token in range(tl.load(starts + row), tl.load(starts + row + 1)):
        d += tl.where(column == tl.load(ids + token), tl.load(grads + token), 0.0)
    tl.store(logits + column, d / temperature, mask=column < vocabulary)


def linear_logps(
    hidden: Float[Tensor, "R E"],
    weight: Float[Tensor, "V E"],
    bias: Float[Tensor, "V"] | None,
    ids: Int[Tensor, "K"],
    rows: Int[Tensor, "K"],
    *,
    temperature: float = 1.0,
) -> LogpsAndSpread:
    """As `algorithm.linear_logps`, for tensors on a GPU. Sums and exponentials are float32.

    What is kept for the backward pass are the logits [R, V], at most `LOGITS_HELD` of them; otherwise none.
    """
    return LogpsAndSpread(*_LinearLogps.apply(hidden, weight, bias, ids, rows, temperature))  # type: ignore[no-untyped-call]


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        rows: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, vocabulary = len(hidden), len(weight)
        keep = any(ctx.needs_input_grad[:3]) and num_rows * vocabulary <= LOGITS_HELD
        order = rows.argsort(stable=True)
        ids = ids[order]
        # tokens starts[r] to starts[r + 1] are read from row r
        starts = torch.searchsorted(rows[order], torch.arange(num_rows + 1, device=rows.device))
        log_total, entropy, largest = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
        chosen = hidden.new_empty(len(ids), dtype=torch.float32)
        kept = []
        for start, stop in chunks(num_rows, vocabulary, None, _LOGITS_AT_ONCE):
            z = torch.nn.functional.linear(hidden[start:stop], weight, bias)
            _statistics[(stop - start,)](
                z, vocabulary, temperature, starts[start:], ids,
                log_total[start:], entropy[start:], largest[start:], chosen, BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
            if keep:
                kept.append(z)
        ctx.save_for_backward(hidden, weight, bias, ids, starts, log_total, entropy, *kept)
        ctx.temperature, ctx.order = temperature, order
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(largest)
        return torch.empty_like(chosen).index_copy_(0, order, chosen), entropy, largest

    @staticmethod
    def backward(
        ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, starts, log_total, entropy, *kept = ctx.saved_tensors
        num_rows, vocabulary = len(hidden), len(weight)
        grads = log_total.new_zeros(len(ids)) if grad_logps is None else grad_logps[ctx.order]
        sums = torch.cat([grads.new_zeros(1, dtype=torch.float64), grads.cumsum(0, dtype=torch.float64)])
        row_grad = (sums[starts[1:]] - sums[starts[:-1]]).float()
        entropy_grad = entropy if grad_entropy is None else grad_entropy.contiguous()
        head = HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for number, (start, stop) in enumerate(chunks(num_rows, vocabulary, None, _LOGITS_AT_ONCE)):
            z = kept[number] if kept else torch.nn.functional.linear(hidden[start:stop], weight, bias)
            _gradient[(stop - start, triton.cdiv(vocabulary, _BLOCK))](
                z, vocabulary, ctx.temperature, starts[start:], ids, log_total[start:], entropy[start:], grads,
                row_grad[start:], entropy_grad[start:], HAS_ENTROPY=grad_entropy is not None, BLOCK=_BLOCK,
            )  # fmt: skip
            head.add(start, stop, z)
        return *head, None, None, None
