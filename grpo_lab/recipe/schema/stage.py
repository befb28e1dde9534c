"""What every stage has: data, steps, an optimiser, checkpoints, held-out data."""

from typing import Annotated, Literal

from pydantic import Field

from grpo_lab.recipe.schema.block import LIST, Block, Fraction, PositiveInt, StageName
from grpo_lab.recipe.schema.data import Data
from grpo_lab.recipe.schema.model import StageModel


class Optimizer(Block):
    """How weights move."""

    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The optimiser. 8bit: AdamW with its state in 8 bits (bitsandbytes); paged: the state may move to main memory."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from its peak to 0 over the stage's optimiser steps."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up; below 1, a share of all."""
    betas: Annotated[tuple[Fraction, Fraction], LIST] = (0.9, 0.999)
    """AdamW's decay rates."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator floor."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; never on norms and biases."""
    momentum: Fraction = 0.0
    """SGD's momentum."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient's norm is clipped to this; null = never."""


class Checkpoint(Block):
    """When the state is saved."""

    every: PositiveInt = 50
    """Steps between two checkpoints."""
    keep: PositiveInt = 2
    """How many are kept."""


class Evaluation(Block):
    """Held-out data, measured before the first step, every `every` steps and after the last."""

    data: Data
    """The held-out rows."""
    every: PositiveInt | None = None
    """Steps between two evaluations; null = only before and after."""
    num_samples: Annotated[int, Field(ge=0)] = 1
    """Sampled completions per prompt beside the greedy one (GRPO stages)."""


class StageBase(Block):
    data: Data
    """What the stage learns from."""
    start_from: StageName = "previous"
    """The weights to begin with: the stage before, the recipe's model (`base`), or an earlier stage by name."""
    model: StageModel | None = None
    """What this stage changes of the model; null = nothing."""
    steps: PositiveInt
    """Steps of the stage."""
    micro_batch_size: PositiveInt | None = None
    """Rows held in memory at once; never changes the result. null = as many as a bound on tokens (4096)
    and on logits (256 MiB) allows, whole groups at a time."""
    optimizer: Optimizer
    """How weights move."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    evaluation: Evaluation | None = None
    """What is measured on held-out data."""
