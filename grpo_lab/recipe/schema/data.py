"""Where rows come from, and how a row becomes a prompt or a text to learn."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import Block, Fraction, PositiveInt


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


class Partition(Block):
    """One part of rows that come without a split. The same seed and shares give parts that never overlap."""

    take: Literal["train", "validation", "test"]
    """Which part; train is what the other two leave."""
    validation: Fraction = 0.1
    """The share of rows (of groups, with `group`) for choosing settings."""
    test: Fraction = 0.1
    """The share that only the final measurement sees."""
    stratify: str | None = None
    """A column whose values keep their shares in every part, such as the label."""
    group: str | None = None
    """A column whose equal values stay together: rows of one text must not stand in two parts."""
    seed: int = 0
    """Which rows go where; apart from the recipe's seed, so that runs with other seeds are measured on the same rows."""

    @model_validator(mode="after")
    def _something_is_left(self) -> "Partition":
        if self.validation + self.test >= 1:
            raise ValueError(f"validation ({self.validation}) and test ({self.test}) leave nothing for train")
        return self


class Cut(Block):
    """A column cut into several by a regular expression."""

    kind: Literal["cut"]
    """The shape's kind."""
    column: str
    """The column with the text."""
    pattern: str
    """It must match all of the text; its named groups, `(?P<name>...)`, become columns."""
    drop: bool = False
    """Leave out rows that it does not match; false = such a row is an error."""


class Classes(Block):
    """A column that holds classes. Their sorted list is written to run.json."""

    kind: Literal["classes"]
    """The shape's kind."""
    column: str
    """The column with the class: a text, or a number that `names` explains."""
    names: dict[str, str] = {}
    """What the column's values are called, such as {0: negative, 1: positive}; none = they are names already."""


class Tagged(Block):
    """Words with one BIO (or IOB1) tag each, as in CoNLL's files: adds the columns `sentence` and `entities`."""

    kind: Literal["tagged"]
    """The shape's kind."""
    tokens: str = "tokens"
    """The column with the words."""
    tags: str = "tags"
    """The column with their tags."""
    names: list[str] = []
    """What the tags are called, where the column holds numbers."""
    form: Literal["lines", "json"] = "lines"
    """How `entities` writes them: one `type: text` per line, or `none`; or a JSON list of {type, text}."""


class Questions(Block):
    """SQuAD's questions: adds the columns `answer`, `golds`, `question_id` and, with `window`, one row per window of the context.

    `golds` are the answers that stand in the row's context, none if there are none; `answer` is the first of them,
    or the word unanswerable.
    """

    kind: Literal["questions"]
    """The shape's kind."""
    window: PositiveInt | None = None
    """The most words of a context; longer ones give several rows. null = contexts stay whole."""
    stride: PositiveInt | None = None
    """Words from one window's start to the next one's; null = half a window."""
    repair: Annotated[int, Field(ge=0)] = 2
    """An answer that does not stand where its answer_start says is looked for so many characters before and after."""

    @model_validator(mode="after")
    def _windows_leave_nothing_out(self) -> "Questions":
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError("stride goes with window and is at most that, or words between two windows would be lost")
        return self


class Gathered(Block):
    """Rows that say the same in one column become one row, with all their golds: several translations of a sentence."""

    kind: Literal["gathered"]
    """The shape's kind."""
    by: str
    """The column that is the same; other columns are those of the first such row."""
    column: str
    """The column that becomes the list of all its values."""


Shape = Annotated[Cut | Classes | Tagged | Questions | Gathered, Field(discriminator="kind")]


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
    format: Literal["jsonl", "json", "csv", "tsv", "parquet", "text", "folders", "conll", "squad"] | None = None
    """The files' format; null tells it from their ending. tsv: fields between tabs, quotes are no quotes; folders: one
    text per file, its folder is its `label`; conll: words with tags; squad: SQuAD's json, one row per question."""
    columns: list[str] | None = None
    """The names of a tsv's columns, of as many as needed from the left; null = they stand in its first line."""
    partition: Partition | None = None
    """Which part of the rows, where the data set has no split; null = all of them."""
    shape: Shape | None = None
    """What the rows are, where that is more than columns; null = as they are."""
    streaming: bool = False
    """Read in file order without holding the rows; the rows are then not shuffled."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Rows left out at the start."""
    limit: PositiveInt | None = None
    """The most rows taken, after `skip`; counted before `shape` makes rows of them."""
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
    chunk_length: Annotated[int, Field(ge=2)] | None = None
    """With `text`: join all texts, an end token after each, and learn pieces of so many tokens; null = text by text."""
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
        if self.chunk_length is not None and self.text is None:
            raise ValueError("chunk_length goes with text")
        if self.system_prompt is not None and (not self.chat or self.text is not None):
            raise ValueError("system_prompt needs a chat prompt")
        if self.streaming and self.source not in ("hub", "file"):
            raise ValueError("streaming is for hub and file sources")
        if self.streaming and (self.partition is not None or self.shape is not None):
            raise ValueError("partition and shape look at all rows; turn streaming off")
        if self.columns is not None and self.format != "tsv":
            raise ValueError("columns names those of a file with format: tsv")
        if self.streaming and self.max_prompt_tokens is not None:
            raise ValueError("max_prompt_tokens looks at every row first; leave streaming out")
        return self
