"""What a GRPO stage means in TRL's words: every recipe key is passed on, used by a shared part, or refused.

Imports no TRL, so that a recipe is checked without it. `arguments` is the map; the tables beside it say which key goes
where, and `tests/engines/test_trl_config.py` walks the schema and fails on a key that none of them knows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from grpo_lab.engines import trl_vllm
from grpo_lab.engines.trl_trainer import QUANTIZED, cut_otherwise, equal_parts, trainer_arguments
from grpo_lab.engines.trl_vllm import vllm_arguments
from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import GrpoStage, Model, WeightSchedule

VERSION = "1.16.0"  # TRL's numbers move between minor versions
INEXACT = "engine: trl draws from global random state, which is not a function of the step"

# TRL's own defaults that differ from what a recipe means; `trl_trainer.py` has those of both trainers.
FIXED: Mapping[str, Any] = {
    "disable_dropout": True,
    "repetition_penalty": 1.0,
    "log_completions": False,  # rollouts go to our own sinks
}

REDUCTIONS = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}
OWN_REDUCTION = {"cispo": "token", "sapo": "sequence"}  # TRL's loss types for these fix it

# recipe key -> the argument of GRPOConfig that it decides, alone or with others
PASSED: Mapping[str, str] = {
    **trl_vllm.PASSED,
    "steps": "max_steps",
    "prompts_per_step": "generation_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.max_grad_norm": "max_grad_norm",
    "sampling.num_generations": "num_generations",
    "sampling.max_completion_length": "max_completion_length",
    "sampling.temperature": "temperature",
    "sampling.top_p": "top_p",
    "sampling.top_k": "top_k",
    "sampling.min_p": "min_p",
    "rewards.weight": "reward_weights",
    "algorithm.reward_aggregation": "multi_objective_aggregation",
    "algorithm.advantage_scale": "scale_rewards",
    "algorithm.surrogate": "loss_type",
    "algorithm.ratio_level": "importance_sampling_level",
    "algorithm.epsilon_low": "epsilon",
    "algorithm.epsilon_high": "epsilon_high",
    "algorithm.delta": "delta",
    "algorithm.sapo_temperature_pos": "sapo_temperature_pos",
    "algorithm.sapo_temperature_neg": "sapo_temperature_neg",
    "algorithm.reduction": "loss_type",
    "algorithm.beta": "beta",
    "algorithm.kl_bias_correction": "use_bias_correction_kl",
    "algorithm.reference_refresh.every": "ref_model_sync_steps",
    "algorithm.reference_refresh.alpha": "ref_model_mixup_alpha",
    "algorithm.entropy_bonus": "entropy_coef",
    "algorithm.top_entropy_quantile": "top_entropy_quantile",
    "algorithm.mask_truncated_completions": "mask_truncated_completions",
    "algorithm.num_iterations": "num_iterations",
    "algorithm.num_minibatches": "gradient_accumulation_steps",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.trust_remote_code": "trust_remote_code",
}

# recipe key, or a whole block of them -> the part of this project that uses it, the same one for both engines
SHARED: Mapping[str, str] = {
    **trl_vllm.SHARED,
    "kind": "chooses the stage",
    "engine": "chooses this engine",
    "data": "the prompt stream",
    "start_from": "the pipeline",
    "rewards": "RewardSet, which TRL asks through one function per term",
    "max_failed_rewards": "check_budget",
    "reward_workers": "Workers, which RewardSet asks",
    "reward_timeout_seconds": "Workers, which RewardSet asks",
    "reward_memory_gib": "Workers, which RewardSet asks",
    "reward_control": "controlled, before TRL is given the one total",
    "checkpoint": "asks TRL for checkpoints and keeps the newest",
    "evaluation": "evaluate",
    "sampling.max_rows": "the native and hf samplers",
    "optimizer": "make_optimizer and learning_rate; TRL gets optimiser and schedule as objects",
    "algorithm.preset": "fills the other keys when the recipe is read",
    "algorithm.overlong_buffer": "GrpoStage.reward_terms: one more reward",
    "model": "load_policy; TRL gets the model as an object",
}

Refusal = tuple[Callable[[GrpoStage], bool], str]

# recipe key -> when TRL cannot do what it asks for, and what to do instead
REFUSED: Mapping[str, Refusal] = {
    **trl_vllm.REFUSED,
    "rewards.weight": (
        lambda stage: (
            stage.algorithm.reward_aggregation != "sum" and stage.reward_control is None and bool(scheduled(stage))
        ),
        "TRL normalises each reward before it weighs it, with weights that never change; set reward_aggregation: sum, a "
        "number for the weight, or engine: native",
    ),
    "score_while_sampling": (
        lambda stage: stage.score_while_sampling,
        "GRPOTrainer scores when a step's sampling is over; leave it out or set engine: native",
    ),
    "sampling.max_rows": (
        lambda stage: stage.sampling.max_rows is not None and stage.sampling.backend in ("auto", "vllm"),
        "TRL's own generation, and the vLLM that it starts, decode all completions of a step at once; set sampling.backend: native, or leave it out",
    ),
    "algorithm.advantage_baseline": (
        lambda stage: stage.algorithm.advantage_baseline != "group",
        "GRPOTrainer compares a completion with its group's mean only; set group or engine: native",
    ),
    "algorithm.advantage_scale": (
        lambda stage: (
            (stage.algorithm.advantage_scale == "centred" and stage.algorithm.reward_aggregation == "sum")
            or (stage.algorithm.advantage_scale in ("group", "none") and stage.algorithm.reward_aggregation != "sum")
        ),
        "TRL scales sums by group, batch or none, and normalised sums by centred or batch; choose one of those or "
        "set engine: native",
    ),
    "algorithm.surrogate": (
        lambda stage: stage.algorithm.surrogate == "none",
        "TRL always bounds the ratio; set clipped or engine: native",
    ),
    "algorithm.reduction": (
        lambda stage: (
            OWN_REDUCTION.get(stage.algorithm.surrogate, stage.algorithm.reduction) != stage.algorithm.reduction
        ),
        "TRL's cispo counts every token the same, its sapo every completion; set reduction: token for cispo, "
        "sequence for sapo, or engine: native",
    ),
    "algorithm.ratio_level": (
        lambda stage: stage.algorithm.ratio_level == "sequence_sum",
        "GRPOTrainer has ratios per token and their geometric mean; set token or sequence, or engine: native",
    ),
    "algorithm.kl_estimator": (
        lambda stage: stage.algorithm.beta > 0 and stage.algorithm.kl_estimator != "k3",
        "TRL has the k3 estimator only; set k3 or engine: native",
    ),
    "algorithm.kl_placement": (
        lambda stage: stage.algorithm.beta > 0 and stage.algorithm.kl_placement != "loss",
        "GRPOTrainer adds the KL to the loss; set loss or engine: native",
    ),
    "algorithm.sampling_attempts": (
        lambda stage: stage.algorithm.sampling_attempts > 1,
        "TRL cannot sample groups without signal again; set 1 or engine: native",
    ),
}


def unsupported(stage: GrpoStage, model: Model | None = None) -> list[tuple[tuple[str, ...], str]]:
    """What TRL cannot do of a stage: each key's place inside the stage, and a message with the remedy.

    `model` is the model block as it holds for the stage; None leaves out what depends on it.
    """
    found = [(key, message) for key, (is_refused, message) in REFUSED.items() if is_refused(stage)]
    lora = None if model is None else model.lora
    if model is not None and model.quantization is not None:
        found.append(("model.quantization", QUANTIZED))
    if lora is not None and lora.bias != "none" and stage.algorithm.beta > 0:
        message = (
            "TRL's reference is a second adapter, and peft allows one with biases; set none, beta: 0 or engine: native"
        )
        found.append(("model.lora.bias", message))
    if lora is not None and stage.algorithm.reference_refresh is not None:
        message = "TRL moves a separate reference model only, and beside an adapter there is none; leave it out or set "
        found.append(("algorithm.reference_refresh", f"{message}engine: native"))
    return [(tuple(key.split(".")), f'engine "trl": {message}') for key, message in found]


def scheduled(stage: GrpoStage) -> frozenset[str]:
    """The terms whose weight follows a schedule: their functions multiply it in, and TRL's own weight is 1."""
    return frozenset(term.key for term in stage.reward_terms if isinstance(term.weight, WeightSchedule))


