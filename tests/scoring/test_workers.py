"""Users' rewards in their own processes: the same values as here, and every fault contained (RELIABILITY R1-R7)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from grpo_lab.errors import RewardError
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import RewardSet, Settings, Workers, bind, discover
from grpo_lab.types import Completion, Example, Group

ROOT = Path(__file__).parents[2]


def groups(*texts, size=4):
    """One group for every `size` texts."""
    completions = [Completion(text, (1, 2), True) for text in texts]
    return [
        Group(Example(f"e{i}", "1+1=", (1,), {"answer": "2"}), tuple(completions[i : i + size]))
        for i in range(0, len(texts), size)
    ]


@pytest.fixture
def rewards(tmp_path):
    """Make the functions of a plugin, by name, rewards in workers; all processes are gone afterwards."""
    made: list[Workers] = []

    def make(source: str, *names: str, **settings) -> RewardSet:
        file = tmp_path / "plugin.py"
        file.write_text(f"import os, signal, time\nfrom grpo_lab.scoring import reward\n\n{dedent(source)}")
        made.append(Workers(Settings(**settings)))
        made[-1].log = tmp_path / "rewards.log"
        return bind([RewardTerm(name=name) for name in names or ("fault",)], discover([file]), made[-1])

    yield make
    for workers in made:
        workers.close()


# What a reward does when it meets the word BAD in one of eight completions, and what must come of it.
EIGHT = ["a", "b", "BAD", "d", "e", "f", "g", "h"]
FAULTS = {
    "raises": ("raise ValueError('no')", "error", "raised ValueError: no (plugin.py:8)"),
    "leaves": ("raise SystemExit(0)", "error", "raised SystemExit: 0 (plugin.py:8)"),
    "sleeps": ("time.sleep(60)", "timeout", "took longer than 1 s (reward_timeout_seconds)"),
    "holds the interpreter's lock": ("sum(range(10**12))", "timeout", "took longer than 1 s"),
    "holds the lock in C": (
        "__import__('ctypes').PyDLL(None).sleep(60)", "timeout", "took longer than 1 s"
    ),
    "ignores SIGTERM": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "timeout", "took longer than 1 s"
    ),
    "exits": ("os._exit(0)", "crashed", "crashed: its process ended with exit code 0"),
    "segfaults": ("__import__('ctypes').string_at(0)", "crashed", "crashed: its process was killed by SIGSEGV"),
    "is interrupted": ("raise KeyboardInterrupt", "crashed", "crashed: its process ended with exit code 1"),
    "eats memory": ("bytearray(2**31)", "crashed", "crashed: its process ran out of memory"),
    "floods the output": (
        "[os.write(1, b'x' * 4096) for _ in iter(int, 1)]", "timeout", "took longer than 1 s"
    ),
    "forks": ("if os.fork(): os.wait()", "ok", ""),
}  # fmt: skip


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_takes_out_its_completion_only_and_the_worker_works_on(rewards, fault, num_workers):
    action, status, reason = FAULTS[fault]
    found = rewards(
        f"""
        @reward
        def fault(completion):
            if completion.text == "BAD": {action}
            return float(len(completion.text))
        """.replace('"BAD": ', '"BAD":\n                '),
        processes=num_workers, timeout_seconds=1.0, memory_gib=0.25,
    )  # fmt: skip
    expected = ["ok", "ok", status, *["ok"] * 5]
    for _ in range(2):  # the second batch needs the worker that took the dead one's place
        scores = found.score(groups(*EIGHT))
        assert [one for row in scores.status["fault"] for one in row] == expected, scores.reasons
        assert scores.total.isnan().flatten().tolist() == [one != "ok" for one in expected]
        assert reason in scores.reasons.get("fault", "")
    assert (found.workers.inexact_because() != []) == (status == "timeout")


def test_no_process_of_a_killed_worker_is_left(rewards, tmp_path):
    """It starts children in its own and in another session before it hangs."""
    found = rewards(
        f"""
        import subprocess

        @reward
        def fault(completion):
            for new_session in (False, True):
                child = subprocess.Popen(["sleep", "100"], start_new_session=new_session)
                with open({str(tmp_path / "pids")!r}, "a") as file:
                    file.write(f"{{child.pid}} ")
            with open({str(tmp_path / "pids")!r}, "a") as file:
                file.write(f"{{os.getpid()}} ")
            time.sleep(100)
        """,
        timeout_seconds=0.5,
    )
    found.score(groups("a", size=1))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_kill_9_of_the_trainer_leaves_no_worker(tmp_path):
    (tmp_path / "plugin.py").write_text(
        "import os, pathlib, ctypes, subprocess\nfrom grpo_lab.scoring import reward\n\n@reward\ndef hang(completion):\n"
        "    child = subprocess.Popen(['sleep', '100'], start_new_session=True)\n"
        "    pathlib.Path('pids').write_text(f'{os.getppid()} {os.getpid()} {child.pid} .')\n"
        "    ctypes.PyDLL(None).sleep(100)\n"
    )
    (tmp_path / "trainer.py").write_text(
        "from grpo_lab.scoring import Settings, Workers, bind, discover\n"
        "from grpo_lab.recipe.schema import RewardTerm\nfrom grpo_lab.types import Completion, Example, Group\n"
        "group = Group(Example('e', '', (), {}), (Completion('', (1,), True),))\n"
        "bind([RewardTerm(name='hang')], discover(['plugin.py']), Workers(Settings())).score([group])\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "trainer.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pids = tmp_path / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().endswith("."), 60)
    trainer.kill()
    trainer.wait()
    started = [int(pid) for pid in pids.read_text().split()[:-1]]
    wait_for(lambda: not any(alive(pid) for pid in started), 10)


def wait_for(fact, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_reward_that_always_hangs_is_given_up_after_three_calls(rewards):
    found = rewards("@reward\ndef fault(completion):\n    time.sleep(60)\n", timeout_seconds=0.3)
    start = time.monotonic()
    scores = found.score(groups(*"abcdefgh"))
    assert scores.status["fault"] == (("timeout",) * 4,) * 2
    assert time.monotonic() - start < 30  # and not the sum of eight deadlines beside the start


def test_user_code_runs_on_the_main_thread_so_signal_alarm_works(rewards):
    found = rewards(
        """
        import threading

        @reward
        def fault(completion):
            def ring(*_): raise TimeoutError
            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                time.sleep(10)
            except TimeoutError:
                return float(threading.current_thread() is threading.main_thread())
        """
    )
    assert found.score(groups("a", "b")).total.tolist() == [[1.0, 1.0]]


def test_math_verify_with_its_own_alarm_works_in_a_worker(rewards):
    found = rewards(
        """
        from math_verify import parse, verify

        @reward
        def fault(completion):
            return float(verify(parse("$2$"), parse(completion.text)))
        """
    )
    assert found.score(groups("$2$", "$3$")).total.tolist() == [[1.0, 0.0]]


def test_a_failing_call_over_a_group_takes_out_its_group_only(rewards):
    found = rewards(
        """
        @reward
        def fault(group):
            if any(c.text == "BAD" for c in group.completions):
                os._exit(3)
            return [1.0] * len(group.completions)
        """
    )
    assert found.score(groups(*EIGHT)).status["fault"] == (("crashed",) * 4, ("ok",) * 4)


def test_a_wrong_number_of_values_ends_the_run_with_both_numbers(rewards):
    found = rewards("@reward\ndef fault(completions, **kwargs):\n    return [1.0] * 7\n")
    with pytest.raises(RewardError, match="returned 7 values for 8 completions"):
        found.score(groups(*EIGHT))


SAME = """
import asyncio
import numpy, torch

