import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from grpo_lab.data.tokenizer import build_tokenizer

TEXTS = ["the cat sat on the mat", "the 12 cats sat: 47+38=85", "<think>7+8=15 c1</think>\n<answer>85</answer>"]
HOSTILE = [
    "",
    " ",
    "  two spaces",
    "end. \n\n",
    "don 't stop .",
    "héllo 😀 \u202e \x00\x7f",
    "a<|im_end|>b",
    "x" * 5000,
    "\r\n\t",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_text_round_trips(text):
    made = build_tokenizer(TEXTS, vocab_size=300, split_digits=True)

    assert made.decode(made(text)["input_ids"]) == text


def test_the_vocabulary_has_the_size_that_was_asked_for():
    assert len(build_tokenizer(TEXTS, vocab_size=275, split_digits=True)) == 275


def test_without_texts_the_vocabulary_is_the_special_tokens_and_the_bytes():
    assert len(build_tokenizer([], vocab_size=300, split_digits=True)) == 3 + 256


def test_special_tokens_are_distinct_and_there_is_no_bos():
    made = build_tokenizer(TEXTS, vocab_size=300, split_digits=True)

    assert (made.pad_token, made.eos_token, made.bos_token) == ("<|pad|>", "<|im_end|>", None)
    assert made.convert_tokens_to_ids(["<|pad|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert made("<|im_start|>x<|im_end|>")["input_ids"][::2] == [1, 2]


def test_decoding_can_leave_special_tokens_out():
    made = build_tokenizer(TEXTS, vocab_size=300, split_digits=True)

    assert made.decode(made("<|im_start|>85<|im_end|>")["input_ids"], skip_special_tokens=True) == "85"


def test_split_digits_gives_every_digit_a_token():
    texts = ["1234 1234 1234 1234"]

    assert len(build_tokenizer(texts, vocab_size=300, split_digits=True)("1234")["input_ids"]) == 4
    assert len(build_tokenizer(texts, vocab_size=300, split_digits=False)("1234")["input_ids"]) == 1


def test_the_template_is_chatml():
    made = build_tokenizer(TEXTS, vocab_size=300, split_digits=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    assert made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_saved_tokenizer_loads_as_the_same(tmp_path):
    made = build_tokenizer(TEXTS, vocab_size=300, split_digits=True)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert loaded.chat_template == made.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id) == (2, 0, None)
    assert [loaded.decode(loaded(text)["input_ids"]) for text in HOSTILE] == HOSTILE


def test_another_process_builds_the_same_tokenizer():
    code = (
        "from grpo_lab.data.tokenizer import build_tokenizer\n"
        f"made = build_tokenizer({TEXTS!r}, vocab_size=300, split_digits=True)\n"
        "import sys; sys.stdout.write(made.backend_tokenizer.to_str())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert other == build_tokenizer(TEXTS, vocab_size=300, split_digits=True).backend_tokenizer.to_str()
