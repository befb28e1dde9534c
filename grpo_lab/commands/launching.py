"""Starts one command as several processes that train together, as torchrun does: the same environment variables.

Unlike torchrun this passes a signal on and waits for as long as saving takes, and ends with the exit code of the process
that failed first.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

LAST_WORDS_SECONDS = 60.0  # what the others get to notice that one process has failed
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `grpo-lab ARGUMENTS` as so many processes on this machine; returns the exit code of the first to fail, or 0."""
    with Passing() as passing:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "grpo_lab", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=_end_with_parent,
            )
            for environment in environments(num_processes)
        ]
        passing.to += processes
        try:
            return _outcome(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def environments(num_processes: int) -> list[dict[str, str]]:
    """What each process must find in its environment. The machine's cores are shared out, unless that was decided."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return [
        {
            "OMP_NUM_THREADS": str(max(1, cores // num_processes)),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # a process whose peer has ended would show torch's C++ stack
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
        }
        for rank in range(num_processes)
    ]


def _end_with_parent() -> None:
    """In a new process, on Linux: be asked to stop when the launcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Passing:
    """Hands SIGTERM and Ctrl-C on to processes, which are not in the terminal's foreground and would not get them."""

    def __init__(self) -> None:
        self.to: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Passing":
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        for process in self.to:
            process.send_signal(number)


def _outcome(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one has failed the others get some time to end by themselves."""
    deadline = float("inf")
    code = 0
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode]
        if failed and code == 0:
            code, deadline = _exit_code(*failed[0]), time.monotonic() + LAST_WORDS_SECONDS
    return code or next(
        (_exit_code(rank, each.returncode) for rank, each in enumerate(processes) if each.returncode), 0
    )


def _exit_code(rank: int, code: int) -> int:
    """A process that was killed cannot say so itself."""
    if code > 0:
        return code
    sys.stderr.write(
        f"error: process {rank} was killed by {signal.Signals(-code).name}; --resume goes on from the newest checkpoint\n"
    )
    return 128 - code
