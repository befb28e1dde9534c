import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

length = discover().get("length").function
adversarial = pytest.param


def score(text, num_tokens, **options):
    return length(Completion(text, tuple(range(num_tokens)), finished=True), **options)


@pytest.mark.parametrize(
    "text, num_tokens, options, expected",
    [
        ("abc", 100, {}, 0.0),
        ("abc", 50, {}, -0.5),
        ("abc", 200, {}, -1.0),
        ("abc", 10, {"target": 20, "scale": 5.0}, -2.0),
        ("abcd", 100, {"target": 8, "unit": "characters"}, -0.5),
        adversarial("x" * 1000, 100, {}, 0.0, id="characters-are-not-tokens"),
        adversarial("", 0, {}, -1.0, id="empty"),
        adversarial("", 1, {"target": 1}, 0.0, id="only-the-end-token"),
        adversarial("né€", 9, {"target": 3, "unit": "characters"}, 0.0, id="characters-are-not-bytes"),
        adversarial("abc", 400, {}, -3.0, id="no-floor"),
        adversarial("abc", 3, {"target": 0, "scale": 1.0}, -3.0, id="shortest-wins"),
    ],
)
def test_length(text, num_tokens, options, expected):
    assert score(text, num_tokens, **options) == expected


def test_a_target_of_nothing_needs_a_scale():
    with pytest.raises(ValueError) as error:
        score("abc", 3, target=0)
    assert str(error.value) == "length needs a scale above 0 (the target, if scale is not given), got 0"
