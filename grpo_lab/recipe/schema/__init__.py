"""What a recipe may say: every key, its type, its default and its meaning. No I/O happens here.

A recipe is yaml; `load.py` reads it, these files check it, one block of the recipe each, and nothing later invents a
default of its own.
"""

from grpo_lab.recipe.schema.algorithm import Algorithm, ReferenceRefresh
from grpo_lab.recipe.schema.block import Block, Fraction
from grpo_lab.recipe.schema.data import Answer, Classes, Cut, Data, Gathered, Partition, Questions, Tagged
from grpo_lab.recipe.schema.grpo import GrpoStage
from grpo_lab.recipe.schema.model import SHIPPED_TEMPLATES, Lora, Model, Quantization, StageModel, TokenizerBuild
from grpo_lab.recipe.schema.recipe import Distributed, Push, Recipe, Stage, Tracking, Wandb
from grpo_lab.recipe.schema.rewards import RewardTerm, WeightSchedule
from grpo_lab.recipe.schema.sampling import Sampling, Vllm
from grpo_lab.recipe.schema.sft import KeyTokens, Selection, SftStage
from grpo_lab.recipe.schema.stage import Checkpoint, Evaluation, Optimizer, StageBase

__all__ = [
    "SHIPPED_TEMPLATES",
    "Algorithm",
    "Answer",
    "Block",
    "Checkpoint",
    "Classes",
    "Cut",
    "Data",
    "Distributed",
    "Evaluation",
    "Fraction",
    "Gathered",
    "GrpoStage",
    "KeyTokens",
    "Lora",
    "Model",
    "Optimizer",
    "Partition",
    "Push",
    "Quantization",
    "Questions",
    "Recipe",
    "ReferenceRefresh",
    "RewardTerm",
    "Sampling",
    "Selection",
    "SftStage",
    "Stage",
    "StageBase",
    "StageModel",
    "Tagged",
    "TokenizerBuild",
    "Tracking",
    "Vllm",
    "Wandb",
    "WeightSchedule",
]
