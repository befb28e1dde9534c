"""The supervised stage."""

from typing import Literal

from pydantic import model_validator

from grpo_lab.recipe.schema.block import PositiveInt
from grpo_lab.recipe.schema.stage import StageBase


class SftStage(StageBase):
    """Supervised fine-tuning: learn to write the completions of the data."""

    kind: Literal["sft"]
    """The stage's kind."""
    batch_size: PositiveInt
    """Rows per step."""
    max_length: PositiveInt | None = None
    """The most tokens of a row; longer ones are an error. null = the model's context."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completions only, or prompts as well."""

    @model_validator(mode="after")
    def _data_has_targets(self) -> "SftStage":
        for data in (self.data, self.evaluation.data if self.evaluation else None):
            if data is not None and data.prompt is not None and data.completion is None:
                raise ValueError("a supervised stage learns completions: data.prompt needs data.completion")
        return self
