import math
import os
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from grpo_lab.errors import RewardError, StopRequested
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import BoundTerm, RewardSet, bind, discover
from grpo_lab.scoring.mark import read_reward
from grpo_lab.types import Completion, Example, Group

NAN = math.nan


def group(name, *texts, messages=None, **columns):
    completions = tuple(Completion(text, (1, 2, 3), finished=True) for text in texts)
    return Group(Example(name, f"prompt {name}", (7, 8), columns, messages), completions)


def rewards(*functions, **terms):
    """A RewardSet of functions with weight 1, or of label=(function, weight, only_if)."""
    listed = {function.__name__: (function, 1.0, None) for function in functions} | terms
    return RewardSet(
        tuple(
            BoundTerm(read_reward(function, name=label, source="test"), label, weight, only_if)
            for label, (function, weight, only_if) in listed.items()
        )
    )


def assert_equal(tensor, expected):
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=torch.float32), equal_nan=True, rtol=0, atol=0)


def value(completion):
    """What the text evaluates to: the tests' way of returning anything."""
    names = {"math": math, "np": np, "torch": torch, "Fraction": Fraction, "Decimal": Decimal}
    return eval(completion.text, names)


def test_the_total_is_the_weighted_sum():
    def size(completion):
        return len(completion.text)

    def is_a(completion):
        return completion.text == "a"

    scores = rewards(size=(size, 0.5, None), is_a=(is_a, 2.0, None)).score(
        [group("x", "a", "bbb"), group("y", "", "a")]
    )
    assert list(scores.terms) == ["size", "is_a"]
    assert_equal(scores.terms["size"], [[1.0, 3.0], [0.0, 1.0]])
    assert_equal(scores.terms["is_a"], [[1.0, 0.0], [0.0, 1.0]])
    assert_equal(scores.total, [[2.5, 1.5], [0.0, 2.5]])
    assert scores.status == {"size": (("ok", "ok"), ("ok", "ok")), "is_a": (("ok", "ok"), ("ok", "ok"))}
    assert scores.reasons == {}


def test_the_sum_is_taken_in_float64():
    def big(completion):
        return 1e8

    def small(completion):
        return 1.0

    def minus(completion):
        return -1e8

    assert_equal(rewards(big, small, minus).score([group("x", "a", "b")]).total, [[1.0, 1.0]])


@pytest.mark.parametrize(
    "text, expected, status",
    [
        ("1.5", 1.5, "ok"),
        ("2", 2.0, "ok"),
        ("True", 1.0, "ok"),
        ("Fraction(1, 2)", 0.5, "ok"),
        ("np.float32(1.5)", 1.5, "ok"),
        ("np.int64(2)", 2.0, "ok"),
        ("np.bool_(True)", 1.0, "ok"),
        ("np.array(1.5)", 1.5, "ok"),
        ("torch.tensor(1.5, requires_grad=True)", 1.5, "ok"),
        ("torch.tensor(True)", 1.0, "ok"),
        ("1e18", 1e18, "ok"),
        ("None", NAN, "abstained"),
        ("'1.0'", NAN, "bad_type"),
        ("b'1'", NAN, "bad_type"),
        ("[1.0]", NAN, "bad_type"),
        ("{'score': 1.0}", NAN, "bad_type"),
        ("np.array([1.0])", NAN, "bad_type"),
        ("torch.tensor([1.0])", NAN, "bad_type"),
        ("np.str_('1')", NAN, "bad_type"),
        ("1j", NAN, "bad_type"),
        ("Decimal('1.5')", NAN, "bad_type"),
        ("math.nan", NAN, "non_finite"),
        ("math.inf", NAN, "non_finite"),
        ("-math.inf", NAN, "non_finite"),
        ("np.float64('nan')", NAN, "non_finite"),
        ("torch.tensor(float('inf'))", NAN, "non_finite"),
        ("1e38", NAN, "non_finite"),
        ("10 ** 400", NAN, "non_finite"),
        ("1 / 0", NAN, "error"),
    ],
)
def test_what_a_returned_value_is_taken_for(text, expected, status):
    scores = rewards(value).score([group("x", text, "1.0")])
    assert_equal(scores.terms["value"], [[expected, 1.0]])
    assert_equal(scores.total, [[expected, 1.0]])
    assert scores.status["value"] == ((status, "ok"),)
    assert ("value" in scores.reasons) == (status not in ("ok", "abstained"))


def test_a_reward_that_raises_once_takes_out_that_completion_only():
    def fragile(completion):
        if completion.text == "bad":
            raise ValueError("no number in it")
        return 1.0

    scores = rewards(fragile).score([group("x", *"abc", "bad", *"defg")])
    assert_equal(scores.total, [[1.0, 1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0]])
    assert scores.status["fragile"][0][3] == "error"
    line = fragile.__code__.co_firstlineno + 2
    assert scores.reasons == {
        "fragile": f'reward "fragile" raised ValueError: no number in it (test_reward_set.py:{line}) '
        "for example x, completion 3"
    }


