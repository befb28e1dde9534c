import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

numeric = discover().get("numeric").function
adversarial = pytest.param


def score(text, answer="18", **options):
    return numeric(Completion(text, (1,), True), answer=answer, **options)


@pytest.mark.parametrize(
    "text, answer, options, expected",
    [
        ("#### 18", "18", {}, 1.0),
        ("#### 18.01", "18", {}, 0.0),
        ("#### 18.01", "18", {"tolerance": 0.01}, 1.0),
        ("#### 18.02", "18", {"tolerance": 0.01}, 0.0),
        ("#### 990", "1000", {"relative": 0.01}, 1.0),
        ("#### 989", "1000", {"relative": 0.01}, 0.0),
        ("#### -990", "-1000", {"relative": 0.01}, 1.0),
        ("#### 3.14", 3.14159, {"tolerance": 0.005}, 1.0),
        ("it is 18 then", "18", {"extract": "last"}, 1.0),
        adversarial("#### 0.3", 0.1 + 0.2, {}, 1.0, id="binary-fractions"),
        adversarial("#### 0.5", "0.2", {"tolerance": 0.3}, 1.0, id="the-bound-belongs-to-it"),
        adversarial("#### 1,080", "1080", {}, 1.0, id="thousands"),
        adversarial("#### 1,08", "108", {}, 0.0, id="bad-grouping"),
        adversarial("#### $18.00", "18", {}, 1.0, id="money"),
        adversarial("#### 18 eggs", "18", {}, 1.0, id="unit"),
        adversarial("#### -18", "18", {}, 0.0, id="sign"),
        adversarial("#### 18.0", "18", {"integer": True}, 1.0, id="whole-number-with-decimals"),
        adversarial("#### 18.4", "18", {"integer": True, "tolerance": 0.5}, 0.0, id="near-but-not-whole"),
        adversarial("#### 1 2 18", "18", {}, 0.0, id="many-numbers"),
        adversarial("#### 17-19", "18", {"tolerance": 1.0}, 0.0, id="a-range"),
        adversarial("#### 18 #### 18", "18", {}, 0.0, id="repeated"),
        adversarial("#### 9+9", "18", {}, 0.0, id="unevaluated"),
        adversarial("#### inf", "18", {"relative": 1e9}, 0.0, id="infinity"),
        adversarial("#### nan", "18", {"tolerance": 1e9}, 0.0, id="nan"),
        adversarial("#### 1e1", "10", {}, 0.0, id="programmers-notation"),
        adversarial("#### ²", "2", {}, 0.0, id="superscript"),
        adversarial("#### " + "9" * 5000, "18", {}, 0.0, id="endless"),
        adversarial("#### 0.00001", "0", {"relative": 0.1}, 0.0, id="relative-to-zero"),
        adversarial("", "18", {}, 0.0, id="empty"),
    ],
)
def test_numeric(text, answer, options, expected):
    assert score(text, answer, **options) == expected


def test_any_of_several_golds_will_do():
    assert score("#### 3", ["2", "3"]) == 1.0
    assert score("#### 4", ["2", "3"]) == 0.0


def test_a_row_without_answer_does_not_apply():
    assert score("#### 18", None) is None


@pytest.mark.parametrize(
    "answer, options, message",
    [("many", {}, "numbers in the column answer, got 'many'"), ("18", {"tolerance": -1.0}, "tolerances of 0 or more")],
)
def test_what_makes_no_sense_is_an_error_and_not_a_zero(answer, options, message):
    with pytest.raises(ValueError, match=message):
        score("#### 18", answer, **options)
