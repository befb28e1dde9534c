"""Reads out, number by number, what TRL's GRPOTrainer or RLOOTrainer makes of a recorded batch. The only file that hooks TRL's private
parts, so it takes the one TRL version that it was written for and refuses any other."""

import copy
import dataclasses
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import constants
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from grpo_lab.algorithm.advantages import has_signal
from grpo_lab.engines.readout import Readout, Rollouts, StepReadout, copied, gradients_of
from grpo_lab.engines.trl import switch_dropout_off
from grpo_lab.engines.trl_config import VERSION, arguments, is_rloo, unsupported
from grpo_lab.errors import RecipeError, SetupError
from grpo_lab.policy.trainable import learned
from grpo_lab.recipe.schema import GrpoStage, Model
from grpo_lab.types import Group, Policy

constants.HF_HUB_DISABLE_TELEMETRY = True  # the trainers' constructors would send it
NEVER = 1e9  # a ratio is never clipped this far from 1


class Probe(GRPOTrainer):
    """The trainer itself; it only takes recorded completions, and remembers what it computed on the way."""

    def __init__(self, rollouts: Rollouts, stage: GrpoStage, **settings: Any) -> None:
        self.rollouts = rollouts
        self.teaches = teaches(rollouts, stage)
        self.batches: list[dict[str, Any]] = []  # one per time that completions were "generated"
        self.computed_advantages: list[Tensor] = []  # as TRL computed them
        self.parts: list[tuple[Tensor, float | None, float]] = []  # log-probs, KL and loss of every micro-batch
        self.seen_logps: Tensor | None = None
        self.texts: tuple[str, ...] = ()
        super().__init__(rollout_func=recorded_rollout(rollouts), **settings)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.computed_advantages.append(batch["advantages"].clone())
        batch["advantages"] = torch.where(self.teaches.to(batch["advantages"].device), batch["advantages"], 0.0)
        if self.rollouts.old_logps is not None:
            batch["old_per_token_logps"] = self.rollouts.old_logps.to(batch["completion_ids"].device)
        self.batches.append(batch)
        answers = list(self._logs["completion"])
        self.texts = tuple(answer if isinstance(answer, str) else answer[0]["content"] for answer in answers)
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.seen_logps = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        assert self.seen_logps is not None
        kl = self._metrics["train"]["kl"][-1] if self.beta != 0 else None
        self.parts.append((self.seen_logps[inputs["completion_mask"].bool()].cpu(), kl, float(loss.detach())))
        return loss


class RlooProbe(RLOOTrainer):
    """TRL's other trainer, likewise. It has no hook for completions from elsewhere, so two of its methods give them."""

    def __init__(self, rollouts: Rollouts, stage: GrpoStage, **settings: Any) -> None:
        self.rollouts = rollouts
        self.teaches = torch.ones(rollouts.num_rows, dtype=torch.bool)  # rewards with a KL in them are never equal
        self.batches: list[dict[str, Any]] = []
        self.computed_advantages: list[Tensor] = []
        self.parts: list[tuple[Tensor, float | None, float]] = []
        self.passes: list[Tensor] = []  # log-probs of the forward passes since completions were "generated"
        self.texts: tuple[str, ...] = ()
        self.recorded = recorded_rollout(rollouts)
        super().__init__(**settings)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.recorded(prompts, self)["prompt_ids"], None, {}

    def _generate_single_turn(self, *_: Any) -> Any:
        return [list(completion.token_ids) for group in self.rollouts.groups for completion in group.completions]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not self.passes and self.rollouts.old_logps is not None:  # the first pass is for log pi_old
            found = (self.rollouts.old_logps.to(found[0]), *found[1:])
        self.passes.append(found[0].detach())
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.passes = []
        batch = super()._generate_and_score_completions(inputs)
        self.computed_advantages.append(batch["advantages"].clone())
        names = ("old_per_token_logps", "ref_per_token_logps")
        batch |= dict(zip(names, self.passes, strict=False))  # without a KL there is no reference
        self.batches.append(batch)
        answers = list(self._logs["completion"])
        self.texts = tuple(answer if isinstance(answer, str) else answer[0]["content"] for answer in answers)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        share = float(loss.detach()) / self.args.gradient_accumulation_steps  # transformers divides its gradient, too
        self.parts.append((self.passes[-1][inputs["completion_mask"].bool()].cpu(), None, share))
        return loss


