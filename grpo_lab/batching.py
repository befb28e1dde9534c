"""From groups to a padded batch, and what the loss needs beside it: log-probs, advantages, loss weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.algorithm.advantages import (
    batch_advantages,
    group_advantages,
    leave_one_out_advantages,
    normalize_then_sum,
)
from grpo_lab.algorithm.entropy import high_entropy_mask
from grpo_lab.algorithm.kl import KL_ESTIMATORS
from grpo_lab.algorithm.weights import token_weights
from grpo_lab.distributed.dealing import by_all
from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.padding import length_mask, pad_left, pad_right
from grpo_lab.policy.forward import PolicyForward, reference_logps, without_gradient
from grpo_lab.recipe.schema import Algorithm, GrpoStage
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
    finished = torch.tensor([completion.finished for completion in completions], device=batch.completion_ids.device)
    batch = replace(batch, finished=finished)
    sampler_logps = [completion.sampler_logps for completion in completions]
    if any(row is None for row in sampler_logps):
        return batch
    padded = pad_right([row for row in sampler_logps if row is not None], 0.0, torch.float32)
    return replace(batch, sampler_logps=padded.to(batch.completion_ids.device))


def with_logps(batch: Batch, policy: Policy, reference: Policy | None, stage: GrpoStage, ranks: Ranks = ALONE) -> Batch:
    """Add log pi_old where rows are used more than once or the reward has the KL in it, log pi_ref where beta > 0, and
    the entropy under pi_old where the policy learns from undecided tokens only.

    With one update per batch the policy of the update is the policy that sampled: the ratio is exactly 1 and old
    log-probs need no forward pass. With several processes each computes some rows, and all get all of them.
    """
    algorithm, temperature, size = stage.algorithm, stage.sampling.temperature, stage.micro_batch_size
    has_kl = algorithm.beta > 0 and reference is not None
    needs_old = algorithm.num_iterations * algorithm.num_minibatches > 1 or (
        has_kl and algorithm.kl_placement == "reward"
    )
    needs_entropy = algorithm.top_entropy_quantile < 1
    if needs_old or needs_entropy:
        forward = PolicyForward(policy.model, temperature=temperature)
        logps, entropy = by_all(batch, ranks, lambda rows: without_gradient(forward, rows, micro_batch_size=size)[:2])
        batch = replace(batch, old_logps=logps if needs_old else None, old_entropy=entropy if needs_entropy else None)
    if has_kl:
        assert reference is not None
        under = partial(reference_logps, reference, temperature=temperature, micro_batch_size=size)
        (ref,) = by_all(batch, ranks, lambda rows: (under(rows),))
        batch = replace(batch, ref_logps=ref)
    return batch


BASELINES: Mapping[str, Callable[..., Tensor]] = {
    "group": group_advantages,
    "leave_one_out": lambda rewards, scale: leave_one_out_advantages(rewards),  # the schema allows no scale there
    "batch": batch_advantages,
}


def compared_rewards(scores: Scores, stage: GrpoStage) -> Float[Tensor, "P G"]:
    """What the completions of a group are compared by: the total reward, or the sum of normalised rewards (GDPO)."""
    if stage.algorithm.reward_aggregation == "sum":
        return scores.total
    if stage.reward_control is not None:  # the terms are the real ones, and not what is learnt from
        return normalize_then_sum([scores.total], [1.0])
    unscored = scores.total.isnan()
    terms = [scores.terms[term.key].masked_fill(unscored, torch.nan) for term in stage.reward_terms]
    return normalize_then_sum(terms, [scores.weights.get(term.key, 1.0) for term in stage.reward_terms])


def advantages(batch: Batch, scores: Scores, stage: GrpoStage) -> Float[Tensor, "N"]:
    """The advantage of every row, the KL taken off its reward first where it is placed there."""
    algorithm = stage.algorithm
    rewards = compared_rewards(scores, stage).to(batch.completion_ids.device)
    if algorithm.kl_placement == "reward" and batch.ref_logps is not None:
        assert batch.old_logps is not None
        kl = KL_ESTIMATORS[algorithm.kl_estimator](batch.old_logps, batch.ref_logps)
        rewards = rewards - algorithm.beta * (kl * batch.completion_mask).sum(1).view_as(rewards)
    return BASELINES[algorithm.advantage_baseline](rewards, scale=algorithm.advantage_scale).flatten()


def with_advantages(batch: Batch, scores: Scores, stage: GrpoStage) -> Batch:
    """Add advantages [N] and loss weights [N, T], and what else depends on a whole optimiser step.

    Each is computed once per optimiser step (one mini-batch of whole groups) from counts of its scored rows, so that
    cutting it into micro-batches changes nothing. A row that could not be scored weighs nothing. A truncated row that is
    masked weighs nothing either, but is one of the completions that "sequence" and "constant" divide by, as in TRL.
    """
    algorithm = stage.algorithm
    scored = ~scores.total.isnan().flatten().to(batch.completion_ids.device)
    counted = batch.completion_mask & scored[:, None]
    mask = counted
    if algorithm.mask_truncated_completions:
        assert batch.finished is not None
        mask = counted & batch.finished[:, None]
    rows = batch.num_rows // algorithm.num_minibatches
    parts = [slice(start, start + rows) for start in range(0, batch.num_rows, rows)]
    weights = [
        token_weights(
            mask[part],
            reduction=algorithm.reduction,
            max_completion_length=stage.sampling.max_completion_length,
            num_sequences=int(counted[part].any(1).sum()),
        )
        for part in parts
    ]
    batch = replace(batch, advantages=advantages(batch, scores, stage), loss_weights=torch.cat(weights))
    return with_entropy_parts(batch, mask, parts, algorithm)


def with_entropy_parts(batch: Batch, mask: Tensor, parts: Sequence[slice], algorithm: Algorithm) -> Batch:
    """Add the mask of the least decided tokens and the weights of the entropy bonus, each where it is on."""
    if algorithm.top_entropy_quantile < 1:
        assert batch.old_entropy is not None
        share = algorithm.top_entropy_quantile
        kept = [high_entropy_mask(batch.old_entropy[part], mask[part], share=share) for part in parts]
        mask = torch.cat(kept)
        batch = replace(batch, policy_mask=mask)
    if algorithm.entropy_bonus > 0:
        weights = torch.cat([token_weights(mask[part], reduction="token") for part in parts])
        batch = replace(batch, entropy_weights=weights)
    return batch