def is_rloo(stage: GrpoStage) -> bool:
    """Whether TRL's RLOOTrainer computes this algorithm, which its GRPOTrainer refuses. It trains nothing here: only
    parity asks."""
    values = stage.algorithm.model_dump()
    return all(values[key] in allowed for key, allowed in RLOO.items()) and (
        stage.algorithm.beta == 0 or (stage.algorithm.kl_placement, stage.algorithm.kl_estimator) == ("reward", "k1")
    )


RLOO: Mapping[str, tuple[Any, ...]] = {
    "reward_aggregation": ("sum",),
    "advantage_baseline": ("leave_one_out",),
    "surrogate": ("none", "clipped"),
    "ratio_level": ("sequence_sum",),
    "reduction": ("sequence",),
    "delta": (None,),
    "entropy_bonus": (0.0,),
    "top_entropy_quantile": (1.0,),
    "mask_truncated_completions": (False,),
    "sampler_correction": ("none",),
}


def require_trl() -> None:
    """Refuse to go on without the one TRL version whose behaviour is known here.

    Raises:
        SetupError: another version is installed, or none.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise SetupError(f'engine "trl" needs trl {VERSION}, found {found}; pip install trl=={VERSION}')


@dataclass(frozen=True)
class Sizes:
    """One step in TRL's counting, which is in completions."""

    completions: int
    """N = P*G: what TRL samples at once (its generation batch, always whole groups)."""
    rows_at_once: int
    """Completions of one forward and backward pass."""
    accumulation: int
    """Passes of one optimiser step."""
    updates: int
    """Optimiser steps of one step of ours: num_iterations * num_minibatches."""

    @property
    def passes(self) -> int:
        """Forward and backward passes over the batch in one iteration (TRL: steps_per_generation)."""
        return self.completions // self.rows_at_once


