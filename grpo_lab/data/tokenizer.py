"""A small tokenizer of one's own, for models that are trained from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo_lab.data.templates import TEMPLATES
from grpo_lab.data.tokens import all_cores

PAD = "<|pad|>"
ROLES = "system\nuser\nassistant\n"  # the template writes them in every prompt, so they are worth tokens


def build_tokenizer(
    texts: Iterable[str], *, vocab_size: int, split_digits: bool, template: str = "chatml"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`; the same texts give the same tokenizer.

    Its alphabet is all 256 bytes, so no text is unknown and decoding gives back exactly what was encoded, leading
    spaces included. EOS is the template's end of a turn (chatml: <|im_end|>), padding is <|pad|> (never the same token),
    BOS is what the template begins with (chatml: none). Few or very uniform texts run out of pairs to merge: the
    vocabulary is then smaller than `vocab_size`, so size models by `len(tokenizer)`.

    Args:
        vocab_size: tokens in all: the special ones (chatml: 3), 256 bytes, the rest merges.
        split_digits: whether every digit is a token of its own.
        template: the name of one that comes along.

    >>> tokenizer = build_tokenizer(["low lower lowest"], vocab_size=262, split_digits=True)
    >>> tokenizer.decode(tokenizer("  10 lows")["input_ids"])
    '  10 lows'
    """
    chat = TEMPLATES[template]
    begin = [] if chat.begin is None else [chat.begin]
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Digits(individual_digits=True), by_bytes] if split_digits else [by_bytes]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, *begin, *chat.others, chat.end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with all_cores():
        bpe.train_from_iterator((part for text in texts for part in (text, ROLES)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=chat.begin,
        eos_token=chat.end,
        pad_token=PAD,
        extra_special_tokens=list(chat.others),
        clean_up_tokenization_spaces=False,
        chat_template=chat.text,
    )
