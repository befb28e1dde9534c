import io

import pytest
from rich.console import Console

from grpo_lab.errors import DiskError
from grpo_lab.tracking.console import ConsoleSink
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.tracking.jsonl import JsonlSink
from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import StepEnd


class DownAfter:
    """A tracker whose server goes away after some calls."""

    def __init__(self, calls):
        self.calls_left = calls
        self.heard = []

    def _hear(self, *news):
        if self.calls_left == 0:
            raise ConnectionError("no route\x1b[31m to host")
        self.calls_left -= 1
        self.heard.append(news)

    def step(self, end):
        self._hear("step", end.step)

    def evaluation(self, stage, step, metrics, rows):
        self._hear("evaluation", step)

    def event(self, stage, step, kind, message, data):
        self._hear("event", kind)

    def close(self):
        self._hear("close")


def end(step):
    return StepEnd("grpo", step, 9, {"reward": 1.0}, {})


def test_every_sink_hears_everything_in_order(run_folder):
    trackers = [DownAfter(99), DownAfter(99)]
    sinks = Sinks(JsonlSink(run_folder), trackers)
    sinks.evaluation("grpo", 0, {"reward": 0.5}, [])
    sinks.step(end(1))
    sinks.event("grpo", 1, "info", "saved", {})
    sinks.close()
    expected = [("evaluation", 0), ("step", 1), ("event", "info"), ("close",)]
    assert [tracker.heard for tracker in trackers] == [expected, expected]


def test_a_tracker_that_fails_is_switched_off_and_said_once(run_folder):
    output = io.StringIO()
    tracker = DownAfter(1)
    sinks = Sinks(JsonlSink(run_folder), [ConsoleSink(Console(file=output, force_terminal=False)), tracker])
    for step in (1, 2, 3):
        sinks.step(end(step))
    sinks.close()
    stage = run_folder.stage("grpo")
    assert tracker.heard == [("step", 1)]
    assert [line["step"] for line in read_jsonl(stage.metrics)] == [1, 2, 3]
    (event,) = read_jsonl(stage.events)
    message = "DownAfter failed and is switched off, the run goes on: ConnectionError: no route\x1b[31m to host"
    assert (event["step"], event["kind"], event["message"]) == (2, "tracker_failed", message)
    assert output.getvalue() == (
        "grpo 1/9: reward 1\n"
        "grpo 2/9: reward 1\n"
        "grpo tracker_failed at step 2: DownAfter failed and is switched off, the run goes on: ConnectionError: "
        "no route\\x1b[31m to host\n"
        "grpo 3/9: reward 1\n"
    )


def test_two_trackers_failing_at_once_are_each_said_once(run_folder):
    sinks = Sinks(JsonlSink(run_folder), [DownAfter(0), DownAfter(0)])
    sinks.step(end(1))
    assert len(read_jsonl(run_folder.stage("grpo").events)) == 2


def test_a_tracker_that_fails_at_the_end_is_said_too(run_folder):
    sinks = Sinks(JsonlSink(run_folder), [DownAfter(1)])
    sinks.step(end(1))
    sinks.close()
    assert len(read_jsonl(run_folder.stage("grpo").events)) == 1


def test_ctrl_c_inside_a_tracker_is_not_swallowed(run_folder):
    class Interrupted(DownAfter):
        def step(self, end):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks(JsonlSink(run_folder), [Interrupted(9)]).step(end(1))


def test_a_log_that_cannot_be_written_stops_the_run(run_folder, disk_full_after):
    tracker = DownAfter(9)
    with disk_full_after(0), pytest.raises(DiskError, match="timing.jsonl: could not be written"):
        Sinks(JsonlSink(run_folder), [tracker]).step(end(1))
    assert tracker.heard == []
