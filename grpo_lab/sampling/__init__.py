"""Samplers: how completions are drawn from the policy."""

from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.sampling.dealt import DealtSampler
from grpo_lab.sampling.decoding import Decoding, Sampler
from grpo_lab.sampling.hf import HfSampler
from grpo_lab.sampling.native import NativeSampler
from grpo_lab.types import Policy

SAMPLERS = {"auto": NativeSampler, "native": NativeSampler, "hf": HfSampler}


def make_sampler(backend: str, policy: Policy, decoding: Decoding, ranks: Ranks = ALONE) -> Sampler:
    """The sampler that a recipe's `sampling.backend` names; with several processes each draws its share of the groups."""
    sampler: Sampler = SAMPLERS[backend](policy, decoding)
    return sampler if ranks.world == 1 else DealtSampler(sampler, ranks)
