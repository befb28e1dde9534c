"""A control: the policy learns from rewards that say nothing about its answers. If it improves all the same, the gain did
not come from the reward."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.types import Scores


def controlled(scores: Scores, kind: Literal["random", "shuffled"] | None, *, seed: int) -> Scores:
    """The scores with other totals to learn from; terms and `real_total` keep what the answers were worth.

    `random` draws every total uniformly from [0, 1); `shuffled` deals the real totals out anew over all completions of the
    step, which keeps their distribution. Both are functions of the seed. A completion without a total stays without.
    """
    if kind is None:
        return scores
    generator = torch.Generator().manual_seed(seed)
    change = {"random": random_totals, "shuffled": shuffled_totals}[kind]
    return replace(scores, total=change(scores.total, generator), real_total=scores.total)


def random_totals(total: Float[Tensor, "P G"], generator: torch.Generator) -> Float[Tensor, "P G"]:
    """A draw for every completion, whether scored or not, so that a draw belongs to its place."""
    drawn = torch.rand(total.shape, generator=generator)
    return torch.where(total.isnan(), total, drawn)


def shuffled_totals(total: Float[Tensor, "P G"], generator: torch.Generator) -> Float[Tensor, "P G"]:
    """The same totals, each at another scored completion."""
    is_scored = ~total.isnan()
    values = total[is_scored]
    order = torch.randperm(len(values), generator=generator)
    return total.masked_scatter(is_scored, values[order])
