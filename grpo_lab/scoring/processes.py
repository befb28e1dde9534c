"""The trainer's side of its reward processes: the nursery that forks them, and one worker with its pipe and its output."""

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any

from grpo_lab.errors import RewardError
from grpo_lab.scoring.calls import Job
from grpo_lab.scoring.nursery import COMMAND, END, FORK, STATUS, Order, packed

LOAD_SECONDS = 120.0  # for importing a plugin; the packages it needs may be large
MAX_OUTPUT = 1 << 16  # bytes of a worker's output that are kept per batch
_START = "import json, socket, sys; sys.path[:] = json.loads(sys.argv[2]); from grpo_lab.scoring.nursery import nurse; "
_START += "nurse(socket.socket(fileno=int(sys.argv[1])))"


class Nursery:
    """The trainer's end of the nursery (see nursery.py)."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._numbers = count()
        # a worker a core: libraries that start a thread per core in each of them would only wait for each other
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal is for the trainer
        )
        theirs.close()
        weakref.finalize(self, _close, self._control, process)  # at exit at the latest

    def fork(self, channel: socket.socket, output: int) -> int:
        """Have a worker forked at the other end of these; its number."""
        number = next(self._numbers)
        socket.send_fds(self._control, [COMMAND.pack(FORK, number)], [channel.fileno(), output])
        return number

    def end(self, number: int) -> int:
        """Kill a worker and all it started; how it ended if it already had, as `subprocess` says it."""
        self._control.sendall(COMMAND.pack(END, number))
        return int(STATUS.unpack(self._control.recv(STATUS.size, socket.MSG_WAITALL))[0])


def start_nursery() -> None:
    """Start what forks workers, which takes a second or two, before they are needed."""
    _nursery()


@cache
def _nursery() -> Nursery:
    """The one of this process, started when it is first needed; it leaves when this process does."""
    return Nursery()


def _close(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()  # which tells the nursery to leave
    process.wait()


class WorkerProcess:
    """One worker process as the trainer sees it, and the calls that it still owes."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.owed: deque[int] = deque()
        self.idle = True  # owes neither calls nor the state after them
        self._start()

    def _start(self) -> None:
        self.channel, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - as long as the process
        self._number = _nursery().fork(theirs, self._output.fileno())
        theirs.close()
        self._buffer = self._end_of_output = b""
        self.ready = False
        self.deadline = time.monotonic() + LOAD_SECONDS
        self._send(self.order)

    def _send(self, value: Any) -> None:
        self.channel.settimeout(LOAD_SECONDS)
        try:
            self.channel.sendall(packed(value))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass  # it is dead or hangs, as reading from it will say
        finally:
            self.channel.settimeout(0)

    def give(self, jobs: Mapping[int, Job], rows: Sequence[int], seconds: float) -> None:
        """Ask for these calls, in this order."""
        self.owed, self.idle = deque(rows), False
        if self.ready:
            self.deadline = time.monotonic() + seconds
        try:
            self._send([tuple(jobs[row]) for row in rows])
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            message = f'reward "{self.order.label}": the data cannot be sent to its process: {error}'
            raise RewardError(message) from error

    def read(self) -> list[dict[str, Any]] | None:
        """What it has said since; None when it is dead, or says what no worker says."""
        try:
            data = self.channel.recv(1 << 20)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if data or messages else None

    def end(self) -> int:
        """Kill it."""
        self.channel.close()
        return _nursery().end(self._number)

    def restart(self, state: Any) -> None:
        """Put a new process in the place of one that was ended."""
        self._output.close()
        self.order = self.order._replace(state=state)
        self._start()

    def trim(self) -> None:
        """Keep endless output from filling the disk: only its end is remembered."""
        if os.fstat(self._output.fileno()).st_size > 16 * MAX_OUTPUT:
            self._end_of_output = self._take_output()

    def output(self) -> str:
        """What it printed since the last time; the end of it, if that was much."""
        printed = (self._end_of_output + self._take_output())[-MAX_OUTPUT:]
        self._end_of_output = b""
        return printed.decode(errors="replace")

    def _take_output(self) -> bytes:
        self._output.seek(max(0, os.fstat(self._output.fileno()).st_size - MAX_OUTPUT))
        printed = self._output.read()
        self._output.truncate(0)
        return printed