def test_a_failed_term_leaves_no_total_even_with_weight_zero():
    def one(completion):
        return 1.0

    scores = rewards(one=(one, 1.0, None), value=(value, 0.0, None)).score([group("x", "math.nan", "1")])
    assert_equal(scores.terms["one"], [[1.0, 1.0]])
    assert_equal(scores.total, [[NAN, 1.0]])
    assert scores.reasons == {"value": 'reward "value" returned nan for example x, completion 0'}


def test_a_weighted_total_that_is_too_large_is_the_failure_of_its_largest_term():
    def one(completion):
        return 1.0

    scores = rewards(one=(one, 1.0, None), value=(value, 1e30, None)).score([group("x", "1e18", "0.0")])
    assert_equal(scores.total, [[NAN, 1.0]])
    assert_equal(scores.terms["value"], [[NAN, 0.0]])
    assert scores.status == {"one": (("ok", "ok"),), "value": (("non_finite", "ok"),)}
    assert scores.reasons == {
        "value": 'reward "value" made the weighted total larger than 1e+18 for example x, completion 0'
    }


def test_a_value_too_large_for_a_mean_fails_whatever_its_weight():
    scores = rewards(value=(value, 1e-30, None)).score([group("x", "1e38", "0.0")])
    assert_equal(scores.total, [[NAN, 0.0]])
    assert scores.reasons == {"value": 'reward "value" returned 1e+38, more than 1e+18, for example x, completion 0'}


def test_totals_that_cancel_beyond_float64_are_not_scored():
    scores = rewards(value=(value, 1e300, None), again=(value, -1e300, None)).score([group("x", "1e18", "0.0")])
    assert_equal(scores.total, [[NAN, 0.0]])
    assert scores.status["value"] == (("non_finite", "ok"),)


def test_a_reward_that_leaves_the_program_is_a_failure():
    def leaves(completion):
        raise SystemExit(0)

    scores = rewards(leaves).score([group("x", "a", "b")])
    assert scores.status["leaves"] == (("error", "error"),)


def test_a_stop_request_passes_through_a_reward():
    def interrupted(completion):
        raise StopRequested("stopped", 75)

    with pytest.raises(StopRequested):
        rewards(interrupted).score([group("x", "a", "b")])


def test_control_characters_and_length_of_a_message_are_tamed():
    def loud(completion):
        raise ValueError("\x1b[31m\n" + "x" * 1000)

    reason = rewards(loud).score([group("x", "a", "b")]).reasons["loud"]
    assert reason.startswith('reward "loud" raised ValueError: \\x1b[31m\\nxxx')
    assert reason.isprintable()
    assert len(reason) < 500


def test_abstaining_on_a_whole_group_adds_nothing():
    def sometimes(completion, *, level):
        return None if level == 0 else 1.0

    def one(completion):
        return 1.0

    scores = rewards(one, sometimes).score([group("x", "a", "b", level=0), group("y", "a", "b", level=1)])
    assert_equal(scores.total, [[1.0, 1.0], [2.0, 2.0]])
    assert_equal(scores.terms["sometimes"], [[NAN, NAN], [1.0, 1.0]])
    assert scores.status["sometimes"] == (("abstained", "abstained"), ("ok", "ok"))


def test_abstaining_on_some_siblings_takes_those_out():
    def one(completion):
        return 1.0

    scores = rewards(one, value).score([group("x", "None", "2.0", "3.0")])
    assert_equal(scores.total, [[NAN, 3.0, 4.0]])


def test_abstaining_beside_failures_only_adds_nothing():
    def one(completion):
        return 1.0

    scores = rewards(one, value).score([group("x", "None", "1/0", "None")])
    assert_equal(scores.total, [[1.0, NAN, 1.0]])


def test_where_every_term_abstains_there_is_no_total():
    scores = rewards(value).score([group("x", "None", "None")])
    assert_equal(scores.total, [[NAN, NAN]])
    assert scores.reasons == {}


def test_a_gate_counts_only_above_zero_and_spares_the_call():
    called = []

    def gate(completion):
        return float(completion.text)

    def bonus(completion):
        called.append(completion.text)
        return 5.0

    scores = rewards(bonus=(bonus, 1.0, "gate"), gate=(gate, 1.0, None)).score([group("x", "1", "0", "-1", "0.5")])
    assert_equal(scores.terms["bonus"], [[5.0, 0.0, 0.0, 5.0]])
    assert_equal(scores.total, [[6.0, 0.0, -1.0, 5.5]])
    assert scores.status["bonus"] == (("ok", "gated", "gated", "ok"),)
    assert called == ["1", "0.5"]
    assert list(scores.terms) == ["bonus", "gate"]


