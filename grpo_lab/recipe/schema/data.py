"""Where rows come from, and how a row becomes a prompt or a text to learn."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import Block, PositiveInt


class Answer(Block):
    """Where the gold answer of a row is; rewards receive it as the column `answer`."""

    column: str
    """The data set's column."""
    extract: Literal["none", "hash", "boxed", "xml", "regex"] = "none"
    """How to cut the answer out of the column: as it is, after `####`, in \\boxed{}, in <answer> tags, or by pattern."""
    pattern: str | None = None
    """With `extract: regex`: the regular expression; its first group is the answer."""

    @model_validator(mode="after")
    def _pattern_goes_with_regex(self) -> "Answer":
        if (self.extract == "regex") != (self.pattern is not None):
            raise ValueError("pattern goes with extract: regex, and extract: regex needs a pattern")
        return self


class Data(Block):
    """Rows, and how a row becomes a prompt (and, for supervised stages, a completion)."""

    source: Literal["hub", "file", "task", "reasoning_gym"]
    """A hub data set, local files, one of this project's generated tasks, or a reasoning-gym data set."""
    path: str
    """The hub id, the file (or glob), the task's name, or the reasoning-gym data set's name."""
    name: str | None = None
    """The hub data set's configuration."""
    revision: str | None = None
    """The hub data set's revision."""
    split: str = "train"
    """Which split of a hub data set or of a task."""
    format: Literal["jsonl", "json", "csv", "parquet", "text"] | None = None
    """The files' format; null tells it from their ending."""
    streaming: bool = False
    """Read in file order without holding the rows; the rows are then not shuffled."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Rows left out at the start."""
    limit: PositiveInt | None = None
    """The most rows taken, after `skip`."""
    max_prompt_tokens: PositiveInt | None = None
    """Rows whose prompt has more tokens are left out (GRPO stages)."""
    options: dict[str, Any] = {}
    """Options of a generated task or a reasoning-gym data set."""
    prompt: str | None = None
    """A column, or a template with {column} places."""
    completion: str | None = None
    """A column or a template: what the model should answer (supervised stages)."""
    messages: str | None = None
    """A column with chat messages: a list of {role, content}."""
    text: str | None = None
    """A column with plain text to learn as it is (supervised stages)."""
    answer: Answer | None = None
    """The gold answer, for rewards and evaluation."""
    system_prompt: str | None = None
    """A system message put before every chat prompt."""
    chat: bool = True
    """Whether prompts go through the chat template; false takes them as plain text."""

    @model_validator(mode="after")
    def _one_form(self) -> "Data":
        forms = [key for key in ("prompt", "messages", "text") if getattr(self, key) is not None]
        if len(forms) != 1:
            raise ValueError(f"give exactly one of prompt, messages, text; found {', '.join(forms) or 'none'}")
        if self.completion is not None and self.prompt is None:
            raise ValueError("completion goes with prompt")
        if self.system_prompt is not None and (not self.chat or self.text is not None):
            raise ValueError("system_prompt needs a chat prompt")
        if self.streaming and self.source not in ("hub", "file"):
            raise ValueError("streaming is for hub and file sources")
        if self.streaming and self.max_prompt_tokens is not None:
            raise ValueError("max_prompt_tokens looks at every row first; leave streaming out")
        return self
