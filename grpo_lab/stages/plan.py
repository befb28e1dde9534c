"""What a stage works with, as `assemble` builds it before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_lab.data.examples import TrainingRow
from grpo_lab.data.stream import PromptStream
from grpo_lab.recipe.schema import GrpoStage, SftStage
from grpo_lab.scoring import RewardSet, Workers
from grpo_lab.types import Example


@dataclass(frozen=True)
class SftPlan:
    """A supervised stage with its tokens."""

    name: str
    stage: SftStage
    rows: PromptStream[TrainingRow]
    held_out: Sequence[TrainingRow]


@dataclass(frozen=True)
class GrpoPlan:
    """A GRPO stage with its prompts and rewards. `held_out_rewards` are those and both accuracies, if answers exist.

    Users' rewards of both run in `workers`.
    """

    name: str
    stage: GrpoStage
    prompts: PromptStream[Example]
    rewards: RewardSet
    held_out: Sequence[Example]
    held_out_rewards: RewardSet
    workers: Workers
