import json
from dataclasses import replace

import pytest
import torch

from grpo_lab.errors import CheckpointError, DiskError
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.tracking.jsonl import JsonlSink
from grpo_lab.types import Completion, Example, Group, Scores, StepEnd


def step_end(step):
    groups = (
        Group(
            Example("row-1", "2+2=", (5, 6), {"answer": "4"}),
            (Completion("\x1b[31m4\ud800", (7, 2), True), Completion("five", (8, 9, 10), False)),
        ),
    )
    scores = Scores(
        total=torch.tensor([[1.5, float("nan")]]),
        terms={"accuracy": torch.tensor([[1.0, float("nan")]])},
        status={"accuracy": (("ok", "timeout"),)},
    )
    return StepEnd("grpo", step, 12, {"reward": step / 3, "loss": 0.0}, {"step_seconds": 0.25}, groups, scores)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "events.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_rewards_wrote_down_is_stored_beside_the_completion(run_folder):
    end = step_end(12)
    scores = replace(end.scores, extra={"found": (("4", None),)})
    JsonlSink(run_folder).step(replace(end, scores=scores))
    rows = read_jsonl(run_folder.stage("grpo").rollouts / "step-000012.jsonl")
    assert [row["extra"] for row in rows] == [{"found": "4"}, {"found": None}]


def test_a_step_is_logged_with_its_metrics_times_and_completions(run_folder):
    JsonlSink(run_folder).step(step_end(12))
    stage = run_folder.stage("grpo")
    assert stage.metrics.read_text() == '{"step": 12, "reward": 4.0, "loss": 0.0}\n'
    assert stage.timing.read_text() == '{"step": 12, "step_seconds": 0.25}\n'
    assert read_jsonl(stage.rollouts / "step-000012.jsonl") == [
        {
            "example": "row-1",
            "prompt": "2+2=",
            "completion": "\x1b[31m4\ud800",
            "num_tokens": 2,
            "finished": True,
            "total": 1.5,
            "terms": {"accuracy": 1.0},
            "status": {"accuracy": "ok"},
        },
        {
            "example": "row-1",
            "prompt": "2+2=",
            "completion": "five",
            "num_tokens": 3,
            "finished": False,
            "total": None,
            "terms": {"accuracy": None},
            "status": {"accuracy": "timeout"},
        },
    ]


def test_supervised_steps_and_unwanted_rollouts_write_none(run_folder):
    JsonlSink(run_folder, rollouts=False).step(step_end(1))
    JsonlSink(run_folder).step(StepEnd("sft", 1, 2, {"loss": 1.0}, {}))
    assert list(run_folder.stage("grpo").rollouts.iterdir()) == []
    assert list(run_folder.stage("sft").rollouts.iterdir()) == []


def test_an_evaluation_has_a_line_beside_the_steps_and_rows_of_its_own(run_folder):
    sink = JsonlSink(run_folder)
    sink.evaluation("grpo", 0, {"reward": 0.5, "pass@1": float("nan")}, [{"example": "a"}, {"example": "b"}])
    stage = run_folder.stage("grpo")
    assert stage.metrics.read_text() == '{"step": 0, "eval_reward": 0.5, "eval_pass@1": null}\n'
    assert stage.evaluation(0).read_text() == '{"example": "a"}\n{"example": "b"}\n'


def test_an_event_has_its_step_and_time(run_folder):
    JsonlSink(run_folder).event("grpo", 3, "advice", "no signal", {"share": 1.0})
    (line,) = read_jsonl(run_folder.stage("grpo").events)
    assert line.pop("time").endswith("+00:00")
    assert line == {"step": 3, "kind": "advice", "message": "no signal", "data": {"share": 1.0}}


def log(sink, first, last):
    for step in range(first, last + 1):
        sink.step(step_end(step))
        sink.event("grpo", step, "info", "done", {})
        if step % 2 == 0:
            sink.evaluation("grpo", step, {"reward": step / 7}, [{"example": step}])


@pytest.mark.parametrize("kept", [-1, 0, 1, 2, 3, 4, 9])
def test_truncating_keeps_the_bytes_up_to_the_step(run_folder, kept):
    sink = JsonlSink(run_folder)
    stage = run_folder.stage("grpo")
    sink.evaluation("grpo", 0, {"reward": 0.0}, [{"example": 0}])
    at = {-1: {"metrics.jsonl": b"", "timing.jsonl": b""}}
    for step in range(4):
        if step:
            log(sink, step, step)
        at[step] = {"timing.jsonl": b"", **contents(stage.path)}
    at[4] = at[9] = at[3]
    before = stage.events.read_bytes()
    sink.truncate("grpo", kept)
    assert {"timing.jsonl": b"", **contents(stage.path)} == at[kept]
    assert before.startswith(stage.events.read_bytes())
    assert [line["step"] for line in read_jsonl(stage.events)] == list(range(1, min(kept, 3) + 1))


def test_a_torn_last_line_and_half_a_rollout_file_go(run_folder):
    sink = JsonlSink(run_folder)
    log(sink, 1, 2)
    stage = run_folder.stage("grpo")
    whole = stage.metrics.read_bytes()
    with stage.metrics.open("ab") as file:
        file.write(b'{"step": 2, "rew')
    (stage.rollouts / ".tmp-step-000003.jsonl").write_bytes(b'{"exam')
    sink.truncate("grpo", 2)
    assert sorted(path.name for path in stage.rollouts.iterdir()) == ["step-000001.jsonl", "step-000002.jsonl"]
    assert stage.metrics.read_bytes() == whole


def test_a_broken_line_inside_a_log_is_said_and_not_dropped(run_folder):
    sink = JsonlSink(run_folder)
    stage = run_folder.stage("grpo")
    stage.metrics.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl:2: not a line of JSON"):
        sink.truncate("grpo", 3)


def test_a_kill_at_any_moment_of_logging_then_truncate_and_redo_gives_the_same_logs(run_folder, killed_at):
    sink = JsonlSink(run_folder)
    stage = run_folder.stage("grpo")
    log(sink, 1, 4)
    uninterrupted = contents(stage.path)
    for n in range(1, 100):
        sink.truncate("grpo", 2)
        got_through = not killed_at(n, lambda: log(sink, 3, 4))
        sink.truncate("grpo", 2)
        log(sink, 3, 4)
        assert contents(stage.path) == uninterrupted
        assert [line["step"] for line in read_jsonl(stage.events)] == [1, 2, 3, 4]
        if got_through:
            break
    assert got_through


def test_a_full_disk_stops_the_run_with_valid_logs(run_folder, disk_full_after):
    sink = JsonlSink(run_folder)
    log(sink, 1, 2)
    stage = run_folder.stage("grpo")
    before = contents(stage.path)
    for room in range(0, max(len(content) for content in before.values()), 16):
        with disk_full_after(room), pytest.raises(DiskError):
            log(sink, 3, 3)
        for path in [stage.metrics, stage.timing, *stage.rollouts.iterdir()]:
            assert all(json.loads(line) for line in path.read_bytes().splitlines())
            assert path.read_bytes().endswith(b"\n")
        sink.truncate("grpo", 2)
        assert contents(stage.path) == before
