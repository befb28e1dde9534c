import pytest

from grpo_lab.bundled import find_recipe
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

adversarial = pytest.param
EXAMPLE = Example("a", "1+2=", (1,), {"answer": "3"})


@pytest.mark.parametrize(
    "text, ids, ended, expected",
    [
        ("#### 3", (5, 2), True, 1.0),
        ("#### 3", (5, 6), False, 0.0),
        adversarial("#### 3<|im_end|>", (5, 6), False, 0.0, id="the-end-spelt-out"),
        adversarial("I am finished. The end.", (5, 6), False, 0.0, id="says-that-it-is"),
        adversarial("<answer>3</answer>", (5, 6), False, 0.0, id="complete-but-not-ended"),
        adversarial("#### 3" + "\n" * 500, (5, 6), False, 0.0, id="nothing-but-line-breaks-after-it"),
        adversarial("#### 3####.####.####", (5, 6), False, 0.0, id="a-loop"),
        adversarial("", (2,), True, 1.0, id="nothing-and-its-end"),
        adversarial("", (7,), False, 0.0, id="nothing-to-see-and-no-end"),
        adversarial("#### 3", (5, 2, 2, 2), False, 0.0, id="ends-by-the-look-of-its-ids"),
        adversarial("\x00\u202e\ud83d", (5, 2), True, 1.0, id="no-text-at-all-but-ended"),
    ],
)
def test_what_counts_is_how_it_ended_and_not_what_it_says(text, ids, ended, expected):
    assert discover().get("finished").function(Completion(text, ids, ended)) == expected


@pytest.mark.parametrize(
    "text, ended, pays",
    [
        ("so it is\n#### 3", True, 1.0),
        ("so it is\n#### 3", False, 0.0),  # right, and never ended
        ("#### 3####.####.####", False, 0.0),
        ("#### 4", True, 0.0),
    ],
)
def test_an_answer_pays_only_if_it_ended(text, ended, pays):
    terms = [
        RewardTerm(name="finished", weight=0.0),
        RewardTerm(name="accuracy", only_if="finished", options={"extract": "hash"}),
    ]
    scores = bind(terms, discover([])).score([Group(EXAMPLE, (Completion(text, (5,), ended),) * 2)])
    assert scores.total.tolist() == [[pays, pays]]
    assert scores.terms["finished"].tolist() == [[float(ended)] * 2]


def test_the_gsm8k_recipes_pay_only_for_answers_that_end():
    assert "only_if: finished" in find_recipe("qwen2.5-0.5b-gsm8k").read_text()
