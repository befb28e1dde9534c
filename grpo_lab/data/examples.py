"""From rows to what the stages take: prompts to sample from, and tokens to learn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from grpo_lab.data.chat import (
    TurnEnd,
    encode_chat,
    encode_plain,
    prefills_thinking,
    prompt_and_ids,
    render_turns,
    token_ids,
    turn_end,
    turn_lead,
)
from grpo_lab.data.chunks import chunks
from grpo_lab.data.fields import answer_field, check_columns, messages_field, text_field, with_system
from grpo_lab.data.key_tokens import key_weights
from grpo_lab.data.sources import Rows
from grpo_lab.data.stream import Mapped, MappedStream, Stream
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data, KeyTokens
from grpo_lab.types import Example, Message

T = TypeVar("T")
Row = dict[str, Any]
Piece = tuple[tuple[int, ...], tuple[float, ...]]
"""A run of tokens with how much each weighs: 0 where it is only read, 1 or the weight of key tokens where it is learnt."""

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

    def example(index: int, row: Row) -> Example:
        columns = row if data.answer is None else {**row, "answer": answer_field(row, data.answer)}
        if data.chat:
            messages = _prompt_messages(row, data)
            return Example(rows.id(index), *prompt_and_ids(tokenizer, messages), columns, messages)
        prompt = text_field(row, _spec(data.prompt), "data.prompt")
        return Example(rows.id(index), prompt, encode_plain(tokenizer, prompt), columns)

    return _converted(rows, example)


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
    end = _end_token(data, tokenizer)
    writer = _Writer(data, tokenizer, end, learn_turns, key_tokens)

    def training_row(index: int, row: Row) -> TrainingRow:
        pieces = writer.pieces(row)
        ids = tuple(token for run, _ in pieces for token in run)
        weights = tuple(weight for _, own in pieces for weight in own)
        if len(ids) > max_length:
            raise RecipeError(f"the row has {len(ids)} tokens, more than max_length {max_length}")
        if loss_on == "all" or data.text is not None:
            weights = (0.0, *[weight or 1.0 for weight in weights[1:]])
        first = next(place for place, weight in enumerate(weights) if weight > 0)
        learn = tuple(weight > 0 for weight in weights[first:])
        return TrainingRow(ids[:first], ids[first:], learn, None if key_tokens is None else weights[first:])

    if data.chunk_length is None:
        return _converted(rows, training_row)
    if data.chunk_length > max_length:
        raise RecipeError(f"data.chunk_length: {data.chunk_length} tokens are more than max_length {max_length}")
    texts = _converted(rows, lambda index, row: writer.pieces(row)[0][0])
    return chunks(texts, data.chunk_length, lambda ids: TrainingRow(ids[:1], ids[1:], (True,) * (len(ids) - 1)))


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


def _end_token(data: Data, tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """What ends the texts that are learnt: the template's end of a turn, or EOS where there is none."""
    end = turn_end(tokenizer) if data.chat and data.text is None else None
    if end is None and data.messages is not None:
        raise RecipeError(
            "data.messages: the chat template writes no special token after an assistant's turn, so the model would not "
            "learn to stop; set model.chat_template: chatml, or train on prompt and completion"
        )
    return end or TurnEnd(tokenizer.eos_token_id, tokenizer.eos_token)


