"""Randomness as a function, not a history: every draw's seed comes from what it is for.

A resumed run therefore needs no replay, and a group's noise does not depend on how the work was batched.
"""

import hashlib


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose of one run, e.g. `derive_seed(run_seed, "sampling", step, group)`.

    >>> derive_seed(0, "sampling", 3, 1) == derive_seed(0, "sampling", 3, 1)
    True
    >>> derive_seed(0, "sampling", 3, 1) == derive_seed(0, "sampling", 31)
    False
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sampling_seed(run_seed: int, stage: str, step: int) -> int:
    """What fixes the noise of a step's completions, of those that it asks for first."""
    return derive_seed(run_seed, stage, "sampling", step)
