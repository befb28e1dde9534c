"""A decoding in vLLM's words, which are the same in this process and over HTTP, and what it answers. Imports no vLLM."""

from collections.abc import Sequence
from typing import Any

from grpo_lab.sampling.decoding import Decoding
from grpo_lab.types import Completion, Policy


def asked(decoding: Decoding, policy: Policy, num_generations: int, seed: int) -> dict[str, Any]:
    """What is asked for one group. `logprobs` are those of the distribution that is sampled."""
    return {
        "n": num_generations,
        "seed": seed,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k or 0,
        "min_p": decoding.min_p,
        "max_tokens": decoding.max_completion_length,
        "stop_token_ids": list(policy.eos_ids),
        "logprobs": 0,
    }


def answered(policy: Policy, ids: Sequence[int], logps: Sequence[float]) -> Completion:
    """One answer's tokens, up to the one that ended it, as a completion."""
    text = policy.tokenizer.decode(list(ids), skip_special_tokens=True)
    return Completion(text, tuple(ids), bool(ids) and ids[-1] in policy.eos_ids, tuple(logps))