def read_out(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage, *, rounds: int) -> Readout:
    """Train a copy of the policy on the recorded batch `rounds` times with SGD, through TRL, and read out everything.

    Raises:
        RecipeError: the stage has something that TRL lacks.
        SetupError: another TRL is installed than the one whose private parts are known here.
    """
    check_version(trl.__version__)
    model = copy.deepcopy(policy.model)
    switch_dropout_off(model)
    names = learned(model)  # of an adapter; None where everything learns
    steps = rounds * stage.algorithm.num_iterations * stage.algorithm.num_minibatches
    # libraries warn each other of what they will rename
    with tempfile.TemporaryDirectory() as folder, in_recorded_order(), warnings.catch_warnings(action="ignore"):
        if (
            reference is not None and names is None
        ):  # TRL loads the reference from where the policy's config says that it came from
            reference.model.save_pretrained(folder)
            model.config._name_or_path = folder
        optimizer = torch.optim.SGD(model.parameters(), lr=stage.optimizer.learning_rate)
        trainer, config = (RlooProbe, RLOOConfig) if is_rloo(stage) else (Probe, GRPOConfig)
        probe = trainer(
            rollouts,
            stage,
            model=model,
            args=config(**settings(stage, rollouts, steps=steps, folder=Path(folder))),
            reward_funcs=reward_functions(rollouts),
            train_dataset=Dataset.from_list([{"prompt": prompt_of(group)} for group in rollouts.groups]),
            processing_class=copy.deepcopy(policy.tokenizer),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )
        probe.remove_callback(PrinterCallback)
        if reference is not None and names is not None:  # TRL keeps a copy of the adapter under another name
            for name in names:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(reference.model.get_parameter(name))
        gradients: list[dict[str, Tensor]] = []
        optimizer.register_step_pre_hook(lambda *_: gradients.append(gradients_of(model)))
        probe.train()
    own = dict(policy.model.named_parameters())
    return readout_of(probe, gradients, copied({name: p for name, p in model.named_parameters() if name in own}))


def check_version(found: str) -> None:
    """Private parts move between minor versions, so one version is accepted."""
    if found != VERSION:
        raise SetupError(f"parity reads private parts of trl {VERSION}, found {found}; pip install trl=={VERSION}")


def readout_of(probe: Probe | RlooProbe, gradients: Sequence[dict[str, Tensor]], weights: dict[str, Tensor]) -> Readout:
    """What the probe remembers, micro-batches put together to optimiser steps."""
    first = probe.batches[0]
    mask = first["completion_mask"].bool()
    accumulation = probe.args.gradient_accumulation_steps
    steps = []
    for index, gradient in enumerate(gradients):
        parts = probe.parts[index * accumulation : (index + 1) * accumulation]
        logps = torch.cat([part for part, _, _ in parts])
        kls = [kl * len(part) for part, kl, _ in parts if kl is not None]
        steps.append(StepReadout(logps, sum(kls) / len(logps) if kls else None, sum(p[2] for p in parts), gradient))
    rewards = torch.tensor([list(column) for column in probe._logs["rewards"].values()])
    advantages = probe.computed_advantages[0].cpu()
    silent = ~probe.teaches

    def flat(name: str) -> Tensor | None:
        return first[name][mask].cpu() if name in first else None

    return Readout(
        texts=probe.texts,
        rewards=(rewards * probe.reward_weights.cpu()[:, None]).sum(0),
        advantages=torch.where(silent, 0.0, advantages),
        old_logps=flat("old_per_token_logps"),
        ref_logps=flat("ref_per_token_logps"),
        steps=steps,
        weights=weights,
        equal_rewards_advantage=float((advantages * silent).abs().max()),
    )


