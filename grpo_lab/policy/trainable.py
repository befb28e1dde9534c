"""What of a model learns: all of it, or an adapter beside frozen weights."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from grpo_lab.errors import CheckpointError


def learned(model: nn.Module) -> set[str] | None:
    """The names of what learns where the rest is frozen (an adapter); None where everything learns."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return None if len(names) == len(list(model.parameters())) else names


def state(model: nn.Module, names: set[str] | None) -> dict[str, Tensor]:
    """The model's tensors of these names, or all of them."""
    return {name: tensor for name, tensor in model.state_dict().items() if names is None or name in names}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; what it left out has not changed since it was loaded.

    Raises:
        CheckpointError: the tensors are not this model's.
    """
    _, unknown = model.load_state_dict(dict(tensors), strict=len(tensors) >= len(model.state_dict()))
    if unknown:
        raise CheckpointError(f"the checkpoint has {len(unknown)} tensors that the model lacks, the first {unknown[0]}")


def fingerprint(model: nn.Module) -> list[float]:
    """A number for every tensor that learns; processes whose weights are the same have the same."""
    return [float(parameter.detach().double().sum()) for parameter in model.parameters() if parameter.requires_grad]


def parameter_count(model: nn.Module) -> str:
    """How many parameters learn, and their share of all; weights in 4 bits count one by one.

    >>> parameter_count(nn.Linear(3, 2))
    '8 of 8 parameters learn (100 %)'
    """
    learning = total = 0
    for parameter in model.parameters():
        quantized = getattr(parameter, "quant_state", None)
        count = parameter.numel() if quantized is None else math.prod(quantized.shape)
        total += count
        learning += count if parameter.requires_grad else 0
    return f"{learning:,} of {total:,} parameters learn ({100 * learning / total:.3g} %)"
