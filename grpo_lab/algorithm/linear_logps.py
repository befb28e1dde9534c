"""From hidden states to log-probabilities: the LM head and the softmax in one, so that logits are held once or never."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The most logits held for the backward pass (float32: 256 MiB); beyond it they are computed again there.
LOGITS_HELD = 1 << 26
# The most logits in one product when they are not held, and the most that elementwise passes touch at once (cache).
_LOGITS_AT_ONCE = 1 << 23
_IN_CACHE = 1 << 18


class LogpsAndSpread(NamedTuple):
    """Log-probabilities of K tokens, and for each of the R places they were predicted from its entropy and the
    log-probability of the most probable token there (without gradient). In nats."""

    logps: Float[Tensor, "K"]
    entropy: Float[Tensor, "R"]
    largest: Float[Tensor, "R"]


def linear_logps(
    hidden: Float[Tensor, "R E"],
    weight: Float[Tensor, "V E"],
    bias: Float[Tensor, "V"] | None,
    ids: Int[Tensor, "K"],
    rows: Int[Tensor, "K"],
    *,
    temperature: float = 1.0,
    held: int = LOGITS_HELD,
) -> LogpsAndSpread:
    """log softmax((hidden @ weight.T + bias) / temperature)[rows, ids], and the entropy of each row.

    Several tokens may be read from one row. What is kept for the backward pass is one float32 matrix [R, V] of
    exp(logit - largest), in place of the logits, if it has at most `held` entries; otherwise none, and the products
    are done again in the backward pass, in chunks. Sums and exponentials are float32 whatever the model's dtype.

    >>> eye = torch.eye(2)
    >>> out = linear_logps(torch.tensor([[2.0, 0.0]]), eye, None, torch.tensor([0, 1]), torch.tensor([0, 0]), temperature=2.0)
    >>> out.logps
    tensor([-0.3133, -1.3133])
    >>> out.entropy
    tensor([0.5822])
    """
    if temperature <= 0:
        raise ValueError(f"linear_logps: temperature is {temperature}; it must be above 0")
    return LogpsAndSpread(*_LinearLogps.apply(hidden, weight, bias, ids, rows, temperature, held))  # type: ignore[no-untyped-call]


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
        held: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, vocabulary = len(hidden), len(weight)
        wants_gradient = any(ctx.needs_input_grad[:3])
        keep = wants_gradient and num_rows * vocabulary <= held
        order = rows.argsort(stable=True)
        ids, rows = ids[order], rows[order]  # tokens in the order of their rows, so that each chunk has a run of them
        wide = torch.promote_types(hidden.dtype, torch.float32)
        chosen = hidden.new_empty(len(ids), dtype=wide)
        total, entropy = (hidden.new_empty(num_rows, dtype=wide) for _ in range(2))
        exps = []
        for start, stop in chunks(num_rows, vocabulary, num_rows if keep else None):
            z = _scaled_logits(hidden[start:stop], weight, bias, temperature)
            first, last = _run(rows, start, stop)
            for a, b in chunks(stop - start, vocabulary, None, _IN_CACHE):
                part = z[a:b]
                part -= part.amax(-1, keepdim=True)
            chosen[first:last] = z[rows[first:last] - start, ids[first:last]]
            for a, b in chunks(stop - start, vocabulary, None, _IN_CACHE):
                part = z[a:b]
                exp = part.exp()
                total[start + a : start + b] = exp.sum(-1)
                # -inf logits have no mass: 0 * -inf would be nan
                entropy[start + a : start + b] = torch.linalg.vecdot(exp, part.clamp_(min=-1e30))
                part.copy_(exp)
            if keep:
                exps.append(z)
        entropy = total.log() - entropy / total
        ctx.save_for_backward(hidden, weight, bias, ids, rows, total, entropy, *exps)
        ctx.temperature, ctx.order = temperature, order
        ctx.set_materialize_grads(False)
        logps, largest = chosen - total.log()[rows], -total.log()
        ctx.mark_non_differentiable(largest)
        return torch.empty_like(logps).index_copy_(0, order, logps), entropy, largest

    @staticmethod
    def backward(
        ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, rows, total, entropy, *exps = ctx.saved_tensors
        num_rows, vocabulary = len(hidden), len(weight)
        grad_logps = total.new_zeros(len(ids)) if grad_logps is None else grad_logps[ctx.order]
        per_row = total.new_zeros(num_rows).index_add_(0, rows, grad_logps)
        grads = HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for start, stop in chunks(num_rows, vocabulary, num_rows if exps else None):
            if exps:
                z = exps[0]
            else:
                z = _scaled_logits(hidden[start:stop], weight, bias, ctx.temperature)
                z -= z.amax(-1, keepdim=True)
                z.exp_()
            scale = total[start:stop, None]
            for a, b in chunks(stop - start, vocabulary, None, _IN_CACHE):
                part = z[a:b].div_(scale[a:b])  # probabilities
                factor = -per_row[start + a : start + b, None]
                if grad_entropy is not None:  # dH/dlogit = -p (log p + H)
                    here = slice(start + a, start + b)
                    surprise = torch.xlogy(part, part).add_(part * entropy[here, None])
                    part.mul_(factor).sub_(surprise.mul_(grad_entropy[here, None]))
                else:
                    part.mul_(factor)
            first, last = _run(rows, start, stop)
            z.index_put_((rows[first:last] - start, ids[first:last]), grad_logps[first:last], accumulate=True)
            if ctx.temperature != 1.0:
                z /= ctx.temperature
            z = z.to(weight.dtype)
            grads.add(start, stop, z)
        return *grads, None, None, None, None


class HeadGradients:
    """The gradients of hidden @ weight.T + bias with regard to all three, of which some are wanted, from those of its rows."""

    def __init__(self, wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._hidden, self._weight = hidden, weight
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight) if wanted[1] else None
        self.bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.hidden, self.weight, self.bias))

    def add(self, start: int, stop: int, d_logits: Float[Tensor, "n V"]) -> None:
        """Add what the gradient of rows start to stop gives."""
        if self.hidden is not None:
            self.hidden[start:stop] = d_logits @ self._weight
        if self.weight is not None:
            self.weight.addmm_(d_logits.T, self._hidden[start:stop])
        if self.bias is not None:
            self.bias += d_logits.sum(0)


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # bfloat16 would round the quotient; the sampler does not
    return z if temperature == 1.0 else z.div_(temperature)


def chunks(num_rows: int, vocabulary: int, size: int | None, at_once: int | None = None) -> list[tuple[int, int]]:
    """Runs of rows, `size` each or as many as `at_once` logits allow."""
    step = size or max(1, (at_once or _LOGITS_AT_ONCE) // vocabulary)
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _run(rows: Tensor, start: int, stop: int) -> tuple[int, int]:
    """Which tokens (sorted by row) are predicted from rows start..stop."""
    first, last = torch.searchsorted(rows, torch.tensor([start, stop], device=rows.device)).tolist()
    return first, last
