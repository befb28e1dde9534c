import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

overlong = discover().get("overlong").function


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
