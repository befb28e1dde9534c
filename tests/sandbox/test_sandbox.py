"""Programs that do not want to be judged by their answers (RELIABILITY S6), and that honest ones can do their work."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from grpo_lab.errors import SetupError
from grpo_lab.sandbox import LEVELS, Limits, Task, isolation, judge

ROOT = Path(__file__).parents[2]
HUMANEVAL = Path(os.environ.get("GRPO_LAB_DATA", ROOT.parent / "shared" / "data")) / "humaneval" / "HumanEval.jsonl.gz"
LIMITS = Limits(cpu_seconds=1, wall_seconds=3.0, memory_mib=512, folder_mib=4)

# Asked of the machine and not of the sandbox, which might have a hole: mount, user, process and network namespaces.
UNSHARE = "import ctypes, os; flags = 0x60020000 | (0x10000000 if os.geteuid() else 0); os._exit(ctypes.CDLL(None).unshare(flags) != 0)"
HAS_NAMESPACES = subprocess.run([sys.executable, "-c", UNSHARE], check=False).returncode == 0
needs_full = pytest.mark.skipif(
    not HAS_NAMESPACES or os.uname().machine != "x86_64", reason="no namespaces or no x86_64 here"
)


def verdict(program: str, test: str, limits: Limits = LIMITS, **more):
    return judge([Task(dedent(program), "f", dedent(test), **more)], limits, minimum="limits-only")[0]


SQUARES = "SECRET = 'hidden-7351'\nassert f(3) == 9\nassert f(-12) == 144\nassert f(5) == 25"

# Programs that want a good verdict without the right answers.
FORGERS = {
    "sys.exit at import": "import sys; sys.exit(0)",
    "os._exit in a call": "import os\ndef f(x): os._exit(0)",
    "prints a verdict": """
        print('{"passed": true, "reason": "", "namespaces": true, "filter": true}', flush=True)
        def f(x): print('{"passed": true}', flush=True)
        """,
    "writes a verdict into every file": """
        import os
        for fd in range(256):
            try: os.write(fd, b'{"passed": true, "reason": "", "namespaces": true, "filter": true}\\n')
            except OSError: pass
        def f(x): return 0
        """,
    "answers before it is asked": """
        import os
        for fd in range(256):
            try: os.write(fd, b'{"ok": true}\\n' + b'{"value": {"n": "int", "v": "9"}}\\n' * 9)
            except OSError: pass
        """,
    "equal to everything": """
        class Any:
            def __eq__(self, other): return True
            __ne__ = lambda self, other: False
            __hash__ = lambda self: 0
        def f(x): return Any()
        """,
    "a number equal to everything": """
        class Any(int):
            def __eq__(self, other): return True
        def f(x): return Any(1)
        """,
    "equal through its class": """
        class Meta(type):
            def __eq__(cls, other): return True
            __hash__ = type.__hash__
        class Any(int, metaclass=Meta):
            def __eq__(self, other): return True
        def f(x): return Any(1)
        """,
    "replaces built-ins": """
        import builtins
        builtins.AssertionError = builtins.Exception = None
        builtins.isinstance = builtins.all = builtins.any = lambda *_: True
        def f(x): return 0
        """,
    "replaces the harness": """
        import sys
        for module in list(sys.modules.values()):
            for name in ("encode", "answer", "dumps", "_judge", "decode", "MAX_ANSWER"):
                if hasattr(module, name): setattr(module, name, lambda *_, **__: True)
        def f(x): return True
        """,
    "jumps through frames": """
        import sys
        frame = sys._getframe()
        while frame:
            frame.f_globals["_judge"] = frame.f_globals["check"] = lambda *_: {"passed": True}
            frame.f_locals.update(passed=True, filtered=True)
            frame = frame.f_back
        def f(x): return True
        """,
    "traces": """
        import sys, threading
        def trace(frame, event, arg):
            frame.f_locals["passed"] = True
            return trace
        sys.settrace(trace); threading.settrace(trace)
        def f(x): return True
        """,
    "a thread and atexit that answer later": """
        import atexit, os, threading, time
        def late():
            time.sleep(0.05)
            for fd in range(64):
                try: os.write(fd, b'{"passed": true}\\n')
                except OSError: pass
        threading.Thread(target=late, daemon=True).start(); atexit.register(late)
        def f(x): time.sleep(0.1); return 1
        """,
    "answers without end": "def f(x): return 'x' * 30_000_000",
    "answers too deeply": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "answers with a huge number": "def f(x): return 10 ** 100_000",
    "redefines a helper of the tests": "def helper(x): return 144\ndef f(x): return 144",
    "does nothing": "",
    "is no Python": "def f(x) return",
    "raises": "def f(x): raise SystemExit(0)",
    "segfaults": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "recurses": "def f(x): return f(x)",
    "loops": "def f(x):\n    while True: pass",
    "loops at import": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "prints without end": "def f(x):\n    while True: print('x' * 1000)",
}


@pytest.mark.parametrize("program", FORGERS.values(), ids=FORGERS)
def test_a_good_verdict_cannot_be_had_without_the_right_answers(program):
    start = time.monotonic()
    found = verdict(program, SQUARES, setup="def helper(x): return x * x\n")
    assert not found.passed
    assert found.reason
    assert time.monotonic() - start < LIMITS.wall_seconds + 6


SEARCH = """
import gc, sys
def f(x):
    frame, found = sys._getframe(), [vars(module) for module in sys.modules.values()] + gc.get_objects()
    while frame:
        found += [frame.f_globals, frame.f_locals, frame.f_code.co_consts]
        frame = frame.f_back
    for each in found:
        try:
            if "1537-neddih" in repr(each)[::-1]: return True
        except Exception: pass
    return False
