"""The policy's move: the clipped objective, num_iterations passes over num_minibatches."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from grpo_lab.algorithm.entropy import entropy_bonus
from grpo_lab.algorithm.losses import (
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    grpo_loss,
    plain_surrogate,
    sampler_correction_weights,
    sapo_surrogate,
)
from grpo_lab.engines.learner import Learner, StepSums
from grpo_lab.recipe.schema import Algorithm
from grpo_lab.types import Batch, LogpsAndEntropy, UpdateStats


@dataclass(frozen=True)
class Objective:
    """A surrogate objective: how its options are bound, and which tokens it clips, if it clips.

    `bind(algorithm, logps)` gives the function of (ratio, advantages); `epsilons(algorithm)` how far below and above 1 the
    ratio of a token may be before it counts as clipped, None where nothing is.
    """

    bind: Callable[[Algorithm, Tensor], Surrogate]
    epsilons: Callable[[Algorithm], tuple[float, float] | None]


def _clipped(algorithm: Algorithm, logps: Tensor) -> Surrogate:
    return partial(
        clipped_surrogate,
        epsilon_low=algorithm.epsilon_low,
        epsilon_high=algorithm.epsilon_high,
        delta=algorithm.delta,
    )


def _cispo(algorithm: Algorithm, logps: Tensor) -> Surrogate:
    return lambda ratio, advantages: cispo_surrogate(ratio, logps, advantages, epsilon_high=algorithm.epsilon_high)


def _sapo(algorithm: Algorithm, logps: Tensor) -> Surrogate:
    return partial(
        sapo_surrogate,
        temperature_pos=algorithm.sapo_temperature_pos,
        temperature_neg=algorithm.sapo_temperature_neg,
    )


OBJECTIVES: Mapping[str, Objective] = {
    "clipped": Objective(_clipped, lambda algorithm: (algorithm.epsilon_low, algorithm.epsilon_high)),
    "cispo": Objective(_cispo, lambda algorithm: (math.inf, algorithm.epsilon_high - 1)),
    "sapo": Objective(_sapo, lambda algorithm: None),
    "none": Objective(lambda algorithm, logps: plain_surrogate, lambda algorithm: None),
}


@dataclass(frozen=True)
class GrpoLoss:
    """The GRPO loss of some rows under one algorithm, with the sums that become metrics.

    Needs no engine: `loss, sums = GrpoLoss(algorithm)(LogpsAndEntropy(logps, entropy), batch)` on a batch from
    `with_logps` and `with_advantages`. For an entropy bonus the entropy must carry its gradient.
    """

    algorithm: Algorithm

    def __call__(self, out: LogpsAndEntropy, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        algorithm, mask = self.algorithm, batch.completion_mask
        assert batch.advantages is not None
        assert batch.loss_weights is not None
        logps = out.logps.masked_fill(~mask, 0.0)
        old_logps = logps.detach() if batch.old_logps is None else batch.old_logps
        objective = OBJECTIVES[algorithm.surrogate]
        result = grpo_loss(
            logps,
            old_logps,
            batch.ref_logps,
            batch.advantages,
            mask,
            batch.loss_weights,
            surrogate=objective.bind(algorithm, logps),
            ratio_level=algorithm.ratio_level,
            beta=algorithm.beta if algorithm.kl_placement == "loss" else 0.0,
            kl_estimator=algorithm.kl_estimator,
            kl_bias_correction=algorithm.kl_bias_correction,
            sampler_weights=self._sampler_weights(old_logps, batch),
            policy_mask=batch.policy_mask,
        )
        sums = {
            "tokens": mask.sum(),
            "entropy": (out.entropy.detach() * mask).sum(),
            "ratio": (result.ratio * mask).sum(),
        }
        epsilons = objective.epsilons(algorithm)
        if epsilons is not None:
            low, high = clipped_tokens(
                result.ratio, batch.advantages, epsilon_low=epsilons[0], epsilon_high=epsilons[1]
            )
            sums |= {"clip_low": (low & mask).sum(), "clip_high": (high & mask).sum()}
        if result.kl is not None:
            sums["kl"] = (result.kl.detach() * mask).sum()
        if batch.sampler_logps is not None:
            sums["sampler_gap"] = ((old_logps - batch.sampler_logps).abs() * mask).sum()
        return result.loss - self._entropy_bonus(out, batch), sums

    def _sampler_weights(self, old_logps: Tensor, batch: Batch) -> Tensor | None:
        algorithm = self.algorithm
        if algorithm.sampler_correction == "none":
            return None
        assert batch.sampler_logps is not None
        return sampler_correction_weights(
            old_logps,
            batch.sampler_logps,
            batch.completion_mask,
            mode=algorithm.sampler_correction,
            level=algorithm.sampler_correction_level,
            cap=algorithm.sampler_correction_cap,
        )

    def _entropy_bonus(self, out: LogpsAndEntropy, batch: Batch) -> Tensor | float:
        if self.algorithm.entropy_bonus == 0:
            return 0.0
        if out.logps.requires_grad and not out.entropy.requires_grad:
            raise ValueError("an entropy bonus needs the entropy's gradient: PolicyForward(..., entropy_gradient=True)")
        assert batch.entropy_weights is not None
        bonus = entropy_bonus(out.entropy, batch.completion_mask, batch.entropy_weights)
        return self.algorithm.entropy_bonus * bonus


def update(learner: Learner, batch: Batch, algorithm: Algorithm) -> UpdateStats:
    """Move the policy on one batch; mini-batches are runs of whole groups, the same in every iteration."""
    rows = batch.num_rows // algorithm.num_minibatches
    loss = GrpoLoss(algorithm)
    steps = [
        learner.step(batch.rows(start, start + rows), loss)
        for _ in range(algorithm.num_iterations)
        for start in range(0, batch.num_rows, rows)
    ]
    return statistics(steps)


def statistics(steps: list[StepSums]) -> UpdateStats:
    """Means over optimiser steps (loss, gradient norm) and over all their tokens (the rest)."""
    totals: dict[str, float] = {}
    for step in steps:
        for name, value in step.sums.items():
            totals[name] = totals.get(name, 0.0) + value
    tokens = max(totals["tokens"], 1.0)

    def per_token(name: str) -> float | None:
        return totals[name] / tokens if name in totals else None

    return UpdateStats(
        loss=sum(step.loss for step in steps) / len(steps),
        grad_norm=sum(step.grad_norm for step in steps) / len(steps),
        learning_rate=steps[-1].learning_rate,
        kl=per_token("kl"),
        entropy=totals["entropy"] / tokens,
        ratio_mean=totals["ratio"] / tokens,
        clip_low=per_token("clip_low"),
        clip_high=per_token("clip_high"),
        skipped=sum(step.skipped for step in steps),
        sampler_gap=per_token("sampler_gap"),
    )
