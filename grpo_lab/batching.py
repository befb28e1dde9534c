"""From groups to a padded batch, and what the loss needs beside it: log-probs, advantages, loss weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from grpo_lab.algorithm.advantages import group_advantages
from grpo_lab.algorithm.weights import token_weights
from grpo_lab.padding import length_mask, pad_left, pad_right
from grpo_lab.policy.forward import completion_logps, reference_logps
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Batch, Group, Policy, Scores


def pad_rows(
    prompts: Sequence[Sequence[int]],
    prompt_index: Sequence[int],
    completions: Sequence[Sequence[int]],
    policy: Policy,
) -> Batch:
    """Prompts (each once) and the completions that answer them, on the policy's device."""
    device = next(policy.model.parameters()).device
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id)
    return Batch(
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        prompt_index=torch.tensor(prompt_index, device=device),
        completion_ids=pad_right(completions, policy.pad_id, torch.long).to(device),
        completion_mask=length_mask([len(row) for row in completions]).to(device),
    )


def pad(groups: Sequence[Group], policy: Policy) -> Batch:
    """Groups as N = P*G rows, group-major."""
    completions = [completion for group in groups for completion in group.completions]
    batch = pad_rows(
        [group.example.prompt_ids for group in groups],
        [index for index, group in enumerate(groups) for _ in group.completions],
        [completion.token_ids for completion in completions],
        policy,
    )
    sampler_logps = [completion.sampler_logps for completion in completions]
    if any(row is None for row in sampler_logps):
        return batch
    padded = pad_right([row for row in sampler_logps if row is not None], 0.0, torch.float32)
    return replace(batch, sampler_logps=padded.to(batch.completion_ids.device))


def with_logps(batch: Batch, policy: Policy, reference: Policy | None, stage: GrpoStage) -> Batch:
    """Add log pi_old where rows are used more than once (or a sampler is corrected), log pi_ref where beta > 0.

    With one update per batch the policy of the update is the policy that sampled: the ratio is exactly 1 and old
    log-probs need no forward pass.
    """
    algorithm, temperature, size = stage.algorithm, stage.sampling.temperature, stage.micro_batch_size
    if algorithm.num_iterations * algorithm.num_minibatches > 1:
        old = completion_logps(policy, batch, temperature=temperature, micro_batch_size=size)
        batch = replace(batch, old_logps=old)
    if algorithm.beta > 0 and reference is not None:
        ref = reference_logps(reference, batch, temperature=temperature, micro_batch_size=size)
        batch = replace(batch, ref_logps=ref)
    return batch


def with_advantages(batch: Batch, scores: Scores, stage: GrpoStage) -> Batch:
    """Add advantages [N] and loss weights [N, T].

    Weights are computed once per optimiser step (one mini-batch of whole groups) from counts of its scored rows, so
    that cutting it into micro-batches changes nothing. A row that could not be scored weighs nothing.
    """
    algorithm, device = stage.algorithm, batch.completion_ids.device
    scored = ~scores.total.isnan().flatten().to(device)
    mask = batch.completion_mask & scored[:, None]
    rows = batch.num_rows // algorithm.num_minibatches
    weights = [
        token_weights(
            mask[start : start + rows],
            reduction=algorithm.reduction,
            max_completion_length=stage.sampling.max_completion_length,
        )
        for start in range(0, batch.num_rows, rows)
    ]
    advantages = group_advantages(scores.total, scale=algorithm.advantage_scale)
    return replace(batch, advantages=advantages.flatten().to(device), loss_weights=torch.cat(weights))
