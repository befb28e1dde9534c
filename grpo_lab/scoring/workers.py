"""Users' rewards in processes of their own: with a deadline, killed and started again, and with their output kept.

What a worker runs is in nursery.py, how one is started and spoken to in processes.py. A reward has its own workers, so
its state is its own, and calls go to them in a fixed order, whatever the timing: the values are those of calls here.
"""

import math
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from grpo_lab.bundled import rewards_folder
from grpo_lab.errors import RewardError, SetupError
from grpo_lab.scoring.calls import Job, Outcome
from grpo_lab.scoring.notes import notes_of
from grpo_lab.scoring.nursery import Order
from grpo_lab.scoring.processes import LOAD_SECONDS, WorkerProcess
from grpo_lab.scoring.terms import BoundTerm

HANGS = 3  # calls in a row over the deadline after which the rest of a batch is not tried


def is_users(term: BoundTerm) -> bool:
    """Whether a reward is a user's: from a plugin, an installed package or a dotted path, not shipped with grpo-lab."""
    return term.reward.path.resolve().parent != rewards_folder().resolve()


class Settings(NamedTuple):
    """The recipe's keys for user rewards: processes of each, and the most seconds of a call and memory of a process."""

    processes: int = 1
    timeout_seconds: float = 60.0
    memory_gib: float | None = None


class Workers:
    """The worker processes of all user rewards of a stage. They start with the first call, or before it with `start`.

    `log` is the file that gets what rewards print.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log: Path | None = None
        self._crews: dict[str, list[WorkerProcess]] = {}
        self._states: dict[str, Any] = {}
        self._inexact: dict[str, None] = {}

    def start(self, terms: Sequence[BoundTerm]) -> None:
        """Start the processes of these terms as far as they are users'; does not wait for them."""
        for term in terms:
            if is_users(term):
                self._crew(term)

    def state_dict(self) -> dict[str, Any]:
        """The states of stateful rewards after the last batch, by term."""
        return dict(self._states)

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from these states; processes that run are ended."""
        if states:
            self.close()
        self._states = dict(states)

    def inexact_because(self) -> list[str]:
        """Why repeating what happened so far need not give the same values; empty if it must."""
        return list(self._inexact)

    def close(self) -> None:
        """End all processes; the next call would start others."""
        crews, self._crews = self._crews, {}
        for worker in chain.from_iterable(crews.values()):
            worker.end()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, term: BoundTerm) -> "Calls":
        """Calls of one term that need not all be known yet; those of one term before them are over or given up."""
        if any(not worker.idle for worker in self._crew(term)):
            self.close()
        return Calls(self, term, self._crew(term))

    def keep_output(self, worker: WorkerProcess, title: str) -> str:
        """Move what a worker printed to the log."""
        text = worker.output()
        if text and self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"[{title}]\n{text.rstrip()}\n")
        return text

    def _crew(self, term: BoundTerm) -> list[WorkerProcess]:
        if term.label not in self._crews:
            reward, users = term.reward, is_users(term)
            gib = self.settings.memory_gib if users else None
            order = Order(
                name=reward.name,
                label=term.label,
                plugin=str(Path(reward.source).resolve()) if users and Path(reward.source).is_file() else None,
                sha256=reward.sha256,
                options=dict(term.options or {}),
                sys_path=list(sys.path),
                memory_bytes=None if gib is None else int(gib * 2**30),
                state=self._states.get(term.label),
            )
            # a reward with a state has one worker: several would each see a part of the calls
            num = 1 if reward.may_keep_state else self.settings.processes
            self._crews[term.label] = [WorkerProcess(order) for _ in range(num)]
        return self._crews[term.label]

    def note_state(self, term: BoundTerm, state: Any) -> None:
        """Remember what a worker's reward knows after a batch."""
        if state is not None:
            self._states[term.label] = state

    def state_of(self, term: BoundTerm) -> Any:
        """The state that a new worker begins with."""
        return self._states.get(term.label)

    def note_deadline(self, term: BoundTerm) -> None:
        """A deadline fired: another time, the call might make it."""
        self._inexact[f'reward "{term.label}" was stopped at its deadline'] = None


