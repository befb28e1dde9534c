"""What an engine made of one recorded batch, number by number: the form in which two engines are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.types import Group, Scores


@dataclass(frozen=True)
class Rollouts:
    """One recorded batch for both engines; `reward_weights` in the order of the scores' terms.

    `old_logps` (nats) are those of another policy, which sampled; None = fresh samples, where each engine works out by
    itself what it needs.
    """

    groups: tuple[Group, ...]
    scores: Scores
    reward_weights: tuple[float, ...]
    old_logps: Float[Tensor, "N T"] | None = None

    @property
    def num_rows(self) -> int:
        return sum(len(group.completions) for group in self.groups)


@dataclass(frozen=True)
class StepReadout:
    """One optimiser step: log-probs of its K completion tokens, in row order, before the weights move; the mean KL over
    those tokens; the loss; the gradient of every trainable parameter, not clipped."""

    logps: Float[Tensor, "K"]
    kl: float | None
    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Readout:
    """Everything that is compared. Log-probs hold completion tokens only, in row order.

    `loss_scales`: for each step sum |l_t w_t|, which a difference of losses is measured against; only one engine needs
    to know it. `equal_rewards_advantage`: the largest advantage that a group of equal rewards was given.
    """

    texts: Sequence[str]
    rewards: Float[Tensor, "N"]
    advantages: Float[Tensor, "N"]
    old_logps: Float[Tensor, "K"] | None
    ref_logps: Float[Tensor, "K"] | None
    steps: Sequence[StepReadout]
    weights: Mapping[str, Tensor]
    loss_scales: Sequence[float] = ()
    equal_rewards_advantage: float = 0.0


@dataclass(frozen=True)
class SftReadout:
    """What an engine made of recorded rows, a step for each batch: the steps, and the weights afterwards."""

    steps: Sequence[StepReadout]
    weights: Mapping[str, Tensor]


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
