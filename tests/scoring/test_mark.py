import hashlib
from pathlib import Path
from typing import Literal

import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.scoring import reward
from grpo_lab.scoring.mark import is_marked, read_reward
from grpo_lab.types import Completion, Group


def test_the_mark_leaves_the_function_as_it_is():
    def short(completion):
        return -len(completion.text)

    assert not is_marked(short)
    assert reward(short) is short
    assert is_marked(short)


def test_keyword_only_without_default_is_a_column_and_with_default_an_option():
    def close(completion: Completion, *, answer: str, tolerance: float = 0.5, unit: Literal["m", "km"] = "m") -> float:
        """Near enough.

        More words.
        """
        return 0.0

    found = read_reward(close, name="close", source="x.py")
    assert (found.scope, found.columns) == ("completion", ("answer",))
    assert found.describe() == {
        "name": "close",
        "scope": "completion",
        "options": {
            "tolerance": {"type": "float", "default": 0.5},
            "unit": {"type": "Literal['m', 'km']", "default": "m"},
        },
        "columns": ["answer"],
        "doc": "Near enough.",
        "source": "x.py",
    }


def test_the_hash_is_that_of_the_source_file():
    def nothing(group: Group):
        return [0.0]

    found = read_reward(nothing, name="nothing", source="x.py")
    assert found.scope == "group"
    assert found.path == Path(__file__)
    assert found.sha256 == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_in_the_batched_scope_every_other_name_is_a_column():
    def judged(completions, solution, *, difficulty, log_extra=None, delimiters=None, **kwargs):
        return [0.0] * len(completions)

    found = read_reward(judged, name="judged", source="x.py")
    assert (found.scope, found.columns, found.options) == ("completions", ("solution", "difficulty"), {})
    assert found.takes_all_columns


def test_a_batched_reward_may_look_at_the_ids_alone():
    def overlong(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    assert read_reward(overlong, name="overlong", source="x.py").scope == "completions"


def test_a_callable_object_is_a_batched_reward():
    class Overlong:
        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    assert read_reward(Overlong(), name="overlong", source="x.py").scope == "completions"


def test_annotations_written_as_text_are_read():
    def close(completion, *, tolerance: "float" = 0.5):
        return 0.0

    assert read_reward(close, name="close", source="x.py").options["tolerance"] == (float, 0.5)


def _no_scope(text):
    return 0.0


def _two_scopes(completion, group):
    return 0.0


def _positional(completion, answer):
    return 0.0


def _rest(completion, **rest):
    return 0.0


def _trainer(completions, trainer_state):
    return [0.0]


def _unreadable(completion, *, tolerance: "Tolerance" = 1):  # noqa: F821
    return 0.0


async def _async(completion):
    return 0.0


@pytest.mark.parametrize(
    "function, message",
    [
        (_no_scope, "takes none of completion, group, completions; name exactly one parameter after what it scores"),
        (_two_scopes, "takes completion and group; name exactly one parameter after what it scores"),
        (_positional, '"answer" must be keyword-only: put a * after completion'),
        (_rest, '"**rest" must be keyword-only: put a * after completion'),
        (_trainer, 'needs "trainer_state", which only TRL\'s trainer has; give it a default'),
        (_unreadable, "an annotation cannot be read: name 'Tolerance' is not defined"),
        (_async, 'is async; only a reward over "completions" can be'),
        (3, "is not a Python function with a source file: 3 is not a callable object"),
    ],
)
def test_a_signature_outside_the_contract_is_refused(function, message):
    with pytest.raises(RecipeError) as error:
        read_reward(function, name="x", source="x.py")
    assert str(error.value) == f'reward "x" (x.py): {message}'
