"""The code reward on answers in the forms models give; what hostile programs try is in tests/sandbox."""

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

HEAD = (
    'import math\n\ndef half(x):\n    return x / 2\n\ndef root(x: float) -> float:\n    """Half the square root."""\n'
)
TEST = "def check(candidate):\n    assert candidate(4.0) == half(2.0)\n    assert candidate(9.0) == 1.5\n"
OPTIONS = {"allow_code_execution": True, "minimum_isolation": "limits-only", "setup": "prompt", "cpu_seconds": 1}
FULL = "def root(x):\n    return math.sqrt(x) / 2\n"


def adversarial(text, worth):
    """An answer that a reward for programs could pay by mistake."""
    return text, worth


ANSWERS = {
    "the body": ("    return half(math.sqrt(x))\n", 1.0),
    "the whole function": (FULL, 1.0),
    "a fenced block": (f"Here it is:\n```python\n{FULL}```\nDone.", 1.0),
    "fenced without a language": (f"```\n{FULL}```", 1.0),
    "the last of two blocks": (f"```python\ndef root(x): return 0\n```\nNo, better:\n```python\n{FULL}```", 1.0),
    "a block that is not closed": adversarial(f"```python\n{FULL}", 0.0),
    "a wrong body": adversarial("    return 1.0\n", 0.0),
    "the last block is wrong": adversarial(f"```python\n{FULL}```\n```python\ndef root(x): return 0\n```", 0.0),
    "right once": adversarial("    return 1.0 if x == 4.0 else 0.0\n", 0.0),
    "empty": adversarial("", 0.0),
    "words": adversarial("I cannot do that.", 0.0),
    "another name": adversarial("    pass\n\ndef roots(x):\n    return math.sqrt(x) / 2\n", 0.0),
    "its own helper": adversarial("    return 7\n\ndef half(x):\n    return 7\n\ndef root(x):\n    return 7\n", 0.0),
    "its own check": adversarial("    return 7\n\ndef check(candidate): pass\n", 0.0),
    "leaves": adversarial("    raise SystemExit(0)\n", 0.0),
    "equal to everything": adversarial(
        "    return type('T', (float,), {'__eq__': lambda a, b: True, '__hash__': float.__hash__})(7.0)\n", 0.0
    ),
    "text for a number": adversarial("    return str(math.sqrt(x) / 2)\n", 0.0),
    "loops": adversarial("    while True: pass\n", 0.0),
    "NUL and a lone surrogate": adversarial("    return '\0\ud800'\n", 0.0),
}  # fmt: skip


def scores(texts, **options):
    example = Example("e", HEAD, (1,), {"prompt": HEAD, "test": TEST, "entry_point": "root"})
    group = Group(example, tuple(Completion(text, (1,), True) for text in texts))
    return bind([RewardTerm(name="code", options={**OPTIONS, **options})], discover()).score([group])


def test_answers_are_worth_what_their_programs_do():
    found = scores([text for text, _ in ANSWERS.values()])
    assert dict(zip(ANSWERS, found.total[0].tolist(), strict=True)) == {
        name: worth for name, (_, worth) in ANSWERS.items()
    }
    assert found.reasons == {}


def test_it_is_refused_unless_the_recipe_allows_it():
    with pytest.raises(RecipeError, match=r"say so with options: \{allow_code_execution: true\}"):
        scores(["    return 1.0\n"], allow_code_execution=False)
