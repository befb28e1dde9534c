"""Where the two engines differ on purpose, each tried out: what TRL makes of such a batch, and what ours does."""

import copy
import math
from dataclasses import replace

import torch

from grpo_lab.compare import native_readout
from grpo_lab.compare.parity import GRPO, for_parity, partner, position_gap
from grpo_lab.compare.recording import record
from grpo_lab.engines.readout import Readout, Rollouts
from grpo_lab.engines.trl_config import differences
from grpo_lab.padding import pad_left
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.scoring import RewardSet
from grpo_lab.types import Completion, Example, Policy

LEVELS = (1.2, 0.1, 0.7, 0.3)  # rewards whose float32 mean over a group is not always themselves


def by_design(policy: Policy, examples: list[Example], rewards: RewardSet, stage: GrpoStage, *, seed: int) -> list[str]:
    """One line for each difference: those that this stage has in words, and those that can be tried with what came out."""
    once = stage.algorithm.model_copy(update={"num_iterations": 1, "num_minibatches": 1})
    small = for_parity(stage.model_copy(update={"algorithm": once}), num_prompts=len(examples), accumulation=1)
    recording = record(policy, examples, rewards, small, seed=seed, off_policy=False)
    reference = recording.reference if once.beta > 0 else None
    given = (policy, reference, recording.rollouts, small)
    found = [
        *differences(stage),
        f"position ids: leaving them out as TRL does moves log-probs after left padding by "
        f"{position_gap(policy, examples):.1e} nats on this model",
        f"dropout: ours is off; TRL's is switched off here (disable_dropout), by default it is on while it samples, too: "
        f"that moves log-probs by {dropout_gap(policy, examples):.1e} nats on this model",
        with_an_empty_completion(*given),
        with_an_unscored_completion(*given),
    ]
    if partner(stage) == GRPO:  # rloo takes its KL off the rewards, which are then never equal
        found.append(with_equal_rewards(*given))
    return found


@torch.no_grad()
def dropout_gap(policy: Policy, examples: list[Example]) -> float:
    """How far log-probs move (nats) where dropout is active; 0 for a model that has none."""
    ids, mask = pad_left([example.prompt_ids for example in examples], policy.pad_id)
    model = copy.deepcopy(policy.model)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
    still = model.eval()(**inputs).logits.log_softmax(-1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = model.train()(**inputs).logits.log_softmax(-1)
    return float((still - moved)[mask.to(device)].abs().max())


def with_an_empty_completion(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage) -> str:
    """The first completion has no tokens."""
    first, *others = rollouts.groups
    emptied = replace(first, completions=(Completion("", (), False), *first.completions[1:]))
    rollouts = replace(rollouts, groups=(emptied, *others))
    try:
        trl_read_out(policy, reference, rollouts, stage)
        theirs = "TRL goes on"
    except IndexError as error:
        theirs = f"TRL stops with an IndexError ({error})"
    weights = native_readout.prepared(policy, reference, rollouts, stage).loss_weights
    assert weights is not None
    step = native_readout.read_out(policy, reference, rollouts, stage, rounds=1).steps[0]
    counted = f"{int((weights.sum(1) > 0).sum())} of {rollouts.num_rows} completions"
    return f"an empty completion: {theirs}; ours weighs nothing and the step is made of {counted}, loss {step.loss:.2g}"


def with_an_unscored_completion(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage) -> str:
    """The first completion's rewards have failed."""
    scores = rollouts.scores
    missing = torch.zeros_like(scores.total, dtype=torch.bool)
    missing[0, 0] = True
    terms = {name: term.masked_fill(missing, math.nan) for name, term in scores.terms.items()}
    failed = replace(scores, terms=terms, total=scores.total.masked_fill(missing, math.nan))
    given = (policy, reference, replace(rollouts, scores=failed), stage)
    ours, theirs = native_readout.read_out(*given, rounds=1), trl_read_out(*given)
    return (
        "a completion that could not be scored has advantage 0 in TRL and stays in the loss's denominators and KL; ours "
        f"is left out: with one of {rollouts.num_rows}, TRL's gradient is {gradient_ratio(theirs, ours):.4f} times ours"
    )


def with_equal_rewards(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage) -> str:
    """All completions of a group have the same reward, in every group."""
    scores = rollouts.scores
    level = torch.tensor([LEVELS[group % len(LEVELS)] for group in range(len(rollouts.groups))])[:, None]
    share = level / (sum(rollouts.reward_weights) or 1.0)
    terms = {name: share.expand_as(term).clone() for name, term in scores.terms.items()}
    equal = replace(scores, terms=terms, total=level.expand_as(scores.total).clone())
    given = (policy, reference, replace(rollouts, scores=equal), stage)
    ours, theirs = native_readout.read_out(*given, rounds=1), trl_read_out(*given)
    return (
        f"equal rewards: groups of {scores.total.shape[1]} times {', '.join(f'{each:g}' for each in level[:, 0].tolist())} "
        f"have advantages up to {theirs.equal_rewards_advantage:.1e} in TRL (rounding), and "
        f"{float(ours.advantages.abs().max()):g} in ours"
    )


def trl_read_out(policy: Policy, reference: Policy | None, rollouts: Rollouts, stage: GrpoStage) -> Readout:
    """What TRL makes of it in one pass."""
    from grpo_lab.engines import trl_probe  # five seconds of import

    return trl_probe.read_out(policy, reference, rollouts, stage, rounds=1)


def gradient_ratio(one: Readout, other: Readout) -> float:
    """The norm of one's first gradient as a multiple of the other's."""

    def norm(read: Readout) -> float:
        return math.sqrt(sum(float(each.double().square().sum()) for each in read.steps[0].gradients.values()))

    return norm(one) / norm(other) if norm(other) > 0 else math.nan
