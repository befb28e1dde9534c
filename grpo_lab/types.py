"""What flows through the trainer: small frozen values with shapes.

Axes: P prompts per step, G completions per prompt, N = P*G rows (group-major), S prompt tokens, T completion tokens,
V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One dataset row, already templated: `prompt` is the exact text the model sees, `prompt_ids` its tokens.

    `columns` are what rewards may ask for (the row's own columns, plus `answer` when the recipe maps one).
    `messages` is the chat form of the prompt, None for a plain-text prompt.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `token_ids` run up to and including EOS and never hold padding.

    `finished` is False when the length limit cut the answer off. `sampler_logps` (nats) are log-probs under the
    distribution actually sampled: after temperature, top_k, top_p and min_p. `text` has no special tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    sampler_logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Group:
    """The unit GRPO compares within: one prompt and its G completions. It is never split and never regrouped.

    `policy_version` is how many steps the policy that sampled had learnt, as a sampler with weights of its own states it;
    None where the sampler uses the trained weights themselves.
    """

    example: Example
    completions: tuple[Completion, ...]
    policy_version: int | None = None


class Progress(NamedTuple):
    """Where a stage stands: `step` of `num_steps` steps are done, each of `updates` optimiser steps."""

    step: int
    num_steps: int
    updates: int = 1


FINISHED = Progress(1, 1)


@dataclass(frozen=True)
class Scores:
    """Rewards of P groups.

    nan in a term: that reward abstained or failed there; `status` says which ("ok", "abstained", "gated", "error",
    "timeout", "bad_type", "non_finite", "crashed").
    nan in `total`: not scored, so out of the group's mean and std and out of the loss weights.
    `reasons` holds the first message of each failure, by term, for people.
    `weights` are what the terms were multiplied by (1 if not given). `extra` (by group, then completion) and `logged` are what rewards
    wrote down beside their values, through TRL's `log_extra` and `log_metric`.
    `real_total` is None but under a reward control, where `total` is not what the answers were worth.
    """

    total: Float[Tensor, "P G"]
    terms: Mapping[str, Float[Tensor, "P G"]]
    status: Mapping[str, tuple[tuple[str, ...], ...]]
    reasons: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, tuple[tuple[Any, ...], ...]] = field(default_factory=dict)
    logged: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    real_total: Float[Tensor, "P G"] | None = None


@dataclass(frozen=True)
class Batch:
    """N padded rows. Each prompt is kept once; `prompt_index` says which one a row answers.

    Prompts are padded on the left, completions on the right, so that every row's completion starts at column S.
    Masks come from lengths, never from `ids == pad_id`. Nobody writes into these tensors.

    `advantages` and `loss_weights` are None until `with_advantages`, as are `policy_mask` (the tokens that the policy
    objective keeps) and `entropy_weights`; `old_logps`, `old_entropy` and `ref_logps` are None until `with_logps`. All
    stay None where they are not needed. What belongs to one optimiser step (one mini-batch) is computed together.
    `finished` is False for rows that the length limit cut off.
    """

    prompt_ids: Int[Tensor, "P S"]
    prompt_mask: Bool[Tensor, "P S"]
    prompt_index: Int[Tensor, "N"]
    completion_ids: Int[Tensor, "N T"]
    completion_mask: Bool[Tensor, "N T"]
    sampler_logps: Float[Tensor, "N T"] | None = None
    old_logps: Float[Tensor, "N T"] | None = None
    ref_logps: Float[Tensor, "N T"] | None = None
    advantages: Float[Tensor, "N"] | None = None
    loss_weights: Float[Tensor, "N T"] | None = None
    finished: Bool[Tensor, "N"] | None = None
    old_entropy: Float[Tensor, "N T"] | None = None
    policy_mask: Bool[Tensor, "N T"] | None = None
    entropy_weights: Float[Tensor, "N T"] | None = None

    @property
    def num_rows(self) -> int:
        return int(self.completion_ids.shape[0])

    def groups(self) -> list[tuple[int, int]]:
        """Runs of rows with the same prompt, as (start, stop)."""
        prompts = self.prompt_index.tolist()
        starts = [row for row, prompt in enumerate(prompts) if row == 0 or prompt != prompts[row - 1]]
        return list(pairwise([*starts, len(prompts)]))

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows start..stop, cut to their longest prompt and completion (padding changes nothing)."""
        index = self.prompt_index[start:stop]
        prompts, index = torch.unique(index, return_inverse=True)
        width = int(self.completion_mask[start:stop].sum(1).max())
        prompt_mask = self.prompt_mask[prompts]
        first = int(self.prompt_mask.shape[1] - prompt_mask.sum(1).max())

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop, :width]

        return replace(
            self,
            prompt_ids=self.prompt_ids[prompts, first:],
            prompt_mask=prompt_mask[:, first:],
            prompt_index=index,
            completion_ids=self.completion_ids[start:stop, :width],
            completion_mask=self.completion_mask[start:stop, :width],
            sampler_logps=cut(self.sampler_logps),
            old_logps=cut(self.old_logps),
            ref_logps=cut(self.ref_logps),
            advantages=None if self.advantages is None else self.advantages[start:stop],
            loss_weights=cut(self.loss_weights),
            finished=None if self.finished is None else self.finished[start:stop],
            old_entropy=cut(self.old_entropy),
            policy_mask=cut(self.policy_mask),
            entropy_weights=cut(self.entropy_weights),
        )


class LogpsAndEntropy(NamedTuple):
    """What one forward pass of the policy returns, in nats; rows and columns as in the batch.

    `largest`: the log-prob of the token that was most probable in that place, without gradient; None = not asked for.
    """

    logps: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    largest: Float[Tensor, "N T"] | None = None


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, and the frozen facts that sampling and padding need.

    `eos_ids` are all the tokens that end an answer; `context_length` is the most tokens (prompt and completion) the
    model can attend to.
    """

    model: nn.Module
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context_length: int


@dataclass(frozen=True)
class UpdateStats:
    """What one call of `update` did, summed over its micro-batches, averaged over its optimiser steps.

    `kl` and `entropy` are means over completion tokens in nats. `skipped` counts optimiser steps that were left out
    because the loss or a gradient was not finite. `clip_low` and `clip_high` are None for a surrogate that never clips.
    `sampler_gap` is the mean |log pi_old - log sampler| over tokens.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    kl: float | None
    entropy: float
    ratio_mean: float
    clip_low: float | None
    clip_high: float | None
    skipped: int
    sampler_gap: float | None = None


@dataclass(frozen=True)
class Attempts:
    """What dynamic sampling did in a step: rounds allowed and used, groups drawn, groups kept without a signal."""

    limit: int
    used: int
    num_drawn: int
    num_without_signal: int


@dataclass(frozen=True)
class StepEnd:
    """One finished step, as every callback sees it. `step` counts from 1: it is the number of steps done.

    `metrics` holds values that are a function of the recipe (they are in `metrics.jsonl` and byte-exact on resume);
    `timing` holds seconds, speeds and memory. `groups` and `scores` are empty and None in supervised stages.
    """

    stage: str
    step: int
    num_steps: int
    metrics: Mapping[str, float]
    timing: Mapping[str, float]
    groups: Sequence[Group] = ()
    scores: Scores | None = None


Callback = Callable[[StepEnd], None]
