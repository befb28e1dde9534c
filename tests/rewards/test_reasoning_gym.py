import time

import pytest

from grpo_lab.data.sources import load_rows
from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import Data, RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

factory = pytest.importorskip("reasoning_gym.factory")
from pathlib import Path  # noqa: E402

reward = discover().get("reasoning_gym").function
SAFE, REFUSED = reward.__globals__["SAFE"], reward.__globals__["REFUSED"]
adversarial = pytest.param


def rows(name, size=2, **options):
    data = Data(source="reasoning_gym", path=name, prompt="prompt", options={"size": size, **options})
    return list(load_rows(data, root=Path("."), seed=0))


def score(text, row, **options):
    completion = Completion(text, (1, 2, 3), finished=True)
    return reward(completion, answer=row["answer"], metadata=row["metadata"], **{"extract": "none", **options})


def test_every_set_of_the_package_is_either_safe_or_refused_with_a_reason():
    assert set(factory.DATASETS) == SAFE | set(REFUSED)
    assert not SAFE & set(REFUSED)


HOSTILE = [
    "__import__('os').abort()",
    "9**9**9**9",
    "1e999999999",
    "(" * 500,
    "[" * 500,
    "9" * 5000,
    "[[[1]]]",
    '{"a": {}}',
    "\x00\u202e\ud83d",
    "nan",
    "-inf",
    "1/0",
    "²",
    "?",
    "word " * 50,
]


@pytest.mark.parametrize("name", sorted(SAFE))
def test_golds_score_1_and_hostile_answers_end_at_once_and_do_not(name):
    first, second = rows(name)
    for row in (first, second):
        assert score(row["answer"], row) == 1.0
        assert score(f"<think>?</think><answer>{row['answer']}</answer>", row, extract="xml") == 1.0
    started = time.perf_counter()
    for text in HOSTILE:
        for exact in (True, False):
            found = score(text, first, exact=exact)
            assert 0.0 <= found <= 1.0
            assert found == score(text, first, exact=exact)  # no call leaves a trace
            assert found < 1, text
    assert score("", first) == 0.0
    assert time.perf_counter() - started < 3


NINE = [
    "countdown",
    "puzzle24",
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
    "string_insertion",
    "spiral_matrix",
    "binary_matrix",
    "n_queens",
]


@pytest.mark.parametrize("name", NINE)
def test_scorers_that_execute_model_text_are_refused(name, tmp_path):
    proof = tmp_path / "ran"
    with pytest.raises(ValueError, match=f'"{name}" is refused: its scorer executes what the model writes'):
        score(f"open({str(proof)!r}, 'w')", {"answer": "1", "metadata": {"source_dataset": name}})
    assert not proof.exists()


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"source_dataset": "coin_flip"}, "hangs on 1e999999999"),
        ({"source_dataset": "game_of_life_halting"}, "takes any text for an answer"),
        ({"source_dataset": "rush_hour"}, "does not give its own answers 1"),
        ({"source_dataset": "brand_new"}, '"brand_new" is refused: nobody has read its scorer yet'),
        ({}, '"None" is refused'),
    ],
)
def test_other_sets_are_refused_with_their_reason(metadata, message):
    with pytest.raises(ValueError) as error:
        score("1", {"answer": "1", "metadata": metadata})
    assert message in str(error.value)


SUM = {"question": "2 + 3", "answer": "5", "metadata": {"source_dataset": "chain_sum"}}


@pytest.mark.parametrize(
    "text, exact, expected",
    [
        ("5", True, 1.0),
        ("5", False, 1.0),
        ("6", False, 0.0),
        adversarial("it is 5 ok", True, 0.0, id="exact-gives-nothing-for-a-sentence"),
        adversarial("it is 5 ok", False, 0.1, id="the-sets-own-partial-credit"),
        adversarial("1 2 3 4 5 6 7 8 9", True, 0.0, id="every-number"),
        adversarial("5" + " " * 200, True, 0.0, id="padded"),
        adversarial("5\x00", True, 0.0, id="control-character"),
        adversarial("", False, 0.0, id="empty"),
        adversarial("5 5", True, 0.0, id="said-twice"),
        adversarial("-5", True, 0.0, id="another-sign"),
        adversarial("2 + 3", True, 0.0, id="handed-back-unsolved"),
        adversarial("5\n6", True, 0.0, id="two-lines"),
        adversarial("\uff15", True, 1.0, id="full-width-digits-are-digits-to-the-scorer"),
    ],
)
def test_exact_or_partial(text, exact, expected):
    assert score(text, SUM, exact=exact) == pytest.approx(expected)


def test_an_answer_the_scorer_cannot_read_is_wrong_and_not_an_error():
    [row, _] = rows("prime_factorization")
    assert score("two times three", row) == 0.0  # int() of a word raises in the scorer


def test_a_scorer_that_fails_on_its_own_answer_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="does not give 1 to its own answer 'two'"):
        score("3", {"answer": "two", "metadata": {"source_dataset": "decimal_chain_sum"}})


def test_not_a_number_equals_nothing():
    [row, _] = rows("complex_arithmetic")  # its distance to nan counts as none
    assert score("nan", row, exact=False) == 0.0


def test_the_answers_place():
    assert score("<answer>5</answer>", SUM, extract="xml") == 1.0
    assert score("5", SUM, extract="xml") == 0.0
    assert score("#### 5", SUM, extract="hash") == 1.0
    assert score(r"\boxed{5}", SUM, extract="boxed") == 1.0


def test_a_scorer_may_need_the_sets_configuration():
    row = {"answer": "0.12", "metadata": {"source_dataset": "decimal_arithmetic"}}
    assert score("0.1249", row, config={"max_num_decimal_places": 2, "min_num_decimal_places": 1}) == 1.0
    assert score("0.1249", row) == 0.0
    with pytest.raises(ValueError, match='"decimal_arithmetic" has no option "places"'):
        score("0.12", row, config={"places": 2})


def test_rows_go_through_as_the_source_makes_them():
    row = rows("gcd")[0]
    columns = {name: row[name] for name in ("prompt", "answer", "metadata")}
    answers = (
        Completion(f"<answer>{row['answer']}</answer>", (1,), True),
        Completion("<answer>0</answer>", (1,), True),
    )
    scores = bind([RewardTerm(name="reasoning_gym")], discover()).score(
        [Group(Example("p", "?", (1,), columns), answers)]
    )
    assert scores.total.tolist() == [[1.0, 0.0]]


def test_a_missing_package_ends_the_run_with_the_command_that_helps(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    fresh = discover().get("reasoning_gym").function
    with pytest.raises(SetupError, match=r'pip install "grpo-lab\[gym\]"'):
        fresh(Completion("5", (1,), True), answer="5", metadata=SUM["metadata"])
