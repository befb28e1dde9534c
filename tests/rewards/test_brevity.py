import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion, Example, Group

brevity = discover().get("brevity").function
adversarial = pytest.param


def score(*answers, answer="12", **options):
    """Each answer is (text, number of tokens)."""
    group = Group(
        Example("e", "p", (1,), {}), tuple(Completion(text, tuple(range(size)), True) for text, size in answers)
    )
    return brevity(group, answer=answer, **options)


R, W = "#### 12", "#### 13"


@pytest.mark.parametrize(
    "answers, expected",
    [
        ([(R, 10), (R, 20), (R, 30)], [1.0, 0.5, 0.0]),
        ([(R, 10), (W, 20), (R, 30)], [1.0, 0.0, 0.0]),
        adversarial([(W, 1), (R, 10), (R, 30)], [0.0, 1.0, 0.0], id="a-short-wrong-answer-gains-nothing"),
        adversarial([(W, 1), (R, 10), (R, 20), (R, 30)], [0.0, 1.0, 0.5, 0.0], id="nor-does-it-move-the-scale"),
        adversarial([(W, 500), (R, 10), (R, 20), (R, 30)], [0.0, 1.0, 0.5, 0.0], id="nor-does-a-long-one"),
        adversarial([(W, 1), (W, 2)], [0.0, 0.0], id="none-is-right"),
        adversarial([(R, 30), (W, 1)], [1.0, 0.0], id="one-is-right"),
        adversarial([(R, 30), (R, 30)], [1.0, 1.0], id="one-length"),
        adversarial([(R, 30)], [1.0], id="a-group-of-one"),
        adversarial([("", 0), (R, 10)], [0.0, 1.0], id="empty-is-not-the-shortest"),
        adversarial([("12", 1), (R, 10)], [0.0, 1.0], id="no-place"),
        adversarial([("#### 12 #### 12", 5), (R, 10)], [0.0, 1.0], id="answer-repeated"),
        adversarial([(R + " " * 900, 10), (R, 20)], [1.0, 0.0], id="characters-are-not-tokens"),
    ],
)
def test_brevity(answers, expected):
    assert score(*answers) == expected


def test_characters_on_demand():
    assert score((R + "  ", 1), (R, 2), unit="characters") == [0.0, 1.0]


def test_the_order_of_siblings_changes_nothing():
    answers = [(R, 10), (W, 5), (R, 17), (R, 30)]
    forward = score(*answers)
    assert score(*answers[::-1]) == forward[::-1]


def test_no_gold_does_not_apply_to_any_sibling():
    assert score((R, 1), (W, 2), answer=None) == [None, None]


def test_lenient_answers_count_on_demand():
    assert score(("it is 12", 5), ("it is 13", 6), strict=False) == [1.0, 0.0]
