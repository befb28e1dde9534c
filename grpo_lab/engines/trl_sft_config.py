"""What a supervised stage means in TRL's words: every recipe key is passed on, used by a shared part, or refused.

Imports no TRL, so that a recipe is checked without it. The tables say which key goes where, and
`tests/engines/test_trl_sft_config.py` walks the schema and fails on a key that none of them knows.
"""

from collections.abc import Callable, Mapping
from typing import Any

from grpo_lab.engines.trl_trainer import QUANTIZED, cut_otherwise, equal_parts, trainer_arguments
from grpo_lab.recipe.schema import Model, SftStage

# Beside what holds for both trainers: SFTTrainer's defaults that differ from what a recipe means.
FIXED: Mapping[str, Any] = {
    "loss_type": "nll",
    "completion_only_loss": False,  # rows come as tokens with their labels
    "assistant_only_loss": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "packing": False,  # TRL's packing cuts rows and decides how many make a batch; packed rows are `padding_free`
    "max_length": None,  # rows were checked
    "train_sampling_strategy": "sequential",  # rows come in the order of the shared stream
}

# recipe key -> the argument of SFTConfig that it decides, alone or with others
PASSED: Mapping[str, str] = {
    "steps": "max_steps",
    "batch_size": "gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "packing": "padding_free",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.max_grad_norm": "max_grad_norm",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.trust_remote_code": "trust_remote_code",
}

# recipe key, or a whole block of them -> the part of this project that uses it, the same one for both engines
SHARED: Mapping[str, str] = {
    "kind": "chooses the stage",
    "engine": "chooses this engine",
    "data": "training_rows and the stream of rows",
    "max_length": "training_rows",
    "loss_on": "training_rows: what is not learnt has no label",
    "learn_turns": "training_rows: what is not learnt has no label",
    "group_by_length": "the stream of rows",
    "start_from": "the pipeline",
    "checkpoint": "asks TRL for checkpoints and keeps the newest",
    "evaluation": "measure_rows",
    "selection": "Best, which tells TRL to stop",
    "optimizer": "make_optimizer and learning_rate; TRL gets optimiser and schedule as objects",
    "model": "load_policy; TRL gets the model as an object",
}

Refusal = tuple[Callable[[SftStage, Model], bool], str]

# recipe key -> when TRL cannot do what it asks for, and what to do instead
REFUSED: Mapping[str, Refusal] = {
    "key_tokens": (
        lambda stage, model: stage.key_tokens is not None,
        "SFTTrainer counts every token the same; leave it out or set engine: native",
    ),
    "model.quantization": (
        lambda stage, model: model.quantization is not None,
        QUANTIZED,
    ),
}


def unsupported_sft(stage: SftStage, model: Model) -> list[tuple[tuple[str, ...], str]]:
    """What TRL cannot do of a stage: each key's place inside the stage, and a message with the remedy."""
    return [
        (tuple(key.split(".")), f'engine "trl": {message}')
        for key, (is_refused, message) in REFUSED.items()
        if is_refused(stage, model)
    ]


def sft_arguments(stage: SftStage, model: Model, *, seed: int) -> dict[str, Any]:
    """The arguments of SFTConfig, all but the folder and the device. `seed` is the recipe's own."""
    at_once = equal_parts(stage.batch_size, stage.micro_batch_size)
    return {
        **trainer_arguments(stage, model, seed=seed),
        **FIXED,
        "max_steps": stage.steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": stage.batch_size // at_once,
        "padding_free": stage.packing,
    }


def sft_differences(stage: SftStage) -> list[str]:
    """What the two engines realise differently for this stage, in words; `compare` prints it."""
    found = [
        "TRL's entropy and accuracy are means over micro-batches, the native engine's are means over learnt tokens",
        "dropout, where the model has any, draws other noise",
    ]
    if stage.packing:
        found.append(
            "packing: TRL gives transformers one row with positions that start again, from which it makes a mask of all "
            "pairs of tokens; the native engine computes no pair of different rows"
        )
    return found + cut_otherwise(stage, stage.batch_size, equal_parts(stage.batch_size, stage.micro_batch_size))
