"""A corpus in pieces: every token but the first is learnt exactly once, and a step's rows are a function of the step."""

import json
from itertools import islice

import pytest

from grpo_lab.data.examples import training_rows
from grpo_lab.data.sources import load_rows
from grpo_lab.data.stream import PromptStream, Stream
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data

TEXTS = ["one and two", "three", "and one is two and three", "x", "is it"]
EOS = 2


@pytest.fixture
def pieces(tmp_path, tokenizer):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for text in TEXTS))

    def of(length, max_length=50, **settings):
        data = Data(source="file", path="c.jsonl", text="t", chunk_length=length, **settings)
        rows = load_rows(data, root=tmp_path, seed=0)
        return training_rows(data, rows, tokenizer, loss_on="completion", max_length=max_length)

    return of


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [2, 3, 7, 50])
def test_the_texts_are_joined_by_eos_and_each_token_is_learnt_once(pieces, tokenizer, length, streaming):
    whole = [token for text in TEXTS for token in (*tokenizer(text)["input_ids"], EOS)]
    rows = list(pieces(length, streaming=streaming))
    assert [row.prompt_ids[0] for row in rows] == whole[:: length - 1][: len(rows)]
    assert [token for row in rows for token in row.completion_ids] == whole[1:]
    assert all(all(row.learn) and len(row.prompt_ids) == 1 for row in rows)
    assert {row.num_tokens for row in rows[:-1]} <= {length}


def test_a_streamed_corpus_is_a_stream_of_the_same_pieces_from_any_step(pieces):
    held = list(pieces(4))
    streamed = pieces(4, streaming=True)
    assert isinstance(streamed, Stream)
    assert list(islice(streamed, 100)) == held
    stream = PromptStream(streamed, 2, seed=0)
    assert stream.at(3) == held[6:8]
    assert stream.at(1) == held[2:4]  # back, as a resumed run may ask
    first = len(held) - len(held) % 2
    assert stream.at(first // 2) == [held[place % len(held)] for place in (first, first + 1)]  # and again from its end


def test_a_piece_longer_than_a_row_may_be_is_refused(pieces):
    with pytest.raises(RecipeError, match="data.chunk_length: 51 tokens are more than max_length 50"):
        pieces(51)


def test_pieces_are_of_plain_text_only():
    with pytest.raises(ValueError, match="chunk_length goes with text"):
        Data(source="file", path="c.jsonl", prompt="p", completion="c", chunk_length=8)
