import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

choice = discover().get("choice").function
adversarial = pytest.param


def score(text, answer="B", **options):
    return choice(Completion(text, (1,), True), answer=answer, **options)


@pytest.mark.parametrize(
    "said",
    [
        "B",
        "b",
        "(B)",
        "( B )",
        "B)",
        "B.",
        "**B**",
        "**B)**",
        r"\text{B}",
        r"\text{(B)}",
        "B) 12 km",
        "B: 12",
        "Option B",
    ]
    + [
        "(B) 12",
        "The answer is B",
        "Answer: (B)",
        "B) (a + b)(a - b)",
        "B) When C covers 960 m, D covers 936 m.",
        "B) B) 3",
    ],
)
def test_ways_to_say_b(said):
    assert score(f"<answer>{said}</answer>") == 1.0
    assert score(f"<answer>{said}</answer>", "C") == 0.0


@pytest.mark.parametrize(
    "text, expected",
    [
        adversarial("<answer>C</answer>", 0.0, id="wrong"),
        adversarial("<answer>A or B</answer>", 0.0, id="two-letters"),
        adversarial("<answer>B or A</answer>", 0.0, id="two-letters-right-one-first"),
        adversarial("<answer>B) or C)</answer>", 0.0, id="two-choices"),
        adversarial("<answer>B, C</answer>", 0.0, id="a-list"),
        adversarial("<answer>A B C D E</answer>", 0.0, id="all"),
        adversarial("<answer>A) B) C) D) E)</answer>", 0.0, id="all-with-brackets"),
        adversarial("<answer>B) (C)</answer>", 0.0, id="another-in-brackets"),
        adversarial("<answer>b) c)</answer>", 0.0, id="two-small-letters"),
        adversarial("<answer>BC</answer>", 0.0, id="run-together"),
        adversarial("<answer>Because</answer>", 0.0, id="a-word"),
        adversarial("<answer>B is not right</answer>", 0.0, id="a-sentence"),
        adversarial("<answer>not B</answer>", 0.0, id="denied"),
        adversarial("<answer>F</answer>", 0.0, id="no-such-choice"),
        adversarial("<answer>12</answer>", 0.0, id="a-number"),
        adversarial("<answer></answer>", 0.0, id="nothing"),
        adversarial("B", 0.0, id="no-place"),
        adversarial("<answer>A</answer><answer>B</answer>", 0.0, id="two-places"),
        adversarial("<think>A?</think><answer>B</answer>", 1.0, id="thought-of-another"),
    ],
)
def test_no_choice(text, expected):
    assert score(text) == expected


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("So the answer is B.", "B", 1.0),
        ("The correct option: **B**", "B", 1.0),
        ("I take (B), since it fits", "B", 1.0),
        ("The answer is A. No, the answer is B.", "B", 1.0),
        adversarial("The answer is A. No, the answer is B.", "A", 0.0, id="the-last-counts"),
        adversarial("A man walks", "A", 0.0, id="an-article"),
        adversarial("the answer is a number", "A", 0.0, id="a-small-article"),
        adversarial("the answer is Apple", "A", 0.0, id="a-word"),
        adversarial("no idea", "B", 0.0, id="nothing-said"),
    ],
)
def test_lenient(text, answer, expected):
    assert score(text, answer, strict=False) == expected
    assert score(text, answer) == 0.0


def test_other_letters_and_several_golds():
    assert score("#### H", "H", letters="FGHJ") == 1.0
    assert score("#### C", ["A", "C"]) == 1.0
    assert score("#### B", ["A", "C"]) == 0.0


def test_a_row_without_answer_does_not_apply():
    assert score("#### B", None) is None


@pytest.mark.parametrize("answer", ["12", "F", "A or B"])
def test_a_gold_that_is_no_letter_is_an_error_and_not_a_zero(answer):
    with pytest.raises(ValueError, match="choice needs one of the letters ABCDE"):
        score("#### B", answer)
