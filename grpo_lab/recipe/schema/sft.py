"""The supervised stage."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import Block, PositiveInt
from grpo_lab.recipe.schema.stage import StageBase


class KeyTokens(Block):
    """Which tokens of what is learnt count more than the others, and how much."""

    weight: Annotated[float, Field(gt=0)]
    """How much a key token weighs; every other learnt token weighs 1. The loss is the weighted mean."""
    pattern: str | None = None
    """A regular expression: what its first group matches (or all of it, without groups) is key."""
    tag: str | None = None
    """What stands in <tag>...</tag> is key."""
    column: str | None = None
    """A column with a text, or a list of texts: wherever they occur is key."""

    @model_validator(mode="after")
    def _one_way(self) -> "KeyTokens":
        ways = [name for name in ("pattern", "tag", "column") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(f"give exactly one of pattern, tag, column; found {', '.join(ways) or 'none'}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from None
        return self


class Selection(Block):
    """End with the model that measured best on the held-out data, and stop when it gets no better."""

    metric: Literal["loss", "mean_token_accuracy"] = "loss"
    """What is compared: a lower loss, or a higher accuracy."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a better one; null = use all steps."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """How much better, in the metric's unit, counts as better."""


class SftStage(StageBase):
    """Supervised fine-tuning: learn to write the completions of the data."""

    kind: Literal["sft"]
    """The stage's kind."""
    engine: Literal["native", "trl"] = "native"
    """Who runs the loop: this project, or TRL's SFTTrainer (for comparison; it resumes, but not to the same bytes)."""
    batch_size: PositiveInt
    """Rows per step."""
    max_length: PositiveInt | None = None
    """The most tokens of a row; longer ones are an error. null = the model's context."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completions only, or prompts as well."""
    learn_turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learnt."""
    key_tokens: KeyTokens | None = None
    """Tokens that count more than others; null = all alike."""
    packing: bool = True
    """Compute the rows of a micro-batch end to end, without padding, each attending to itself only; false pads them.
    Never changes the result."""
    group_by_length: bool = False
    """Let each step hold rows of similar length. Epochs still hold every row once."""
    selection: Selection | None = None
    """Which model the stage ends with; null = the last one."""

    @model_validator(mode="after")
    def _data_has_targets(self) -> "SftStage":
        for data in (self.data, self.evaluation.data if self.evaluation else None):
            if data is not None and data.prompt is not None and data.completion is None:
                raise ValueError("a supervised stage learns completions: data.prompt needs data.completion")
        return self

    @model_validator(mode="after")
    def _selection_has_something_to_select_by(self) -> "SftStage":
        if self.selection is None:
            return self
        if self.evaluation is None or self.evaluation.every is None:
            raise ValueError("selection needs evaluation with every: N, to compare models along the way")
        data = self.evaluation.data
        is_test_part = data.partition is not None and data.partition.take == "test"
        if is_test_part or is_test_split(data.source, data.path, data.split):
            raise ValueError(
                "selection: evaluation.data is the test split, which selects no model; give it a validation split, or "
                "rows that are kept out of the training data with skip and limit"
            )
        return self

    @model_validator(mode="after")
    def _options_go_with_their_data(self) -> "SftStage":
        if self.learn_turns == "last" and (self.data.messages is None or self.loss_on == "all"):
            raise ValueError("learn_turns: last goes with data.messages and loss_on: completion")
        if self.key_tokens is not None and self.data.chunk_length is not None:
            raise ValueError("key_tokens needs texts that are learnt one by one; leave out data.chunk_length")
        if self.group_by_length and self.data.streaming:
            raise ValueError("group_by_length needs to know all rows; leave out data.streaming, or group_by_length")
        return self


def is_test_split(source: str, path: str, split: str) -> bool:
    """Whether rows are meant for the last measurement only, by their name.

    >>> is_test_split("hub", "openai/gsm8k", "test[:100]"), is_test_split("file", "imdb/test.jsonl", "train")
    (True, True)
    >>> is_test_split("file", "latest/dev.jsonl", "train")
    False
    """
    name = path.rsplit("/", 1)[-1] if source == "file" else split
    return "test" in name.lower().replace("[", ".").replace("-", ".").replace("_", ".").split(".")
