"""What both of TRL's trainers are told, whichever stage they train. Imports no TRL."""

from collections.abc import Mapping
from typing import Any

from grpo_lab.recipe.schema import GrpoStage, Model, SftStage
from grpo_lab.seeds import derive_seed

# TRL's and transformers' own defaults that differ from what a recipe means, and everything this project does itself.
ALWAYS: Mapping[str, Any] = {
    "bf16": False,  # TRL's default is true, on CPUs too: log-probs off by .08. Weights have the recipe's dtype.
    "fp16": False,
    "shuffle_dataset": False,  # prompts and rows come in the order of the shared stream
    "num_train_epochs": 1,
    "dataloader_num_workers": 0,
    "remove_unused_columns": False,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # true would log a loss that is not a number as 0
    "save_strategy": "no",  # a callback asks for checkpoints, at the end of a step only
    "eval_strategy": "no",  # evaluation is the shared one
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
}

QUANTIZED = "TRL turns the adapter of a quantized model to bfloat16, whatever the recipe says; set engine: native"


def equal_parts(rows: int, most: int | None) -> int:
    """TRL cuts an optimiser step into equal parts: the largest divisor of its rows that micro_batch_size allows.

    >>> equal_parts(12, 5), equal_parts(12, None), equal_parts(12, 40)
    (4, 12, 12)
    """
    return next(size for size in range(min(most or rows, rows), 0, -1) if rows % size == 0)


def trainer_arguments(stage: GrpoStage | SftStage, model: Model, *, seed: int) -> dict[str, Any]:
    """The arguments that both of TRL's trainers take."""
    return {
        **ALWAYS,
        "seed": derive_seed(seed, "trl") % 2**32,
        "learning_rate": stage.optimizer.learning_rate,
        "max_grad_norm": stage.optimizer.max_grad_norm or 0.0,  # 0 = never clipped, still measured
        "gradient_checkpointing": model.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "trust_remote_code": model.trust_remote_code,
    }


def cut_otherwise(stage: GrpoStage | SftStage, rows: int, at_once: int) -> list[str]:
    """What to say where TRL cannot cut a step's rows as the recipe wants."""
    if stage.micro_batch_size is None or at_once == min(stage.micro_batch_size, rows):
        return []
    return [f"TRL needs equal micro-batches: {at_once} rows instead of {stage.micro_batch_size}"]
