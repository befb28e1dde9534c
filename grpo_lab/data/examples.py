"""From rows to what the stages take: prompts to sample from, and tokens to learn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from grpo_lab.data.chat import encode_chat, encode_plain
from grpo_lab.data.chunks import chunks
from grpo_lab.data.fields import answer_field, check_columns, messages_field, text_field
from grpo_lab.data.row_texts import Row, Text, Writer, end_token, prompt_messages, prompt_text
from grpo_lab.data.sources import Rows
from grpo_lab.data.stream import Mapped, MappedStream, Stream
from grpo_lab.data.tokens import tokenise
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data, KeyTokens
from grpo_lab.types import Example

T = TypeVar("T")
MAX_PROBLEMS = 10
MAX_STREAMED = 1000


@dataclass(frozen=True)
class TrainingRow:
    """Tokens for supervised learning; `learn` says which of `completion_ids` count in the loss.

    `weights` says how much each of them counts, where it is learnt; None = all alike.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    learn: tuple[bool, ...]
    weights: tuple[float, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return len(self.prompt_ids) + len(self.completion_ids)


def prompt_examples(data: Data, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Mapped[Example] | Stream[Example]:
    """The rows as prompts, templated and tokenised when asked for; a Stream if the rows are streamed.

    `messages` data is cut after its last user (or tool) turn: assistant turns behind it are what the model is about
    to write, so they are no part of the prompt. Rewards still see them in the row's own column.
    """
    if data.text is not None:
        raise RecipeError("data.text: plain text has no prompt to sample from; use data.prompt or data.messages")
    _check(data, rows, tokenizer)

    def example(index: int, row: Row, texts: list[Text]) -> Example:
        columns = row if data.answer is None else {**row, "answer": answer_field(row, data.answer)}
        ((prompt, _),) = texts
        if not data.chat:
            return Example(rows.id(index), prompt, encode_plain(tokenizer, prompt), columns)
        return Example(rows.id(index), prompt, encode_chat(tokenizer, prompt), columns, prompt_messages(row, data))

    return _converted(rows, tokenizer, lambda row: [(prompt_text(row, data, tokenizer), False)], example)


def short_prompts(examples: Mapped[Example], most: int) -> Mapped[Example]:
    """Those whose prompt has at most so many tokens.

    Raises:
        RecipeError: there are none.
    """
    kept = [index for index, example in enumerate(examples) if len(example.prompt_ids) <= most]
    if not kept:
        raise RecipeError(f"data.max_prompt_tokens: every one of {len(examples)} prompts has more than {most} tokens")
    return Mapped(lambda index: examples[kept[index]], len(kept))


def training_rows(
    data: Data,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: Literal["completion", "all"],
    max_length: int,
    learn_turns: Literal["all", "last"] = "all",
    key_tokens: KeyTokens | None = None,
) -> Mapped[TrainingRow] | Stream[TrainingRow]:
    """The rows as tokens to learn, made when asked for; a Stream if the rows are streamed.

    Prompt and completion are tokenised apart, as sampling meets them: a prompt's tokens never depend on what follows.
    Every assistant turn ends in the template's end token (plain completions: EOS), learnt exactly once. In a
    conversation only assistant turns are learnt, and what follows the last of them is left out. Plain text is learnt
    whole after its first token (BOS if the tokenizer has one), EOS included; with `data.chunk_length` all texts are
    one run of tokens, learnt in pieces.

    Args:
        loss_on: "all" learns every token after the first one.
        max_length: the most tokens of a row; a longer one is a RecipeError.
        learn_turns: which of a conversation's assistant turns are learnt.
        key_tokens: which tokens weigh more than 1. An end token weighs 1.
    """
    if data.max_prompt_tokens is not None:
        raise RecipeError("data.max_prompt_tokens: is for prompts to sample from; set max_length, or leave it out")
    _check(data, rows, tokenizer, key_tokens)
    writer = Writer(data, tokenizer, end_token(data, tokenizer), learn_turns, key_tokens)

    def training_row(index: int, row: Row, texts: list[Text]) -> TrainingRow:
        pieces = writer.pieces(row, texts)
        ids = tuple(chain.from_iterable(run for run, _ in pieces))
        weights = tuple(chain.from_iterable(own for _, own in pieces))
        if len(ids) > max_length:
            raise RecipeError(f"the row has {len(ids)} tokens, more than max_length {max_length}")
        if loss_on == "all" or data.text is not None:
            weights = (0.0, *[weight or 1.0 for weight in weights[1:]])
        first = next(place for place, weight in enumerate(weights) if weight > 0)
        learn = tuple(map(bool, weights[first:]))
        return TrainingRow(ids[:first], ids[first:], learn, None if key_tokens is None else weights[first:])

    if data.chunk_length is None:
        return _converted(rows, tokenizer, writer.texts, training_row)
    if data.chunk_length > max_length:
        raise RecipeError(f"data.chunk_length: {data.chunk_length} tokens are more than max_length {max_length}")
    runs = _converted(rows, tokenizer, writer.texts, lambda index, row, texts: writer.pieces(row, texts)[0][0])
    return chunks(runs, data.chunk_length, lambda ids: TrainingRow(ids[:1], ids[1:], (True,) * (len(ids) - 1)))


def check_prompts(examples: Sequence[Any] | Stream[Any], context_length: int, max_completion_length: int) -> list[str]:
    """One line for every example that cannot be built or whose prompt leaves no room for a whole completion.

    After ten lines the rest is left out. Of a stream, the first thousand rows are looked at.
    """

    def problem(example: Example) -> str | None:
        if len(example.prompt_ids) + max_completion_length <= context_length:
            return None
        return (
            f"{example.id}: the prompt has {len(example.prompt_ids)} tokens; with max_completion_length "
            f"{max_completion_length} that is more than the model's context of {context_length}"
        )

    return _problems(examples, problem)


def check_training_rows(rows: Sequence[Any] | Stream[Any]) -> list[str]:
    """One line for every training row that cannot be built, as many and of as many rows as in `check_prompts`."""
    return _problems(rows, lambda row: None)


def corpus(data: Data, rows: Rows) -> Iterator[str]:
    """The raw texts of all rows (prompts, completions, messages, plain text), for training a tokenizer."""
    check_columns(data, rows.column_names)
    for index, row in enumerate(rows):
        try:
            yield from _texts(row, data)
        except RecipeError as error:
            raise RecipeError(f"{rows.row(index)}: {error}") from error


def _texts(row: Row, data: Data) -> list[str]:
    if data.messages is not None:
        return [message["content"] for message in messages_field(row, data)]
    specs = {"data.prompt": data.prompt, "data.completion": data.completion, "data.text": data.text}
    texts = [text_field(row, spec, key) for key, spec in specs.items() if spec is not None]
    return texts if data.system_prompt is None else [data.system_prompt, *texts]


def _check(data: Data, rows: Rows, tokenizer: PreTrainedTokenizerBase, key_tokens: KeyTokens | None = None) -> None:
    """What can be said before any row is read."""
    check_columns(
        data, rows.column_names, () if key_tokens is None or key_tokens.column is None else (key_tokens.column,)
    )
    if key_tokens is not None and not tokenizer.is_fast:
        raise RecipeError("key_tokens: this tokenizer does not say where in the text a token stands; use a fast one")
    if data.messages is not None and not data.chat:
        raise RecipeError("data.chat: messages need the chat template; leave out chat: false")
    if data.text is None and data.chat and tokenizer.chat_template is None:
        raise RecipeError("the tokenizer has no chat template: set model.chat_template: chatml, or data.chat: false")
    if tokenizer.eos_token_id is None:
        raise RecipeError("model.tokenizer: the tokenizer has no EOS token, so no text could ever end; use another one")


def _converted(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    texts: Callable[[Row], list[Text]],
    convert: Callable[[int, Row, list[Text]], T],
) -> Mapped[T] | Stream[T]:
    """The rows converted one by one when asked for, with their texts; errors get the row's name in front."""
    prepared: dict[int, list[Text]] = {}

    def texts_of(indices: range) -> Iterator[str]:
        for index in indices:
            with suppress(RecipeError):  # raised again when the row itself is asked for
                prepared[index] = texts(rows[index])
                yield from (text for text, _ in prepared[index])

    def ahead(indices: range) -> None:
        prepared.clear()
        tokenise(tokenizer, texts_of(indices))

    def named(index: int, row: Row) -> T:
        try:
            return convert(index, row, prepared.pop(index, None) or texts(row))
        except RecipeError as error:
            raise RecipeError(f"{rows.row(index)}: {error}") from error

    if rows.streamed:
        return MappedStream(rows.items, named)
    return Mapped(lambda index: named(index, rows[index]), len(rows), ahead=ahead)


def _problems(items: Sequence[Any] | Stream[Any], problem: Callable[[Any], str | None]) -> list[str]:
    found: list[str] = []
    for index in range(MAX_STREAMED) if isinstance(items, Stream) else range(len(items)):
        if isinstance(items, Mapped):
            items.prepare(index)
        try:
            line = problem(items[index])
        except RecipeError as error:
            line = str(error)
        except IndexError:
            if isinstance(items, Stream):
                break
            raise
        if line is not None and line not in found:
            found.append(line)
        if len(found) > MAX_PROBLEMS:
            return [*found[:MAX_PROBLEMS], "... and more"]
    return found
