"""What a person sees while a run trains: a live display on a terminal, one plain line per step anywhere else."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from grpo_lab.types import StepEnd

SHOWN = {
    "reward": "reward",
    "kl": "KL",
    "completions/mean_length": "length",
    "loss": "loss",
}


def safe(text: str) -> str:
    """The text on one line, unable to do anything to a terminal: what does not print is written as its escape.

    That covers line ends, ANSI escapes, control and bidi characters, odd spaces and lone surrogates. Rich markup is
    not touched: print with `markup=False`.

    >>> safe("a\\x1b[31m\\u202eb\\n")
    'a\\\\x1b[31m\\\\u202eb\\\\n'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class QuietPipeConsole(Console):
    """A console whose reader may leave (`2>&1 | head`): training then goes on unseen instead of exiting."""

    def on_broken_pipe(self) -> None:
        """Print nothing any more."""
        self.quiet = True


class ConsoleSink:
    """Shows the run on standard error, or on the console given. Quiet shows only what went wrong."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or QuietPipeConsole(stderr=True)
        self._quiet = quiet
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def step(self, end: StepEnd) -> None:
        """Move the stage's bar, or print the step's line."""
        if self._quiet:
            return
        if self._console.is_terminal:
            self._move_bar(end)
        else:
            self._line(f"{end.stage} {end.step}/{end.num_steps}: {_numbers(end)}")

    def evaluation(
        self, stage: str, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Print an evaluation's line."""
        if not self._quiet:
            shown = {name: value for name, value in metrics.items() if not name.endswith(("/low", "/high"))}
            numbers = ", ".join(f"{name.removesuffix('/mean')} {value:.4g}" for name, value in shown.items())
            self._line(f"{stage} evaluation after {step} steps: {numbers}")

    def event(self, stage: str, step: int, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Print an event's line; quiet hides the kind "info"."""
        if not (self._quiet and kind == "info"):
            self._line(f"{stage} {kind} at step {step}: {message}")

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, text: str) -> None:
        # soft_wrap: one line stays one line, however narrow the console is thought to be.
        self._console.print(safe(text), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _move_bar(self, end: StepEnd) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._progress.start()
            self._tasks = {}
        if end.stage not in self._tasks:  # a resumed stage starts its bar where it stands, for an honest time left
            self._tasks[end.stage] = self._progress.add_task(
                safe(end.stage), total=end.num_steps, completed=end.step - 1, numbers=""
            )
        self._progress.update(self._tasks[end.stage], completed=end.step, numbers=_numbers(end))


def _numbers(end: StepEnd) -> str:
    shown = [f"{label} {end.metrics[name]:.4g}" for name, label in SHOWN.items() if name in end.metrics]
    if "tokens_per_second" in end.timing:
        shown.append(f"{end.timing['tokens_per_second']:.0f} tokens/s")
    if "step_seconds" in end.timing:
        shown.append(f"{end.timing['step_seconds']:.2f} s")
    return ", ".join(shown)
