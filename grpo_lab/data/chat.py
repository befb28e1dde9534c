"""Chat templates: from messages to the exact text and tokens a model sees, and where such a template can fool us."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo_lab.data.templates import templated_as
from grpo_lab.data.tokens import known, token_ids
from grpo_lab.errors import RecipeError
from grpo_lab.types import Message

ROLES = ("system", "user", "assistant", "tool")
_PROBE = "fjord"


@dataclass(frozen=True)
class TurnEnd:
    """The special token with which a template ends an assistant's turn."""

    id: int
    text: str


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of `messages` with the header of the assistant's turn, ready for the model to answer."""
    text = _render(tokenizer, messages, add_generation_prompt=True)
    last = str(messages[-1]["content"]).strip()
    if last not in text:
        raise RecipeError(
            f"the chat template leaves out the last message ({_cut(last)}), so the model would not see it; "
            "set model.chat_template: chatml, or give another template"
        )
    written = templated_as(last)
    if written is not None:
        raise RecipeError(
            f"the message is already written in a chat template, {written} ({_cut(last)}), and would be put into a second "
            "one; give the messages without it, or set data.chat: false"
        )
    return text


def render_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], end: TurnEnd
) -> list[tuple[str, bool]]:
    """The conversation up to its last assistant turn, in pieces: (text, whether the assistant writes it).

    The pieces joined are the template's own text. An assistant's piece stops before its end token, the next piece
    starts after it: the end token itself stands in no piece. What precedes a turn is exactly the text that a sampler
    would see there, so a template that rewrites earlier turns (drops their thoughts, for example) is refused.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        turn = _render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        content, closing, _ = turn[len(prompt) :].rpartition(end.text)
        if not (prompt.startswith(done) and turn.startswith(prompt) and closing):
            raise RecipeError(
                f"the chat template writes the first {index} messages differently once message {index + 1} follows, "
                "so training would not see what sampling sees; train on prompt and completion, or set "
                "model.chat_template: chatml"
            )
        if message["content"].strip() and not content.strip():
            raise RecipeError(f"the chat template leaves out the assistant's words ({_cut(message['content'])})")
        pieces += [(prompt[len(done) :], False), (content, True)]
        done = prompt + content + end.text
    return pieces


def encode_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of templated text. No special tokens are added: the template has written them."""
    ids = token_ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == (bos, bos):
        raise RecipeError(
            f"the chat template writes the token that begins a text ({tokenizer.bos_token}, id {bos}) twice; "
            "correct the template"
        )
    return ids


def known_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """`render_prompt`, remembered."""
    prompts = known(tokenizer).prompts
    key = (tokenizer.chat_template, *(tuple(message.items()) for message in messages))
    if key not in prompts:
        prompts[key] = render_prompt(tokenizer, messages)
    return prompts[key]


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of plain text to be continued: with the tokenizer's own BOS if it has one, once, and never with EOS."""
    ids = token_ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return (bos, *ids) if adds_bos and ids[:1] != (bos,) else ids


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd | None:
    """How the chat template ends an assistant's turn; None if it writes no special token there.

    It need not be the tokenizer's EOS: base models often have <|endoftext|> as EOS and <|im_end|> in the template.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    _, _, tail = _render(tokenizer, turns, add_generation_prompt=False).rpartition(_PROBE)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if token in special:
            return TurnEnd(token, tokenizer.convert_ids_to_tokens(token))
    return None


def turn_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """The blanks that the template writes between the header of the assistant's turn and its words: mistral's is " ".

    Where it writes more than blanks (an empty thought, say) that is for the words themselves to say, and this is "".
    """
    asked = [{"role": "user", "content": "?"}]
    prompt = _render(tokenizer, asked, add_generation_prompt=True)
    turns = _render(tokenizer, [*asked, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
    lead = turns[len(prompt) :].partition(_PROBE)[0] if turns.startswith(prompt) and _PROBE in turns else ""
    return lead if not lead.strip() else ""


def prefills_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template opens <think> itself, so that completions start inside it and never hold the opening tag."""
    prompt = _render(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    return prompt.rstrip().endswith("<think>")


def template_problems(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> list[str]:
    """What would go wrong in training with this template, one line each; `eos_ids` are where sampling stops."""
    eos_ids = tuple(eos_ids)
    end = turn_end(tokenizer)
    problems = []
    if end is not None and end.id not in eos_ids:
        stops = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} (id {token})" for token in eos_ids)
        problems.append(
            f"the chat template ends a turn with {end.text} (id {end.id}), but sampling stops at {stops}: answers would "
            "run on to the length limit; add the id to eos_token_id in the model's generation_config.json"
        )
    return problems


def check_messages(value: Any) -> tuple[Message, ...]:
    """The messages of one row, if they are a list of {role, content} with known roles and text contents."""
    if not isinstance(value, list | tuple) or not value:
        raise RecipeError(f"expected a list of messages {{role, content}}, found {_cut(value)}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = f"the keys {', '.join(map(str, message))}" if isinstance(message, dict) else _cut(message)
            raise RecipeError(f"message {number}: expected {{role, content}}, found {keys}")
        if message["role"] not in ROLES:
            raise RecipeError(f"message {number}: role {_cut(message['role'])} is not one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise RecipeError(f"message {number}: content should be text, found {_cut(message['content'])}")
    return tuple(value)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise RecipeError("the tokenizer has no chat template: set model.chat_template: chatml, or data.chat: false")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    # A template is somebody's program; these are the ways in which one fails inside jinja's sandbox.
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise RecipeError(
            f"the chat template cannot write messages with the roles {roles}: {type(error).__name__}: {error}"
        ) from error
    assert isinstance(text, str)
    return text


def _cut(value: Any, width: int = 60) -> str:
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    return shown if len(shown) <= width else f"{shown[: width - 4]}...{shown[-1]}"