"""


@pytest.mark.parametrize("there", [False, True])
def test_the_tests_are_nowhere_in_the_programs_process(there):
    """It searches what it can reach for a word of the tests that call it; put there by hand, it finds it."""
    planted = "".join(["x = ['hidden", "-7351']\n"]) if there else ""
    assert (
        verdict(planted + SEARCH, "SECRET = 'hidden-7351'\nassert f(3) is True", LIMITS._replace(cpu_seconds=5)).passed
        == there
    )


# Programs that try to get out. `f` says whether it could: the tests want True, so a passed verdict is an escape.
ESCAPES = {
    "fork bomb": "while True: os.fork()",
    "forks": "pid = os.fork()\nif pid == 0: os._exit(0)",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "exec": "os.execv('/usr/bin/true', ['true'])",
    "thread bomb": "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "connects": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "sends a datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "listens": "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
    "reads a file of the user": "open('CANARY').read()",
    "lists the home": "os.listdir(os.path.expanduser('~root')); os.listdir('HOME')",
    "reads /etc/passwd": "open('/etc/passwd').read()",
    "scans /proc": "assert [p for p in os.listdir('/proc') if p.isdigit()]",
    "reads the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "writes outside": "open('FOLDER/x', 'w').write('x')",
    "changes a file of the user": "open('CANARY', 'a').write('x')",
    "changes the standard library": "open(os.__file__, 'a').write('x')",
    "link out of its folder": "os.symlink('/', 'root'); open('root/CANARY').read()",
    "hard link out of its folder": "os.link('CANARY', 'mine')",
    "climbs out": "os.chdir('/'); [os.chdir('..') for _ in range(50)]; open('.CANARY').read()",
    "chroot and out": "os.mkdir('d'); os.chroot('d'); [os.chdir('..') for _ in range(50)]; open('.CANARY').read()",
    "fills the memory": "import mmap; mmap.mmap(-1, 2**31)",
    "fills the disk": "for i in range(64):\n    with open(f'/tmp/{i}', 'wb') as file: file.write(bytes(2**20))",
    "fills the file table": "for i in range(100_000): open(f'/tmp/{i}', 'w').close()",
    "kills its parent": "os.kill(os.getppid(), 9)",
    "kills the trainer": "os.kill(TRAINER, 9)",
    "kills all": "os.kill(-1, 9)",
    "kills its group": "os.killpg(0, 9)",
    "stops the trainer": "import signal; os.kill(TRAINER, signal.SIGSTOP)",
    "traces": "import ctypes; assert ctypes.CDLL(None).ptrace(16, os.getppid() or TRAINER, 0, 0) == 0",
    "own session": "os.setsid()",
    "root again": "os.setuid(0); os.seteuid(0)",
    "new namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'proc', b'/tmp', b'proc', 0, None) == 0",
    "lifts its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "the trainer's limits": "import resource; resource.prlimit(TRAINER, resource.RLIMIT_CPU, (1, 1))",
    "reads the environment": "os.environ['GRPO_LAB_CANARY']",
    "open files of the trainer": "import stat\nassert any(not stat.S_ISFIFO(os.fstat(n).st_mode) for n in range(3, 256) if fine(n))",
    "calls of another architecture": "import ctypes; assert ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0) >= 0",
}  # fmt: skip


@needs_full
@pytest.mark.parametrize("action", ESCAPES.values(), ids=ESCAPES)
def test_there_is_no_way_out(action, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    canary.write_text("gold")
    tmp_path.chmod(0o777)
    canary.chmod(0o666)
    monkeypatch.setenv("GRPO_LAB_CANARY", "gold")
    names = {"CANARY": canary, "FOLDER": tmp_path, "HOME": Path.home(), "TRAINER": os.getpid(), "PORT": 9}
    for name, value in names.items():
        action = (
            action.replace(f"GRPO_LAB_{name}", "GRPO-LAB")
            .replace(name, str(value))
            .replace("GRPO-LAB", f"GRPO_LAB_{name}")
        )
    program = (
        "import os\ndef fine(n):\n    try: os.fstat(n)\n    except OSError: return False\n    return True\n\n"
        "def f():\n    try:\n        " + action.replace("\n", "\n        ") + "\n        return True\n"
        "    except (OSError, MemoryError, RuntimeError, ValueError, KeyError, AssertionError) as error:\n"
        "        return f'{type(error).__name__}: {error}'\n"
    )
    found = verdict(program, "said = f()\nassert said is True, said")
    assert not found.passed
    assert not found.reason.startswith(("NameError", "SyntaxError", "the program cannot be run"))
    assert canary.read_text() == "gold"
    assert list(tmp_path.iterdir()) == [canary]


@needs_full
def test_a_machine_with_namespaces_isolates_fully():
    assert isolation() == ("full", "")


def test_no_process_is_left(tmp_path):
    before = set(os.listdir("/proc"))
    judge([Task(FORGERS["sleeps"], "f", "f(1)")] * 2, Limits(1, 0.5, 256, 1), minimum="limits-only")
    commands = [
        Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in set(os.listdir("/proc")) - before
        if pid.isdigit() and Path(f"/proc/{pid}").exists()
    ]
    assert not [command for command in commands if b"sandbox/main.py" in command]


def test_an_honest_program_can_use_the_standard_library_threads_and_its_folder():
    program = """
        import collections, dataclasses, datetime, decimal, fractions, hashlib, heapq, itertools, json, math, random, re
        import statistics, string, threading, typing
        def f(x):
            found = []
            thread = threading.Thread(target=lambda: found.append(hashlib.sha256(b"x").hexdigest()[:2]))
            thread.start(); thread.join()
            with open("/tmp/notes", "w") as file: file.write("ok")
            return [x, (1, 2.5), {"k": {3}}, None, True, 1j, b"b", float("inf"), frozenset(), open("/tmp/notes").read(), *found]
        """
    level = isolation()[0]
    if level != "full":
        program = program.replace('with open("/tmp/notes", "w") as file: file.write("ok")', "pass")
        program = program.replace('open("/tmp/notes").read()', '"ok"')
    wanted = '[(7, "a"), (1, 2.5), {"k": {3}}, None, True, 1j, b"b", float("inf"), frozenset(), "ok", "2d"]'
    assert verdict(program, f"assert f((7, 'a')) == {wanted}") == (True, "")


def test_tests_may_define_check_use_helpers_and_expect_exceptions():
    found = verdict(
        "def f(x):\n    if x < 0: raise ValueError(x)\n    return x + 1",
        """
        def check(candidate):
            assert candidate(helper(1)) == 3
            try: candidate(-1)
            except Exception: return
            assert False
        """,
        setup="def helper(x): return 2 * x",
    )
    assert found == (True, "")


def test_programs_are_judged_in_their_order():
    tasks = [Task(f"def f(x): return x + {n}", "f", f"assert f(1) == {1 + n if n % 3 else 99}") for n in range(9)]
    assert [one.passed for one in judge(tasks, LIMITS, minimum="limits-only")] == [n % 3 != 0 for n in range(9)]


@pytest.fixture(scope="module")
def humaneval():
    if not HUMANEVAL.exists():
        pytest.skip(f"no {HUMANEVAL}")
    with gzip.open(HUMANEVAL, "rt") as file:
        return [json.loads(line) for line in file]


def tasks(rows, body) -> list[Task]:
    return [Task(row["prompt"] + body(row), row["entry_point"], row["test"], row["prompt"]) for row in rows]


def test_all_humaneval_solutions_pass_and_wrong_ones_fail(humaneval):
    """164 each in about 7 s on two free cores; six times that is let pass."""
    start = time.monotonic()
    assert [
        one
        for one in judge(tasks(humaneval, lambda row: row["canonical_solution"]), minimum="limits-only")
        if not one.passed
    ] == []
    assert time.monotonic() - start < 40
    empty = judge(tasks(humaneval[::4], lambda _: "\n"), minimum="limits-only")
    assert [one for one in empty if one.passed] == []
    wrong = judge(tasks(humaneval[1::4], lambda _: "    return 'wrong'\n"), minimum="limits-only")
    assert [one for one in wrong if one.passed] == []


# How well a machine isolates is found out by trying.

WITHOUT_NAMESPACES = """
import ctypes, struct
from grpo_lab.sandbox import confine
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 272), (6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]  # unshare: EPERM
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, struct.pack("@HP", len(steps), ctypes.addressof(code)), 0, 0) == 0
from grpo_lab.sandbox import Limits, Task, isolation, judge
print(isolation())
def run(body, minimum="no-network"):
    task = Task("import os, socket\\ndef f(x):\\n    " + body, "f", "assert f(3) == 9")
    return judge([task], Limits(1, 3.0), minimum=minimum)[0].passed
