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
        ("abc", 150, {"goal": "shorter"}, -0.5),
        ("abc", 50, {"goal": "longer"}, -0.5),
        adversarial("abc", 99, {"goal": "shorter"}, 0.0, id="nothing-gained-below-the-target"),
        adversarial("", 0, {"goal": "shorter"}, 0.0, id="empty-gains-nothing-by-it"),
        adversarial("abc", 9999, {"goal": "longer"}, 0.0, id="nothing-gained-by-going-on"),
        adversarial("abc", 7, {"goal": "shorter", "target": 0, "scale": 10.0}, -0.7, id="every-token-charged"),
        adversarial("x" * 400, 10, {"goal": "longer", "target": 40}, -0.75, id="characters-do-not-help"),
        adversarial("abc", 3, {"target": 0, "scale": 1.0}, -3.0, id="shortest-wins"),
    ],
)
def test_length(text, num_tokens, options, expected):
    assert score(text, num_tokens, **options) == expected


def test_a_target_of_nothing_needs_a_scale():
    with pytest.raises(ValueError) as error:
        score("abc", 3, target=0)
    assert str(error.value) == "length needs a scale above 0 (the target, if scale is not given), got 0"
