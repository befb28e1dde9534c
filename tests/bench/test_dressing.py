"""How golds are written as completions, and which wrong answers and junk are made of them."""

import pytest

from grpo_lab.bench.dressing import (
    Dressed,
    Dressing,
    Row,
    choose,
    demonstration,
    dressings,
    filler,
    gold_of,
    with_answer,
)
from grpo_lab.bench.probes import GOLD, ONE_PLACE, OWN, WRONG, is_junk, probe_texts, wrong_answers
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example

TAGS = ["think", "answer"]


def row(gold="12", demo=None, **columns) -> Row:
    return Row(Example(f"r-{gold}", "1+1=", (1,), {"answer": gold, **columns}), gold, demo)


def encode(text: str) -> Completion:
    return Completion(text, tuple(range(len(text.split()) + 1)), True)


def rewards(*terms):
    return bind([RewardTerm(**term) for term in terms], discover())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<answer>1</answer> no <answer>2</answer>.", "<answer>1</answer> no <answer>9</answer>."),
        ("a\n#### 3\n", "a\n#### 9\n"),
        (r"\boxed{\frac{1}{2}} .", r"\boxed{9} ."),
        ("<final>3</final>", None),
    ],
)
def test_an_answer_is_put_where_the_old_one_stood(text, expected):
    assert with_answer(text, "9", TAGS) == expected


def test_the_recipe_s_own_tag_is_where_the_answer_is():
    assert with_answer("<why>1</why><final>3</final>", "9", ["why", "final"]) == "<why>1</why><final>9</final>"


def test_golds_are_the_first_of_their_columns_and_the_first_of_several():
    assert gold_of({"answer": None, "solution": " 4 "}, ["answer", "solution"]) == "4"
    assert gold_of({"answer": ["x", "y"]}, ["answer"]) == "x"
    assert gold_of({"answer": {"a": 1}}, ["answer"]) is None


@pytest.mark.parametrize(
    "terms, name",
    [
        ([{"name": "accuracy", "options": {"extract": "hash"}}], "after ####"),
        (
            [{"name": "accuracy", "options": {"extract": "boxed"}}, {"name": "format"}],
            "tags think, answer, boxed inside",
        ),
        ([{"name": "accuracy", "options": {"extract": "boxed"}}], "tags think, answer, boxed inside"),
        ([{"name": "format", "options": {"style": "boxed"}}], "tags think, answer, boxed inside"),
        ([{"name": "format", "options": {"style": "regex", "pattern": r"\d+"}}], "the bare answer"),
    ],
)
def test_the_form_is_the_one_in_which_golds_score_best(terms, name):
    rows, made = [row(), row("7")], rewards(*terms)
    found = choose(
        made, rows, dressings(made, rows, TAGS, prefilled=False), encode, maximum=float(len(terms)), longest=40
    )
    assert found.name == name


def test_demonstrations_come_first_and_hold_the_gold():
    rows, made = (
        [row(demo=with_answer("2+2 <think>x</think><answer>5</answer>", "12", TAGS))],
        rewards({"name": "accuracy"}),
    )
    found = choose(made, rows, dressings(made, rows, TAGS, prefilled=False), encode, maximum=1.0, longest=40)
    assert found.dressing.write(rows[0], "8", "") == "2+2 <think>x</think><answer>8</answer>"


def test_where_a_length_is_wanted_the_reasoning_gets_it():
    made = rewards({"name": "format"}, {"name": "length", "weight": 0.5, "options": {"target": 23}})
    rows = [row(), row("1 000 000")]
    found = choose(made, rows, dressings(made, rows, TAGS, prefilled=False), encode, maximum=1.0, longest=60)
    texts = [
        found.dressing.write(each, each.gold, reasoning) for each, reasoning in zip(rows, found.reasoning, strict=True)
    ]
    assert [len(encode(text).token_ids) for text in texts] == [23, 23]


def test_filler_has_no_number_and_exactly_the_length():
    assert len(filler(1000)) == 1000
    assert not any(char.isdigit() for char in filler(1000))


def test_a_demonstration_is_what_a_supervised_stage_learns_else_the_row_s_own_solution():
    columns = {"solution": r"so \boxed{3}", "work": "1+2", "result": "3"}
    assert demonstration(columns, ["{work}\n#### {result}"], "12", TAGS) == "1+2\n#### 12"
    assert demonstration(columns, ["{other}", "work"], "12", TAGS) == r"so \boxed{12}"
    assert demonstration({"work": "1+2"}, ["work"], "12", TAGS) is None


def test_wrong_answers_are_of_the_gold_s_kind_and_far_from_it():
    assert wrong_answers("18", []) == ["36", "54", "72"]
    assert wrong_answers("0", []) == ["1", "2", "3"]
    assert wrong_answers("1/2", []) == ["1.5", "2.5", "3.5"]
    assert wrong_answers("B", ["B", "b", "A", "C", "D", "E"]) == ["A", "C", "D"]
    assert wrong_answers("Paris", ["Paris"]) == ["not Paris", "not not Paris", "not not not Paris"]


def test_probes_are_made_for_every_row_and_the_gold_is_among_the_guesses():
    rows = [row("12", demo="#### 12"), row("5", demo="#### 5")]
    form = Dressing("hash", lambda row, answer, reasoning: f"{reasoning}\n#### {answer}")
    texts = probe_texts(rows, Dressed(form, ["so"] * 2, "hash"))
    assert all(len(each) == 2 for each in texts.values())
    assert (texts[GOLD][0], texts[WRONG][0]) == ("so\n#### 12", "so\n#### 24")
    assert texts["marks, no content"] == ["####", "####"]
    assert texts["gold repeated"][1].count("#### 5") == 5
    assert texts["guesses, gold last"][0].endswith("#### 12")
    assert "#### 12\n" in texts["guesses, gold between"][0]
    assert texts[ONE_PLACE][0] == "so\n#### 24, 36, 12, 48"
    assert texts[OWN] == ["#### 12", "#### 5"]
    assert (is_junk(ONE_PLACE, judged=True), is_junk(ONE_PLACE, judged=False), is_junk(WRONG, judged=True)) == (
        True,
        False,
        False,
    )


def test_without_golds_only_what_needs_none_is_probed():
    rows = [Row(Example("r", "hi", (1,), {}), None, None)]
    form = Dressing("bare", lambda row, answer, reasoning: answer)
    assert list(probe_texts(rows, Dressed(form, [""], "bare"))) == ["empty", "prompt echoed", "numbers 0 to 9"]
