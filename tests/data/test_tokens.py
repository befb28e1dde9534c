import os
import signal
import tracemalloc

import pytest
from transformers import PreTrainedTokenizer

from grpo_lab.data import tokens
from grpo_lab.data.chat import known_prompt
from grpo_lab.data.tokens import known, token_ids, tokenise

TEXTS = ["the cat", "12 + 30 = 42", "the cat", " \n", "<|im_start|>user\nhéllo 😀<|im_end|>"]


class Slow(PreTrainedTokenizer):
    """A tokenizer without the tokenizers library: one number for each character."""

    vocab_size = 128

    def get_vocab(self):
        return {chr(number): number for number in range(self.vocab_size)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)


def plain(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_tokens_are_what_the_tokenizer_says(tokenizer):
    assert [token_ids(tokenizer, text) for text in TEXTS] == [plain(tokenizer, text) for text in TEXTS]


def test_tokens_of_many_texts_are_those_of_each(tokenizer):
    tokenise(tokenizer, TEXTS)

    assert set(known(tokenizer).ids) == set(TEXTS)
    assert [token_ids(tokenizer, text) for text in TEXTS] == [plain(tokenizer, text) for text in TEXTS]


@pytest.mark.parametrize(
    "limits, sizes", [((3, 10_000), [3] * 6 + [2]), ((100, 100), [3] * 6 + [2]), ((1, 1), [1] * 20)]
)
def test_many_texts_go_to_the_library_some_at_a_time(tokenizer, monkeypatch, limits, sizes):
    monkeypatch.setattr(tokens, "MOST_TEXTS", limits[0])
    monkeypatch.setattr(tokens, "MOST_CHARACTERS", limits[1])
    seen = []
    encoded = tokens._encoded
    monkeypatch.setattr(tokens, "_encoded", lambda it, texts: seen.append(len(texts)) or encoded(it, texts))
    texts = [f"{number:2} " + "word " * 8 for number in range(20)]  # 43 characters each
    tokenise(tokenizer, texts)

    assert seen == sizes
    assert [token_ids(tokenizer, text) for text in texts] == [plain(tokenizer, text) for text in texts]


def test_what_was_asked_for_together_is_known_however_much_it_is(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "MOST_KNOWN", 10)
    texts = [f"a text of some length, {number}" for number in range(20)]
    tokenise(tokenizer, texts)
    monkeypatch.setattr(tokens, "_encoded", lambda *_: pytest.fail("it was known"))

    assert all(token_ids(tokenizer, text) for text in texts)


def test_a_forked_process_can_tokenise_too(tokenizer, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the command line has it
    tokenise(tokenizer, [f"before {number}" for number in range(1000)])
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # threads that are waited for never come: without the alarm the test would hang
        tokenise(tokenizer, [f"after {number}" for number in range(1000)])
        os._exit(0)

    assert os.waitpid(child, 0)[1] == 0


def test_truncation_that_somebody_left_on_cuts_nothing(tokenizer):
    whole = plain(tokenizer, TEXTS[1])
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenise(tokenizer, [TEXTS[1]])
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenise(tokenizer, TEXTS)

    assert token_ids(tokenizer, TEXTS[1]) == whole
    assert token_ids(tokenizer, TEXTS[0]) == plain(tokenizer, TEXTS[0])


def test_a_slow_tokenizer_will_do():
    slow = Slow()
    tokenise(slow, ["ab", "c"])

    assert [token_ids(slow, text) for text in ("ab", "c", "d")] == [(97, 98), (99,), (100,)]


def test_a_text_is_tokenised_once(tokenizer, monkeypatch):
    expected = token_ids(tokenizer, "the cat")

    monkeypatch.setattr(tokens, "_encoded", lambda *_: pytest.fail("it was known"))
    tokenise(tokenizer, ["the cat"])
    assert token_ids(tokenizer, "the cat") == expected


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "MOST_KNOWN", 10 * tokens.PER_TEXT)
    held = []
    for number in range(50):
        text = f"what is {number}?"
        assert token_ids(tokenizer, text) == plain(tokenizer, text)
        held.append(len(known(tokenizer).ids))

    assert max(held) == 9  # with the texts and tokens themselves
    assert held.count(1) == 6


def test_the_bound_is_near_what_texts_really_take(tokenizer):
    texts = [f"{number}+{number}=" for number in range(20_000)]
    tracemalloc.start()
    for text in texts:
        known_prompt(tokenizer, [{"role": "user", "content": text}])
    tokenise(tokenizer, known(tokenizer).prompts.values())
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert 0.5 < taken / known(tokenizer).size < 2


@pytest.mark.parametrize("before", [None, "false"])
def test_the_environment_is_left_as_it_was(tokenizer, before, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)

    tokenise(tokenizer, TEXTS)

    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