class Calls:
    """The calls of one term over one step, by a number of each. They go to the workers in turn, in the order of `add`.

    Nothing happens but in its methods, on the caller's thread. Any exception in them, an interruption too, ends all
    workers.
    """

    def __init__(self, workers: Workers, term: BoundTerm, crew: Sequence[WorkerProcess]) -> None:
        self.workers, self.term, self.crew = workers, term, crew
        # what comes with grpo-lab keeps its own time limits
        self.seconds = workers.settings.timeout_seconds if is_users(term) else math.inf
        self.jobs: dict[int, Job] = {}
        self.waiting: list[list[int]] = [[] for _ in crew]
        self.outcomes: dict[int, list[Outcome]] = {}
        self.hangs = 0
        self.given_up: set[int] = set()  # workers that hung too often

    def add(self, number: int, job: Job) -> None:
        """One call more, which a worker is given as soon as it is idle when `advance` or `finish` looks."""
        self.waiting[len(self.jobs) % len(self.crew)].append(number)
        self.jobs[number] = job

    def advance(self) -> None:
        """Give idle workers what waits for them, and hear what the others have done. Does not wait."""
        with self._ending_all_at_an_error():
            self._give()
            if busy := self._busy():
                self._hear_from(busy, 0.0)
                self._give()

    def finish(self, jobs: Mapping[int, Job]) -> dict[int, list[Outcome]]:
        """The outcomes of these calls, each a list with one for every completion of the call; those that were not added
        before are made now, the others not again.

        A call over the deadline is a `timeout`, one whose process ends is `crashed`; its worker is started again and
        the other calls go on. After three time-outs in a row the rest of them is taken to hang as well.

        Raises:
            RewardError: the reward cannot be loaded, or returned the wrong number of values.
        """
        for number, job in jobs.items():
            if number not in self.jobs:
                self.add(number, job)
        with self._ending_all_at_an_error():
            self._give()
            while busy := self._busy():
                self._hear_from(busy, 0.5)
                self._give()
        for index, worker in enumerate(self.crew):
            self.workers.keep_output(worker, f"reward {self.term.label}, worker {index}")
        return self.outcomes

    @contextmanager
    def _ending_all_at_an_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.workers.close()  # somebody may still be busy with these calls
            raise

    def _busy(self) -> list[WorkerProcess]:
        return [worker for worker in self.crew if not worker.idle]

    def _give(self) -> None:
        for index, (worker, numbers) in enumerate(zip(self.crew, self.waiting, strict=True)):
            if index in self.given_up:
                self._not_called(numbers)
            elif numbers and worker.idle:
                worker.give(self.jobs, numbers, self.seconds)
                numbers.clear()

    def _hear_from(self, busy: Sequence[WorkerProcess], seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            soonest = min(worker.deadline for worker in busy) - time.monotonic()
            spoke = [key.data for key, _ in selector.select(max(0.0, min(soonest, seconds)))]
        for worker in busy:
            worker.trim()
            if worker in spoke:
                self._hear(worker)
            elif time.monotonic() > worker.deadline:
                self._too_late(worker)

    def _hear(self, worker: WorkerProcess) -> None:
        messages = worker.read()
        if messages is None:
            self._crashed(worker, "")
            return
        try:
            self._take(worker, messages)
        except (AttributeError, LookupError, TypeError, ValueError):
            self._crashed(worker, "wrote into the pipe that its outcomes go through")

    def _take(self, worker: WorkerProcess, messages: Sequence[dict[str, Any]]) -> None:
        for message in messages:
            worker.deadline = time.monotonic() + self.seconds
            if "ready" in message:
                worker.ready = True
            elif "outcomes" in message and worker.owed:
                self.hangs = 0
                row = worker.owed[0]
                job = self.jobs[row]
                self.outcomes[row] = _outcomes(message["outcomes"], job.num_completions)
                notes = notes_of(job.arguments)
                if notes is not None:
                    notes.add(message["notes"])
                worker.owed.popleft()
            elif "state" in message and not worker.owed:
                worker.idle = True
                self.workers.note_state(self.term, message["state"])
            elif "crashed" in message:
                self._crashed(worker, message["crashed"])
                return
            elif "broken" in message:
                raise RewardError(message["broken"])
            elif "unable" in message:
                raise SetupError(message["unable"])
            elif "refused" in message:
                raise RewardError(f'reward "{self.term.label}" cannot be loaded in its worker: {message["refused"]}')
            else:
                raise ValueError(f"not the turn for {message}")

    def _crashed(self, worker: WorkerProcess, reason: str) -> None:
        code = worker.end()
        if not reason:
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if not worker.ready:
            said = self.workers.keep_output(worker, f"reward {self.term.label}").strip()[-500:]
            raise RewardError(f'reward "{self.term.label}" cannot be loaded: its process {reason}. {said}')
        self._lost(worker, "crashed", f"crashed: its process {reason}")

    def _too_late(self, worker: WorkerProcess) -> None:
        worker.end()
        if not worker.ready:
            raise RewardError(f'reward "{self.term.label}" did not load in {LOAD_SECONDS:g} s')
        self.workers.note_deadline(self.term)
        self.hangs += 1
        self._lost(worker, "timeout", f"took longer than {self.seconds:g} s (reward_timeout_seconds)")

    def _lost(self, worker: WorkerProcess, status: str, reason: str) -> None:
        """The call in progress has failed; another process goes on with the rest."""
        said = self.workers.keep_output(worker, f"reward {self.term.label}, a worker that {reason}").strip()
        if said:
            last = "".join(char if char.isprintable() else " " for char in said[-200:])
            reason += f"; the end of what it printed: {last}"
        if worker.owed:
            self._fail(worker.owed.popleft(), status, reason)
        if self.hangs >= HANGS:
            self.given_up.add(self.crew.index(worker))
            self._not_called(worker.owed)
        worker.restart(self.workers.state_of(self.term))
        worker.idle = not worker.owed
        if worker.owed:
            worker.give(self.jobs, list(worker.owed), self.seconds)

    def _not_called(self, numbers: deque[int] | list[int]) -> None:
        for number in numbers:
            self._fail(number, "timeout", f"was not called: {HANGS} calls in a row took too long")
        numbers.clear()

    def _fail(self, row: int, status: str, reason: str) -> None:
        self.outcomes[row] = [Outcome(math.nan, status, reason)] * self.jobs[row].num_completions


def _outcomes(found: Any, num_completions: int) -> list[Outcome]:
    """What a worker says of one call. Only its own reward can be behind it, but nothing else may break of it."""
    outcomes = [Outcome(float(value), str(status), str(reason)) for value, status, reason in found]
    if len(outcomes) != num_completions or any((one.status == "ok") != math.isfinite(one.value) for one in outcomes):
        raise ValueError("no outcomes")
    return outcomes
