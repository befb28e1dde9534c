"""The two processes of a sandbox: the judge, which runs the tests, and the program that is judged.

The program's process is forked before the judge has read the tests, has no way to it but two pipes, and is sent only the
arguments of calls. It answers with plain values, which the judge builds anew from text: an object with an `__eq__` of its
own cannot come through. So the only way to a good verdict is to answer the calls as the tests want it. Both processes
are shut in (confine.py). Imported by main.py in a bare interpreter; standard library only.
"""

import json
import os
import select
import signal
import time
import traceback

if __package__:
    from grpo_lab.sandbox.confine import (
        close_all_but,
        die_with_parent,
        drop_privileges,
        enter_namespaces,
        filter_calls,
        probe,
        set_limits,
    )
else:  # in the sandbox, where there is no grpo_lab
    from confine import (  # type: ignore[import-not-found,no-redef]
        close_all_but,
        die_with_parent,
        drop_privileges,
        enter_namespaces,
        filter_calls,
        probe,
        set_limits,
    )

MAX_ANSWER = 1 << 20  # bytes of one answer
MAX_DEPTH = 50
_PLAIN = (type(None), bool, str)


class Ended(BaseException):
    """The program's process is gone, out of time, or answers nonsense; no test may catch it."""


def main() -> None:
    """Read a job from standard input, write its verdict to standard output, as JSON lines."""
    verdicts = os.dup(1)
    jobs = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    settings = json.loads(_line(jobs))  # limits only; the tests are read after the fork
    facts = {"namespaces": True, "filter": False, "why": ""}
    try:
        enter_namespaces(settings["folder_bytes"])
    except OSError as error:
        facts.update(namespaces=False, why=str(error))
    to_program, to_judge = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        _program(to_program[0], to_judge[1], settings, facts["namespaces"])
    os.close(to_program[0])
    os.close(to_judge[1])
    signal.alarm(int(settings["wall_seconds"]) + 2)  # should the trainer be gone
    drop_privileges()
    program = Program(pid, to_program[1], to_judge[0], time.monotonic() + settings["wall_seconds"])
    try:
        facts["filter"] = program.hear()["filter"]
        set_limits(
            cpu_seconds=int(settings["wall_seconds"]) + 2,
            memory_bytes=settings["memory_bytes"],
            file_bytes=0,
            open_files=64,
        )
        if facts["filter"]:
            filter_calls(may_write=False, may_kill=True)
    except (Ended, OSError, ValueError) as error:
        verdict = {"sandbox": f"{error}"}
    else:
        verdict = _judge(program, json.loads(_line(jobs)))
    program.kill()
    os.write(verdicts, json.dumps({**verdict, **facts}).encode() + b"\n")
    os._exit(0)


def _line(fd: int) -> bytes:
    """One line, read byte for byte as far as its end only: what follows is not for a process forked in between."""
    size = int.from_bytes(os.read(fd, 8), "big")
    parts = b""
    while len(parts) < size:
        part = os.read(fd, size - len(parts))
        if not part:
            os._exit(1)
        parts += part
    return parts


# The judge


