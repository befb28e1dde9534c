"""The native engine: THE LOOP. Read it beside Algorithm 1 of DeepSeekMath (arXiv:2402.03300)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_lab.batching import pad, with_advantages, with_logps
from grpo_lab.data.stream import PromptStream
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.update import update
from grpo_lab.policy.forward import learn_without_dropout
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.sampling.decoding import Sampler
from grpo_lab.scoring import RewardSet, check_budget
from grpo_lab.seeds import derive_seed
from grpo_lab.tracking.metrics import step_metrics
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Group, Policy, Scores, StepEnd


@dataclass(frozen=True)
class Parts:
    """Everything the loop works with, already built. `reference` is None when beta is 0."""

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


def train(parts: Parts, *, start: int, report: Callable[[StepEnd], None]) -> None:
    """GRPO from step `start` to the stage's end; everything that is not GRPO hangs on `report`."""
    stage = parts.stage
    for step in range(start, stage.steps):
        clock = Stopwatch()
        groups, scores = collect(parts, step, clock)  # G answers to each of P prompts, from pi_old, scored
        learn_without_dropout(parts.policy.model)
        batch = pad(groups, parts.policy)  # the only place that pads; masks from lengths
        batch = with_logps(batch, parts.policy, parts.reference, stage)  # log pi_old, log pi_ref: where needed
        batch = with_advantages(batch, scores, stage)  # A and the weight of every token
        stats = update(parts.learner, batch, stage.algorithm)  # the clipped objective
        parts.sampler.sync(parts.policy)
        clock.lap("learn")
        timing = clock.report(completions=batch.num_rows, tokens=int(batch.completion_mask.sum()))
        metrics = step_metrics(groups, scores, stats)
        report(StepEnd(parts.name, step + 1, stage.steps, metrics, timing, groups, scores))


def collect(parts: Parts, step: int, clock: Stopwatch) -> tuple[list[Group], Scores]:
    """Sample and score one step's groups. Too many failed rewards end the run with the examples saved."""
    groups = parts.sampler.sample(
        parts.prompts.at(step),
        num_generations=parts.stage.sampling.num_generations,
        seed=derive_seed(parts.seed, parts.name, "sampling", step),
    )
    clock.lap("sample")
    scores = parts.rewards.score(groups)
    check_budget(scores, groups, max_failed=parts.stage.max_failed_rewards, folder=parts.folder)
    clock.lap("score")
    return groups, scores
