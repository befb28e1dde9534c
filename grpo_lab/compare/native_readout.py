"""Reads out, number by number, what the native engine makes of a recorded batch: through the very functions it trains with."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lab.batching import pad, with_advantages, with_logps
from grpo_lab.engines.learner import Learner, Loss, StepSums
from grpo_lab.engines.readout import Readout, Rollouts, StepReadout, copied, gradients_of
from grpo_lab.engines.update import GrpoLoss, update
from grpo_lab.policy.forward import PolicyForward, learn_without_dropout
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Batch, LogpsAndEntropy, Policy


class RecordingLearner(Learner):
    """A learner that remembers log-probs, KL, loss and gradient of every optimiser step."""

    def __init__(self, forward: PolicyForward, stage: GrpoStage, *, total_steps: int) -> None:
        super().__init__(forward, stage.optimizer, total_steps=total_steps, micro_batch_size=stage.micro_batch_size)
        self.only_finished = stage.algorithm.mask_truncated_completions
        self.steps: list[StepReadout] = []
        self.loss_scales: list[float] = []
        self.at_update: dict[str, Tensor] | None = None
        self.optimizer.optimizer.register_step_pre_hook(self._keep_gradients)

    def _keep_gradients(self, *_: Any) -> None:
        self.at_update = gradients_of(self.forward.model)

    def counted(self, rows: Batch) -> Tensor:
        """The tokens that are read out: TRL does not attend to completions that are masked as truncated."""
        assert rows.finished is not None
        return rows.completion_mask & rows.finished[:, None] if self.only_finished else rows.completion_mask

    def step(self, batch: Batch, loss: Loss) -> StepSums:
        seen: list[Tensor] = []
        scale = 0.0

        def remembering(out: LogpsAndEntropy, rows: Batch) -> Any:
            nonlocal scale
            seen.append(out.logps.detach()[self.counted(rows)].cpu())
            scale += loss_scale(loss, out, rows)
            return loss(out, rows)

        self.at_update = None
        sums = super().step(batch, remembering)
        nothing = {name: torch.zeros_like(p) for name, p in self.forward.model.named_parameters() if p.requires_grad}
        has_kl = "kl" in sums.sums and not self.only_finished  # ours is the mean over all completions
        kl = sums.sums["kl"] / sums.sums["tokens"] if has_kl else None
        self.steps.append(StepReadout(torch.cat(seen), kl, sums.loss, self.at_update or nothing))
        self.loss_scales.append(scale)
        return sums


def loss_scale(loss: Loss, out: LogpsAndEntropy, rows: Batch) -> float:
    """sum |l_t w_t| over all tokens: the loss is linear in the weights, so its gradient in them is the loss per token."""
    assert rows.loss_weights is not None
    weights = rows.loss_weights.detach().requires_grad_(True)
    share, _ = loss(LogpsAndEntropy(out.logps.detach(), out.entropy.detach()), replace(rows, loss_weights=weights))
    (per_token,) = torch.autograd.grad(share, weights)
    return float((per_token * weights.detach()).abs().sum())


def policy_forward(model: Any, stage: GrpoStage) -> PolicyForward:
    """The forward pass as the stage trains with it."""
    return PolicyForward(
        model, temperature=stage.sampling.temperature, entropy_gradient=stage.algorithm.entropy_bonus > 0
    )


def prepared(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage) -> Batch:
    """The recorded batch as the native loop prepares it."""
    batch = with_logps(pad(rollouts.groups, policy), policy, reference, stage)
    if rollouts.old_logps is not None:
        batch = replace(batch, old_logps=rollouts.old_logps.to(batch.completion_ids.device))
    return with_advantages(batch, rollouts.scores, stage)


def direct(model: nn.Module, batch: Batch, stage: GrpoStage) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a prepared batch as it is; the engine itself would cut superfluous columns off again."""
    model = copy.deepcopy(model)
    learn_without_dropout(model)
    out = policy_forward(model, stage)(batch)
    loss, _ = GrpoLoss(stage.algorithm)(out, batch)
    torch.autograd.backward(loss)
    return float(loss.detach()), gradients_of(model)


def read_out(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage, *, rounds: int) -> Readout:
    """Train a copy of the policy on the recorded batch `rounds` times and read out everything."""
    trained = replace(policy, model=copy.deepcopy(policy.model))
    learn_without_dropout(trained.model)
    steps = rounds * stage.algorithm.num_iterations * stage.algorithm.num_minibatches
    forward = policy_forward(trained.model, stage)
    learner = RecordingLearner(forward, stage, total_steps=steps)
    first = batch = prepared(trained, reference, rollouts, stage)
    for done in range(rounds):
        batch = first if done == 0 else prepared(trained, reference, rollouts, stage)
        update(learner, batch, stage.algorithm)
    assert first.advantages is not None
    mask = learner.counted(first)
    return Readout(
        texts=tuple(completion.text for group in rollouts.groups for completion in group.completions),
        rewards=rollouts.scores.total.flatten(),
        advantages=first.advantages.cpu(),
        old_logps=None if first.old_logps is None else first.old_logps[mask].cpu(),
        ref_logps=None if first.ref_logps is None else first.ref_logps[mask].cpu(),
        steps=learner.steps,
        weights=copied(dict(trained.model.named_parameters())),
        loss_scales=learner.loss_scales,
    )
