import math

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

cosine = discover().get("cosine").function
adversarial = pytest.param


def score(text, num_tokens, answer="12", **options):
    return cosine(Completion(text, tuple(range(num_tokens)), True), answer=answer, **{"max_length": 100, **options})


@pytest.mark.parametrize(
    "text, num_tokens, expected",
    [
        ("#### 12", 0, 1.0),
        ("#### 12", 50, 0.75),  # cos(pi / 2) = 0: half-way between 1 and .5
        ("#### 12", 25, 0.5 + 0.25 * (1 + math.sqrt(0.5))),  # .9268
        ("#### 12", 100, 0.5),
        ("#### 13", 0, -1.0),
        ("#### 13", 50, -0.75),
        ("#### 13", 100, -0.5),
        adversarial("#### 12", 150, 0.5, id="the-cosine-does-not-turn-round-beyond-the-maximum"),
        adversarial("#### 12", 200, 0.5, id="nor-come-back-to-its-start"),
        adversarial("#### 13", 10_000, -0.5, id="nor-pay-for-endless-wrong-answers"),
        adversarial("", 0, -1.0, id="empty"),
        adversarial("12", 0, -1.0, id="no-place"),
        adversarial("#### 12 #### 12", 0, -1.0, id="answer-repeated"),
        adversarial("#### 11, 12, 13", 0, -1.0, id="guesses"),
        adversarial("#### 12" + " " * 5000, 0, 1.0, id="characters-are-not-tokens"),
        adversarial("<think>\\boxed{12}</think>", 0, -1.0, id="only-thought-of"),
    ],
)
def test_cosine(text, num_tokens, expected):
    assert score(text, num_tokens) == pytest.approx(expected)


def test_a_right_answer_is_always_worth_more_than_a_wrong_one():
    worst = min(score("#### 12", n) for n in range(0, 220, 7))
    assert worst > max(score("#### 13", n) for n in range(0, 220, 7))


def test_right_answers_lose_and_wrong_ones_gain_with_length():
    right, wrong = ([score(text, n) for n in range(101)] for text in ("#### 12", "#### 13"))
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)


@pytest.mark.parametrize("text", ["#### 12", "#### 13"])
def test_what_exceeds_the_length_gets_its_own_value(text):
    assert score(text, 99, exceeded=-10.0) > -1.01
    assert score(text, 100, exceeded=-10.0) == -10.0


def test_values_can_be_those_of_the_paper():
    assert score("#### 12", 0, right=(2.0, 1.0)) == 2.0
    assert score("#### 13", 0, wrong=(-10.0, 0.0)) == -10.0


def test_no_gold_does_not_apply_and_an_unusable_one_is_an_error_at_any_length():
    assert score("#### 12", 3, answer=None) is None
    with pytest.raises(ValueError, match="holds no answer"):
        score("#### 12", 500, answer="", exceeded=-1.0)


@pytest.mark.parametrize("max_length", [None, 0, -5])
def test_it_needs_a_maximum(max_length):
    with pytest.raises(ValueError, match="cosine needs max_length above 0"):
        score("#### 12", 3, max_length=max_length)
