"""What a model writes is never trusted to be short: every reward reads very long texts in linear time."""

import time

import pytest

from grpo_lab.scoring import discover
from grpo_lab.types import Completion, Example, Group

REWARDS = {
    "accuracy": {"answer": "12"},
    "arithmetic": {"expression": "3 * 4"},
    "choice": {"answer": "B"},
    "cosine": {"answer": "12", "max_length": 100},
    "countdown": {"nums": [3, 4], "target": 12},
    "exact": {"answer": "New York"},
    "language": {"language": "en"},
    "numeric": {"answer": "12"},
    "reasoning_steps": {},
    "repetition": {"unit": "characters"},
}
PIECES = [
    "b) ",
    "B, ",
    "(",
    "1 ",
    "1,",
    "a",
    "x=",
    r"\text{",
    r"\boxed{",
    " ",
    "\n",
    "answer is ",
    "or ",
    "é.",
    "</think>",
]


@pytest.mark.parametrize("name", REWARDS)
def test_a_long_text_in_a_place_or_without_one(name):
    function = discover().get(name).function
    options = [REWARDS[name]] + [{**REWARDS[name], "strict": False}] * ("strict" in discover().get(name).options)
    start = time.process_time()
    for piece in PIECES:
        content = piece * (50_000 // len(piece))
        for text in (f"<answer>{content}</answer>", f"#### {content}", content):
            for each in options:
                function(Completion(text, (1,) * 9, True), **each)
    assert time.process_time() - start < 8  # 45 texts; one quadratic step takes longer


def test_brevity_over_long_texts():
    group = Group(
        Example("e", "p", (1,), {}), tuple(Completion("#### " + "1 " * 100_000, (1,), True) for _ in range(8))
    )
    start = time.process_time()
    assert discover().get("brevity").function(group, answer="12") == [0.0] * 8
    assert time.process_time() - start < 5
