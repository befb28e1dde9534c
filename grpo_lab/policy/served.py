"""What of a policy goes to a sampler that keeps weights of its own: tensors by their names in a checkpoint, or files."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo_lab.policy.load import has_adapter
from grpo_lab.types import Policy

WEIGHTS = "model.safetensors"


def base_network(policy: Policy) -> Any:
    """The transformers model, without the adapter around it."""
    network: Any = policy.model
    return network.get_base_model() if has_adapter(network) else network


@torch.no_grad()
def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """Every weight by its name in a checkpoint, those that share memory once. They are the trained ones: copy, don't keep.

    Not for a policy with an adapter, of which the adapter alone is sent.
    """
    assert not has_adapter(policy.model)
    found: dict[str, Tensor] = {}
    seen = set[int]()
    for name, tensor in policy.model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found


def write_served(policy: Policy, folder: Path) -> None:
    """Write what a server needs to follow the policy: its adapter, or all its weights in one file."""
    if has_adapter(policy.model):
        from grpo_lab.policy.adapter import write_adapter  # a second of import, needed only here

        write_adapter(policy.model, folder, None)  # type: ignore[arg-type]
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole_weights(policy).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def write_config(policy: Policy, folder: Path) -> None:
    """Write what kind of model it is, in transformers' format; no weights."""
    network = base_network(policy)
    config = copy.deepcopy(network.config)
    config.architectures = [type(network).__name__]
    config.save_pretrained(folder)
