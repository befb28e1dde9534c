"""The run's logs as JSON lines: what another program reads, and what resume cuts back to the checkpoint."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpo_lab.tracking.files import append_line, disk_errors, dump_line, parse_line, write_atomic
from grpo_lab.tracking.folders import remove_leftovers
from grpo_lab.tracking.run_folder import RunFolder
from grpo_lab.types import Scores, StepEnd


class JsonlSink:
    """Writes each stage's logs. A log that cannot be written stops the run (DiskError)."""

    def __init__(self, run: RunFolder, *, rollouts: bool = True) -> None:
        self._run = run
        self._rollouts = rollouts

    def step(self, end: StepEnd) -> None:
        """Log a step: rollouts first, so that a step in metrics.jsonl has all its other lines."""
        folder = self._run.stage(end.stage)
        if self._rollouts and end.scores is not None:
            _write_lines(folder.rollout(end.step), rollout_rows(end, end.scores))
        append_line(folder.timing, {"step": end.step, **end.timing})
        append_line(folder.metrics, {"step": end.step, **end.metrics})

    def evaluation(
        self, stage: str, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log an evaluation: its rows in a file of their own, its metrics as `eval_...` beside the steps'."""
        folder = self._run.stage(stage)
        _write_lines(folder.evaluation(step), rows)
        append_line(folder.metrics, {"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})

    def event(self, stage: str, step: int, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Log an event with the time of day."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"step": step, "time": time, "kind": kind, "message": message, "data": data}
        append_line(self._run.stage(stage).events, line)

    def close(self) -> None:
        """Nothing to do: every line is written when it is logged."""

    def truncate(self, stage: str, step: int) -> None:
        """Forget what was logged after `step` steps, so that a resumed run logs nothing twice.

        What stays is byte for byte the beginning of each log; a last line cut short by a kill goes. With -1
        everything goes: the stage starts over.
        """
        folder = self._run.stage(stage)
        for log in (folder.metrics, folder.timing, folder.events):
            if log.exists():
                with disk_errors(log):
                    os.truncate(log, _bytes_until(log, step))
        for past in (folder.rollouts, folder.evaluations):
            with disk_errors(past):
                remove_leftovers(past)
                for path in past.iterdir():
                    match = re.fullmatch(r"step-(\d+)\.jsonl", path.name)
                    if match and int(match[1]) > step:
                        path.unlink()


def rollout_rows(end: StepEnd, scores: Scores) -> list[dict[str, Any]]:
    """What is stored of every completion of a step, in the groups' order."""
    rows = []
    for p, group in enumerate(end.groups):
        for g, completion in enumerate(group.completions):
            rows.append(
                {
                    "example": group.example.id,
                    "prompt": group.example.prompt,
                    "completion": completion.text,
                    "num_tokens": len(completion.token_ids),
                    "finished": completion.finished,
                    "total": float(scores.total[p, g]),
                    "terms": {name: float(values[p, g]) for name, values in scores.terms.items()},
                    "status": {name: statuses[p][g] for name, statuses in scores.status.items()},
                    **({} if group.policy_version is None else {"policy_version": group.policy_version}),
                    **({"extra": {column: v[p][g] for column, v in scores.extra.items()}} if scores.extra else {}),
                }
            )
    return rows


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(f"{dump_line(row)}\n" for row in rows))


def _bytes_until(log: Path, step: int) -> int:
    """The length of the log's beginning that holds whole lines of at most `step`."""
    length = 0
    for number, line in enumerate(log.read_bytes().split(b"\n")[:-1], start=1):
        if parse_line(log, number, line)["step"] > step:
            break
        length += len(line) + 1
    return length
