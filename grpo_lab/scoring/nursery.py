"""The processes in which users' reward code runs: a nursery that forks them, and what a worker does.

The trainer has threads and perhaps a GPU, so it must not fork; starting a fresh interpreter takes a second or two. So one
nursery is started for a stage: a clean process of one thread that has imported what every reward needs and forks a worker
in milliseconds, also in place of one that was killed. It runs no user code itself and leaves when the trainer's end of
its socket closes, kill -9 included, taking all workers and what these started with it.
"""

import ctypes
import faulthandler
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from grpo_lab.errors import RecipeError, RewardError, SetupError
from grpo_lab.scoring.calls import call
from grpo_lab.scoring.mark import Reward, Stateful, plain_state
from grpo_lab.scoring.notes import notes_of
from grpo_lab.scoring.registry import discover
from grpo_lab.scoring.terms import BoundTerm

COMMAND, STATUS, SIZE = struct.Struct("!cQ"), struct.Struct("!i"), struct.Struct("!Q")
FORK, END = b"f", b"e"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Order(NamedTuple):
    """What a worker is to become: the reward by name, from a plugin file, an entry point or a dotted path."""

    name: str
    label: str
    plugin: str | None
    sha256: str
    options: Mapping[str, Any]
    sys_path: list[str]
    memory_bytes: int | None
    state: Any


def nurse(control: socket.socket) -> NoReturn:
    """Fork and end workers as the trainer says, until it is gone."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a worker started becomes ours when the worker dies
    pids: dict[int, int] = {}
    while True:
        message, fds, _, _ = socket.recv_fds(control, COMMAND.size, 2)
        if len(message) < COMMAND.size:
            break
        command, number = COMMAND.unpack(message)
        if command == FORK:
            pids[number] = os.fork()
            if pids[number] == 0:
                control.close()
                _work(*fds)
            for fd in fds:
                os.close(fd)
        else:
            pid = pids.pop(number, None)  # None: it was ended before
            control.sendall(STATUS.pack(0 if pid is None else _end(pid, keep=pids.values())))
    for pid in list(pids.values()):
        _end(pid, keep=())
    os._exit(0)


def _end(pid: int, keep: Any) -> int:
    """Kill a worker and everything it started; its exit code, minus the signal if it died of one before."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # not yet reaped, so still this process
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for _ in range(100):  # a stray's own children become ours only once it is dead
        strays = [each for each in _children() if each not in keep]
        if not strays:
            break
        for stray in strays:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(stray, signal.SIGKILL)
                os.waitpid(stray, 0)
    return status


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:  # not Linux, or a kernel without this file: process groups must do
        return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _work(channel_fd: int, output_fd: int) -> NoReturn:
    """A worker's life: become the reward that the trainer orders, then answer its calls, on this, the main thread."""
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, to in ((nothing, 0), (output_fd, 1), (output_fd, 2)):
            os.dup2(fd, to)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        faulthandler.enable()
        with suppress(OSError):  # where memory ends, the kernel is to take this process and not the trainer
            Path("/proc/self/oom_score_adj").write_text("1000")
        _serve(socket.socket(fileno=channel_fd))
    except BaseException:  # noqa: BLE001 - nothing may go back into the nursery's loop
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _serve(channel: socket.socket) -> None:
    pid = os.getpid()
    order = Order(*receive(channel))
    sys.path[:] = order.sys_path
    _limit_memory(order.memory_bytes)
    try:
        reward = _load(order)
        term = BoundTerm(reward, order.label, options=order.options)
        if order.state is not None and isinstance(reward.function, Stateful):
            reward.function.load_state_dict(order.state)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: the trainer says why
        answer(channel, {"refused": str(error) or type(error).__name__})
        return
    answer(channel, {"ready": True})
    while (jobs := receive(channel)) is not None:
        for arguments, num_completions in jobs:
            try:
                outcomes = call(term, arguments, num_completions=num_completions, passing=MemoryError)
            except MemoryError:
                answer(channel, {"crashed": "ran out of memory"})
                return
            except RewardError as error:
                answer(channel, {"broken": str(error)})
                continue
            except SetupError as error:
                answer(channel, {"unable": str(error)})
                continue
            if os.getpid() != pid:
                os._exit(1)  # the reward forked and its child came back here
            notes = notes_of(arguments)
            answer(channel, {"outcomes": outcomes, "notes": None if notes is None else notes.plain()})
        try:
            answer(channel, {"state": plain_state(reward.function, order.label)})
        except RewardError as error:
            answer(channel, {"broken": str(error)})
            return


def _load(order: Order) -> Reward:
    reward = discover([order.plugin] if order.plugin is not None else []).get(order.name)
    if reward.sha256 != order.sha256:
        raise RecipeError(f"{reward.path} was changed while the run was going on")
    return reward


def _limit_memory(num_bytes: int | None) -> None:
    """Allow this much address space on top of what the interpreter has now."""
    if num_bytes is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def receive(channel: socket.socket) -> Any:
    """What the trainer sent (it alone is trusted with pickle); None when it is gone."""
    header = _exactly(channel, SIZE.size)
    body = None if header is None else _exactly(channel, SIZE.unpack(header)[0])
    return None if body is None else pickle.loads(body)


def packed(value: Any) -> bytes:
    """A message from the trainer to a worker."""
    body = pickle.dumps(value)
    return SIZE.pack(len(body)) + body


def answer(channel: socket.socket, message: Mapping[str, Any]) -> None:
    """A message from a worker to the trainer: a line of JSON, since what a worker says is not to be trusted."""
    channel.sendall(json.dumps(message).encode() + b"\n")


def _exactly(channel: socket.socket, num_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = channel.recv(min(num_bytes - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
