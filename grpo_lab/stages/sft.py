"""Supervised fine-tuning: maximise the log-probability of the data's completions, token by token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo_lab.algorithm.weights import token_weights
from grpo_lab.batching import pad_rows
from grpo_lab.data.examples import TrainingRow
from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.engines.learner import Learner
from grpo_lab.padding import pad_right
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.policy.load import load_policy
from grpo_lab.seeds import derive_seed
from grpo_lab.stages.plan import SftPlan
from grpo_lab.stages.running import (
    Context,
    checkpointing,
    evaluating,
    finish,
    reporting,
    resume,
    say_what_learns,
    saying_halved,
    saying_plain,
)
from grpo_lab.tracking.metrics import sft_metrics
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Batch, LogpsAndEntropy, Policy, StepEnd

EVALUATION_ROWS = 64  # rows of one forward pass when nothing smaller is asked for


def run_sft(context: Context, plan: SftPlan) -> None:
    """Train the stage from where it stands to its end, and leave its final model."""
    stage, ranks = plan.stage, context.ranks
    model, seed = context.recipe.model_of(stage), context.recipe.seed
    policy = load_policy(model, context.tokenizer, seed=seed, folder=context.start)
    forward = PolicyForward(policy.model, temperature=1.0)
    learner = Learner(
        forward,
        stage.optimizer,
        total_steps=stage.steps,
        micro_batch_size=stage.micro_batch_size,
        ranks=ranks,
        sharded=context.in_pieces,
    )
    start = resume(context, plan.name, policy, learner)

    if start == 0:
        say_what_learns(context, plan.name, policy)

    def measure(step: int) -> None:
        metrics = evaluation_loss(policy, plan.held_out, stage.micro_batch_size or EVALUATION_ROWS, ranks)
        context.sinks.evaluation(plan.name, step, metrics, [])

    if start == 0 and stage.evaluation is not None:
        measure(0)
    report = reporting(
        context.sinks.step,
        saying_plain(context, learner.forward),
        saying_halved(context, learner),
        evaluating(stage.evaluation, measure),
        checkpointing(context, policy, learner, stage.checkpoint),
    )
    for step in range(start, stage.steps):
        clock = Stopwatch()
        learner.forward.model.train()
        torch.manual_seed(derive_seed(seed, plan.name, "dropout", step) + ranks.rank)
        batch = training_batch(plan.rows.at(step), policy)
        result = learner.step(batch, negative_log_likelihood)
        clock.lap("learn")
        metrics = sft_metrics(loss=result.loss, grad_norm=result.grad_norm, learning_rate=result.learning_rate)
        timing = clock.report(completions=batch.num_rows, tokens=int(batch.completion_mask.sum()))
        report(StepEnd(plan.name, step + 1, stage.steps, metrics, timing))
    finish(context, plan.name, policy, model, steps=stage.steps)


def training_batch(rows: Sequence[TrainingRow], policy: Policy) -> Batch:
    """Rows as a padded batch whose loss weights share the loss equally among all learned tokens."""
    batch = pad_rows([row.prompt_ids for row in rows], range(len(rows)), [row.completion_ids for row in rows], policy)
    learned = pad_right([row.learn for row in rows], False, torch.bool).to(batch.completion_mask.device)
    weights = token_weights(learned, reduction="token", max_completion_length=learned.shape[1])
    return replace(batch, loss_weights=weights)


def negative_log_likelihood(out: LogpsAndEntropy, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The mean negative log-probability (nats) of learned tokens; shares of micro-batches add up to it."""
    assert batch.loss_weights is not None
    return -(out.logps * batch.loss_weights).sum(), {}


@torch.no_grad()
def evaluation_loss(
    policy: Policy, rows: Sequence[TrainingRow], rows_at_once: int, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Mean negative log-likelihood per learned token over all rows (nats), and its exponential."""
    policy.model.eval()
    forward = PolicyForward(policy.model, temperature=1.0)
    total, count = 0.0, 0
    own = range(len(rows))[ranks.share(len(rows))]
    for first in range(0, len(own), rows_at_once):
        part = [rows[index] for index in own[first : first + rows_at_once]]
        batch = training_batch(part, policy)
        num_learned = sum(sum(row.learn) for row in part)
        total += float(negative_log_likelihood(forward(batch), batch)[0]) * num_learned
        count += num_learned
    total, count = (sum(parts) for parts in zip(*ranks.gather((total, count)), strict=True))
    return {"loss": total / count, "perplexity": math.exp(min(total / count, 700.0))}
