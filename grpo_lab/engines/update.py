"""The policy's move: the clipped objective, num_iterations passes over num_minibatches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from grpo_lab.algorithm.losses import (
    clipped_surrogate,
    clipped_tokens,
    grpo_loss,
    truncated_importance_weights,
)
from grpo_lab.engines.learner import Learner, StepSums
from grpo_lab.recipe.schema import Algorithm
from grpo_lab.types import Batch, LogpsAndEntropy, UpdateStats


def surrogate(algorithm: Algorithm) -> Callable[[Tensor, Tensor], Tensor]:
    """The variant's surrogate objective with its options bound."""
    return partial(
        clipped_surrogate,
        epsilon_low=algorithm.epsilon_low,
        epsilon_high=algorithm.epsilon_high,
        delta=algorithm.delta,
    )


@dataclass(frozen=True)
class GrpoLoss:
    """The GRPO loss of some rows under one algorithm, with the sums that become metrics."""

    algorithm: Algorithm

    def __call__(self, out: LogpsAndEntropy, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        algorithm, mask = self.algorithm, batch.completion_mask
        assert batch.advantages is not None
        assert batch.loss_weights is not None
        old_logps = out.logps.detach() if batch.old_logps is None else batch.old_logps
        sampler_weights = None
        if algorithm.sampler_correction == "truncate":
            assert batch.sampler_logps is not None
            sampler_weights = truncated_importance_weights(
                old_logps, batch.sampler_logps, cap=algorithm.sampler_correction_cap
            )
        result = grpo_loss(
            out.logps,
            old_logps,
            batch.ref_logps,
            batch.advantages,
            mask,
            batch.loss_weights,
            surrogate=surrogate(algorithm),
            ratio_level=algorithm.ratio_level,
            beta=algorithm.beta,
            kl_estimator=algorithm.kl_estimator,
            sampler_weights=sampler_weights,
        )
        low, high = clipped_tokens(
            result.ratio, batch.advantages, epsilon_low=algorithm.epsilon_low, epsilon_high=algorithm.epsilon_high
        )
        sums = {
            "tokens": mask.sum(),
            "entropy": (out.entropy * mask).sum(),
            "ratio": (result.ratio * mask).sum(),
            "clip_low": (low & mask).sum(),
            "clip_high": (high & mask).sum(),
        }
        if result.kl is not None:
            sums["kl"] = (result.kl.detach() * mask).sum()
        if batch.sampler_logps is not None:
            sums["sampler_gap"] = ((old_logps - batch.sampler_logps).abs() * mask).sum()
        return result.loss, sums


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
        clip_low=totals["clip_low"] / tokens,
        clip_high=totals["clip_high"] / tokens,
        skipped=sum(step.skipped for step in steps),
        sampler_gap=per_token("sampler_gap"),
    )