class Program:
    """The judge's view of the program: calls go out as text, answers come back as text, before the deadline."""

    def __init__(self, pid: int, to: int, back: int, deadline: float) -> None:
        self.pid, self.to, self.back, self.deadline = pid, to, back, deadline
        self.buffer = b""

    def ask(self, request: dict) -> dict:  # type: ignore[type-arg]
        """Send a line and wait for one.

        Raises:
            Ended: there is none, or none that could be meant.
        """
        try:
            data = json.dumps(request).encode() + b"\n"
            while data:
                self._wait(writing=True)
                data = data[os.write(self.to, data[:4096]) :]
        except BrokenPipeError:
            raise Ended("the program ended before the tests did") from None
        return self.hear()

    def hear(self) -> dict:  # type: ignore[type-arg]
        """Wait for a line of its own; raises as `ask` does."""
        while b"\n" not in self.buffer:
            self._wait(writing=False)
            part = os.read(self.back, 1 << 16)
            if not part:
                raise Ended("the program ended before the tests did")
            self.buffer += part
            if len(self.buffer) > MAX_ANSWER:
                raise Ended("the program answered with too much")
        line, self.buffer = self.buffer.split(b"\n", 1)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise Ended("the program answered with nonsense") from None
        if not isinstance(answer, dict):
            raise Ended("the program answered with nonsense")
        return answer

    def _wait(self, *, writing: bool) -> None:
        left = self.deadline - time.monotonic()
        ready = select.select([] if writing else [self.back], [self.to] if writing else [], [], max(0.0, left))
        if not any(ready):
            raise Ended("timeout")

    def call(self, *args: object, **kwargs: object) -> object:
        """The entry point, as the tests see it."""
        answer = self.ask({"args": encode(args), "kwargs": encode(kwargs)})
        if "raised" in answer:
            raise RuntimeError(str(answer["raised"])[:200])
        try:
            return decode(answer["value"])
        except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
            raise Ended(f"the program answered with nonsense: {error}") from None

    def kill(self) -> None:
        os.close(self.to)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _judge(program: Program, job: dict) -> dict:  # type: ignore[type-arg]
    """Run the tests with the entry point standing for the program's."""
    if job["test"] is None:
        return {"passed": True, "reason": "", "probe": program.ask({"probe": True})}
    names: dict[str, object] = {"__name__": "tests"}
    try:
        compiled = [compile(job[part], f"<{part}>", "exec") for part in ("setup", "test")]
        exec(compiled[0], names)
        names[job["entry_point"]] = program.call
        loaded = program.ask({"load": job["program"], "entry_point": job["entry_point"]})
        if loaded.get("ok") is not True:
            return {"passed": False, "reason": f"the program cannot be run: {str(loaded.get('raised'))[:200]}"}
        exec(compiled[1], names)
        check = names.get("check")
        if callable(check):
            check(program.call)
    except Ended as ended:
        return {"passed": False, "reason": str(ended)}
    except AssertionError as error:
        return {"passed": False, "reason": f"a test failed{_at(error)}: {str(error)[:200]}".removesuffix(": ")}
    except BaseException as error:  # noqa: BLE001 - whatever a test dies of, it did not pass
        return {"passed": False, "reason": f"{type(error).__name__}{_at(error)}: {str(error)[:200]}"}
    return {"passed": True, "reason": ""}


def _at(error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<test>"]
    return f" (line {lines[-1]} of the tests)" if lines else ""


# Values as text


def encode(value: object, depth: int = 0) -> object:
    """A plain value as JSON, types kept: lists and tuples differ, subclasses of plain types are refused."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if kind in _PLAIN:
        return value
    if kind is int or kind is float:
        return {"n": kind.__name__, "v": repr(value)}
    if kind is complex:
        return {"n": "complex", "v": [repr(value.real), repr(value.imag)]}
    if kind is bytes:
        return {"n": "bytes", "v": value.hex()}
    if kind in (list, tuple, set, frozenset):
        return {"n": kind.__name__, "v": [encode(each, depth + 1) for each in value]}
    if kind is dict:
        return {"n": "dict", "v": [[encode(key, depth + 1), encode(each, depth + 1)] for key, each in value.items()]}
    raise TypeError(f"a value of type {kind.__name__} cannot be passed between the tests and the program")


def decode(found: object) -> object:
    """The value anew, of plain types only."""
    if type(found) in _PLAIN:
        return found
    name, value = found["n"], found["v"]  # type: ignore[index]
    if name == "dict":
        return {decode(key): decode(each) for key, each in value}
    if name == "complex":
        return complex(float(value[0]), float(value[1]))
    if name in ("list", "tuple", "set", "frozenset"):
        kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        return kinds[name]([decode(each) for each in value])
    return {"int": int, "float": float, "bytes": bytes.fromhex}[name](value)


# The program


def _program(requests: int, answers: int, settings: dict, alone: bool) -> None:  # type: ignore[type-arg]
    """The program's process: shut in, then whatever the program makes of it."""
    try:
        close_all_but(requests, answers)
        drop_privileges()
        die_with_parent()
        set_limits(
            cpu_seconds=settings["cpu_seconds"],
            memory_bytes=settings["memory_bytes"],
            file_bytes=settings["folder_bytes"],
            open_files=32,
        )
        try:
            filter_calls(may_write=alone)
            filtered = True
        except OSError:
            filtered = False
        answer(answers, {"filter": filtered})
        names: dict[str, object] = {"__name__": "program"}
        entry_point = None
        for line in os.fdopen(requests, "rb", closefd=False):
            request = json.loads(line)
            try:
                if "probe" in request:
                    found = probe()
                elif "load" in request:
                    entry_point = request["entry_point"]
                    exec(compile(request["load"], "<program>", "exec"), names)
                    found = {"ok": True}
                else:
                    result = names[entry_point](*decode(request["args"]), **decode(request["kwargs"]))  # type: ignore
                    found = {"value": encode(result)}
            except Exception as error:  # noqa: BLE001 - the program's own failure
                found = {"raised": f"{type(error).__name__}: {error}"}
            answer(answers, found)
    finally:
        os._exit(1)


def answer(fd: int, message: object) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]
