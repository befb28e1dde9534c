"""Samplers: how completions are drawn from the policy."""

from grpo_lab.sampling.decoding import Decoding, Sampler
from grpo_lab.sampling.hf import HfSampler
from grpo_lab.sampling.native import NativeSampler
from grpo_lab.types import Policy

SAMPLERS = {"auto": NativeSampler, "native": NativeSampler, "hf": HfSampler}


def make_sampler(backend: str, policy: Policy, decoding: Decoding) -> Sampler:
    """The sampler that a recipe's `sampling.backend` names."""
    return SAMPLERS[backend](policy, decoding)
