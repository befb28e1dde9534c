"""Supervised learning, the part that computes: from rows to a batch, its loss, and what is measured on held-out rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.batching import pad_rows
from grpo_lab.data.examples import TrainingRow
from grpo_lab.padding import pad_right
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.types import Batch, LogpsAndEntropy, Policy


def training_batch(rows: Sequence[TrainingRow], policy: Policy) -> Batch:
    """Rows as a padded batch with the weights that every token has in the loss."""
    batch = pad_rows([row.prompt_ids for row in rows], range(len(rows)), [row.completion_ids for row in rows], policy)
    return replace(batch, loss_weights=loss_weights(rows).to(batch.completion_mask.device))


def loss_weights(rows: Sequence[TrainingRow]) -> Float[Tensor, "N T"]:
    """w_t / sum of w over all learnt tokens of all rows; w_t is 1, or what the row says, and 0 where nothing is learnt.

    The sum is over the whole optimiser step, so that micro-batches' losses add up to the loss.

    >>> loss_weights([TrainingRow((1,), (2, 3), (True, True)), TrainingRow((1,), (4, 5), (False, True), (1.0, 2.0))])
    tensor([[0.2500, 0.2500],
            [0.0000, 0.5000]])
    """
    learned = pad_right([row.learn for row in rows], False, torch.bool)
    own = pad_right([row.weights or [1.0] * len(row.learn) for row in rows], 0.0, torch.float32)
    weights = own * learned
    return weights / weights.sum()


def negative_log_likelihood(out: LogpsAndEntropy, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The weighted mean of the negative log-probability (nats) of learned tokens; shares of micro-batches add up to it.

    Beside it, sums over the learned tokens, each counted once: how many are the model's first choice, and their entropy.
    """
    assert batch.loss_weights is not None
    learned = batch.loss_weights > 0
    sums = {"tokens": learned.sum(), "entropy": (out.entropy.detach() * learned).sum()}
    if out.largest is not None:
        sums["first_choices"] = ((out.logps.detach() >= out.largest) & learned).sum()
    return -(out.logps * batch.loss_weights).sum(), sums


@torch.no_grad()
def measure_rows(
    policy: Policy, rows: Sequence[TrainingRow], rows_at_once: int, *, packed: bool = True
) -> dict[str, float]:
    """Over all learned tokens of all rows, each counted once whatever it weighs in training: the mean negative
    log-likelihood (nats), its exponential, and the share that is the model's first choice."""
    policy.model.eval()
    forward = PolicyForward(policy.model, temperature=1.0, packed=packed, first_choices=True)
    total, count, right = 0.0, 0, 0
    for first in range(0, len(rows), rows_at_once):
        part = [replace(rows[index], weights=None) for index in range(first, min(first + rows_at_once, len(rows)))]
        batch = training_batch(part, policy)
        num_learned = sum(sum(row.learn) for row in part)
        loss, sums = negative_log_likelihood(forward(batch), batch)
        total += float(loss) * num_learned
        right += int(sums["first_choices"])
        count += num_learned
    loss_per_token = total / count
    return {
        "loss": loss_per_token,
        "perplexity": math.exp(min(loss_per_token, 700.0)),
        "mean_token_accuracy": right / count,
    }
