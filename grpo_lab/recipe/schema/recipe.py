"""A whole recipe: a model, its stages in order, and what is written beside the metrics."""

from typing import Annotated, Literal

from pydantic import Field

from grpo_lab.recipe.schema.block import Block, Name, PositiveInt, StageName
from grpo_lab.recipe.schema.grpo import GrpoStage
from grpo_lab.recipe.schema.model import Model
from grpo_lab.recipe.schema.sft import SftStage

Stage = Annotated[SftStage | GrpoStage, Field(discriminator="kind")]


class Wandb(Block):
    """Weights & Biases."""

    project: str
    """The project's name."""
    mode: Literal["online", "offline"] = "offline"
    """Offline needs neither account nor network."""
    entity: str | None = None
    """The team or user."""


class Tracking(Block):
    """What is written beside the metrics."""

    rollouts: bool = True
    """Whether every completion with its rewards is stored."""
    wandb: Wandb | None = None
    """Also log to Weights & Biases; needs grpo-lab[wandb]."""


class Distributed(Block):
    """How several processes share a run (torchrun, accelerate launch, `train --nproc`)."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every process holds all weights. fsdp2: gradients, optimiser state and the trained weights lie in pieces over
    the processes, beside whole weights to sample from; for stages in which all weights learn."""


class Recipe(Block):
    """A run: a model and the stages it goes through."""

    name: Name
    """The run's name and folder."""
    seed: int = 0
    """Every random draw is a function of it."""
    output_dir: str = "runs"
    """Where run folders are made, relative to the working directory."""
    data_root: str | None = None
    """The folder that file sources are relative to; null = the recipe's own folder."""
    plugins: list[str] = []
    """Files or folders with reward functions, relative to the recipe."""
    num_threads: PositiveInt | None = None
    """CPU threads; null = torch's default. Part of exactness: resume checks it."""
    model: Model
    """The policy."""
    stages: Annotated[dict[StageName, Stage], Field(min_length=1)]
    """The stages, in order; the key is the stage's name and folder."""
    distributed: Distributed = Distributed()
    """How several processes share the work; one process needs none of it."""
    tracking: Tracking = Tracking()
    """What is written beside the metrics."""

    def model_of(self, stage: SftStage | GrpoStage) -> Model:
        """The model block as it holds for a stage."""
        return self.model if stage.model is None else self.model.model_copy(update=dict(stage.model))
