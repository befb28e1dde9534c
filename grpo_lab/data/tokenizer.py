"""A small tokenizer of one's own, for models that are trained from nothing."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo_lab.data.chat import CHATML
from grpo_lab.errors import RecipeError

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
ROLES = "system\nuser\nassistant\n"  # the template writes them in every prompt, so they are worth tokens


def build_tokenizer(texts: Iterable[str], *, vocab_size: int, split_digits: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, trained on `texts`; the same texts give the same tokenizer.

    Its alphabet is all 256 bytes, so no text is unknown and decoding gives back exactly what was encoded, leading
    spaces included. EOS is <|im_end|>, padding is <|pad|> (never the same token), there is no BOS. Few or very
    uniform texts run out of pairs to merge: the vocabulary is then smaller than `vocab_size`, so size models by
    `len(tokenizer)`.

    Args:
        vocab_size: tokens in all: 3 special ones, 256 bytes, the rest merges.
        split_digits: whether every digit is a token of its own.

    >>> tokenizer = build_tokenizer(["low lower lowest"], vocab_size=262, split_digits=True)
    >>> tokenizer.decode(tokenizer("  10 lows")["input_ids"])
    '  10 lows'
    """
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Digits(individual_digits=True), by_bytes] if split_digits else [by_bytes]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((part for text in texts for part in (text, ROLES)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def with_chatml(tokenizer: Any) -> Any:
    """A pretrained tokenizer with the ChatML template, changed in place: a turn's end ends an answer.

    Raises:
        RecipeError: its vocabulary has no such token.
    """
    if TURN_END not in tokenizer.get_vocab():
        raise RecipeError(
            f'model.chat_template: chatml ends turns with "{TURN_END}", which is no token of {tokenizer.name_or_path}'
        )
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = TURN_END
    return tokenizer
