"""How a process holds the weights that learn: whole, or in pieces over all processes (sharding.py, zero.py)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from grpo_lab.distributed.ranks import Ranks
from grpo_lab.recipe.schema import Optimizer
from grpo_lab.types import Batch, LogpsAndEntropy

Strategy = Literal["ddp", "fsdp2", "deepspeed"]


@runtime_checkable
class Weights(Protocol):
    """The weights that learn, with their gradient and optimiser. All processes call all of this, in the same order."""

    forward: Any
    """A PolicyForward over these weights."""
    optimizer: Any
    in_lockstep: bool
    """Whether processes need each other in every pass, so that all must make the same number."""

    def begin(self, batch: Batch, learning_rate: float) -> None:
        """Begin an optimiser step on a batch, without gradient."""

    def passed(self, rows: Batch) -> LogpsAndEntropy:
        """A forward pass whose gradient `backward` will want."""

    def backward(self, share: Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the loss; `last`: no other follows in this step."""

    def add_up(self) -> None:
        """Add up the gradient over all processes, where `backward` has not done so."""

    def clipped(self) -> float:
        """Clip the gradient, now or in the step; what its norm was."""

    def step(self, *, moves: bool) -> None:
        """One step of the optimiser and an end to the gradient; the weights stay as they are unless it `moves`."""

    def state(self) -> dict[str, Any]:
        """The optimiser's state, as one process has it; the first process gets all of it."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on with this state, and with the weights that the policy's model now has."""


class TorchWeights:
    """Weights whose gradient torch adds up where they lie, and which torch's optimiser steps."""

    def __init__(self, forward: nn.Module, settings: Optimizer, ranks: Ranks) -> None:
        self.forward, self.ranks = forward, ranks
        self.max_grad_norm = settings.max_grad_norm
        self.accelerator = accelerator()
        # the model is not prepared: accelerate would average gradients in every backward pass, ours are added up
        self.optimizer: Any = self.accelerator.prepare(make_optimizer(forward, settings))
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def begin(self, batch: Batch, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()

    def passed(self, rows: Batch) -> LogpsAndEntropy:
        return self.forward(rows)  # type: ignore[no-any-return]

    def backward(self, share: Tensor, *, last: bool) -> None:
        self.accelerator.backward(share)

    def clipped_norm(self) -> Any:
        """Clip the gradient's norm; what it was, as torch says it of such weights."""
        return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf, foreach=None)

    def step(self, *, moves: bool) -> None:
        if moves:
            self.optimizer.step()
        self.optimizer.zero_grad()


class WholeWeights(TorchWeights):
    """Every process has all weights, and the gradients are added up once in an optimiser step."""

    in_lockstep = False

    def add_up(self) -> None:
        add_gradients(self.parameters, self.ranks)

    def clipped(self) -> float:
        return float(self.clipped_norm())

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def hold(forward: nn.Module, settings: Optimizer, ranks: Ranks, strategy: Strategy) -> Weights:
    """The weights of a PolicyForward as a strategy holds them."""
    if strategy == "fsdp2":
        from grpo_lab.engines.sharding import Shards

        return Shards(forward, settings, ranks)  # type: ignore[arg-type]
    if strategy == "deepspeed":
        from grpo_lab.engines.zero import ZeroShards

        return ZeroShards(forward, settings, ranks)  # type: ignore[arg-type]
    return WholeWeights(forward, settings, ranks)


def accelerator(*, deepspeed: bool = False) -> Any:
    """accelerate's object; told that there is no GPU it leaves DeepSpeed out."""
    from accelerate import Accelerator  # a second of import, needed only to train

    return Accelerator(cpu=not torch.cuda.is_available() and not deepspeed)


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimiser over trainable parameters; weight decay only on matrices, not on norms and biases."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    if settings.name != "adamw":
        from grpo_lab.policy.quantization import adamw_8bit  # needs bitsandbytes

        return adamw_8bit(groups, settings)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)


def add_gradients(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Add up every gradient over all processes, in place; what no process has a gradient for stays without."""
    if ranks.world == 1:
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    ranks.add([has])
    used = [parameter for parameter, count in zip(parameters, has.tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.add([parameter.grad for parameter in used if parameter.grad is not None])
