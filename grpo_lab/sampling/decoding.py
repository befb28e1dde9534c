"""From logits to a token: temperature, top_k, top_p and min_p, then inverse-CDF sampling with given noise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_lab.recipe.schema import Sampling
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Completion, Example, Group, Policy

Listener = Callable[[Mapping[int, Completion]], None]
"""Told after every token which answers ended with it (often none), by their row: group * num_generations + index."""

_BLOCK = 64  # tokens whose masses are summed before a running sum is taken


@dataclass(frozen=True)
class Decoding:
    """How one token is drawn. Temperature 0 is greedy; max_rows bounds the completions decoded at once."""

    max_completion_length: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    max_rows: int | None = None

    @classmethod
    def of(cls, sampling: Sampling) -> "Decoding":
        """The decoding that a recipe's sampling block asks for."""
        return cls(
            sampling.max_completion_length,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.max_rows,
        )

    def greedy(self) -> "Decoding":
        """The same limits, always the likeliest token."""
        return Decoding(self.max_completion_length, temperature=0.0, max_rows=self.max_rows)


@runtime_checkable
class Sampler(Protocol):
    """Draws completions. `seed` fixes all noise; group i's noise depends on (seed, i) only, not on batching.

    Groups are counted from `first_group`: a process that samples some groups of a step draws what one would that
    samples them all.
    """

    def sample(
        self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0
    ) -> list[Group]: ...

    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights after an update."""
        ...


@runtime_checkable
class TellingSampler(Sampler, Protocol):
    """A sampler that can tell of each answer as it ends, while it goes on with the others."""

    def sample_telling(
        self, examples: list[Example], listener: Listener, *, num_generations: int, seed: int, first_group: int = 0
    ) -> list[Group]:
        """The groups of `sample`, with the completions that `listener` was told of."""
        ...


def draw(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, "N"], decoding: Decoding
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """One token for each row, and its log-prob (nats) under the distribution that was sampled; greedy: 0."""
    if decoding.temperature == 0.0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    kept = filtered(logits, decoding)
    highest = kept.amax(-1, keepdim=True)
    masses = (kept - highest).exp_()
    token = inverse_cdf(masses, uniform)
    chosen = kept.gather(-1, token[:, None]) - highest
    return token, chosen.squeeze(-1) - masses.sum(-1).log()


def filtered(logits: Float[Tensor, "N V"], decoding: Decoding) -> Float[Tensor, "N V"]:
    """Logits whose softmax is the distribution that is really sampled; -inf for tokens that were filtered out.

    The order is transformers': temperature, top_k, top_p, min_p, each over what the ones before left.
    """
    logits = logits.float()
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    if decoding.top_k is not None and decoding.top_k < logits.shape[-1]:
        floor = logits.topk(decoding.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if decoding.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        mass_before = probs.cumsum(-1) - probs
        dropped = (mass_before >= decoding.top_p).scatter(-1, order, mass_before >= decoding.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    if decoding.min_p > 0.0:
        floor = logits.max(-1, keepdim=True).values + torch.log(torch.tensor(decoding.min_p))
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


def inverse_cdf(masses: Float[Tensor, "N V"], uniform: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
    """The token at which the cumulative mass passes the share `uniform` (in [0, 1)) of the whole.

    Masses need not add up to 1. Found in two steps, a block of tokens and then a token in it: a running sum over a whole
    vocabulary is slow, and in float32 it ends a little off its true value (0.9999992 to 1.0000008 at V = 152k). The
    result never has mass 0, whatever the rounding.
    """
    width = _BLOCK if masses.shape[-1] > _BLOCK else masses.shape[-1]
    short = -masses.shape[-1] % width
    blocks = (torch.nn.functional.pad(masses, (0, short)) if short else masses).unflatten(-1, (-1, width))
    sums = blocks.sum(-1)
    cumulative = sums.cumsum(-1)
    target = uniform * cumulative[:, -1]
    block = _passed(cumulative, target, sums)
    before = (cumulative - sums).gather(-1, block[:, None]).squeeze(-1)
    inside = blocks[torch.arange(len(blocks), device=block.device), block]
    return block * width + _passed(inside.cumsum(-1), target - before, inside)


def _passed(
    cumulative: Float[Tensor, "N K"], target: Float[Tensor, "N"], masses: Float[Tensor, "N K"]
) -> Int[Tensor, "N"]:
    """The first entry whose running sum is above the target, or the last one that has a mass."""
    last = masses.shape[-1] - 1 - (masses.flip(-1) > 0).int().argmax(-1)
    index = torch.searchsorted(cumulative, target[:, None].contiguous(), right=True).squeeze(-1)
    index = torch.minimum(index, last)
    # a parallel scan (CUDA) may rise by a rounding where a token has no mass
    return torch.where(masses.gather(-1, index[:, None]).squeeze(-1) > 0, index, last)


def group_noise(seed: int, group: int, num_generations: int, length: int) -> Float[Tensor, "G T"]:
    """Uniform noise for every token of one group: a function of (seed, group), drawn on the CPU for every device."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise", group))
    return torch.rand(num_generations, length, generator=generator)
