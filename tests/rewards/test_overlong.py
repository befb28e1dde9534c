import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

overlong = discover().get("overlong").function
adversarial = pytest.param


def score(num_tokens, **options):
    return overlong(Completion("", tuple(range(num_tokens)), finished=True), **options)


@pytest.mark.parametrize(
    "num_tokens, expected",  # DAPO, eq. 13, with L_max 100 and L_cache 20
    [(0, 0.0), (79, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_the_penalty_falls_in_a_line_over_the_buffer(num_tokens, expected):
    assert score(num_tokens, max_length=100, buffer=20) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options", [{}, {"max_length": 10}, {"max_length": 10, "buffer": 0}, {"max_length": 10, "buffer": 11}]
)
def test_lengths_that_make_no_sense_are_an_error(options):
    with pytest.raises(ValueError, match="overlong needs options max_length"):
        score(3, **options)


@pytest.mark.parametrize(
    "text, num_tokens, finished, expected",
    [
        adversarial("x" * 10_000, 80, True, 0.0, id="characters-are-not-tokens"),
        adversarial("", 100, True, -1.0, id="tokens-without-text"),
        adversarial("short", 90, False, -0.5, id="cut-off-counts-by-its-length-only"),
        adversarial("short", 90, True, -0.5, id="so-does-one-that-ended"),
        adversarial("", 0, True, 0.0, id="empty-gains-nothing"),
        adversarial("short", 1, True, 0.0, id="nor-does-a-very-short-one"),
        adversarial("long", 10**6, False, -1.0, id="never-below-minus-one"),
        adversarial("long", 100, True, -1.0, id="the-limit-itself-is-too-long"),
    ],
)
def test_what_counts_is_the_number_of_tokens(text, num_tokens, finished, expected):
    completion = Completion(text, tuple(range(num_tokens)), finished)
    assert overlong(completion, max_length=100, buffer=20) == pytest.approx(expected)


def test_the_buffer_may_be_the_whole_length():
    assert score(50, max_length=100, buffer=100) == pytest.approx(-0.5)