@reward
def one(completion, *, answer: str, scale: float = 0.1):
    odd = [True, 3, numpy.float32(0.1), torch.tensor(0.7), None, float("nan"), "1.0", [1.0], 1e30, -0.0]
    return odd[int(completion.text)] if completion.text != "10" else scale / 3

@reward
def siblings(group):
    return [len(group.completions) / 7, None] * (len(group.completions) // 2)

@reward
async def batched(completions, prompts, completion_ids, answer, **kwargs):
    await asyncio.sleep(0)
    return [len(ids) / 3 + len(text) for ids, text in zip(completion_ids, completions)]
"""


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_give_what_calls_in_this_process_give(rewards, num_workers):
    apart = rewards(SAME, "one", "siblings", "batched", processes=num_workers)
    here = RewardSet(apart.terms)
    batch = groups(*map(str, range(10)), "10", "0")
    for _ in range(2):
        a, b = apart.score(batch), here.score(batch)
        assert (a.status, a.reasons) == (b.status, b.reasons)
        assert {status for rows in a.status["one"] for status in rows} == {"ok", "abstained", "non_finite", "bad_type"}
        for name in ("one", "siblings", "batched"):
            assert torch.equal(a.terms[name].nan_to_num(-7.0), b.terms[name].nan_to_num(-7.0))
        assert torch.equal(a.total.nan_to_num(-7.0), b.total.nan_to_num(-7.0))


def test_what_a_reward_prints_goes_to_the_log_and_into_the_reason_of_a_crash(rewards, tmp_path, capfd):
    found = rewards(
        """
        @reward
        def fault(completion):
            print("scoring", completion.text)
            if completion.text == "BAD":
                os.write(2, b"the end is near")
                os._exit(2)
            return 1.0
        """
    )
    scores = found.score(groups(*EIGHT))
    log = (tmp_path / "rewards.log").read_text()
    assert all(f"scoring {text}\n" in log for text in EIGHT)
    assert "the end of what it printed: scoring a scoring b scoring BAD the end is near" in scores.reasons["fault"]
    assert capfd.readouterr() == ("", "")


def test_the_end_of_a_megabyte_a_call_is_kept_and_no_more(rewards, tmp_path):
    found = rewards(
        """
        @reward
        def fault(completion):
            print("x" * 1_200_000)
            print("scored", completion.text)
            return 1.0
        """
    )
    assert found.score(groups(*EIGHT)).total.tolist() == [[1.0] * 4] * 2
    log = (tmp_path / "rewards.log").read_text()
    assert log.endswith("scored h\n")
    assert len(log) < 70_000


ODD = """
import asyncio, multiprocessing, subprocess
import numpy, torch

@reward
async def later(completions, prompts, log_extra, log_metric, trainer_state, **kwargs):
    async def size(text):
        await asyncio.sleep(0.001 * (3 - len(text)))
        return len(text)
    sizes = numpy.array(await asyncio.gather(*map(size, completions)))
    log_extra("size", sizes)
    log_metric("mean", sizes.mean(dtype=numpy.float32))
    return sizes

class Seen:
    def __init__(self): self.counts = {}
    def __call__(self, completion, *, answer: str, rate: float = 0.5):
        self.counts[completion.text] = self.counts.get(completion.text, 0) + 1
        return rate ** self.counts[completion.text]
    def state_dict(self): return self.counts
    def load_state_dict(self, state): self.counts = dict(state)

seen = reward(Seen())

@reward
def ranks(group):
    return numpy.argsort([len(each.text) for each in group.completions]).astype(numpy.int8)

@reward
def half(group):
    return torch.tensor([len(each.text) for each in group.completions], dtype=torch.bfloat16, requires_grad=True) / 2

@reward
def forks(completion):
    if os.fork() == 0:
        os._exit(0)
    if os.fork() == 0:
        return 5.0
    subprocess.Popen(["sleep", "100"], start_new_session=True)
    return 0.25

@reward
def pooled(completions, **kwargs):
    with multiprocessing.Pool(2) as pool:
        return pool.map(len, completions)
"""


def test_odd_plugins_that_keep_the_contract_are_scored(rewards):
    names = ("later", "seen", "ranks", "half", "forks", "pooled")
    scores = rewards(ODD, *names).score(groups("aaa", "b", "aaa", "cc"))
    assert scores.reasons == {}
    assert {name: values[0].tolist() for name, values in scores.terms.items()} == {
        "later": [3.0, 1.0, 3.0, 2.0],
        "seen": [0.5, 0.5, 0.25, 0.5],
        "ranks": [1.0, 3.0, 0.0, 2.0],
        "half": [1.5, 0.5, 1.5, 1.0],
        "forks": [0.25] * 4,
        "pooled": [3.0, 1.0, 3.0, 2.0],
    }
    assert scores.extra == {"size": ((3, 1, 3, 2),)}
    assert scores.logged == {"mean": (2.25,)}


@pytest.mark.parametrize(
    "returned", ["numpy.zeros((4, 1))", "(1.0 for _ in completions)", "{'a': 1.0}", "map(len, completions)"]
)
def test_odd_plugins_that_do_not_are_failures_of_their_call(rewards, returned):
    scores = rewards(f"import numpy\n@reward\ndef fault(completions, **kwargs):\n    return {returned}\n").score(
        groups(*"abcd")
    )
    assert scores.status["fault"] == (("bad_type",) * 4,)


def test_a_plugin_changed_under_way_is_refused(rewards, tmp_path):
    found = rewards("@reward\ndef fault(completion):\n    return 1.0\n")
    (tmp_path / "plugin.py").write_text(
        "from grpo_lab.scoring import reward\n@reward\ndef fault(completion): return 2.0\n"
    )
    with pytest.raises(RewardError, match=r"cannot be loaded in its worker: .*plugin.py was changed"):
        found.score(groups("a", size=1))


def test_a_plugin_that_dies_while_it_is_loaded_ends_the_run_with_what_it_said(rewards, tmp_path):
    found = rewards(
        f"""
        if os.getpid() != {os.getpid()}:
            os.write(2, b"no licence found")
            os._exit(9)

        @reward
        def fault(completion):
            return 1.0
        """
    )
    with pytest.raises(RewardError, match="its process ended with exit code 9. no licence found"):
        found.score(groups("a", size=1))


def test_an_answer_that_no_worker_gives_is_a_crash(rewards):
    """Everything the worker can write to is written to; the trainer takes nothing of it for a value."""
    found = rewards(
        """
        @reward
        def fault(completion):
            if completion.text == "BAD":
                for fd in range(3, 64):
                    try: os.write(fd, b'{"outcomes": 5}\\n{"outcomes": []}\\n')
                    except OSError: pass
            return 1.0
        """
    )
    scores = found.score(groups(*EIGHT))
    assert "crashed" in scores.status["fault"][0]
    assert {one for row in scores.status["fault"] for one in row} <= {"ok", "crashed"}


COUNTER = """
class Counter:
    def __init__(self): self.calls = 0
    def __call__(self, completions, **kwargs):
        if "BAD" in completions: os._exit(1)
        self.calls += len(completions)
        return [float(self.calls)] * len(completions)
    {methods}

counter = Counter()
"""
METHODS = """
    def state_dict(self): return {"calls": self.calls}
    def load_state_dict(self, state): self.calls = state["calls"]
"""


@pytest.fixture
def counter(tmp_path, monkeypatch, rewards):
    """A stateful reward, by dotted path; several processes are asked for, and one is what it must get."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(methods: str) -> RewardSet:
        (tmp_path / f"counting_{len(methods)}.py").write_text("import os\n" + COUNTER.replace("{methods}", methods))
        made.append(Workers(Settings(processes=3)))
        return bind([RewardTerm(name=f"counting_{len(methods)}.counter", label="counter")], discover(), made[-1])

    yield make
    for workers in made:
        workers.close()


def test_a_state_stays_in_its_worker_survives_a_crash_and_goes_on_from_a_checkpoint(counter):
    found = counter(METHODS)
    assert found.score(groups("a", "b")).total.tolist() == [[2.0, 2.0]]
    assert found.score(groups("BAD", "b")).status["counter"] == (("crashed", "crashed"),)
    assert found.score(groups("a", "b")).total.tolist() == [[4.0, 4.0]]
    saved = json.loads(json.dumps(found.state_dict()))
    assert saved == {"counter": {"calls": 4}}
    again = counter(METHODS)
    again.load_state_dict(saved)
    assert again.score(groups("a", "b")).total.tolist() == [[6.0, 6.0]]
    assert found.inexact_because() == again.inexact_because() == []


def test_a_state_that_no_checkpoint_can_keep_makes_the_run_inexact(counter):
    assert counter("").inexact_because() == [
        'reward "counter" is an object without state_dict and load_state_dict: what it remembers is lost on resume'
    ]


@pytest.mark.parametrize("state", ["{1, 2}", "float('nan')", "1 / 0"])
def test_a_state_that_cannot_be_had_ends_the_run(counter, state):
    found = counter(METHODS.replace('{"calls": self.calls}', state))
    with pytest.raises(RewardError, match=r'reward "counter": state_dict\(\) must give JSON values: '):
        found.score(groups("a"))


def test_a_stop_request_while_a_reward_hangs_waits_for_the_deadline_only(rewards):
    """The first signal asks for the end of the step; system calls that it interrupts go on."""
    found = rewards("@reward\ndef fault(completion):\n    time.sleep(60)\n", timeout_seconds=0.5)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        assert found.score(groups("a", size=1)).status["fault"] == (("timeout",),)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
