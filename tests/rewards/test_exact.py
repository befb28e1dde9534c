import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

exact = discover().get("exact").function
adversarial = pytest.param


def score(text, answer="New York", **options):
    return exact(Completion(text, (1,), True), answer=answer, **options)


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("<answer>New York</answer>", {}, 1.0),
        ("<answer>Boston</answer>", {}, 0.0),
        (r"\boxed{\text{New York}}", {}, 1.0),
        ("New York", {"extract": "none"}, 1.0),
        adversarial("<answer>\nnew\n  york.\n</answer>", {}, 1.0, id="case-space-and-full-stop"),
        adversarial("<answer>new york</answer>", {"ignore_case": False}, 0.0, id="case-on-demand"),
        adversarial("<answer>New York City</answer>", {}, 0.0, id="longer"),
        adversarial("<answer>York New</answer>", {}, 0.0, id="words-exchanged"),
        adversarial("<answer>NewYork</answer>", {}, 0.0, id="no-space"),
        adversarial("<answer>New York or Boston</answer>", {}, 0.0, id="guesses"),
        adversarial("<answer>New York</answer><answer>New York</answer>", {}, 0.0, id="repeated"),
        adversarial("New York", {}, 0.0, id="no-place"),
        adversarial("It is New York", {"extract": "none"}, 0.0, id="more-than-the-answer"),
        adversarial("", {"extract": "none"}, 0.0, id="empty"),
        adversarial("<answer>New-York!</answer>", {}, 0.0, id="punctuation-counts"),
        adversarial("<answer>“New York”!</answer>", {"ignore_punctuation": True}, 1.0, id="unless-told-otherwise"),
        adversarial("I think New York 12", {"strict": False}, 0.0, id="lenient-finds-no-words-without-a-place"),
    ],
)
def test_exact(text, options, expected):
    assert score(text, **options) == expected


@pytest.mark.parametrize(
    "text, answer, options, expected",
    [
        ("#### NYC", ["New York", "NYC"], {}, 1.0),
        ("#### LA", ["New York", "NYC"], {}, 0.0),
        adversarial("#### 18.0", "18", {}, 0.0, id="a-number-is-a-text"),
        adversarial("#### 18", 18, {}, 1.0, id="gold-is-a-number"),
        adversarial("#### ?!", "?!", {"ignore_punctuation": True}, 1.0, id="nothing-but-punctuation"),
        adversarial("#### ...", "?!", {"ignore_punctuation": True}, 0.0, id="other-punctuation"),
        adversarial("#### Straße", "STRASSE", {}, 1.0, id="folded-case"),
    ],
)
def test_golds(text, answer, options, expected):
    assert score(text, answer, **options) == expected


def test_a_row_without_answer_does_not_apply():
    assert score("#### x", None) is None