@dataclass(frozen=True)
class _Writer:
    """Writes rows as runs of tokens."""

    data: Data
    tokenizer: PreTrainedTokenizerBase
    end: TurnEnd
    learn_turns: Literal["all", "last"]
    key_tokens: KeyTokens | None

    @cached_property
    def lead(self) -> str:
        """What precedes the completion of a chat prompt that brings no blanks of its own."""
        return turn_lead(self.tokenizer) if self.data.chat and self.data.completion is not None else ""

    @cached_property
    def prefilled(self) -> bool:
        """Whether the template has already opened <think>."""
        return self.data.chat and self.data.completion is not None and prefills_thinking(self.tokenizer)

    def pieces(self, row: Row) -> list[Piece]:
        """A row's tokens, in runs that are only read and runs that are learnt."""
        data, tokenizer = self.data, self.tokenizer
        if data.messages is not None:
            return self._conversation(row)
        if data.text is not None:
            text = text_field(row, data.text, "data.text")
            ids, weights = self._learnt(text, "data.text", row)
            whole = encode_plain(tokenizer, text)
            bos = whole[: len(whole) + 1 - len(ids)]  # one token or none
            return [((*bos, *ids), (*[1.0] * len(bos), *weights))]
        completion = text_field(row, _spec(data.completion), "data.completion")
        if data.chat:
            _, prompt = prompt_and_ids(tokenizer, _prompt_messages(row, data))
        else:
            prompt = encode_plain(tokenizer, text_field(row, _spec(data.prompt), "data.prompt"))
        if self.prefilled and completion.lstrip().startswith("<think>"):
            raise RecipeError(
                "data.completion: the chat template has already written <think> in the prompt; "
                "leave it out of the completion, or set another model.chat_template"
            )
        lead = "" if completion[0].isspace() else self.lead
        return [_read(prompt), self._learnt(lead + completion, "data.completion", row)]

    def _conversation(self, row: Row) -> list[Piece]:
        messages = messages_field(row, self.data)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
            raise RecipeError(f"data.messages: there is no assistant turn after a user turn: {', '.join(roles)}")
        turns = render_turns(self.tokenizer, messages, self.end)
        pieces = []
        for place, (text, written) in enumerate(turns):
            if not written:
                pieces.append(_read(encode_chat(self.tokenizer, text)))
                continue
            piece = self._learnt(text, "data.messages", row)
            is_last = place == len(turns) - 1
            pieces.append(piece if is_last or self.learn_turns == "all" else _read(piece[0]))
        return pieces

    def _learnt(self, text: str, key: str, row: Row) -> Piece:
        """What the model writes, and the token that ends it."""
        _refuse_end(text, key, self.end)
        ids = token_ids(self.tokenizer, text)
        weights = [1.0] * len(ids)
        if self.key_tokens is not None:
            weights = key_weights(self.tokenizer, text, row, self.key_tokens)
        return (*ids, self.end.id), (*weights, 1.0)


def _read(ids: tuple[int, ...]) -> Piece:
    """Tokens that are not learnt."""
    return ids, (0.0,) * len(ids)


def _refuse_end(text: str, key: str, end: TurnEnd) -> None:
    if end.text in text:
        raise RecipeError(f"{key}: the text holds {end.text}, which is added where it ends; leave it out")


def _prompt_messages(row: Row, data: Data) -> tuple[Message, ...]:
    if data.messages is None:
        content = text_field(row, _spec(data.prompt), "data.prompt")
        return with_system(({"role": "user", "content": content},), data)
    messages = messages_field(row, data)
    asked = [place for place, message in enumerate(messages) if message["role"] in ("user", "tool")]
    if not asked:
        raise RecipeError("data.messages: there is no user turn to answer")
    prompt = messages[: asked[-1] + 1]
    if not prompt[-1]["content"].strip():
        raise RecipeError("data.messages: the last user turn is empty")
    return prompt


def _spec(spec: str | None) -> str:
    assert spec is not None, "the schema sees to it that one form is given"
    return spec


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


def _converted(rows: Rows, convert: Callable[[int, Row], T]) -> Mapped[T] | Stream[T]:
    """The rows converted one by one when asked for; errors get the row's name in front."""

    def named(index: int, row: Row) -> T:
        try:
            return convert(index, row)
        except RecipeError as error:
            raise RecipeError(f"{rows.row(index)}: {error}") from error

    if rows.streamed:
        return MappedStream(rows.items, named)
    return Mapped(lambda index: named(index, rows[index]), len(rows))


def _problems(items: Sequence[Any] | Stream[Any], problem: Callable[[Any], str | None]) -> list[str]:
    found: list[str] = []
    for index in range(MAX_STREAMED) if isinstance(items, Stream) else range(len(items)):
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
