"""A whole recipe: a model, its stages in order, and what is written beside the metrics."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import Block, Name, PositiveInt, StageName
from grpo_lab.recipe.schema.grpo import GrpoStage
from grpo_lab.recipe.schema.model import Model
from grpo_lab.recipe.schema.sampling import MAX_LOGPS_GAP, OWN_WEIGHTS
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


class Push(Block):
    """The last stage's model on the hub while it trains, with its card; as `grpo-lab push` sends it."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$", max_length=96)]
    """The hub's name for it: owner/name."""
    public: bool = False
    """For everybody; a repository that is public already is refused without it."""
    merge: bool = False
    """An adapter merged into the weights it is learnt beside."""
    checkpoints: bool = True
    """Send at every checkpoint, in the background; false = only when the run is finished."""


class Tracking(Block):
    """What is written beside the metrics."""

    rollouts: bool = True
    """Whether every completion with its rewards is stored."""
    wandb: Wandb | None = None
    """Also log to Weights & Biases; needs grpo-lab[wandb]."""
    push: Push | None = None
    """Also send the last stage's model to the hub."""


class Distributed(Block):
    """How several processes share a run (torchrun, accelerate launch, `train --nproc`)."""

    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """ddp: every process holds all weights. fsdp2: gradients, optimiser state and the trained weights lie in pieces over
    the processes, beside whole weights to sample from; for stages in which all weights learn. deepspeed: the same by
    DeepSpeed's ZeRO, with the configuration of `accelerate config`."""


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

    @model_validator(mode="before")
    @classmethod
    def _fill_gap_for_dtype(cls, values: Any) -> Any:
        """How far sampler and trainer may be apart depends on the model's dtype, which a stage does not know."""
        if not isinstance(values, dict) or not isinstance(values.get("stages"), dict):
            return values
        model = values.get("model")
        dtype = model.get("dtype", "float32") if isinstance(model, dict) else None
        if not isinstance(dtype, str) or dtype not in MAX_LOGPS_GAP:
            return values
        stages = {name: _with_gap(stage, dtype) for name, stage in values["stages"].items()}
        return {**values, "stages": stages}


def _with_gap(stage: Any, dtype: str) -> Any:
    """A GRPO stage as it was written, with the most that sampler and trainer may differ by."""
    if not isinstance(stage, dict) or not isinstance(stage.get("sampling"), dict):
        return stage
    sampling = stage["sampling"]
    if stage.get("engine") == "trl" and sampling.get("backend") in OWN_WEIGHTS:
        dtype = "bfloat16"  # in which vLLM serves a float32 model, as TRL gives it no dtype
    vllm = sampling.get("vllm")
    if isinstance(vllm, dict) and vllm.get("one_step_off") is True:
        dtype = "bfloat16"  # an update changes more than other kernels round
    truncates = any(sampling.get(key, off) != off for key, off in (("top_p", 1.0), ("top_k", None), ("min_p", 0.0)))
    return {**stage, "sampling": {"max_logps_gap": None if truncates else MAX_LOGPS_GAP[dtype], **sampling}}
