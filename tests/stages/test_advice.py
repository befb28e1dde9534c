import pytest
import torch

from grpo_lab.scoring import controlled
from grpo_lab.stages.advice import ADVICE, AT_ONCE, Advice, reward_shares
from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import Scores, StepEnd


class Heard:
    """A log that only remembers its events."""

    def __init__(self):
        self.events = []

    def step(self, end):
        pass

    def evaluation(self, stage, step, metrics, rows):
        pass

    def close(self):
        pass

    def event(self, stage, step, kind, message, data):
        self.events.append((stage, step, kind, message, data))


def advise(*values: float, metric: str = "frac_reward_zero_std") -> list[tuple]:
    heard = Heard()
    advice = Advice(Sinks(heard, []))
    for step, value in enumerate(values, start=1):
        advice(StepEnd("grpo", step, 99, {metric: value}, {}))
    return heard.events


@pytest.mark.parametrize("metric", [metric for metric in ADVICE if metric not in AT_ONCE])
def test_ten_steps_in_a_row_are_advised_about_once(metric):
    ((stage, step, kind, message, data),) = advise(*[1.0] * 25, metric=metric)
    assert (stage, step, kind, data) == ("grpo", 10, "advice", {"metric": metric})
    assert message == f"10 steps in a row: {ADVICE[metric]}"


def test_what_was_asked_for_and_cannot_be_had_is_said_at_once():
    ((_, step, _, message, _),) = advise(*[1.0] * 25, metric="lab/sampling_exhausted")
    assert (step, message) == (1, ADVICE["lab/sampling_exhausted"])


def test_one_step_that_teaches_starts_the_count_again():
    assert advise(*[1.0] * 9, 0.75, *[1.0] * 9) == []
    assert [event[1] for event in advise(*[1.0] * 9, 0.75, *[1.0] * 10, 0.5, *[1.0] * 10)] == [20, 31]


def test_nothing_is_said_where_the_metric_does_not_exist():
    assert advise(*[1.0] * 20, metric="reward") == []


# one reward beside others


def of_terms(weights=None, **terms) -> Scores:
    values = {name: torch.tensor(rows) for name, rows in terms.items()}
    weights = weights or dict.fromkeys(terms, 1.0)
    total = sum(weights[name] * each for name, each in values.items())
    return Scores(total, values, {}, weights=weights)


def advise_on(scores: Scores, steps: int = 12, **metrics: float) -> list[tuple[int, str]]:
    heard = Heard()
    advice = Advice(Sinks(heard, []))
    for step in range(1, steps + 1):
        advice(StepEnd("grpo", step, 99, metrics, {}, (), scores))
    return [(step, message) for _, step, _, message, _ in heard.events]


def test_a_share_is_weight_squared_times_the_variance_within_groups():
    scores = of_terms({"a": 2.0, "b": 1.0}, a=[[0.0, 1.0], [5.0, 5.0]], b=[[0.0, 2.0], [0.0, 2.0]])
    assert reward_shares(scores) == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}  # 4 * .25 to 1 + 1


def test_a_completion_without_a_total_and_rounding_are_no_difference():
    scores = of_terms(a=[[0.1, 0.1, 0.1, float("nan")]], b=[[1.0, 1.0, 1.0, 7.0]])
    assert reward_shares(scores) == {"a": 0.0, "b": 0.0}


def test_a_reward_that_decides_alone_is_named_after_ten_steps():
    ((step, message),) = advise_on(of_terms(big=[[0.0, 9.0]], small=[[1.0, 0.0]]))
    assert step == 10
    assert message.startswith('10 steps in a row: reward "big" makes up more than 95% of the differences within groups')


def test_a_reward_that_never_differs_in_a_group_is_named_after_ten_steps():
    ((step, message),) = advise_on(of_terms(still=[[3.0, 3.0], [1.0, 1.0]], moving=[[1.0, 0.0], [1.0, 0.0]]))
    assert (step, message[:49]) == (10, '10 steps in a row: reward "still" is the same for')


@pytest.mark.parametrize(
    "scores, metrics",
    [
        (of_terms(a=[[0.0, 2.0]], b=[[1.0, 0.0]]), {}),  # both count
        (of_terms(only=[[0.0, 2.0]]), {}),  # nothing to dominate
        (of_terms({"a": 1.0, "b": 0.0}, a=[[0.0, 2.0]], b=[[1.0, 1.0]]), {}),  # b only measures
        (of_terms(a=[[1.0, 1.0]], b=[[1.0, 1.0]]), {}),  # said otherwise: nothing differs at all
    ],
)
def test_nothing_is_said_of_rewards_that_do_their_part(scores, metrics):
    assert advise_on(scores, **metrics) == []


def test_under_a_control_nothing_is_said_of_rewards_as_the_policy_does_not_learn_from_them():
    scores = controlled(of_terms(big=[[0.0, 9.0]], small=[[1.0, 0.0]]), "shuffled", seed=0)
    assert [(step, message[:20]) for step, message in advise_on(scores)] == [(1, "reward_control is on")]
