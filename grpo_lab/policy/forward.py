"""Forward passes: log-probs of completions, with gradient for the policy and without for old and reference policies."""

import copy
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_lab.algorithm.linear_logps import LOGITS_HELD
from grpo_lab.algorithm.logps import entropy, selected_logps
from grpo_lab.attention.interface import NotPackableError
from grpo_lab.attention.last_layer import predicted_states
from grpo_lab.attention.layout import PackedBatch, spread
from grpo_lab.attention.packed import attending_to
from grpo_lab.attention.probe import parts, why_plain
from grpo_lab.types import Batch, LogpsAndEntropy, Policy

# The most tokens whose activations are held for the backward pass, if no micro-batch size is given: of completions, and
# of prompts that have one each. More would be no faster; a GPU needs more to be busy.
TOKENS_HELD = 4096
TOKENS_HELD_ON_GPU = 16384


class PolicyForward(nn.Module):
    """The one module that is wrapped for training: a batch in, log-probs and entropy [N, T] in nats out.

    All logits are divided by the sampling temperature, for the policy, the old and the reference policy alike. Columns
    beyond a row's length hold finite values without meaning. The entropy has a gradient only if asked for
    (`entropy_gradient`).

    Where the model allows it a batch is computed packed: each prompt once, each real token once, each needed logit
    once, and never more logits than a stated bound. Elsewhere it is computed plainly, row by row with padding, and
    `plain_because` says why; so it is where nobody wants it `packed`. `first_choices`: also say how probable the most
    probable tokens are, which costs a packed pass nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        entropy_gradient: bool = False,
        packed: bool = True,
        first_choices: bool = False,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.first_choices = first_choices
        self.model = model
        self.temperature = temperature
        self.entropy_gradient = entropy_gradient
        self.plain_because: str | None = None

    def forward(self, batch: Batch) -> LogpsAndEntropy:
        self.plain_because = None
        if self.packed:
            try:
                return packed_forward(self.model, batch, temperature=self.temperature)
            except NotPackableError as reason:
                self.plain_because = str(reason)
        return plain_forward(
            self.model,
            batch,
            temperature=self.temperature,
            entropy_gradient=self.entropy_gradient,
            first_choices=self.first_choices,
        )

    def micro_batches(self, batch: Batch, size: int | None) -> list[tuple[int, int]]:
        """Where to cut a batch: `size` rows each, or whole groups, as many as the bounds on tokens and logits allow.

        Tokens of a prompt count where it has one completion only; shared by many they are few.
        """
        if size is not None:
            return [(start, min(start + size, batch.num_rows)) for start in range(0, batch.num_rows, size)]
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        tokens, most, most_logits = batch.completion_mask.sum(1), TOKENS_HELD, LOGITS_HELD // vocabulary
        if not self.packed or why_plain(self.model) is not None:
            tokens = torch.full_like(tokens, batch.completion_ids.shape[1])
        elif tokens.is_cuda:  # logits are bounded there by themselves
            most, most_logits = TOKENS_HELD_ON_GPU, TOKENS_HELD_ON_GPU
        prompts = batch.prompt_mask.sum(1).tolist()
        cuts, held, logits = [0], 0, 0
        for start, stop in batch.groups():
            own = int(tokens[start:stop].sum())
            read = prompts[int(batch.prompt_index[start])] if stop - start == 1 else 0
            if held > 0 and (held + own + read > most or logits + own > most_logits):
                cuts.append(start)
                held = logits = 0
            held, logits = held + own + read, logits + own
        return list(pairwise([*cuts, batch.num_rows]))


def packed_forward(model: nn.Module, batch: Batch, *, temperature: float) -> LogpsAndEntropy:
    """Log-probs and entropy of a batch laid out as one row without padding; both with their gradients.

    Raises:
        NotPackableError: the model is not one that can be computed so, or not with texts as long as these.
    """
    reason = why_plain(model)
    if reason is not None:
        raise NotPackableError(reason)
    packed = PackedBatch.of(batch)
    decoder, head = parts(model)
    if packed.ids.is_cuda:
        from grpo_lab.kernels.head import linear_logps  # Triton, which comes with torch there
    else:
        from grpo_lab.algorithm.linear_logps import linear_logps
    out = linear_logps(
        predicted_states(decoder, attending_to(packed)),
        head.weight,
        head.bias,
        batch.completion_ids[batch.completion_mask],
        packed.logits_row,
        temperature=temperature,
    )
    return LogpsAndEntropy(
        spread(out.logps, batch),
        spread(out.entropy[packed.logits_row], batch),
        spread(out.largest[packed.logits_row], batch),
    )


def plain_forward(
    model: nn.Module,
    batch: Batch,
    *,
    temperature: float,
    entropy_gradient: bool = False,
    first_choices: bool = False,
) -> LogpsAndEntropy:
    """The same, row by row: right for every decoder, whatever its attention.

    Positions come from the mask, so left padding is exact for absolute embeddings too. The LM head runs on completion
    positions only. The entropy's gradient would keep another [N, T, V] tensor, so it is there only if asked for.
    """
    width = batch.completion_ids.shape[1]
    prompt_ids, prompt_mask = batch.prompt_ids[batch.prompt_index], batch.prompt_mask[batch.prompt_index]
    mask = torch.cat([prompt_mask, batch.completion_mask], dim=1).long()
    logits = model(
        input_ids=torch.cat([prompt_ids, batch.completion_ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]  # the logits at column t-1 predict the token at column t
    if temperature != 1.0:
        logits = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        )  # bfloat16 would round the quotient; the sampler does not
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        undecided = entropy(logits)
    largest = selected_logps(logits.detach(), logits.detach().argmax(-1)) if first_choices else None
    return LogpsAndEntropy(selected_logps(logits, batch.completion_ids), undecided, largest)


@torch.no_grad()
def without_gradient(forward: PolicyForward, batch: Batch, *, micro_batch_size: int | None = None) -> LogpsAndEntropy:
    """Log-probs and entropy [N, T] in micro-batches, padded back to the batch's width with zeros."""
    logps = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
    undecided = torch.zeros_like(logps)
    for start, stop in forward.micro_batches(batch, micro_batch_size):
        out = forward(batch.rows(start, stop))
        logps[start:stop, : out.logps.shape[1]] = out.logps
        undecided[start:stop, : out.entropy.shape[1]] = out.entropy
    outside = ~batch.completion_mask
    return LogpsAndEntropy(logps.masked_fill(outside, 0.0), undecided.masked_fill(outside, 0.0))


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
