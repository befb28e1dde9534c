import os
import signal

import pytest

from grpo_lab.distributed.ranks import ALONE
from grpo_lab.errors import StopRequested
from grpo_lab.recipe.schema import Data, Evaluation
from grpo_lab.stages.running import StopSignal, evaluating, reporting
from grpo_lab.types import StepEnd

HELD_OUT = Data(source="task", path="addition", prompt="prompt")


def end(step: int, num_steps: int = 10) -> StepEnd:
    return StepEnd("grpo", step, num_steps, {}, {})


@pytest.mark.parametrize(
    "every, measured",
    [(None, [10]), (1, list(range(1, 11))), (4, [4, 8, 10]), (5, [5, 10]), (99, [10])],
)
def test_held_out_data_is_measured_every_so_many_steps_and_once_at_the_end(every, measured):
    found: list[int] = []
    after_step = evaluating(Evaluation(data=HELD_OUT, every=every), found.append)
    for step in range(1, 11):
        after_step(end(step))
    assert found == measured


def test_without_held_out_data_nothing_is_measured():
    found: list[int] = []
    evaluating(None, found.append)(end(10))
    assert found == []


def test_callbacks_are_called_in_their_order():
    found: list[str] = []
    reporting(lambda _: found.append("log"), lambda _: found.append("measure"), lambda _: found.append("save"))(end(1))
    assert found == ["log", "measure", "save"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_next_check_and_becomes_its_exit_code(number, code):
    with StopSignal() as stop:
        stop.check("here")
        os.kill(os.getpid(), number)
        assert stop.received == number
        stop.check("where nobody has asked yet")
        assert stop.asked(ALONE)
        with pytest.raises(StopRequested) as error:
            stop.check("after step 3")
    assert str(error.value) == f"{number.name}: stopped after step 3; --resume goes on from here"
    assert error.value.exit_code == code


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
