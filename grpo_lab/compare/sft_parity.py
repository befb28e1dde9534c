"""Whether the native engine and TRL's SFTTrainer compute the same thing of a supervised stage: the same rows through both."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_lab.assemble import Plan
from grpo_lab.compare.gates import Check
from grpo_lab.compare.parity import LEARNING_RATE, Parity, plain_sgd, step_checks, weight_check
from grpo_lab.compare.recording import exact_policy
from grpo_lab.data.examples import TrainingRow
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.readout import SftReadout, StepReadout, copied, gradients_of
from grpo_lab.engines.sft import negative_log_likelihood, training_batch
from grpo_lab.errors import UsageError
from grpo_lab.policy.forward import PolicyForward, learn_without_dropout
from grpo_lab.recipe.schema import Model, SftStage
from grpo_lab.stages.plan import SftPlan
from grpo_lab.types import Batch, LogpsAndEntropy, Policy

TRAINER = "SFTTrainer"
STEPS = 3  # each on rows of its own
PARTS = 4  # micro-batches, where there is more than one


@dataclass(frozen=True)
class SftCase:
    """One way to learn rows: which tokens, padded or packed, in how many micro-batches."""

    whole: bool
    packing: bool
    accumulation: int

    @property
    def name(self) -> str:
        what = "all tokens" if self.whole else "as the recipe learns"
        how = "packed" if self.packing else "padded"
        return f"{what}, {how}, {self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''}"


CASES = tuple(
    SftCase(whole, packing, accumulation)
    for whole in (False, True)
    for packing in (False, True)
    for accumulation in (1, PARTS)
)


@dataclass(frozen=True)
class SftSubject:
    """What is compared: a supervised stage's model in float32 as it is before any stage, and rows of its data."""

    policy: Policy
    plan: Plan
    name: str
    stage: SftStage
    model: Model
    batches: tuple[tuple[TrainingRow, ...], ...]


def supervised(plan: Plan, name: str | None) -> SftPlan | None:
    """The supervised stage that is meant: of that name, or the last one of a recipe with no other stages."""
    stages = [each for each in plan.stages if isinstance(each, SftPlan)]
    if name is None:
        return stages[-1] if len(stages) == len(plan.stages) else None
    return next((each for each in stages if each.name == name), None)


def sft_subject(plan: Plan, of: SftPlan, num_prompts: int) -> SftSubject:
    """`STEPS` batches of twice as many rows as prompts are asked for, the first that the stage would see.

    Raises:
        UsageError: the number of rows cannot be cut into micro-batches.
    """
    num_rows = 2 * num_prompts
    if num_rows % PARTS:
        raise UsageError(f"--prompts {num_prompts}: twice as many rows are cut into {PARTS} parts; give an even number")
    policy, model = exact_policy(plan, of.stage)
    rows: list[TrainingRow] = []
    while len(rows) < STEPS * num_rows:
        rows += of.rows.at(len(rows) // of.stage.batch_size)
    batches = tuple(tuple(rows[first : first + num_rows]) for first in range(0, STEPS * num_rows, num_rows))
    return SftSubject(policy, plan, of.name, of.stage, model, batches)


def compare_sft(of: SftSubject, case: SftCase) -> Parity:
    """Both engines on the same rows.

    Raises:
        RecipeError: the stage has something that TRL lacks.
    """
    from grpo_lab.engines import trl_sft_probe  # five seconds of import

    batches = [[whole(row) if case.whole else row for row in batch] for batch in of.batches]
    rows = len(batches[0])
    stage = of.stage.model_copy(
        update={
            "optimizer": plain_sgd(of.stage.optimizer, LEARNING_RATE),
            "packing": case.packing,
            "batch_size": rows,
            "micro_batch_size": rows // case.accumulation,
        }
    )
    native = native_read_out(of.policy, batches, stage)
    theirs = trl_sft_probe.read_out(of.policy, batches, stage, of.model)
    start = dict(of.policy.model.named_parameters())
    found: list[Check] = []
    for ours, trls in zip(native.steps, theirs.steps, strict=True):
        found += step_checks(ours, trls, scale=abs(ours.loss))  # every token's share has the same sign
    return Parity(case.name, TRAINER, [*found, weight_check(native, theirs, start)], [])


def whole(row: TrainingRow) -> TrainingRow:
    """The row with everything after its first token learnt."""
    ids = (*row.prompt_ids, *row.completion_ids)
    return replace(row, prompt_ids=ids[:1], completion_ids=ids[1:], learn=(True,) * (len(ids) - 1))


def native_read_out(policy: Policy, batches: Sequence[Sequence[TrainingRow]], stage: SftStage) -> SftReadout:
    """Train a copy of the policy on the batches, a step for each, and read out everything."""
    trained = replace(policy, model=copy.deepcopy(policy.model))
    learn_without_dropout(trained.model)
    forward = PolicyForward(trained.model, temperature=1.0, packed=stage.packing)
    learner = Learner(forward, stage.optimizer, total_steps=len(batches), micro_batch_size=stage.micro_batch_size)
    gradients: list[dict[str, Tensor]] = []
    learner.optimizer.optimizer.register_step_pre_hook(lambda *_: gradients.append(gradients_of(trained.model)))
    steps = []
    for rows in batches:
        seen: list[Tensor] = []

        def remembering(out: LogpsAndEntropy, batch: Batch, seen: list[Tensor] = seen) -> Any:
            assert batch.loss_weights is not None
            seen.append(out.logps.detach()[batch.loss_weights > 0].cpu())
            return negative_log_likelihood(out, batch)

        sums = learner.step(training_batch(rows, trained), remembering)
        steps.append(StepReadout(torch.cat(seen), None, sums.loss, gradients[-1]))
    return SftReadout(steps, copied(dict(trained.model.named_parameters())))
