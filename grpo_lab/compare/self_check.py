"""Whether the native loss and gradient depend on what must not matter: micro-batches, padding, the order of rows."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from grpo_lab.compare.gates import Check, gradient_checks
from grpo_lab.compare.native_readout import loss_scale, policy_forward, prepared, read_out
from grpo_lab.compare.parity import GRADIENT_GATE, LOSS_GATE, for_parity
from grpo_lab.compare.recording import record
from grpo_lab.engines.readout import Rollouts, gradients_of
from grpo_lab.engines.update import GrpoLoss
from grpo_lab.policy.forward import learn_without_dropout
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.scoring import RewardSet
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Batch, Example, Policy, Scores

EXTRA_COLUMNS = 7
Result = tuple[float, dict[str, Tensor]]


def self_check(
    policy: Policy, examples: list[Example], rewards: RewardSet, stage: GrpoStage, *, seed: int
) -> list[Check]:
    """Loss and gradient of one optimiser step on one recorded batch, against those of the batch in one piece."""
    once = stage.algorithm.model_copy(update={"num_iterations": 1, "num_minibatches": 1})
    stage = for_parity(stage.model_copy(update={"algorithm": once}), num_prompts=len(examples), accumulation=1)
    recording = record(policy, examples, rewards, stage, seed=seed, off_policy=True)
    reference = recording.reference if once.beta > 0 else None
    rollouts = recording.rollouts

    def engine(rows: Rollouts, size: int | None) -> Result:
        setting = stage.model_copy(update={"micro_batch_size": size})
        step = read_out(policy, reference, rows, setting, rounds=1).steps[0]
        return step.loss, dict(step.gradients)

    whole = engine(rollouts, None)
    batch = prepared(policy, reference, rollouts, stage)
    scale = scale_of(policy, batch, stage)
    found: list[Check] = []
    count = rollouts.num_rows
    for size in sorted({1, 3, count // 4, count // 2} - {0, count}):
        found += differences(f"micro-batches of {size}", whole, engine(rollouts, size), scale)
    found += differences("padding", whole, direct(policy, padded(batch, policy.pad_id), stage), scale)
    for name, order in orders(rollouts, seed=seed):
        found += differences(name, whole, engine(order, None), scale)
    return found


def differences(name: str, whole: Result, other: Result, scale: float) -> list[Check]:
    """Loss and gradient against those of the whole."""
    gradient = gradient_checks(other[1], whole[1], gate=GRADIENT_GATE)
    loss = Check(f"{name}: loss", abs(whole[0] - other[0]), LOSS_GATE * scale, f"sum|l w| {scale:.3g}")
    return [loss, *(replace(check, quantity=f"{name}: {check.quantity}", detail="") for check in gradient)]


def scale_of(policy: Policy, batch: Batch, stage: GrpoStage) -> float:
    """sum |l_t w_t| of the batch."""
    with torch.no_grad():
        out = policy_forward(policy.model, stage)(batch)
    return loss_scale(GrpoLoss(stage.algorithm), out, batch)


def direct(policy: Policy, batch: Batch, stage: GrpoStage) -> Result:
    """Loss and gradient of a batch as it is; the engine itself would cut superfluous columns off again."""
    model: nn.Module = copy.deepcopy(policy.model)
    learn_without_dropout(model)
    out = policy_forward(model, stage)(batch)
    loss, _ = GrpoLoss(stage.algorithm)(out, batch)
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def padded(batch: Batch, pad_id: int) -> Batch:
    """The same rows with columns of padding before the prompts and after the completions."""

    def before(tensor: Tensor, value: int = 0) -> Tensor:
        return nn.functional.pad(tensor, (EXTRA_COLUMNS, 0), value=value)

    def after(tensor: Tensor, value: int = 0) -> Tensor:
        return nn.functional.pad(tensor, (0, EXTRA_COLUMNS), value=value)

    def if_any(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else after(tensor)

    return replace(
        batch,
        prompt_ids=before(batch.prompt_ids, pad_id),
        prompt_mask=before(batch.prompt_mask),
        completion_ids=after(batch.completion_ids, pad_id),
        completion_mask=after(batch.completion_mask),
        sampler_logps=if_any(batch.sampler_logps),
        old_logps=if_any(batch.old_logps),
        ref_logps=if_any(batch.ref_logps),
        loss_weights=if_any(batch.loss_weights),
        old_entropy=if_any(batch.old_entropy),
        policy_mask=if_any(batch.policy_mask),
        entropy_weights=if_any(batch.entropy_weights),
    )


def orders(rollouts: Rollouts, *, seed: int) -> Iterator[tuple[str, Rollouts]]:
    """The groups in another order, and the rows within every group in another order."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    shape = rollouts.scores.total.shape
    groups = torch.randperm(shape[0], generator=generator).tolist()
    yield "groups in another order", reordered(rollouts, [(p, list(range(shape[1]))) for p in groups])
    rows = [torch.randperm(shape[1], generator=generator).tolist() for _ in range(shape[0])]
    yield "rows of groups in another order", reordered(rollouts, list(enumerate(rows)))


def reordered(rollouts: Rollouts, order: list[tuple[int, list[int]]]) -> Rollouts:
    """The same rollouts; `order` names each group and the order of its rows."""
    size = len(order[0][1])

    def moved(values: Tensor) -> Tensor:
        return torch.stack([values[p][rows] for p, rows in order])

    scores = rollouts.scores
    status = {name: tuple(tuple(each[p][g] for g in rows) for p, rows in order) for name, each in scores.status.items()}
    flat = [p * size + g for p, rows in order for g in rows]
    return Rollouts(
        tuple(
            replace(rollouts.groups[p], completions=tuple(rollouts.groups[p].completions[g] for g in rows))
            for p, rows in order
        ),
        Scores(moved(scores.total), {name: moved(term) for name, term in scores.terms.items()}, status),
        rollouts.reward_weights,
        None if rollouts.old_logps is None else rollouts.old_logps[flat],
    )