def sizes(stage: GrpoStage) -> Sizes:
    """A GRPO step in TRL's counting.

    >>> base = {"kind": "grpo", "data": {"source": "task", "path": "addition", "prompt": "prompt"}, "steps": 1}
    >>> base |= {"optimizer": {"learning_rate": 1e-3}, "rewards": [{"name": "accuracy"}], "prompts_per_step": 4}
    >>> base |= {"sampling": {"num_generations": 3, "max_completion_length": 8}, "micro_batch_size": 5}
    >>> sizes(GrpoStage(**base))
    Sizes(completions=12, rows_at_once=4, accumulation=3, updates=1)
    """
    algorithm = stage.algorithm
    completions = stage.prompts_per_step * stage.sampling.num_generations
    rows = completions // algorithm.num_minibatches
    at_once = equal_parts(rows, stage.micro_batch_size)
    return Sizes(completions, at_once, rows // at_once, algorithm.num_iterations * algorithm.num_minibatches)


def arguments(stage: GrpoStage, model: Model, *, seed: int) -> dict[str, Any]:
    """The arguments of GRPOConfig, all but the folder and the device. `seed` is the stage's own."""
    size, sampling, algorithm = sizes(stage), stage.sampling, stage.algorithm
    return {
        **trainer_arguments(stage, model, seed=seed),
        **FIXED,
        "max_steps": stage.steps * size.updates,
        "generation_batch_size": size.completions,
        "per_device_train_batch_size": size.rows_at_once,
        "gradient_accumulation_steps": size.accumulation,
        "num_generations": sampling.num_generations,
        "max_completion_length": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
        "min_p": sampling.min_p or None,
        "reward_weights": [
            1.0 if isinstance(term.weight, WeightSchedule) else term.weight for term in stage.reward_terms
        ]
        if stage.reward_control is None
        else [1.0],
        **_loss_arguments(stage),
        **vllm_arguments(stage),
        "num_iterations": algorithm.num_iterations,
    }


def _loss_arguments(stage: GrpoStage) -> dict[str, Any]:
    algorithm, normalised = stage.algorithm, stage.algorithm.reward_aggregation == "normalize_then_sum"
    surrogate, refresh = algorithm.surrogate, algorithm.reference_refresh
    return {
        "loss_type": surrogate if surrogate in OWN_REDUCTION else REDUCTIONS[algorithm.reduction],
        "multi_objective_aggregation": "normalize_then_sum" if normalised else "sum_then_normalize",
        # normalised sums have mean 0 in every group, and TRL always scales them by their std over the step
        "scale_rewards": "batch" if normalised else algorithm.advantage_scale,
        "importance_sampling_level": algorithm.ratio_level,
        "epsilon": algorithm.epsilon_low,
        "epsilon_high": algorithm.epsilon_high,
        "delta": algorithm.delta,
        "sapo_temperature_pos": algorithm.sapo_temperature_pos,
        "sapo_temperature_neg": algorithm.sapo_temperature_neg,
        "beta": algorithm.beta,
        "use_bias_correction_kl": algorithm.kl_bias_correction,
        "mask_truncated_completions": algorithm.mask_truncated_completions,
        "top_entropy_quantile": algorithm.top_entropy_quantile,
        "entropy_coef": algorithm.entropy_bonus,
        "sync_ref_model": refresh is not None,
        "ref_model_sync_steps": refresh.every * sizes(stage).updates if refresh else 1,
        "ref_model_mixup_alpha": refresh.alpha if refresh else 1.0,
    }


def differences(stage: GrpoStage) -> list[str]:
    """What the two engines realise differently for this stage, in words; `compare` prints it beside what it tries out
    (compare/by_design.py)."""
    size, algorithm = sizes(stage), stage.algorithm
    found = [
        "TRL's kl, entropy and clip ratios are means over micro-batches, the native engine's are means over all tokens"
    ]
    if algorithm.ratio_level == "sequence":
        found.append("TRL's clip ratios are shares of completions here, the native engine's are shares of tokens")
    if algorithm.num_minibatches > 1:
        found.append("TRL's mini-batches are random rows of the step, the native engine's are whole groups")
        if algorithm.reduction == "token":
            found.append("TRL divides a mini-batch by the step's mean token count per mini-batch, not by its own")
    if algorithm.top_entropy_quantile < 1:
        found.append("TRL takes the entropy quantile per micro-batch and under the current policy, not over the step")
    if algorithm.entropy_bonus > 0 and size.accumulation > 1:
        found.append("TRL's entropy bonus is a mean of micro-batch means")
    return found + cut_otherwise(stage, size.completions, size.rows_at_once)
