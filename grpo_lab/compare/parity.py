"""Whether the native engine and TRL compute the same thing: one recorded batch through both, number by number.

What TRL lacks goes against a sheet that computes it a second time (sheet.py)."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from grpo_lab.compare import native_readout, sheet
from grpo_lab.compare.gates import Check, first_failure, gradient_checks, largest, worst_of
from grpo_lab.compare.recording import LONGEST_PRODUCT, Recording, record
from grpo_lab.engines.readout import Readout, SftReadout, StepReadout
from grpo_lab.engines.trl_config import is_rloo
from grpo_lab.padding import pad_left
from grpo_lab.recipe.schema import GrpoStage, Optimizer
from grpo_lab.scoring import RewardSet
from grpo_lab.types import Example, Policy

GRPO, RLOO, SHEET = "GRPOTrainer", "RLOOTrainer", "float64 sheet"
LEARNING_RATE = 1e-2  # plain SGD: Adam would divide rounding by small second moments
ROUNDS = 2  # how often the batch is learnt from
REWARD_GATE = ADVANTAGE_GATE = LOGP_GATE = KL_GATE = LOSS_GATE = GRADIENT_GATE = 1e-5
WEIGHT_GATE = 1e-6


@dataclass(frozen=True)
class Case:
    """One way to use the batch: sampled by this policy or another, and in how many micro-batches."""

    off_policy: bool
    accumulation: int

    @property
    def name(self) -> str:
        who = "off-policy" if self.off_policy else "fresh"
        return f"{who}, {self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''}"


CASES = (Case(off_policy=False, accumulation=1), Case(off_policy=True, accumulation=4))


@dataclass(frozen=True)
class Parity:
    """The outcome of one case: `in_order` as computed, step by step."""

    case: str
    against: str
    in_order: list[Check]
    notes: list[str]

    @property
    def checks(self) -> list[Check]:
        """Each quantity once: its worst step."""
        names = dict.fromkeys(check.quantity for check in self.in_order)
        return [worst_of([check for check in self.in_order if check.quantity == name]) for name in names]

    @property
    def first_failure(self) -> str | None:
        return first_failure(self.in_order)


def compare(
    policy: Policy, examples: list[Example], rewards: RewardSet, stage: GrpoStage, case: Case, *, seed: int
) -> Parity:
    """Both engines on one recorded batch, or the native one and the sheet.

    Raises:
        RecipeError: the algorithm has something that neither TRL nor the sheet has.
        SetupError: another TRL than the one that can be read.
    """
    against = partner(stage)
    if stage.algorithm.top_entropy_quantile < 1 or stage.algorithm.entropy_bonus > 0:
        case = replace(case, accumulation=1)
    alike = position_gap(policy, examples) > LOGP_GATE
    examples = [examples[0]] * len(examples) if alike else examples
    stage = for_parity(stage, num_prompts=len(examples), accumulation=case.accumulation)
    recording = record(policy, examples, rewards, stage, seed=seed, off_policy=case.off_policy)
    reference = recording.reference if stage.algorithm.beta > 0 else None
    native = native_readout.read_out(policy, reference, recording.rollouts, stage, rounds=ROUNDS)
    if against == SHEET:
        theirs = sheet.read_out(policy, reference, recording.rollouts, stage, rounds=ROUNDS)
    else:
        from grpo_lab.engines import trl_probe  # five seconds of import

        theirs = trl_probe.read_out(policy, reference, recording.rollouts, stage, rounds=ROUNDS)
    start = dict(policy.model.named_parameters())
    said = [*notes(recording, native, theirs, one_prompt=alike), *narrowed(stage)]
    return Parity(case.name, against, checks(native, theirs, start), said)


def partner(stage: GrpoStage) -> str:
    """Whom the native engine is compared with."""
    if sheet.covers(stage.algorithm):
        return SHEET
    return RLOO if is_rloo(stage) else GRPO


def narrowed(stage: GrpoStage) -> list[str]:
    """What is compared under narrower conditions than the rest, and why."""
    found = []
    if stage.algorithm.ratio_level == "sequence_sum":
        found.append(
            f"ratios of whole completions: compared on their first {LONGEST_PRODUCT} tokens and with a tenth of the rate; "
            "TRL subtracts two float32 sums of log-probs, whose rounding reaches the gates where they are longer"
        )
    if stage.algorithm.top_entropy_quantile < 1:
        found.append(
            "top_entropy_quantile: TRL takes it per micro-batch and under the policy of the moment, ours over the whole "
            "optimiser step under pi_old; compared with one micro-batch and one update per batch, where they are the same"
        )
    if stage.algorithm.entropy_bonus > 0:
        found.append("entropy_bonus: TRL's is a mean of micro-batch means; compared with one micro-batch")
    return found


def for_parity(stage: GrpoStage, *, num_prompts: int, accumulation: int) -> GrpoStage:
    """The stage with plain SGD, without gradient clipping, and as many micro-batches as the case wants.

    Dynamic sampling comes before a batch is recorded, and the reference stays as it is: both are off.
    """
    changes: dict[str, Any] = {"sampling_attempts": 1, "reference_refresh": None}
    if stage.algorithm.top_entropy_quantile < 1:  # see narrowed
        changes |= {"num_iterations": 1, "num_minibatches": 1}
    algorithm = stage.algorithm.model_copy(update=changes)
    # Products of ratios are not clipped in rloo: at the larger rate plain SGD diverges on them and only rounding is compared.
    rate = LEARNING_RATE / 10 if algorithm.ratio_level == "sequence_sum" else LEARNING_RATE
    rows = num_prompts * stage.sampling.num_generations // algorithm.num_minibatches
    size = max(1, rows // accumulation)
    return stage.model_copy(
        update={
            "optimizer": plain_sgd(stage.optimizer, rate),
            "algorithm": algorithm,
            "micro_batch_size": size,
            "prompts_per_step": num_prompts,
            "evaluation": None,
            "reward_control": None,
        }
    )


def checks(native: Readout, theirs: Readout, start: dict[str, Any]) -> list[Check]:
    """Every quantity in the order in which it is computed, step by step: the first difference is nearest to its cause."""
    differing = sum(a != b for a, b in zip(native.texts, theirs.texts, strict=True))
    found = [
        Check("completion texts", float(differing), 0.0, f"{len(native.texts)} rows"),
        largest("rewards", native.rewards, theirs.rewards, REWARD_GATE),
        largest("advantages", native.advantages, theirs.advantages, ADVANTAGE_GATE),
    ]
    for name, one, other in (
        ("old log-probs", native.old_logps, theirs.old_logps),
        ("reference log-probs", native.ref_logps, theirs.ref_logps),
    ):
        if one is not None and other is not None:
            found.append(largest(name, one, other, LOGP_GATE))
    for ours, trls, scale in zip(native.steps, theirs.steps, native.loss_scales, strict=True):
        found += step_checks(ours, trls, scale)
    return [*found, weight_check(native, theirs, start)]


def weight_check(native: Readout | SftReadout, theirs: Readout | SftReadout, start: dict[str, Any]) -> Check:
    """The weights after all steps."""
    moved = max(float((weight - start[name].detach()).abs().max()) for name, weight in theirs.weights.items())
    worst = worst_of([largest(name, native.weights[name], it, WEIGHT_GATE) for name, it in theirs.weights.items()])
    detail = f"after {len(native.steps)} SGD steps; moved by {moved:.1e}"
    return Check("weights", worst.difference, WEIGHT_GATE, detail)


def plain_sgd(optimizer: Optimizer, rate: float) -> Optimizer:
    """SGD at a constant rate, nothing else."""
    return optimizer.model_copy(
        update={
            "name": "sgd",
            "learning_rate": rate,
            "schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "max_grad_norm": None,
        }
    )


def step_checks(native: StepReadout, theirs: StepReadout, scale: float) -> list[Check]:
    """One optimiser step."""
    found = [largest("log-probs", native.logps, theirs.logps, LOGP_GATE, f"{len(theirs.logps)} tokens")]
    if native.kl is not None and theirs.kl is not None:
        found.append(Check("KL", abs(native.kl - theirs.kl), KL_GATE, f"KL {theirs.kl:.3g}"))
    detail = f"loss {theirs.loss:.3g}, sum|l w| {scale:.3g}"
    found.append(Check("loss", abs(native.loss - theirs.loss), LOSS_GATE * scale, detail))
    return found + gradient_checks(native.gradients, theirs.gradients, gate=GRADIENT_GATE)


def notes(recording: Recording, native: Readout, theirs: Readout, *, one_prompt: bool) -> list[str]:
    """What of this batch was not the recipe's own, or was made equal for the comparison."""
    found = []
    if one_prompt:
        found.append(
            "this model needs position ids, which TRL does not give; one prompt for all groups needs no padding"
        )
    if recording.invented_rewards:
        found.append("the recipe's rewards gave some group no signal; rewards were drawn at random instead")
    if theirs.equal_rewards_advantage > 0:
        found.append(
            f"TRL gave a group of equal rewards an advantage of {theirs.equal_rewards_advantage:.1e} (rounding); ours is "
            "exactly 0, and was used"
        )
    if recording.rollouts.old_logps is not None and native.old_logps is not None:
        first = native.steps[0].logps
        ratio = (first - native.old_logps[: len(first)]).exp()
        found.append(
            f"the first step's ratios pi / pi_old lie between {float(ratio.min()):.2f} and {float(ratio.max()):.2f}"
        )
    return found


@torch.no_grad()
def position_gap(policy: Policy, examples: list[Example]) -> float:
    """How far log-probs move (nats) where a left-padded model is not told its positions, as TRL does not tell it."""
    width = max(len(example.prompt_ids) for example in examples)
    rows = [example.prompt_ids for example in examples] + [examples[0].prompt_ids[: width // 2]]
    ids, mask = pad_left(rows, policy.pad_id)
    device = next(policy.model.parameters()).device
    ids, attention = ids.to(device), mask.long().to(device)
    policy.model.eval()
    without = policy.model(input_ids=ids, attention_mask=attention).logits
    told = policy.model(
        input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)
    ).logits
    return float((told.log_softmax(-1) - without.log_softmax(-1))[mask.to(device)].abs().max())