def test_a_gate_without_a_value_is_closed():
    def bonus(completion):
        return 5.0

    scores = rewards(value=(value, 1.0, None), bonus=(bonus, 1.0, "value")).score(
        [group("x", "None", "None"), group("y", "1/0", "1")]
    )
    assert scores.status["bonus"] == (("gated", "gated"), ("gated", "ok"))
    assert_equal(scores.total, [[NAN, NAN], [NAN, 6.0]])


def test_gates_form_a_chain():
    def bonus(completion):
        return 1.0

    scores = rewards(
        c=(bonus, 1.0, "b"),
        b=(value, 1.0, "a"),
        a=(value, 1.0, None),
    ).score([group("x", "1", "0")])
    assert_equal(scores.total, [[3.0, 0.0]])
    assert scores.status["c"] == (("ok", "gated"),)


def test_a_group_reward_sees_all_siblings_and_a_gate_zeroes_its_values():
    def rank(group, *, answer):
        assert answer == 4
        order = sorted(len(completion.text) for completion in group.completions)
        return [order.index(len(completion.text)) for completion in group.completions]

    def is_a(completion):
        return completion.text.startswith("a")

    scores = rewards(is_a=(is_a, 0.0, None), rank=(rank, 1.0, "is_a")).score([group("x", "aaa", "b", "aa", answer=4)])
    assert_equal(scores.terms["rank"], [[2.0, 0.0, 1.0]])
    assert scores.status["rank"] == (("ok", "gated", "ok"),)


def test_a_failing_group_call_takes_out_its_group_only():
    def ranks(group):
        if group.example.id == "x":
            raise KeyError("rank")
        return torch.arange(2.0)

    scores = rewards(ranks).score([group("x", "a", "b"), group("y", "a", "b")])
    assert_equal(scores.total, [[NAN, NAN], [0.0, 1.0]])
    line = ranks.__code__.co_firstlineno + 2
    assert scores.reasons["ranks"] == (
        f"reward \"ranks\" raised KeyError: 'rank' (test_reward_set.py:{line}) in one call over 2 completions, "
        "for example x, completion 0"
    )


def test_a_failure_is_reported_behind_a_closed_gate_too():
    def ranks(group):
        raise ValueError("no")

    scores = rewards(value=(value, 1.0, None), ranks=(ranks, 1.0, "value")).score([group("x", "1", "0")])
    assert scores.status["ranks"] == (("error", "error"),)
    assert_equal(scores.total, [[NAN, NAN]])


def test_one_bad_value_of_a_group_call_takes_out_its_completion_only():
    def ranks(group):
        return (1, math.nan, "2", None)

    scores = rewards(ranks).score([group("x", *"abcd")])
    assert scores.status["ranks"] == (("ok", "non_finite", "bad_type", "abstained"),)
    assert scores.reasons["ranks"] == 'reward "ranks" returned nan for example x, completion 1'


@pytest.mark.parametrize("returned", [1.0, "12345678", {1: 2}, None, torch.tensor(1.0)])
def test_a_group_call_that_returns_no_list_is_the_failure_of_its_group(returned):
    def ranks(group):
        return returned

    scores = rewards(ranks).score([group("x", "a", "b")])
    assert scores.status["ranks"] == (("bad_type", "bad_type"),)


def test_a_wrong_number_of_values_stops_the_run():
    def ranks(group):
        return [1.0] * 7

    with pytest.raises(RewardError) as error:
        rewards(ranks).score([group("x", *"abcdefgh")])
    assert str(error.value) == (
        'reward "ranks" returned 7 values for 8 completions; it must return one for each, None where it does not apply'
    )
    assert error.value.exit_code == 5


def test_a_missing_column_is_a_failure_that_names_it():
    def matches(completion, *, answer):
        return 1.0

    scores = rewards(matches).score([group("x", "a", "b"), group("y", "a", "b", answer="a")])
    assert scores.status["matches"] == (("error", "error"), ("ok", "ok"))
    assert scores.reasons["matches"] == 'reward "matches" found no column "answer" for example x, completion 0'


