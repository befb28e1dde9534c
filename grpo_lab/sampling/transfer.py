"""How a sampler that keeps weights of its own is sent the policy's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from grpo_lab.types import Policy

INEXACT = "vLLM computes requests in batches that depend on their timing, so its log-probs differ in the last digits"


@dataclass(frozen=True)
class Transfer:
    """What of a policy is sent, and where the sampler's files lie.

    `lora_rank` is that of the policy's adapter, which is then all that is sent; None = all weights are. `base` names the
    model with the weights beside the adapter (a folder or hub id, and its revision).
    `tensors` gives all weights by their names in a checkpoint, the trained ones themselves; `write` puts the adapter, or
    all weights, into a folder that appears whole or not at all; `drop` deletes such a
    folder; `write_config` writes the model's config.
    """

    folder: Path
    base: str
    revision: str | None
    lora_rank: int | None
    dtype: str
    trust_remote_code: bool
    tensors: Callable[[Policy], Mapping[str, Tensor]]
    write: Callable[[Policy, Path], None]
    write_config: Callable[[Policy, Path], None]
    drop: Callable[[Path], None]


def version_name(version: int) -> str:
    """The name of the policy after so many steps, as an adapter and as a folder.

    >>> version_name(12)
    'policy-000012'
    """
    return f"policy-{version:06d}"


def is_version_name(name: str) -> bool:
    """Whether `version_name` made this."""
    return re.fullmatch(r"policy-\d{6,}", name) is not None
