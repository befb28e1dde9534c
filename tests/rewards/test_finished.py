import pytest

from grpo_lab.bundled import find_recipe
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

EXAMPLE = Example("a", "1+2=", (1,), {"answer": "3"})


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