def settings(stage: GrpoStage, rollouts: Rollouts, *, steps: int, folder: Path) -> dict[str, Any]:
    """The engine's own settings for this stage, but without logs, clipping or the recipe's number of steps."""
    rloo = is_rloo(stage)
    problems = [] if rloo else unsupported(stage)
    if problems:
        raise RecipeError([f"{'.'.join(place)}: {message}" for place, message in problems])
    values = arguments(stage, Model(path="given as an object"), seed=0)
    if rloo:
        known = {field.name for field in dataclasses.fields(RLOOConfig)}
        values = {key: value for key, value in values.items() if key in known}
        if stage.algorithm.surrogate == "none":  # TRL always clips; so far away that it never does
            values |= {"epsilon": NEVER, "epsilon_high": NEVER}
    return {
        **values,
        "output_dir": str(folder),
        "max_steps": steps,
        "max_grad_norm": 0.0,  # off: gradients are compared as they are
        "gradient_checkpointing": False,
        "reward_weights": list(rollouts.reward_weights),
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "no",
    }


def recorded_rollout(rollouts: Rollouts) -> Callable[..., dict[str, Any]]:
    """TRL's public hook for completions from elsewhere; it gives the recorded ones, row by row."""
    rows = [(group, completion) for group in rollouts.groups for completion in group.completions]

    def rollout(prompts: Sequence[Any], _trainer: Any) -> dict[str, Any]:
        expected = [prompt_of(group) for group, _ in rows]
        if list(prompts) != expected:
            raise SetupError("parity: TRL asked for other prompts, or in another order, than were recorded")
        return {
            "prompt_ids": [list(group.example.prompt_ids) for group, _ in rows],
            "completion_ids": [list(completion.token_ids) for _, completion in rows],
            "logprobs": None,
        }

    return rollout


def reward_functions(rollouts: Rollouts) -> list[Callable[..., list[float | None]]]:
    """One function per term, as TRL wants them; nan (abstained, failed) is None in its contract."""

    def function(name: str, values: list[float]) -> Callable[..., list[float | None]]:
        def score(**_: Any) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values]

        score.__name__ = name
        return score

    return [function(name, values.flatten().tolist()) for name, values in rollouts.scores.terms.items()]


def prompt_of(group: Group) -> Any:
    """The prompt as TRL's data sets hold it: messages of a chat, or text."""
    messages = group.example.messages
    return group.example.prompt if messages is None else [dict(message) for message in messages]


def teaches(rollouts: Rollouts, stage: GrpoStage) -> Tensor:
    """[N]: whether a row's group has different rewards."""
    scores = rollouts.scores
    apart = stage.algorithm.reward_aggregation == "normalize_then_sum"
    signal = torch.stack([has_signal(each) for each in (scores.terms.values() if apart else [scores.total])]).any(0)
    return signal.repeat_interleave(scores.total.shape[1])


@contextmanager
def in_recorded_order() -> Iterator[None]:
    """TRL shuffles rows before it cuts them into mini-batches; within this block it keeps their order."""
    original = grpo_trainer.shuffle_sequence_dict
    for module in (grpo_trainer, rloo_trainer):
        module.shuffle_sequence_dict = lambda batch: batch
    try:
        yield
    finally:
        for module in (grpo_trainer, rloo_trainer):
            module.shuffle_sequence_dict = original


class Formula(GRPOTrainer):
    """TRL's loss formula alone, on given log-probs: no model, no data, any precision."""

    def __init__(self, args: GRPOConfig, logps: Tensor) -> None:
        self.args, self.logps = args, logps
        self.model = torch.nn.Identity().eval()  # not in training: no share of an accumulation
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.loss_type, self.beta = args.loss_type, args.beta
        self.epsilon_low, self.epsilon_high = args.epsilon, args.epsilon_high
        self.importance_sampling_level = args.importance_sampling_level
        self.max_completion_length = args.max_completion_length
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self._metrics: dict[str, Any] = {"eval": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> Any:
        return self.logps, torch.zeros_like(self.logps), None


def formula_loss(
    stage: GrpoStage, *, logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """TRL's loss of one optimiser step from log-probs [N, T], in the precision that they have."""
    check_version(trl.__version__)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        values = arguments(stage, Model(path="none"), seed=0)
        formula = Formula(GRPOConfig(**values, output_dir=folder, use_cpu=not torch.cuda.is_available()), logps)
    none = torch.zeros(len(mask), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": none,
        "prompt_mask": none,
        "completion_ids": mask.long(),
        "completion_mask": mask.to(logps.dtype),
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
        "num_items_in_batch": mask.sum().to(logps.dtype),
    }
    loss: Tensor = formula._compute_loss(None, inputs)
    return loss
