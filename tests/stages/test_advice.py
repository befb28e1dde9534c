import pytest

from grpo_lab.stages.advice import ADVICE, AT_ONCE, Advice
from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import StepEnd


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
