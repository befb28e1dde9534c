"""pass@k: how often at least one of k answers is right."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def pass_at_k(correct: Bool[Tensor, "P n"], k: int) -> Float[Tensor, "P"]:
    """The chance that k answers drawn from the n at hand, without putting back, hold a right one; for each prompt.

    1 - C(n-c, k) / C(n, k),  c = number of right answers       Chen et al. 2021 (arXiv:2107.03374)

    Unbiased for the chance that k fresh samples hold a right one, unlike 1 - (1 - c/n)^k. Computed as
    1 - prod_{i=n-c+1..n} (1 - k/i), which has no large binomials.

    Raises:
        ValueError: k is not between 1 and n; more than n answers cannot be drawn.

    >>> pass_at_k(torch.tensor([[True, False, False, False], [True, True, True, False]]), k=2)
    tensor([0.5000, 1.0000])
    """
    num_answers = correct.shape[1]
    if not 1 <= k <= num_answers:
        raise ValueError(f"pass_at_k: k is {k}, with {num_answers} answers per prompt; use 1 to {num_answers}")
    num_wrong = num_answers - correct.sum(dim=1, keepdim=True)
    i = torch.arange(1, num_answers + 1, dtype=torch.float64, device=correct.device)
    # With fewer than k wrong answers the product holds i == k, a factor of exactly 0.
    return (1 - torch.where(i > num_wrong, 1 - k / i, 1.0).prod(dim=1)).float()
