"""The native engine: THE LOOP. Read it beside Algorithm 1 of DeepSeekMath (arXiv:2402.03300)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_lab.algorithm.advantages import has_signal
from grpo_lab.batching import compared_rewards, pad, with_advantages, with_logps
from grpo_lab.data.stream import PromptStream
from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.update import update
from grpo_lab.policy.forward import learn_without_dropout
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.sampling.decoding import Sampler, TellingSampler
from grpo_lab.scoring import RewardSet, before_step, check_budget, controlled
from grpo_lab.seeds import derive_seed, sampling_seed
from grpo_lab.tracking.metrics import sampling_metrics, step_metrics
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Attempts, Example, Group, Policy, Scores, StepEnd


@dataclass(frozen=True)
class Parts:
    """Everything the loop works with, already built. `reference` is None when beta is 0.

    With several processes (`ranks`) the loop stays what it is: sampler, rewards and learner deal the work out among them.
    """

    name: str
    stage: GrpoStage
    seed: int
    policy: Policy
    reference: Policy | None
    prompts: PromptStream
    sampler: Sampler
    rewards: RewardSet
    learner: Learner
    folder: Path
    ranks: Ranks = ALONE


class Collected(NamedTuple):
    """What a step learns from, and what it took to get it."""

    groups: list[Group]
    scores: Scores
    attempts: Attempts


def train(parts: Parts, *, start: int, report: Callable[[StepEnd], None]) -> None:
    """GRPO from step `start` to the stage's end; everything that is not GRPO hangs on `report`."""
    stage = parts.stage
    for step in range(start, stage.steps):
        clock = Stopwatch()
        groups, scores, attempts = collect(parts, step, clock)  # G answers to each of P prompts, from pi_old, scored
        learn_without_dropout(parts.learner.forward.model)
        batch = pad(groups, parts.policy)  # the only place that pads; masks from lengths
        batch = with_logps(batch, parts.policy, parts.reference, stage, parts.ranks)  # log pi_old, pi_ref: if needed
        batch = with_advantages(batch, scores, stage)  # A and the weight of every token
        stats = update(parts.learner, batch, stage.algorithm)  # the clipped objective
        parts.sampler.sync(parts.policy)
        clock.lap("learn")
        timing = clock.report(completions=batch.num_rows, tokens=int(batch.completion_mask.sum()))
        metrics = {**step_metrics(groups, scores, stats), **sampling_metrics(attempts)}
        report(StepEnd(parts.name, step + 1, stage.steps, metrics, timing, groups, scores))


def collect(parts: Parts, step: int, clock: Stopwatch) -> Collected:
    """Sample and score one step's groups. Too many failed rewards end the run with the examples saved.

    Dynamic sampling (`sampling_attempts` above 1): groups without signal give way to groups of other prompts that have
    one, in up to that many rounds; what is left then stays. A later round's prompts and noise are a function of (seed,
    step, attempt).
    """
    stage, num_groups = parts.stage, parts.stage.prompts_per_step
    seed = sampling_seed(parts.seed, parts.name, step)
    groups, scores = _draw(parts, parts.prompts.at(step), seed, step, clock)
    teaches = has_signal(compared_rewards(scores, stage)).tolist()
    num_drawn, attempt = num_groups, 1
    while attempt < stage.algorithm.sampling_attempts and not all(teaches):
        places = [place for place, has in enumerate(teaches) if not has]
        seed = derive_seed(parts.seed, parts.name, "resampling", step, attempt)
        examples = parts.prompts.others(step, attempt)[: len(places)]
        other_groups, other_scores = _draw(parts, examples, seed, step, clock)
        useful = has_signal(compared_rewards(other_scores, stage)).tolist()
        swaps = {place: index for index, place in enumerate(places) if useful[index]}
        groups = [other_groups[swaps[place]] if place in swaps else group for place, group in enumerate(groups)]
        scores = replaced(scores, other_scores, swaps)
        teaches = [has or place in swaps for place, has in enumerate(teaches)]
        num_drawn, attempt = num_drawn + len(places), attempt + 1
    limit = stage.algorithm.sampling_attempts
    return Collected(groups, scores, Attempts(limit, attempt, num_drawn, num_groups - sum(teaches)))


def _draw(parts: Parts, examples: list[Example], seed: int, step: int, clock: Stopwatch) -> tuple[list[Group], Scores]:
    count, early = parts.stage.sampling.num_generations, None
    if parts.stage.score_while_sampling and isinstance(parts.sampler, TellingSampler):  # the recipe's check sees to it
        early = parts.rewards.early(examples, count)
        groups = parts.sampler.sample_telling(examples, early, num_generations=count, seed=seed)
    else:
        groups = parts.sampler.sample(examples, num_generations=count, seed=seed)
    clock.lap("sample")
    scores = parts.rewards.score(groups, before_step(parts.stage, step), early)
    if parts.ranks.is_first:  # all have the same scores; one ends the run, and writes down why
        check_budget(scores, groups, max_failed=parts.stage.max_failed_rewards, folder=parts.folder)
    clock.lap("score")
    return groups, controlled(scores, parts.stage.reward_control, seed=derive_seed(seed, "control"))


def replaced(scores: Scores, others: Scores, swaps: Mapping[int, int]) -> Scores:
    """The scores with those of some groups replaced: `swaps` maps a group's place to its place in `others`."""
    if not swaps:
        return scores
    kept, new = list(swaps), list(swaps.values())

    def put(mine: Tensor, theirs: Tensor) -> Tensor:
        return mine.index_copy(0, torch.tensor(kept), theirs[new])

    return Scores(
        total=put(scores.total, others.total),
        terms={name: put(values, others.terms[name]) for name, values in scores.terms.items()},
        status={
            name: tuple(others.status[name][swaps[place]] if place in swaps else row for place, row in enumerate(rows))
            for name, rows in scores.status.items()
        },
        reasons={**others.reasons, **scores.reasons},
        weights=scores.weights,
        extra={
            column: tuple(
                others.extra.get(column, scores.extra[column])[swaps[place]] if place in swaps else row
                for place, row in enumerate(rows)
            )
            for column, rows in scores.extra.items()
        },
        logged={name: (*scores.logged[name], *others.logged.get(name, ())) for name in scores.logged},
        real_total=None
        if scores.real_total is None or others.real_total is None
        else put(scores.real_total, others.real_total),
    )
