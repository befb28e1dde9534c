import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

repetition = discover().get("repetition").function
adversarial = pytest.param


def score(text, ids=(), **options):
    return repetition(Completion(text, tuple(ids), True), **options)


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("a b c d", {"n": 2}, 0.0),
        ("a b a b", {"n": 2}, -1 / 3),  # ab, ba, ab: one of three came before
        ("a a a a a", {"n": 2}, -3 / 4),
        ("a a a a a", {"n": 1}, -4 / 5),
        adversarial("", {}, 0.0, id="empty"),
        adversarial("a", {}, 0.0, id="shorter-than-n"),
        adversarial("a b c", {"n": 4}, 0.0, id="one-short-of-n"),
        adversarial("A a A a A", {"n": 2}, -3 / 4, id="capitals-do-not-hide-it"),
        adversarial("a\na\n\na a\ta", {"n": 2}, -3 / 4, id="line-breaks-do-not-hide-it"),
        adversarial("so 1 so 2 so 3 so 4", {"n": 1}, -3 / 8, id="a-frame-with-changing-numbers"),
        adversarial("12" * 300, {"n": 4}, 0.0, id="without-spaces-words-see-nothing"),
        adversarial("x " * 5000, {"n": 4}, -4996 / 4997, id="a-loop-nearly-minus-one"),
    ],
)
def test_words(text, options, expected):
    assert score(text, unit="words", **options) == pytest.approx(expected)


@pytest.mark.parametrize(
    "ids, expected",
    [
        ((1, 2, 3, 4, 5), 0.0),
        ((1, 2) * 4, -3 / 5),  # five 4-grams, two different
        adversarial((7,) * 500, -496 / 497, id="a-loop-without-spaces"),
        adversarial((), 0.0, id="no-tokens"),
    ],
)
def test_tokens(ids, expected):
    assert score("however it looks " * 9, ids) == pytest.approx(expected)


def test_characters():
    assert score("哈哈哈哈哈", n=2, unit="characters") == pytest.approx(-3 / 4)


def test_a_free_share_costs_nothing_and_a_loop_still_costs_all():
    assert score("a b a b", n=2, unit="words", free=0.4) == 0.0
    assert score("a a a a a", n=2, unit="words", free=0.5) == pytest.approx(-0.5)
    assert score("x " * 5000, unit="words", free=0.5) == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("options", [{"n": 0}, {"free": 1.0}, {"free": -0.1}])
def test_options_that_make_no_sense_are_an_error(options):
    with pytest.raises(ValueError, match="repetition needs n of at least 1"):
        score("a b", **options)
