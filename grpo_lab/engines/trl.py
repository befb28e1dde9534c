"""The TRL engine: the same stage through trl.GRPOTrainer. Only the loop is TRL's; every part is this project's.

TRL is met at its public surface: the constructor, the reward contract, `rollout_func` and callbacks. What each recipe
key becomes there is in `trl_config.py`, which needs no TRL. Importing this file takes seconds: do it where it is used.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers import GenerationConfig, PrinterCallback, TrainerCallback

constants.HF_HUB_DISABLE_TELEMETRY = True  # the environment variable was read long before

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from grpo_lab.engines.learner import MAX_SKIPPED_IN_A_ROW, learning_rate  # noqa: E402
from grpo_lab.engines.trl_config import arguments, require_trl, sizes  # noqa: E402
from grpo_lab.engines.trl_rollouts import Rollouts, TrlParts  # noqa: E402
from grpo_lab.engines.trl_vllm import beside_vllm, own_engine  # noqa: E402
from grpo_lab.engines.weights import make_optimizer  # noqa: E402
from grpo_lab.errors import NumericError, SetupError  # noqa: E402
from grpo_lab.recipe.schema import Model, Optimizer  # noqa: E402
from grpo_lab.tracking.metrics import step_metrics  # noqa: E402
from grpo_lab.types import Policy, StepEnd, UpdateStats  # noqa: E402

REFERENCE = "reference"  # in a checkpoint: the reference, where it has moved since the stage began


def train(
    parts: TrlParts,
    model: Model,
    *,
    output: Path,
    resume_from: Path | None,
    report: Callable[[StepEnd], None],
    callbacks: list[TrainerCallback],
) -> None:
    """The stage from its start, or from a checkpoint of TRL's, to its end.

    Args:
        model: the recipe's model block.
        output: where TRL puts its checkpoints.
        callbacks: further ones of transformers' Trainer; they run after a step was reported.
    """
    with plain_generation(parts.policy), beside_vllm(parts.stage), without_old_names():
        warnings.filterwarnings("ignore", message=".*rollout_func.*experimental")
        trainer = make_trainer(parts, model, output=output, report=report, callbacks=callbacks)
        with own_engine(trainer, parts.stage):
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))


def make_trainer(
    parts: TrlParts,
    model: Model,
    *,
    output: Path,
    report: Callable[[StepEnd], None],
    callbacks: list[TrainerCallback],
) -> GRPOTrainer:
    """TRL's trainer, made of the stage's parts."""
    require_place()
    settings = arguments(parts.stage, model, seed=parts.seed)
    rollouts, guard = Rollouts(parts), UpdateGuard()
    follower = Follower(parts, rollouts, guard, report)
    network: Any = parts.policy.model
    if model.lora is None:  # beside an adapter TRL keeps a copy of it, and no second model
        network.config.name_or_path = parts.reference or network.config.name_or_path
    switch_dropout_off(network)
    optimizer = make_optimizer(network, parts.stage.optimizer)
    updates = parts.stage.steps * sizes(parts.stage).updates
    revision = {"revision": model.revision} if model.revision and parts.reference == model.path else None
    trainer = GRPOTrainer(
        model=network,
        reward_funcs=rollouts.reward_functions(),
        args=GRPOConfig(
            output_dir=str(output),
            use_cpu=not torch.cuda.is_available(),
            model_init_kwargs=revision,
            **settings,
        ),
        train_dataset=rollouts.dataset(),
        processing_class=parts.policy.tokenizer,
        optimizers=(optimizer, schedule(optimizer, parts.stage.optimizer, updates)),
        callbacks=[guard, follower],
        rollout_func=None if parts.sampler is None else follower.rollout,
    )
    trainer.remove_callback(PrinterCallback)
    if parts.stage.algorithm.reference_refresh is not None:
        trainer.add_callback(KeepReference(trainer.ref_model, output))
    for callback in callbacks:
        trainer.add_callback(callback)
    for scored in (network, trainer.ref_model):
        if scored is not None:
            scored.register_forward_pre_hook(follower.before_forward, with_kwargs=True)
    return trainer


@contextmanager
def without_old_names() -> Iterator[None]:
    """Not to hear of transformers' new names for arguments that TRL still reads by the old ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
        yield


def require_place() -> None:
    """Refuse to go on where TRL would compute something else.

    Raises:
        SetupError: it is of another version, or would share the work out over several GPUs.
    """
    require_trl()
    if torch.cuda.device_count() > 1:
        raise SetupError('engine "trl" uses one GPU; make one visible with CUDA_VISIBLE_DEVICES')


