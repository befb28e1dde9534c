import hashlib
import math
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

        More words. How far `tolerance` may be. And others.

        Args:
            unit: Of the number,
                in either system.
        """
        return 0.0

    found = read_reward(close, name="close", source="x.py")
    assert (found.scope, found.columns) == ("completion", ("answer",))
    assert found.describe() == {
        "name": "close",
        "scope": "completion",
        "options": {
            "tolerance": {"type": "float", "default": 0.5, "doc": "How far `tolerance` may be."},
            "unit": {"type": "Literal['m', 'km']", "default": "m", "doc": "Of the number, in either system."},
        },
        "columns": ["answer"],
        "doc": "Near enough.",
        "manual": "Near enough.\n\nMore words. How far `tolerance` may be. And others.",
        "range": None,
        "state": "none",
        "source": "x.py",
        "version": found.sha256[:12],
        "sha256": found.sha256,
    }


def test_the_hash_is_that_of_the_source_file():
    def nothing(group: Group):
        return [0.0]

    found = read_reward(nothing, name="nothing", source="x.py")
    assert found.scope == "group"
    assert found.path == Path(__file__)
    assert found.sha256 == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_a_mark_may_say_the_range():
    @reward(range=(-1, math.inf))
    def above(completion):
        return 1.0

    found = read_reward(above, name="above", source="x.py")
    assert (found.range, found.describe()["range"]) == ((-1, math.inf), [-1, None])
    with pytest.raises(ValueError, match="lowest, highest"):
        reward(range=(1, 0))(above)


def test_an_object_is_marked_as_it_is_made_and_its_class_is_not():
    class Novelty:
        def __call__(self, completion):
            return 1.0

    novelty = reward(Novelty())
    assert is_marked(novelty)
    assert not is_marked(Novelty())
    assert read_reward(novelty, name="novelty", source="x.py").describe()["state"] == "lost"
    with pytest.raises(TypeError, match=r"novelty = reward\(Novelty\(\)\)"):
        reward(Novelty)


def test_what_trl_passes_beside_columns_is_no_column():
    def logs(completions, answer, log_extra, log_metric, trainer_state):
        return [0.0]

    assert read_reward(logs, name="logs", source="x.py").columns == ("answer",)


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


def _trainer(completions, environments):
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
        (_trainer, 'needs "environments", which only TRL\'s trainer has; give it a default'),
        (_unreadable, "an annotation cannot be read: name 'Tolerance' is not defined"),
        (_async, 'is async; only a reward over "completions" can be'),
        (3, "is not a Python function with a source file: 3 is not a callable object"),
    ],
)
def test_a_signature_outside_the_contract_is_refused(function, message):
    with pytest.raises(RecipeError) as error:
        read_reward(function, name="x", source="x.py")
    assert str(error.value) == f'reward "x" (x.py): {message}'
