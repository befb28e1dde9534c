"""FSDP2: the trained weights, their gradients and the optimiser's state lie in pieces, one in each process.

The policy itself stays whole in every process: it samples, is evaluated and saved, and gets the trained weights after
every optimiser step. So no process waits for another while texts of very unequal lengths are written.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_lab.attention.probe import why_plain
from grpo_lab.distributed.ranks import Ranks
from grpo_lab.engines.weights import TorchWeights
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.recipe.schema import Optimizer


class Shards(TorchWeights):
    """The trained copy of a policy's forward pass, in pieces: every layer is put together only while it computes.

    Each pass needs the pieces of all processes, and each backward pass adds the gradient of all to them.
    """

    in_lockstep = True

    def __init__(self, whole: PolicyForward, settings: Optimizer, ranks: Ranks) -> None:
        self.whole = whole.model
        forward = copy.deepcopy(whole)
        why_plain(forward.model)  # tried now: it calls the model from outside of what is wrapped
        mesh = init_device_mesh(next(self.whole.parameters()).device.type, (ranks.world,))
        for layer in list(forward.modules()):
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh)
        fully_shard(forward, mesh=mesh)
        for module in forward.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # added up, not averaged
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on the way
        plain = [name for name, parameter in forward.named_parameters() if not isinstance(parameter, DTensor)]
        assert not plain, f"FSDP2 left {len(plain)} parameters as they were, the first {plain[0]}"
        super().__init__(forward, settings, ranks)

    def add_up(self) -> None:
        """Nothing: every backward pass has."""

    def clipped(self) -> float:
        """Clip the norm of the whole gradient; what it was."""
        return float(self.clipped_norm().full_tensor())

    def step(self, *, moves: bool) -> None:
        """One step of the optimiser; the whole model gets the weights that were learnt."""
        super().step(moves=moves)
        if moves:
            self.weights_to_whole()

    def state(self) -> dict[str, Any]:
        """The optimiser's state with every tensor whole; only the first process gets it."""
        state_dict, state = self.optimizer.state_dict(), dict[Any, dict[str, Any]]()
        for index, entries in state_dict["state"].items():
            found = {key: whole(item) if isinstance(item, Tensor) else item for key, item in entries.items()}
            state |= {index: found} if self.ranks.is_first else {}
        return {"state": state, "param_groups": state_dict["param_groups"]}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from the whole model's weights, with a whole state."""
        for mine, theirs in zip(self.whole.parameters(), self.forward.model.parameters(), strict=True):
            theirs.copy_(pieces(mine, theirs))
        self.optimizer.load_state_dict(sharded_state(state, self.parameters))

    @torch.no_grad()
    def weights_to_whole(self) -> None:
        """Give the whole model the weights that were learnt."""
        for mine, theirs in zip(self.whole.parameters(), self.forward.model.parameters(), strict=True):
            mine.copy_(whole(theirs))


def sharded_state(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimiser's whole state cut into pieces like the parameters that it belongs to; those are in the state's order."""
    state = {
        index: {
            key: pieces(item, parameters[index]) if isinstance(item, Tensor) and item.ndim else item
            for key, item in entries.items()
        }
        for index, entries in state_dict["state"].items()
    }
    return {"state": state, "param_groups": state_dict["param_groups"]}


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the pieces make up, for all processes; one that is not in pieces as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def pieces(tensor: Tensor, like: Tensor) -> DTensor:
    """A tensor that all processes have, cut into pieces as `like` is."""
    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)
