"""Forward passes: log-probs of completions, with gradient for the policy and without for old and reference policies."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_lab.algorithm.logps import entropy, selected_logps
from grpo_lab.types import Batch, LogpsAndEntropy, Policy


class PolicyForward(nn.Module):
    """The one module that is wrapped for training: a batch in, log-probs and entropy [N, T] in nats out.

    All logits are divided by the sampling temperature, for the policy, the old and the reference policy alike. The LM
    head runs on completion positions only. Positions come from the mask, so left padding is exact for absolute
    embeddings too. Columns beyond a row's length hold finite values without meaning. The entropy has a gradient only if
    asked for (`entropy_gradient`): it keeps another [N, T, V] tensor for the backward pass.
    """

    def __init__(self, model: nn.Module, *, temperature: float, entropy_gradient: bool = False) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.entropy_gradient = entropy_gradient

    def forward(self, batch: Batch) -> LogpsAndEntropy:
        width = batch.completion_ids.shape[1]
        prompt_ids, prompt_mask = batch.prompt_ids[batch.prompt_index], batch.prompt_mask[batch.prompt_index]
        mask = torch.cat([prompt_mask, batch.completion_mask], dim=1).long()
        logits = self.model(
            input_ids=torch.cat([prompt_ids, batch.completion_ids], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits[:, :-1]  # the logits at column t-1 predict the token at column t
        if self.temperature != 1.0:
            logits = logits.float() / self.temperature  # bfloat16 would round the quotient; the sampler does not
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):
            spread = entropy(logits)
        return LogpsAndEntropy(selected_logps(logits, batch.completion_ids), spread)


@torch.no_grad()
def without_gradient(forward: PolicyForward, batch: Batch, *, micro_batch_size: int | None = None) -> LogpsAndEntropy:
    """Log-probs and entropy [N, T] in micro-batches, padded back to the batch's width with zeros."""
    size = micro_batch_size or batch.num_rows
    logps = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
    spread = torch.zeros_like(logps)
    for start in range(0, batch.num_rows, size):
        rows = batch.rows(start, min(start + size, batch.num_rows))
        out = forward(rows)
        logps[start : start + size, : out.logps.shape[1]] = out.logps
        spread[start : start + size, : out.entropy.shape[1]] = out.entropy
    outside = ~batch.completion_mask
    return LogpsAndEntropy(logps.masked_fill(outside, 0.0), spread.masked_fill(outside, 0.0))


def completion_logps(
    policy: Policy, batch: Batch, *, temperature: float, micro_batch_size: int | None = None
) -> Float[Tensor, "N T"]:
    """Log-probs [N, T] in nats of the batch's completions under the policy, without gradient; 0 where masked."""
    return without_gradient(
        PolicyForward(policy.model, temperature=temperature), batch, micro_batch_size=micro_batch_size
    ).logps


def frozen_copy(policy: Policy) -> Policy:
    """The reference: the policy as it is now, frozen. Taken once, when the stage begins.

    What does not learn is shared with the policy, so beside an adapter only the adapter is copied. A copy of a fresh
    adapter changes nothing: the reference is then the model without it.
    """
    shared = {id(parameter): parameter for parameter in policy.model.parameters() if not parameter.requires_grad}
    model = copy.deepcopy(policy.model, shared).eval().requires_grad_(False)
    return Policy(model, policy.tokenizer, policy.eos_ids, policy.pad_id, policy.context_length)


def reference_logps(
    reference: Policy, batch: Batch, *, temperature: float, micro_batch_size: int | None = None
) -> Float[Tensor, "N T"]:
    """Log-probs [N, T] in nats under the frozen reference."""
    return completion_logps(reference, batch, temperature=temperature, micro_batch_size=micro_batch_size)


@torch.no_grad()
def refresh_reference(reference: Policy, policy: Policy, *, alpha: float) -> None:
    """Move the reference towards the policy, in place: ref = alpha * policy + (1 - alpha) * ref.

    In float32 whatever the weights' type. As TRL's sync_ref_model, after "Learn Your Reference Model for Real Good
    Alignment" (arXiv:2404.09656).
    """
    for mine, theirs in zip(reference.model.parameters(), policy.model.parameters(), strict=True):
        if mine is not theirs:  # beside an adapter all else is shared
            mine.copy_(alpha * theirs.float() + (1 - alpha) * mine.float())


def learn_without_dropout(model: nn.Module) -> None:
    """Put every module in evaluation mode, except that gradient checkpointing stays on.

    With dropout active the KL would not be 0 at step 0 and the ratio not 1. transformers recomputes activations only
    in layers that are in training mode, so the checkpointed layers keep that flag; a few architectures (OPT) call
    functional dropout in that very layer with a rate kept there, which is set to 0.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
