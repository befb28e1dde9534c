import time

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion

reasoning_steps = discover().get("reasoning_steps").function
adversarial = pytest.param


def score(text, **options):
    return reasoning_steps(Completion(text, (1,), True), **options)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Step 1: add the tens\nStep 2: add the ones\nStep 3: add both sums", 1.0),
        ("1. add the tens\n2. add the ones\n3) add both sums\n4. say the result", 1.0),
        ("- add the tens\n* add the ones\n\u2022 add both sums", 1.0),
        ("First, add the tens.\nThen, add the ones.\nFinally, add both sums.", 1.0),
        ("**Step 1:** add the tens\n  2. add the ones", 2 / 3),
        adversarial("Step 1: Step 2: Step 3:", 0.0, id="labels-only"),
        adversarial("Step 1:\nStep 2:\nStep 3:", 0.0, id="empty-steps"),
        adversarial("1. go\n2. go\n3. go", 0.0, id="too-short-to-say-anything"),
        adversarial("1. add the tens\n2. add the tens\n3. Add the tens!", 1 / 3, id="the-same-step-again"),
        adversarial("First, second, third, and finally nothing", 1 / 3, id="all-in-one-line"),
        adversarial("The 1. thing and step 2 of it, first, then, finally", 0.0, id="within-a-line"),
        adversarial("12.5 is the sum of both", 0.0, id="a-decimal"),
        adversarial("-5 is the sum of both", 0.0, id="a-negative-number"),
        adversarial("Stepping 1 further we see more", 0.0, id="a-word-that-begins-so"),
        adversarial("\n".join(f"{n}. this is step {n}" for n in range(9)), 0.0, id="steps-that-say-which-they-are"),
        adversarial("", 0.0, id="empty"),
        adversarial("\n".join(f"{n}. this makes {n} apples" for n in range(1, 100)), 1.0, id="no-more-than-one"),
    ],
)
def test_steps(text, expected):
    assert score(text) == pytest.approx(expected)


def test_only_within_the_tag():
    text = "<think>1. add the tens\n2. add the ones</think>\n3. tell the world about it"
    assert score(text, within="think", target=2) == 1.0
    assert score(text, within="think") == pytest.approx(2 / 3)
    assert score(text, within="reasoning") == 0.0


def test_a_target_below_one_is_an_error():
    with pytest.raises(ValueError, match="target of at least 1"):
        score("1. add the tens", target=0)


@pytest.mark.parametrize("piece", ["1. ", "\n", " ", "- \n", "Step ", "*", "\t"])
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    start = time.monotonic()
    score(piece * (300_000 // len(piece)))
    assert time.monotonic() - start < 5
