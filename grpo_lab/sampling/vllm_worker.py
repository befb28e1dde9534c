"""What a vLLM server must know to take over new weights: `--worker-extension-cls grpo_lab.sampling.vllm_worker.WeightLoader`.

It runs in the server's worker processes and needs nothing of the trainer. Its methods are called by name, through
`/collective_rpc`, with text only.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

NO_VERSION = "none"


class WeightLoader:
    """Added to vLLM's own worker, which brings `model_runner`."""

    model_runner: Any
    held_policy_version = NO_VERSION

    def load_policy_weights(self, path: str, version: str) -> str:
        """Take over all weights from a safetensors file; returns the version that is now held."""
        self.held_policy_version = NO_VERSION  # until every weight is in place
        load_all(self.model_runner.model, tensors_in(Path(path)))
        self.held_policy_version = version
        return version

    def policy_weights_version(self) -> str:
        """Which weights are held; "none" before the first were loaded."""
        return self.held_policy_version


def tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, one at a time."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            yield name, file.get_tensor(name)


def load_all(model: nn.Module, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights, by their names in a checkpoint, into vLLM's model.

    Raises:
        ValueError: a weight of the model has got nothing.
    """
    loader: Any = model
    loaded = loader.load_weights(tensors.items() if isinstance(tensors, Mapping) else tensors)
    missing = sorted({name for name, _ in model.named_parameters()} - set(loaded))
    if missing:
        raise ValueError(f"{len(missing)} weights of vLLM's model were not sent, the first is {missing[0]}")
