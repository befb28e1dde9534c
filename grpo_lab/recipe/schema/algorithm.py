"""The GRPO variant, key by key."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_lab.recipe.presets import PRESETS, conflicts
from grpo_lab.recipe.schema.block import Block, Fraction, PositiveInt


class ReferenceRefresh(Block):
    """Lets the reference follow the policy: ref = alpha * policy + (1 - alpha) * ref."""

    every: PositiveInt
    """Steps between two refreshes."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The policy's share; 1 replaces the reference."""


class Algorithm(Block):
    """The GRPO variant. A preset fills what is not written; see presets.py for the rows and their papers."""

    preset: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo",
        "trl_default",
    ] = "grpo"  # fmt: skip
    """A row of the table of variants."""
    reward_aggregation: Literal["sum", "normalize_then_sum"] = "sum"
    """Sum the weighted rewards as they are, or each one first centred and scaled within its group (GDPO)."""
    advantage_baseline: Literal["group", "leave_one_out", "batch"] = "group"
    """What a reward is compared with: its group's mean, the mean of the others in its group, or the step's mean."""
    advantage_scale: Literal["group", "batch", "centred", "none"] = "group"
    """What the difference is divided by: the std of the group's rewards, of the step's, of the step's differences, or 1."""
    surrogate: Literal["clipped", "cispo", "sapo", "none"] = "clipped"
    """The objective: PPO's clip, CISPO's capped weight, SAPO's soft clip, or ratio * A as it is."""
    ratio_level: Literal["token", "sequence", "sequence_sum"] = "token"
    """The importance ratio: per token, its geometric mean over the completion, or its product (the completion's own)."""
    epsilon_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """surrogate clipped: the ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: Annotated[float, Field(gt=0)] = 0.2
    """surrogate clipped: the ratio is clipped above at 1 + epsilon_high. cispo: the ratio's cap itself."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """surrogate clipped: two-sided clipping, the ratio itself is capped here first; null = off."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """surrogate sapo: how fast the gradient fades where the advantage is positive."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """surrogate sapo: how fast the gradient fades where the advantage is negative."""
    reduction: Literal["sequence", "token", "constant"] = "sequence"
    """Every completion counts the same, every token counts the same, or a constant length divides."""
    beta: Annotated[float, Field(ge=0)] = 0.04
    """Weight of the KL penalty to the reference; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimator of the KL."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Add the KL to every token's loss, or subtract a completion's summed KL from its reward."""
    kl_bias_correction: bool = False
    """Multiply the KL in the loss by the importance ratio, gradient included."""
    reference_refresh: ReferenceRefresh | None = None
    """When the reference follows the policy; null = it stays as the stage began."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    """This times the mean entropy per token (nats) is taken from the loss; 0 = off."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of tokens, those of highest entropy under pi_old, that the policy objective keeps; 1 = all."""
    mask_truncated_completions: bool = False
    """Leave completions that the length limit cut off out of the loss; they stay in their group's baseline. DAPO's overlong
    filtering (arXiv:2503.14476)."""
    sampling_attempts: PositiveInt = 1
    """Dynamic sampling: rounds of sampling in a step, groups without signal being replaced in each; 1 = off."""
    overlong_buffer: Fraction = 0.0
    """DAPO's soft overlong penalty over this last share of max_completion_length, as a reward `overlong`; 0 = off."""
    num_iterations: PositiveInt = 1
    """Passes over one batch of completions."""
    num_minibatches: PositiveInt = 1
    """Optimiser steps in one pass; each takes whole groups."""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """Weight tokens by pi_old / sampler, capped or left out beyond the cap: for samplers that are not quite the policy."""
    sampler_correction_level: Literal["token", "sequence"] = "token"
    """Whether that weight is a token's own or the product over its completion."""
    sampler_correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """The cap of that weight."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "grpo")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}

    @model_validator(mode="after")
    def _no_key_without_effect(self) -> "Algorithm":
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        problems = conflicts(self.model_dump(), defaults)
        if problems:
            raise ValueError("\n".join(problems))
        return self
