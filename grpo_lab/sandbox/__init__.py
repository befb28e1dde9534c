"""A sandbox for programs that a model wrote: judged by tests that they cannot see, shut in as far as the machine lets.

`isolation()` says how far that is; `judge` runs programs. What happens inside is in harness.py and confine.py.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grpo_lab.errors import SetupError

Isolation = Literal["full", "no-network", "limits-only", "none"]
LEVELS: tuple[Isolation, ...] = ("full", "no-network", "limits-only", "none")
_MAIN = Path(__file__).parent / "main.py"
_MAX_VERDICT = 1 << 20


class Task(NamedTuple):
    """A program and how it is judged.

    `test` is Python that calls `entry_point` (or defines `check(candidate)`) and raises where the program is wrong.
    `setup` runs before it, on the tests' side. Both are trusted as the data set is; `program` is not.
    """

    program: str
    entry_point: str
    test: str | None
    setup: str = ""


class Limits(NamedTuple):
    """What a program may use: processor and clock seconds for all its tests together, memory, and files in /tmp."""

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_mib: int = 512
    folder_mib: int = 16


class Verdict(NamedTuple):
    """Whether all tests passed, and if not, what happened (it may quote the program)."""

    passed: bool
    reason: str


@cache
def isolation() -> tuple[Isolation, str]:
    """How well programs can be shut in on this machine, found out by trying to get out, and what was in the way of more.

    full: no network, no files but the standard library and an empty folder, no other processes. no-network: neither
    network nor processes nor writing, but files that everybody may read can be read. limits-only: processor, memory and
    files are limited, nothing else. none: not even that (not Linux).
    """
    if sys.platform != "linux":
        return "none", f"the sandbox needs Linux, this is {sys.platform}"
    found = _run(Task("", "", None), Limits())
    if "probe" not in found:
        return "none", str(found.get("sandbox", "the sandbox does not start"))
    can = found["probe"]
    if "raised" in can:
        return "none", f"programs cannot be run in the sandbox: {can['raised']}"
    if not (can["network"] or can["files"] or can["writes"] or can["processes"]):
        return "full", ""
    if not (can["network"] or can["writes"] or can["processes"] or can["fork"]):
        return "no-network", found["why"]
    return "limits-only", found["why"]


def require(minimum: Isolation) -> None:
    """Refuse a machine that isolates less well.

    Raises:
        SetupError: with the level that there is, and why.
    """
    level, why = isolation()
    if LEVELS.index(level) > LEVELS.index(minimum):
        raise SetupError(
            f'programs can be isolated only as "{level}" here, less than the "{minimum}" asked for ({why}); allow '
            "unprivileged user namespaces on this machine, or ask for less (minimum_isolation) if you know what it means"
        )


def judge(tasks: Sequence[Task], limits: Limits = Limits(), *, minimum: Isolation = "full") -> list[Verdict]:  # noqa: B008
    """Run each program against its tests, as many at once as there are cores.

    Raises:
        SetupError: the isolation is below `minimum`, or the sandbox itself failed; that is never a program's verdict.
    """
    require(minimum)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda task: _verdict(task, limits), tasks))


def _verdict(task: Task, limits: Limits) -> Verdict:
    expected = _mechanisms()
    found = _run(task, limits)
    if "passed" not in found:
        raise SetupError(f"the sandbox failed: {found.get('sandbox', 'it ended without a verdict')}")
    if (found["namespaces"], found["filter"]) != expected:
        raise SetupError(f"the sandbox isolated less well than before: {found['why']}")
    return Verdict(found["passed"] is True, str(found["reason"]))


@cache
def _mechanisms() -> tuple[bool, bool]:
    found = _run(Task("", "", None), Limits())
    return found["namespaces"], found["filter"]


def _run(task: Task, limits: Limits) -> dict[str, Any]:
    """One sandbox from start to end; an empty dict if it gave no verdict in time."""
    settings = {
        "cpu_seconds": limits.cpu_seconds,
        "wall_seconds": limits.wall_seconds,
        "memory_bytes": limits.memory_mib << 20,
        "folder_bytes": limits.folder_mib << 20,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_MAIN)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError):
            for message in (settings, task._asdict()):
                data = json.dumps(message).encode()
                process.stdin.write(len(data).to_bytes(8, "big") + data)
                process.stdin.flush()
        line = _read_line(process.stdout.fileno(), time.monotonic() + limits.wall_seconds + 5)
        return dict(json.loads(line)) if line.endswith(b"\n") else {}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()


def _read_line(fd: int, deadline: float) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _MAX_VERDICT:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        part = os.read(fd, 1 << 16)
        if not part:
            break
        data += part
    return data