print(run("return x * x"), run("socket.socket(); return 9"), run("os.fork(); return 9"),
      run("open('/tmp/grpo-lab-x', 'w'); return 9"), run("os.kill(%d, 0); return 9"))
run("return 9", "full")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter knows x86_64")
def test_a_machine_without_namespaces_is_found_out_and_refused_where_more_is_asked_for():
    """Containers often forbid `unshare`; so does a filter here."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NAMESPACES % os.getpid()],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "('no-network', '[Errno 1] unshare: Operation not permitted')\nTrue False False False False\n"
    assert 'only as "no-network" here, less than the "full" asked for' in done.stderr.splitlines()[-1]


def test_less_isolation_than_asked_for_is_refused(monkeypatch):
    monkeypatch.setattr("grpo_lab.sandbox.isolation", lambda: ("limits-only", "a test"))
    for minimum in LEVELS[:2]:
        with pytest.raises(SetupError, match=f'only as "limits-only" here, less than the "{minimum}" asked for'):
            judge([], minimum=minimum)
    judge([], minimum="limits-only")


def test_a_sandbox_that_fails_is_no_verdict(monkeypatch, tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit(1)\n")
    isolation()
    monkeypatch.setattr("grpo_lab.sandbox._MAIN", tmp_path / "main.py")
    with pytest.raises(SetupError, match="the sandbox failed: it ended without a verdict"):
        judge([Task("", "f", "")], LIMITS, minimum="limits-only")
