"""Where a run's news go: one small protocol, and the fan-out to files, console and trackers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from grpo_lab.types import StepEnd


@runtime_checkable  # the test suite checks every argument
class Sink(Protocol):
    """Receives what happens in a run. `step` is always the number of steps done."""

    def step(self, end: StepEnd) -> None:
        """One step is finished."""

    def evaluation(
        self, stage: str, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Held-out data was measured after `step` steps. Metric names come without `eval_`; rows are JSON values."""

    def event(self, stage: str, step: int, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Something else happened. Kind "info" went as planned; any other word (advice, warning) a person must see."""

    def close(self) -> None:
        """The run is over."""


class SilentSink:
    """Nowhere: for the processes of a run that write nothing."""

    def step(self, end: StepEnd) -> None:
        """Say nothing."""

    def evaluation(
        self, stage: str, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Say nothing."""

    def event(self, stage: str, step: int, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Nothing to do."""

    def truncate(self, stage: str, step: int) -> None:
        """There is nothing to forget."""


class Sinks:
    """Several sinks as one. The first may stop the run (a log that cannot be written must); the others never do.

    A console or tracker that raises is switched off, and that is said once, in the log and on what remains.
    """

    def __init__(self, files: Sink, others: Sequence[Sink]) -> None:
        self._files = files
        self._others = list(others)
        self._where: tuple[str, int] | None = None  # the stage and step last heard of

    def step(self, end: StepEnd) -> None:
        """Tell every sink that a step is finished."""
        self._where = end.stage, end.step
        self._files.step(end)
        self._tell_others(lambda sink: sink.step(end))

    def evaluation(
        self, stage: str, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Tell every sink what was measured on held-out data."""
        self._where = stage, step
        self._files.evaluation(stage, step, metrics, rows)
        self._tell_others(lambda sink: sink.evaluation(stage, step, metrics, rows))

    def event(self, stage: str, step: int, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Tell every sink what happened."""
        self._where = stage, step
        self._files.event(stage, step, kind, message, data)
        self._tell_others(lambda sink: sink.event(stage, step, kind, message, data))

    def close(self) -> None:
        """Close every sink."""
        self._tell_others(lambda sink: sink.close())
        self._files.close()

    def _tell_others(self, tell: Callable[[Sink], None]) -> None:
        for sink in list(self._others):
            if sink not in self._others:  # it failed a moment ago, on hearing that another one did
                continue
            try:
                tell(sink)
            except Exception as error:  # noqa: BLE001 - the contract: no tracker's failure, whatever it is, stops a run
                self._others.remove(sink)
                name = type(sink).__name__
                message = f"{name} failed and is switched off, the run goes on: {type(error).__name__}: {error}"
                if self._where is not None:
                    self.event(*self._where, "tracker_failed", message, {"tracker": name})
