"""What a row says, in texts that are only read and texts that are learnt, and their tokens.

Errors here do not say which row it is; `examples.py` puts that in front.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo_lab.data.chat import (
    TurnEnd,
    encode_chat,
    encode_plain,
    known_prompt,
    prefills_thinking,
    render_turns,
    turn_end,
    turn_lead,
)
from grpo_lab.data.fields import messages_field, text_field, with_system
from grpo_lab.data.key_tokens import key_weights
from grpo_lab.data.tokens import token_ids
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data, KeyTokens
from grpo_lab.types import Message

Row = dict[str, Any]
Text = tuple[str, bool]
"""A text of a row, and whether it is learnt."""
Piece = tuple[tuple[int, ...], tuple[float, ...]]
"""A run of tokens with how much each weighs: 0 where it is only read, 1 or the weight of key tokens where it is learnt."""


def end_token(data: Data, tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """What ends the texts that are learnt: the template's end of a turn, or EOS where there is none."""
    end = turn_end(tokenizer) if data.chat and data.text is None else None
    if end is None and data.messages is not None:
        raise RecipeError(
            "data.messages: the chat template writes no special token after an assistant's turn, so the model would not "
            "learn to stop; set model.chat_template: chatml, or train on prompt and completion"
        )
    return end or TurnEnd(tokenizer.eos_token_id, tokenizer.eos_token)


@dataclass(frozen=True)
class Writer:
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

    def texts(self, row: Row) -> list[Text]:
        """What a row says, in texts that are only read and texts that are learnt."""
        data = self.data
        if data.messages is not None:
            key, texts = "data.messages", self._turns(row)
        elif data.text is not None:
            key, texts = "data.text", [(text_field(row, data.text, "data.text"), True)]
        else:
            prompt, completion = prompt_text(row, data, self.tokenizer), self._completion(row)
            key, texts = "data.completion", [(prompt, False), (completion, True)]
        for text, learnt in texts:
            if learnt:
                _refuse_end(text, key, self.end)
        return texts

    def pieces(self, row: Row, texts: list[Text]) -> list[Piece]:
        """The tokens of `texts(row)`."""
        if self.data.text is not None:
            ids, weights = self._learnt(texts[0][0], row)
            whole = encode_plain(self.tokenizer, texts[0][0])
            bos = whole[: len(whole) + 1 - len(ids)]  # one token or none
            return [((*bos, *ids), (*[1.0] * len(bos), *weights))]
        encode = encode_chat if self.data.chat else encode_plain
        pieces = []
        for place, (text, learnt) in enumerate(texts, start=1):
            piece = self._learnt(text, row) if learnt else _read(encode(self.tokenizer, text))
            pieces.append(piece if place == len(texts) or self.learn_turns == "all" else _read(piece[0]))
        return pieces

    def _completion(self, row: Row) -> str:
        completion = text_field(row, _spec(self.data.completion), "data.completion")
        if self.prefilled and completion.lstrip().startswith("<think>"):
            raise RecipeError(
                "data.completion: the chat template has already written <think> in the prompt; "
                "leave it out of the completion, or set another model.chat_template"
            )
        return completion if completion[0].isspace() else self.lead + completion

    def _turns(self, row: Row) -> list[Text]:
        messages = messages_field(row, self.data)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
            raise RecipeError(f"data.messages: there is no assistant turn after a user turn: {', '.join(roles)}")
        return render_turns(self.tokenizer, messages, self.end)

    def _learnt(self, text: str, row: Row) -> Piece:
        """What the model writes, and the token that ends it."""
        ids = token_ids(self.tokenizer, text)
        weights = [1.0] * len(ids)
        if self.key_tokens is not None:
            weights = key_weights(self.tokenizer, text, row, self.key_tokens)
        return (*ids, self.end.id), (*weights, 1.0)


def prompt_text(row: Row, data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model sees before it answers: templated messages, or the plain prompt."""
    if data.chat:
        return known_prompt(tokenizer, prompt_messages(row, data))
    return text_field(row, _spec(data.prompt), "data.prompt")


def prompt_messages(row: Row, data: Data) -> tuple[Message, ...]:
    """The conversation up to what the model is to answer, after the recipe's system prompt."""
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


def _read(ids: tuple[int, ...]) -> Piece:
    """Tokens that are not learnt."""
    return ids, (0.0,) * len(ids)


def _refuse_end(text: str, key: str, end: TurnEnd) -> None:
    if end.text in text:
        raise RecipeError(f"{key}: the text holds {end.text}, which is added where it ends; leave it out")


def _spec(spec: str | None) -> str:
    assert spec is not None, "the schema sees to it that one form is given"
    return spec
