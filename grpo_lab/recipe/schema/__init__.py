"""What a recipe may say: every key, its type, its default and its meaning. No I/O happens here.

A recipe is yaml; `load.py` reads it, these files check it, one block of the recipe each, and nothing later invents a
default of its own.
"""

from grpo_lab.recipe.schema.algorithm import Algorithm, ReferenceRefresh
from grpo_lab.recipe.schema.block import Block, Fraction
from grpo_lab.recipe.schema.data import Answer, Data
from grpo_lab.recipe.schema.grpo import GrpoStage
from grpo_lab.recipe.schema.model import Lora, Model, Quantization, StageModel, TokenizerBuild
from grpo_lab.recipe.schema.recipe import Distributed, Recipe, Stage, Tracking, Wandb
from grpo_lab.recipe.schema.rewards import RewardTerm, WeightSchedule
from grpo_lab.recipe.schema.sampling import Sampling
from grpo_lab.recipe.schema.sft import SftStage
from grpo_lab.recipe.schema.stage import Checkpoint, Evaluation, Optimizer, StageBase

__all__ = [
    "Algorithm",
    "Answer",
    "Block",
    "Checkpoint",
    "Data",
    "Distributed",
    "Evaluation",
    "Fraction",
    "GrpoStage",
    "Lora",
    "Model",
    "Optimizer",
    "Quantization",
    "Recipe",
    "ReferenceRefresh",
    "RewardTerm",
    "Sampling",
    "SftStage",
    "Stage",
    "StageBase",
    "StageModel",
    "TokenizerBuild",
    "Tracking",
    "Wandb",
    "WeightSchedule",
]
