"""The TRL engine for supervised stages: the same rows through trl.SFTTrainer. Only the loop is TRL's.

Rows come as tokens with labels, in the order of the shared stream. What each recipe key becomes is in
`trl_sft_config.py`. Importing this file takes seconds: do it where it is used.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from grpo_lab.data.examples import TrainingRow
from grpo_lab.data.stream import PromptStream
from grpo_lab.engines.trl import (  # before trl: it switches telemetry off
    UpdateGuard,
    require_place,
    schedule,
    without_old_names,
)
from grpo_lab.engines.trl_dataset import LazyRows
from grpo_lab.engines.trl_sft_config import sft_arguments
from grpo_lab.engines.weights import make_optimizer
from grpo_lab.recipe.schema import Model, SftStage
from grpo_lab.tracking.metrics import sft_metrics
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Policy, StepEnd

from trl import SFTConfig, SFTTrainer  # isort: skip

IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class SftParts:
    """Everything the engine works with. `is_over` is asked after every step whether to stop early."""

    name: str
    stage: SftStage
    seed: int
    policy: Policy
    rows: PromptStream[TrainingRow]
    is_over: Callable[[], bool]


def labelled(row: TrainingRow) -> dict[str, list[int]]:
    """A row as TRL takes it: all its tokens, and the same again as labels where they are learnt.

    >>> labelled(TrainingRow((5, 6), (7, 8), (True, False)))
    {'input_ids': [5, 6, 7, 8], 'labels': [-100, -100, 7, -100]}
    """
    learned = [token if learn else IGNORED for token, learn in zip(row.completion_ids, row.learn, strict=True)]
    return {
        "input_ids": [*row.prompt_ids, *row.completion_ids],
        "labels": [*[IGNORED] * len(row.prompt_ids), *learned],
    }


def dataset(rows: PromptStream[TrainingRow], steps: int) -> LazyRows:
    """The rows of every step, in the order of the shared stream."""
    batch = lru_cache(maxsize=4)(rows.at)
    size = rows.batch_size
    return LazyRows.of(steps * size, lambda position: labelled(batch(position // size)[position % size]))


def train_sft(
    parts: SftParts,
    model: Model,
    *,
    output: Path,
    resume_from: Path | None,
    report: Callable[[StepEnd], None],
    callbacks: list[TrainerCallback],
) -> None:
    """The stage from its start, or from a checkpoint of TRL's, to its end.

    Args:
        model: the model block as it holds for the stage.
        output: where TRL puts its checkpoints.
        callbacks: further ones of transformers' Trainer; they run after a step was reported.
    """
    with without_old_names():
        trainer = make_sft_trainer(parts, model, output=output, report=report, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))


def make_sft_trainer(
    parts: SftParts,
    model: Model,
    *,
    output: Path,
    report: Callable[[StepEnd], None],
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """TRL's trainer, made of the stage's parts."""
    require_place()
    stage, network = parts.stage, parts.policy.model
    optimizer = make_optimizer(network, stage.optimizer)
    guard = UpdateGuard()
    trainer = SFTTrainer(
        model=network,
        args=SFTConfig(
            output_dir=str(output),
            use_cpu=not torch.cuda.is_available(),
            **sft_arguments(stage, model, seed=parts.seed),
        ),
        train_dataset=dataset(parts.rows, stage.steps),
        processing_class=copy.deepcopy(parts.policy.tokenizer),  # TRL gives it a padding token where it has none
        optimizers=(optimizer, schedule(optimizer, stage.optimizer, stage.steps)),
        callbacks=[guard, Follower(parts, report)],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


class Follower(TrainerCallback):
    """Turns TRL's logs into the steps of this project, and stops when the stage is over."""

    def __init__(self, parts: SftParts, report: Callable[[StepEnd], None]) -> None:
        self.parts = parts
        self.report = report
        self.clock = Stopwatch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock = Stopwatch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        self.clock.lap("learn")
        rows = self.parts.rows.at(state.global_step - 1)
        tokens = sum(len(row.completion_ids) for row in rows)
        metrics = sft_metrics(
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm", math.nan),
            learning_rate=logs["learning_rate"],
            entropy=logs.get("entropy"),
            accuracy=logs.get("mean_token_accuracy"),
        )
        timing = self.clock.report(completions=len(rows), tokens=tokens)
        self.report(StepEnd(self.parts.name, state.global_step, self.parts.stage.steps, metrics, timing))
        if self.parts.is_over():
            control.should_training_stop = True