def test_a_batched_reward_is_called_once_with_trls_arguments():
    calls = []

    def batched(completions, prompts, completion_ids, solution, environments=None, **kwargs):
        assert {kwargs.pop(name) is None for name in ("log_extra", "log_metric", "trainer_state")} == {False}
        calls.append((completions, prompts, completion_ids, solution, environments, kwargs))
        return [1.0, None, 3.0, 4.0]

    scores = rewards(batched).score(
        [group("x", "a", "b", solution="s", level=1), group("y", "c", "d", solution="t", level=2)]
    )
    assert calls == [
        (
            ["a", "b", "c", "d"],
            ["prompt x", "prompt x", "prompt y", "prompt y"],
            [[1, 2, 3]] * 4,
            ["s", "s", "t", "t"],
            None,
            {"level": [1, 1, 2, 2]},
        )
    ]
    assert_equal(scores.total, [[1.0, NAN], [3.0, 4.0]])


def test_chat_prompts_reach_a_batched_reward_as_messages():
    def batched(completions, prompts):
        return [
            float(completions[0] == [{"role": "assistant", "content": "a"}] and prompts[0][0]["content"] == "hi")
        ] * 2

    messages = ({"role": "user", "content": "hi"},)
    assert_equal(rewards(batched).score([group("x", "a", "b", messages=messages)]).total, [[1.0, 1.0]])


def test_a_batched_reward_need_not_name_what_it_does_not_use():
    def batched(completions, level=0):
        return [float(len(text)) + level for text, level in zip(completions, level, strict=True)]

    assert_equal(rewards(batched).score([group("x", "a", "bb", level=1, other=2)]).total, [[2.0, 3.0]])


def test_an_async_batched_reward_is_awaited():
    async def judged(completions, **kwargs):
        return [0.5] * len(completions)

    assert_equal(rewards(judged).score([group("x", "a", "b")]).total, [[0.5, 0.5]])


def test_a_failing_batched_call_takes_out_the_whole_step():
    def batched(completions):
        raise OSError("judge is down")

    scores = rewards(batched).score([group("x", "a", "b"), group("y", "a", "b")])
    assert scores.status["batched"] == (("error", "error"), ("error", "error"))


@pytest.mark.parametrize(
    "groups, found",
    [
        ([], "none"),
        ([group("x", "a"), group("y", "a", "b")], "sizes 1, 2"),
        ([group("x")], "sizes 0"),
    ],
)
def test_groups_that_do_not_fit_together_are_an_error(groups, found):
    with pytest.raises(ValueError) as error:
        rewards(value).score(groups)
    assert str(error.value) == (
        f"scoring needs groups with the same number of completions, at least one; found {found}"
    )


def test_a_group_of_one_and_an_empty_completion_are_scored():
    def size(completion):
        return len(completion.text)

    assert_equal(rewards(size).score([group("x", "")]).total, [[0.0]])


def test_the_recipes_rewards_work_together():
    terms = [
        RewardTerm(name="accuracy", weight=2.0),
        RewardTerm(name="format", weight=0.5, options={"style": "hash"}),
        RewardTerm(name="length", only_if="accuracy", options={"target": 2}, label="brief"),
    ]
    chosen = bind(terms, discover())
    assert chosen.names == ["accuracy", "format", "brief"]
    scores = chosen.score([group("x", "#### 12", "#### 13", "12", answer="12")])
    assert_equal(scores.total, [[2.0, 0.5, 0.0]])


def test_trls_own_rewards_work_by_dotted_path(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_DISABLE_TELEMETRY", "1")
    terms = [RewardTerm(name="trl.rewards.accuracy_reward"), RewardTerm(name="trl.rewards.think_format_reward")]
    messages = ({"role": "user", "content": "half of 1?"},)
    chosen = bind(terms, discover())
    scores = chosen.score(
        [
            group("x", r"<think>a</think>\boxed{\frac{1}{2}}", r"\boxed{2}", messages=messages, solution="$0.5$"),
            group("y", "<think>a</think>", "b", messages=messages, solution="no mathematics"),
        ]
    )
    assert chosen.names == ["accuracy_reward", "think_format_reward"]
    assert_equal(scores.terms["accuracy_reward"], [[1.0, 0.0], [NAN, NAN]])
    assert_equal(scores.terms["think_format_reward"], [[1.0, 0.0], [1.0, 0.0]])
    assert_equal(scores.total, [[2.0, 0.0], [1.0, 0.0]])


def test_a_step_of_plain_numbers_is_scored_in_milliseconds():
    chosen = bind([RewardTerm(name="accuracy"), RewardTerm(name="format", options={"style": "hash"})], discover())
    groups = [
        group(
            str(prompt), *[f"so it is\n#### {1000 * prompt + index}" for index in range(8)], answer=str(1000 * prompt)
        )
        for prompt in range(32)
    ]
    seconds = []
    for _ in range(5):
        start = time.process_time()
        scores = chosen.score(groups)
        seconds.append(time.process_time() - start)
    assert scores.total.sum().item() == 32 + 256
    assert min(seconds) < 0.25  # 5 ms without the suite's type checks; math-verify would take half a second
