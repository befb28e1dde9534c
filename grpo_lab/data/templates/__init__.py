"""The chat templates that come along, one Jinja file each, and the tokens that they write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lab.errors import RecipeError


@dataclass(frozen=True)
class ChatTemplate:
    """A template by name. `end` ends every assistant's turn, `others` are the other tokens that it cannot do without.

    `begin` is written in front of a conversation if it is the tokenizer's BOS. `mark` is what a text that was templated
    already starts with.
    """

    name: str
    end: str
    others: tuple[str, ...] = ()
    begin: str | None = None
    mark: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The Jinja source."""
        return (Path(__file__).parent / f"{self.name}.jinja").read_text(encoding="utf-8")


TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate("chatml", "<|im_end|>", ("<|im_start|>",), mark=("<|im_start|>",)),
        # the instruction marks are tokens in some of Mistral's vocabularies only
        ChatTemplate("mistral", "</s>", begin="<s>", mark=("<s>[INST]", "<s> [INST]", "[INST]")),
        ChatTemplate(
            "llama3",
            "<|eot_id|>",
            ("<|start_header_id|>", "<|end_header_id|>"),
            begin="<|begin_of_text|>",
            mark=("<|begin_of_text|>", "<|start_header_id|>"),
        ),
    )
}


def with_template(tokenizer: Any, name: str) -> Any:
    """A pretrained tokenizer with one of these templates in place of its own, changed in place: a turn's end is its EOS.

    Raises:
        RecipeError: its vocabulary lacks a token of the template.
    """
    template, vocabulary = TEMPLATES[name], tokenizer.get_vocab()
    if template.end not in vocabulary:
        raise RecipeError(
            f'model.chat_template: {name} ends turns with "{template.end}", which is no token of {tokenizer.name_or_path}'
        )
    for token in template.others:
        if token not in vocabulary:
            raise RecipeError(
                f'model.chat_template: {name} writes "{token}", which is no token of {tokenizer.name_or_path}'
            )
    tokenizer.chat_template = template.text
    tokenizer.eos_token = template.end
    return tokenizer


def templated_as(text: str) -> str | None:
    """The template that a text begins like, if it was put through one already.

    >>> templated_as("<s>[INST] Hi [/INST]"), templated_as("Hi")
    ('mistral', None)
    """
    start = text.lstrip()
    return next((each.name for each in TEMPLATES.values() if start.startswith(each.mark)), None)
