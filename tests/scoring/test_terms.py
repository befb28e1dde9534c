import pytest

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover, problems

TYPED = """
from typing import Literal
from grpo_lab.scoring import reward

@reward
def typed(completion, *, size: int = 1, share: float = 0.5, on: bool = False, names: tuple[str, ...] = (),
          unit: Literal["m", "km"] = "m", any_kind=None):
    return 0.0

@reward
def batched(completions, solution, **kwargs):
    return [0.0]

@reward
def plain(completion):
    return 0.0
"""


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    return discover([tmp_path / "typed.py"])


def term(name, **values):
    return RewardTerm(name=name, **values)


def test_a_good_recipe_has_no_problems(registry):
    terms = [
        term("accuracy", weight=2.0, options={"extract": "hash"}),
        term("length", only_if="accuracy", options={"target": 20, "scale": 5}),
        term("typed", options={"names": ["a", "b"], "share": 1, "any_kind": {"a": [1]}}),
    ]
    assert problems(terms, registry, ["question", "answer"]) == []
    bound = bind(terms, registry).terms
    assert [each.label for each in bound] == ["accuracy", "length", "typed"]
    assert bound[1].options == {"target": 20, "scale": 5.0}
    assert bound[2].options == {"names": ("a", "b"), "share": 1.0, "any_kind": {"a": [1]}}


def test_every_problem_is_found_with_its_place(registry):
    terms = [
        term("accuracy", options={"exract": "hash", "strict": "yes"}),
        term("lenght"),
        term("typed", options={"size": "3", "on": 1, "names": ["a", 2], "unit": "mile"}),
        term("batched", options={"solution": "x"}),
        term("plain", options={"size": 1}),
    ]
    assert problems(terms, registry, ["solution", "question"]) == [
        ((0, "options", "exract"), 'unknown option "exract"; did you mean "extract"?'),
        ((0, "options", "strict"), 'input should be a valid boolean, got "yes"'),
        ((0,), '"accuracy" needs a dataset column "answer"; the data has: question, solution'),
        ((1, "name"), 'unknown reward "lenght"; did you mean "length"?'),
        ((2, "options", "size"), 'input should be a valid integer, got "3"'),
        ((2, "options", "on"), "input should be a valid boolean, got 1"),
        ((2, "options", "names", 1), "input should be a valid string, got 2"),
        ((2, "options", "unit"), "input should be 'm' or 'km', got \"mile\""),
        (
            (3, "options", "solution"),
            'unknown option "solution"; "batched" takes no options: every parameter of a batched reward is a column',
        ),
        ((4, "options", "size"), 'unknown option "size"; "plain" takes no options'),
    ]


def test_a_boolean_is_no_integer(registry):
    assert problems([term("typed", options={"size": True})], registry, []) == [
        ((0, "options", "size"), "input should be a valid integer, got true")
    ]


def test_a_batched_reward_needs_its_columns(registry):
    assert problems([term("batched")], registry, []) == [
        ((0,), '"batched" needs a dataset column "solution"; the data has: none')
    ]


def test_gates_in_a_circle_are_a_problem(registry):
    terms = [term("plain", only_if="typed"), term("typed", only_if="plain")]
    assert problems(terms, registry, []) == [((0, "only_if"), "terms gate each other: plain <- typed <- plain")]


def test_an_unknown_gate_is_a_problem(registry):
    terms = [term("plain", only_if="acuracy"), term("accuracy")]
    assert problems(terms, registry, ["answer"]) == [
        ((0, "only_if"), 'unknown term "acuracy"; did you mean "accuracy"?')
    ]


def test_a_weight_that_is_no_number_is_a_problem(registry):
    assert problems([term("plain", weight=float("nan"))], registry, []) == [
        ((0, "weight"), "should be a finite number, got nan")
    ]


def test_bind_raises_all_problems_at_once(registry):
    with pytest.raises(RecipeError) as error:
        bind([term("lenght"), term("typed", options={"size": "3"})], registry)
    assert error.value.problems == [
        'rewards[0].name: unknown reward "lenght"; did you mean "length"?',
        'rewards[1].options.size: input should be a valid integer, got "3"',
    ]
