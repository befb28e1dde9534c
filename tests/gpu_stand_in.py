"""The GPU's flash kernels in plain torch, so that what is built on them is tested where there is no GPU."""

import torch
from torch import Tensor

from grpo_lab.attention.varlen import Runs


def _pieces(queries: Runs, keys: Runs) -> list[tuple[slice, slice]]:
    starts = zip(queries.starts.tolist(), keys.starts.tolist(), strict=True)
    ends = list(starts)
    return [(slice(q, end_q), slice(k, end_k)) for (q, k), (end_q, end_k) in zip(ends, ends[1:], strict=False)]


def _scores(q: Tensor, k: Tensor, *, causal: bool, scaling: float) -> Tensor:
    """[H, m, n]"""
    scores = torch.einsum("mhd,nhd->hmn", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scaling
    above = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf) if causal else scores


def flash(q, k, v, queries, keys, *, causal, scaling):
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for rows, columns in _pieces(queries, keys):
        assert rows.stop - rows.start <= queries.longest
        assert columns.stop - columns.start <= keys.longest
        scores = _scores(q[rows], k[columns], causal=causal, scaling=scaling)
        lse[:, rows] = scores.logsumexp(-1)
        values = v[columns].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), values)
    return out, lse


def flash_backward(grad, q, k, v, out, lse, queries, keys, *, causal, scaling):
    """P = exp(S - lse), dS = P (dP - rowsum(dO O)): Algorithm 2 of FlashAttention-2 (arXiv:2307.08691)."""
    assert grad.is_contiguous()
    assert lse.is_contiguous()
    repeats = q.shape[1] // k.shape[1]
    d_q, d_k, d_v = torch.full_like(q, torch.nan), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns in _pieces(queries, keys):
        p = (_scores(q[rows], k[columns], causal=causal, scaling=scaling) - lse[:, rows, None]).exp()
        d_p = torch.einsum("mhd,nhd->hmn", grad[rows], v[columns].repeat_interleave(repeats, 1))
        d_s = p * (d_p - (grad[rows] * out[rows]).sum(-1).T[..., None]) * scaling
        d_q[rows] = torch.einsum("hmn,nhd->mhd", d_s, k[columns].repeat_interleave(repeats, 1))
        d_k[columns] += torch.einsum("hmn,mhd->nhd", d_s, q[rows]).unflatten(1, (-1, repeats)).sum(2)
        d_v[columns] += torch.einsum("hmn,mhd->nhd", p, grad[rows]).unflatten(1, (-1, repeats)).sum(2)
    return d_q, d_k, d_v


def flash_cached(q, k, v, queries, keys, used, *, scaling):
    out = torch.full_like(q, torch.nan)
    for (rows, columns), count in zip(_pieces(queries, keys), used.tolist(), strict=True):
        seen = slice(columns.start, columns.start + count)
        assert seen.stop <= columns.stop
        scores = _scores(q[rows], k[seen], causal=False, scaling=scaling)
        out[rows] = torch.einsum(
            "hmn,nhd->mhd", scores.softmax(-1), v[seen].repeat_interleave(q.shape[1] // k.shape[1], 1)
        )
    return out
