"""Which tokens are key: those with at least one character in a key part of what is learnt."""

import pytest
from pydantic import ValidationError

from grpo_lab.data.examples import training_rows
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data, KeyTokens


@pytest.fixture
def weights(load, tokenizer):
    """The learnt tokens of one row with their weights, token by token."""

    def of(row, key_tokens, **settings):
        data = Data(source="file", path="d.jsonl", **settings)
        loss_on = "completion"
        made = training_rows(
            data, load([row], data), tokenizer, loss_on=loss_on, max_length=99, key_tokens=KeyTokens(**key_tokens)
        )[0]
        assert len(made.weights) == len(made.completion_ids) == len(made.learn)
        pairs = zip(made.completion_ids, made.weights, strict=True)
        return [(tokenizer.decode([token]), weight) for token, weight in pairs if weight]

    return of


def test_a_pattern_makes_its_first_group_key(weights):
    found = weights({"q": "?", "a": "is 42"}, {"weight": 3, "pattern": r"is (\d+)"}, prompt="q", completion="a")
    assert found[-3:] == [("4", 3.0), ("2", 3.0), ("<|im_end|>", 1.0)]
    assert {weight for _, weight in found[:-3]} == {1.0}


def test_a_pattern_without_groups_makes_its_match_key(weights):
    found = weights({"q": "?", "a": "x1y2"}, {"weight": 0.5, "pattern": r"\d"}, prompt="q", completion="a")
    assert found == [("x", 1.0), ("1", 0.5), ("y", 1.0), ("2", 0.5), ("<|im_end|>", 1.0)]


def test_a_tag_makes_what_stands_in_it_key_over_lines(weights):
    row = {"q": "?", "a": "a<answer>\n7</answer>7"}
    found = weights(row, {"weight": 2, "tag": "answer"}, prompt="q", completion="a")
    assert [text for text, weight in found if weight == 2.0] == ["\n", "7"]


def test_a_column_makes_its_texts_key_wherever_they_occur(weights):
    row = {"q": "7?", "a": "7 or 8 or 9", "gold": ["7", "9"]}
    found = weights(row, {"weight": 2, "column": "gold"}, prompt="q", completion="a")
    assert [text for text, weight in found if weight == 2.0] == ["7", "9"]


def test_a_token_that_overlaps_a_key_part_is_key(weights, tokenizer):
    assert len(tokenizer(" three")["input_ids"]) < 6
    found = weights({"t": "two three"}, {"weight": 2, "pattern": "e$"}, text="t")
    (key,) = [text for text, weight in found if weight == 2.0]
    assert key.endswith("e")
    assert len(key) > 1


def test_all_tokens_of_a_character_of_several_bytes_are_key(weights):
    found = weights({"t": "a\N{SNOWMAN}b"}, {"weight": 2, "pattern": "\N{SNOWMAN}"}, text="t")
    assert [weight for _, weight in found] == [2.0, 2.0, 2.0, 1.0, 1.0]  # three bytes, b, the end


def test_prompts_weigh_1_where_they_are_learnt(load, tokenizer):
    data = Data(source="file", path="d.jsonl", prompt="q", completion="a", chat=False)
    key = KeyTokens(weight=5, pattern="7")
    (row,) = training_rows(
        data, load([{"q": "77", "a": "7"}], data), tokenizer, loss_on="all", max_length=9, key_tokens=key
    )
    assert row.weights == (1.0, 5.0, 1.0)


def test_what_cannot_be_key_is_refused(weights):
    with pytest.raises(RecipeError, match='key_tokens.column: column "gold" is not in the data'):
        weights({"t": "x"}, {"weight": 2, "column": "gold"}, text="t")
    with pytest.raises(RecipeError, match='key_tokens.column: "gold" should be a text or a list of texts, found 1.5'):
        weights({"t": "x", "gold": 1.5}, {"weight": 2, "column": "gold"}, text="t")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight": 2}, "give exactly one of pattern, tag, column; found none"),
        ({"weight": 2, "tag": "a", "column": "b"}, "found tag, column"),
        ({"weight": 0, "tag": "a"}, "greater than 0"),
        ({"weight": 2, "pattern": "("}, "pattern is no regular expression"),
    ],
)
def test_a_setting_without_meaning_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        KeyTokens(**settings)