def schedule(optimizer: torch.optim.Optimizer, settings: Optimizer, updates: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The native engine's learning rate for every optimiser step, as the object that TRL takes."""

    def share(index: int) -> float:
        return learning_rate(settings, min(index, updates - 1), updates) / settings.learning_rate

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@contextmanager
def plain_generation(policy: Policy) -> Iterator[None]:
    """While TRL generates, an answer ends at any of the policy's own end tokens and no default of the model's slips in."""
    network: Any = policy.model
    own = network.generation_config
    network.generation_config = GenerationConfig(eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id)
    try:
        yield
    finally:
        network.generation_config = own


def switch_dropout_off(network: nn.Module) -> None:
    """Set every rate to 0. TRL trains in training mode, where `disable_dropout` reaches nn.Dropout modules only."""
    for module in network.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class UpdateGuard(TrainerCallback):
    """Leaves an optimiser step out, bit for bit, where the gradient is 0 or not finite, as the native engine does."""

    def __init__(self) -> None:
        self.skipped = 0
        self.skipped_in_a_row = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [each.grad for each in kwargs["model"].parameters() if each.grad is not None]
        size = float(torch.stack([each.detach().abs().max() for each in gradients]).max()) if gradients else 0.0
        is_finite = all(bool(each.isfinite().all()) for each in gradients)
        if size == 0.0 or not is_finite:
            kwargs["model"].zero_grad(set_to_none=True)  # optimisers pass over parameters without gradient
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NumericError(
                f"{self.skipped_in_a_row} optimiser steps in a row had a gradient that is not finite; the weights were "
                "left as they were. Lower optimizer.learning_rate, or look at the last rollouts."
            )


class KeepReference(TrainerCallback):
    """Saves a reference that moves beside the policy; TRL's checkpoints leave it out."""

    def __init__(self, model: Any, output: Path) -> None:
        self.model = model
        self.output = output

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.save_pretrained(self.output / f"checkpoint-{state.global_step}" / REFERENCE)


class Follower(TrainerCallback):
    """Turns TRL's logs into the steps of this project: one StepEnd for all the optimiser steps on one batch."""

    def __init__(
        self, parts: TrlParts, rollouts: Rollouts, guard: UpdateGuard, report: Callable[[StepEnd], None]
    ) -> None:
        self.parts = parts
        self.rollouts = rollouts
        self.guard = guard
        self.report = report
        self.updates = sizes(parts.stage).updates
        self.step = 0
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates == 0:
            self.step, self.logs, self.guard.skipped = state.global_step // self.updates, [], 0
            self.rollouts.begin()

    def rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: the step's completions by our own sampler."""
        drawn = self.rollouts.sample(self.step)
        self.rollouts.clock.lap("sample")
        return drawn

    def before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """TRL's first pass for log-probs says that sampling is over."""
        if kwargs.get("fused_lm_head") and "sample_seconds" not in self.rollouts.clock.seconds:
            self.rollouts.clock.lap("sample")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        self.logs.append(logs)
        if state.global_step % self.updates == 0:
            self._report()

    def _report(self) -> None:
        rollouts, stage = self.rollouts, self.parts.stage
        assert rollouts.scores is not None
        rollouts.clock.lap("learn")
        lengths = [len(completion.token_ids) for group in rollouts.groups for completion in group.completions]
        timing = rollouts.clock.report(completions=len(lengths), tokens=sum(lengths))
        metrics = step_metrics(rollouts.groups, rollouts.scores, statistics(self.logs, self.guard.skipped))
        end = StepEnd(self.parts.name, self.step + 1, stage.steps, metrics, timing, rollouts.groups, rollouts.scores)
        self.report(end)


def statistics(logs: list[dict[str, float]], skipped: int) -> UpdateStats:
    """TRL's logs of one batch's optimiser steps, averaged. What TRL does not measure does not exist."""

    def mean(name: str) -> float | None:
        values = [each[name] for each in logs if each.get(name) is not None]
        return sum(values) / len(values) if values else None

    def number(name: str) -> float:
        found = mean(name)
        return math.nan if found is None else found

    capped = mean("cispo_clip_ratio")  # cispo has a cap and nothing below
    return UpdateStats(
        loss=number("loss"),
        grad_norm=number("grad_norm"),
        learning_rate=logs[-1]["learning_rate"],
        kl=mean("kl"),
        entropy=number("entropy"),
        ratio_mean=math.nan,  # TRL does not measure it
        clip_low=mean("clip_ratio/low_mean") if capped is None else 0.0,
        clip_high=mean("clip_ratio/high_mean") if capped is None else capped,
        skipped=skipped,
        sampler_gap=mean("sampling/sampling_logp_difference/mean"),
    )
