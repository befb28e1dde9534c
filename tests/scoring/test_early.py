"""Scoring while sampling goes on: the same scores as after it, every fault contained, nothing left behind."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import chain
from pathlib import Path
from random import Random
from textwrap import dedent
from threading import Thread

import pytest
from rich.console import Console

from grpo_lab.assemble import assemble
from grpo_lab.errors import RecipeError, RewardError, SetupError
from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.sampling import NativeSampler
from grpo_lab.scoring import RewardSet, Settings, Workers, bind, discover
from grpo_lab.scoring.early import EarlyCalls
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.types import Completion, Example, Group

EIGHT = ["a", "bb", "BAD", "dddd", "e", "f", "gg", "h"]


def groups(*texts, size=4):
    """One group for every `size` texts; the last example has no column "answer"."""
    completions = [Completion(text, (1, 2), True) for text in texts]
    starts = range(0, len(texts), size)
    return [
        Group(Example(f"e{i}", "", (1,), {"answer": "2"} if i != 8 else {}), tuple(completions[i : i + size]))
        for i in starts
    ]


@pytest.fixture
def rewards(tmp_path) -> Iterator:
    """Make the functions of a plugin, by name, rewards in workers."""
    made: list[Workers] = []

    def make(source: str, *terms: RewardTerm, **settings) -> RewardSet:
        file = tmp_path / "plugin.py"
        file.write_text(f"import os, time\nfrom grpo_lab.scoring import reward\n\n{dedent(source)}")
        made.append(Workers(Settings(**settings)))
        return bind(terms or [RewardTerm(name="fault")], discover([file]), made[-1])

    yield make
    for workers in made:
        workers.close()


def told(found: RewardSet, batch, order, *, until_scored: bool = True):
    """What `found` begins when it is told of these rows one after the other; waits until all that began has an outcome."""
    rows = list(chain.from_iterable(group.completions for group in batch))
    early = found.early([group.example for group in batch], len(batch[0].completions))
    for row in order:
        early({row: rows[row]})
    begun = [early.of(term) for term in found.early_terms]
    if until_scored:
        wait_for(lambda: early({}) or all(calls.outcomes.keys() == calls.jobs.keys() for calls in begun))
    return early


def wait_for(fact, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_same(a, b) -> None:
    assert (a.status, a.reasons, a.weights, a.extra, a.logged) == (b.status, b.reasons, b.weights, b.extra, b.logged)
    assert a.terms.keys() == b.terms.keys()
    for mine, theirs in [(a.total, b.total), *((a.terms[name], b.terms[name]) for name in a.terms)]:
        assert mine.numpy().tobytes() == theirs.numpy().tobytes()


ALL_KINDS = """
@reward
def one(completion, *, answer: str):
    return {"a": 0.1, "BAD": float("nan"), "e": None}.get(completion.text, len(completion.text) / 3)

@reward
def siblings(group):
    return [len(each.text) / 7 for each in group.completions]

@reward
def gated(completion):
    return 0.5 if completion.text != "BAD" else 1 / 0

@reward
def whole(completions, log_extra, log_metric, **kwargs):
    log_extra("size", [len(text) for text in completions])
    log_metric("calls", 1)
    return [len(text) / 9 for text in completions]

class Memory:
    def __init__(self): self.calls = 0
    def __call__(self, completion):
        self.calls += 1
        return float(self.calls)
    def state_dict(self): return self.calls
    def load_state_dict(self, state): self.calls = state

memory = reward(Memory())
"""
TERMS = [
    RewardTerm(name="one"),
    RewardTerm(name="siblings", weight=0.5),
    RewardTerm(name="siblings", label="gated_siblings", only_if="one"),
    RewardTerm(name="gated", only_if="siblings"),
    RewardTerm(name="whole"),
    RewardTerm(name="memory"),
]


@pytest.mark.parametrize("num_told", [12, 7, 0])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_scores_are_those_of_calls_after_sampling_whatever_ends_when(rewards, num_workers, num_told):
    """Also if only some answers were told of, and without a column. A state sees its calls in the rows' order."""
    batch = groups(*EIGHT, "a", "b", "cc", "d")
    found, early = [rewards(ALL_KINDS, *TERMS, processes=num_workers) for _ in range(2)]
    assert [term.label for term in found.early_terms] == ["one", "siblings", "gated_siblings"]
    for step in range(2):
        order = Random(step).sample(range(12), num_told)
        scores = early.score(batch, early=told(early, batch, order))
        assert_same(scores, found.score(batch))
        assert {"ok", "abstained", "non_finite", "error"} == set(chain.from_iterable(scores.status["one"]))
    assert early.state_dict() == found.state_dict() == {"memory": 24}


def test_no_call_is_made_twice_and_none_is_left_out(rewards, tmp_path):
    source = f"""
    @reward
    def fault(completion):
        with open({str(tmp_path / "calls")!r}, "a") as file: file.write(completion.text + " ")
        return 1.0
    """
    found, batch = rewards(source, processes=2), groups(*"abcdefgh")
    early = told(found, batch, [5, 0, 3])
    assert sorted((tmp_path / "calls").read_text().split()) == ["a", "d", "f"]
    found.score(batch, early=early)
    assert sorted((tmp_path / "calls").read_text().split()) == [*"abcdefgh"]


FAULTS = {
    "raises": ("raise ValueError('no')", "error"),
    "sleeps": ("time.sleep(60)", "timeout"),
    "holds the interpreter's lock": ("sum(range(10**12))", "timeout"),
    "exits": ("os._exit(3)", "crashed"),
    "wrong type": ("return 'x'", "bad_type"),
}


@pytest.mark.parametrize("scope", ["completion", "group"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_during_sampling_takes_out_what_it_would_afterwards(rewards, fault, scope):
    action, status = FAULTS[fault]
    texts = "[completion.text]" if scope == "completion" else "[each.text for each in group.completions]"
    source = f"""
    @reward
    def fault({scope}):
        texts = {texts}
        if "BAD" in texts:
            {action}
        return float(len(texts)) if {scope == "completion"} else [1.0] * len(texts)
    """
    found, batch = rewards(source, processes=2, timeout_seconds=0.5), groups(*EIGHT)
    for order in ([5, 2, 0, 1, 3, 4, 7, 6], [2, 3]):  # the second step needs the process that took the dead one's place
        scores = found.score(batch, early=told(found, batch, order))
        assert_same(scores, found.score(batch))
        assert scores.status["fault"][0][2] == status
        assert scores.status["fault"][1] == ("ok",) * 4
    assert (found.workers.inexact_because() != []) == (status == "timeout")


def test_a_reward_that_always_hangs_is_given_up_after_three_calls_also_for_answers_still_to_come(rewards):
    found, batch = rewards("@reward\ndef fault(completion):\n    time.sleep(60)\n", timeout_seconds=0.2), groups(*EIGHT)
    early = told(found, batch, [7, 1, 0])
    scores = found.score(batch, early=early)
    outcomes = early.of(found.early_terms[0]).outcomes
    assert scores.status["fault"] == (("timeout",) * 4,) * 2
    called = {row for row, (outcome,) in outcomes.items() if outcome.reason.startswith("took longer than 0.2 s")}
    assert called == {7, 1, 0}
    assert all("was not called: 3 calls in a row" in outcomes[row][0].reason for row in {2, 3, 4, 5, 6})


def test_a_reward_that_breaks_its_contract_ends_the_run_while_sampling_goes_on(rewards):
    found, batch = rewards("@reward\ndef fault(group):\n    return [1.0] * 3\n"), groups(*EIGHT)
    with pytest.raises(RewardError, match="returned 3 values for 4 completions"):
        told(found, batch, range(4))


def test_values_of_other_answers_than_the_sampler_gave_are_refused(rewards):
    found = rewards("@reward\ndef fault(completion):\n    return 1.0\n")
    early = told(found, groups(*EIGHT), [0])
    with pytest.raises(ValueError, match="told another answer 0 than it gave"):
        found.score(groups("z", *EIGHT[1:]), early=early)


def test_calls_that_nobody_waits_for_end_with_the_workers_or_with_the_next_step(rewards, tmp_path):
    pid = tmp_path / "pid"
    source = f"""
    @reward
    def fault(completion):
        if completion.text == "BAD":
            with open({str(pid)!r}, "w") as file: file.write(f"{{os.getpid()}} .")
            time.sleep(100)
        return 1.0
    """
    found = rewards(source)

    def left() -> int:
        pid.unlink(missing_ok=True)
        told(found, groups(*EIGHT), [2], until_scored=False)
        wait_for(lambda: pid.exists() and pid.read_text().endswith("."))
        return int(pid.read_text().split()[0])

    def gone(number: int) -> bool:
        return not Path(f"/proc/{number}").exists()

    running = left()
    assert not gone(running)
    found.workers.close()  # as the end of a stage does, whatever ended it
    assert gone(running)

    running = left()
    assert found.score(groups(*"abcd")).total.tolist() == [[1.0] * 4]
    assert gone(running)


def test_a_machine_that_lacks_something_is_said_as_it_is_in_the_trainer(rewards):
    found = rewards("""
    from grpo_lab.errors import SetupError

    @reward
    def fault(completion):
        raise SetupError("pip install something")
    """)
    with pytest.raises(SetupError, match="pip install something"):
        told(found, groups(*EIGHT), [0])


class Judge(BaseHTTPRequestHandler):
    """A server that finds longer questions better."""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        reply = json.dumps({"choices": [{"message": {"content": f"Score: {len(asked) % 10}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


def test_code_and_judge_are_called_early_too_in_a_process_without_the_deadline_of_users_rewards():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    terms = [
        RewardTerm(name="code", options={"allow_code_execution": True, "minimum_isolation": "none"}),
        RewardTerm(name="judge", options={"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m"}),
        RewardTerm(name="length", options={"target": 2}),
    ]
    texts = ["def f(x): return 2 * x", "def f(x): return x", "def f(x): return x + x", "1 / 0"]
    columns = {"test": "def check(c):\n    assert c(3) == 6", "entry_point": "f"}
    batch = [
        Group(Example(f"e{i}", "", (1,), columns), tuple(Completion(text, (1, 2), True) for text in texts[i : i + 2]))
        for i in (0, 2)
    ]
    with Workers(Settings(timeout_seconds=0.01, memory_gib=0.001)) as workers, closing(server.socket):
        found = bind(terms, discover([]), workers)
        assert [term.label for term in found.early_terms] == ["code", "judge"]
        scores = found.score(batch, early=told(found, batch, [3, 0, 1, 2]))
        assert_same(scores, found.score(batch))
        server.shutdown()
    assert scores.terms["code"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert len(set(scores.terms["judge"].flatten().tolist())) > 1


RECIPE = """
name: early
plugins: [./slow.py]
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64}
  tokenizer: {vocab_size: 280}
stages:
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 8, max_rows: 4}
    rewards: [{name: slow}, {name: length, options: {target: 3}}]
    algorithm: {beta: 0.0, sampling_attempts: 2}
    prompts_per_step: 3
    steps: 2
    reward_workers: 2
    score_while_sampling: true
    optimizer: {learning_rate: 1.0e-3}
    evaluation: {data: {source: task, path: addition, split: test, prompt: prompt, options: {digits: 1, size: 2}}, every: 1}
"""
SLOW = """
import os, time
from grpo_lab.scoring import reward

@reward
def slow(completion):
    with open(os.path.join(os.path.dirname(__file__), "began"), "a") as file:
        file.write(f"{time.monotonic()} {os.getpid()}\\n")
    time.sleep(0.05)
    return 1.0
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path / "recipe.yaml"


def train(recipe: Path, *overrides: str) -> Path:
    loaded = load(recipe, [f"output_dir={recipe.parent}/runs", *overrides])
    return train_recipe(loaded, RECIPE, go_on=False, console=Console(file=StringIO()), quiet=True) / "grpo"


def began(recipe: Path) -> list[tuple[float, int]]:
    """When each call began, and in which process."""
    lines = [line.split() for file in recipe.parent.rglob("began") for line in file.read_text().splitlines()]
    return [(float(start), int(pid)) for start, pid in lines]


def test_in_a_run_calls_begin_before_the_sampling_of_their_step_has_ended(recipe, monkeypatch):
    """In every round of dynamic sampling: the sampler is made to wait for a call once the first group has ended."""
    spans: list[tuple[float, float]] = []
    sample = NativeSampler.sample_telling

    def waiting(self, examples, listener, *, num_generations, seed, first_group=0):
        start, rows = time.monotonic(), set()

        def tell(ended) -> None:
            listener(ended)
            rows.update(ended)
            if len(rows) == num_generations and ended:
                wait_for(lambda: listener({}) or any(call > start for call, _ in began(recipe)))

        found = sample(self, examples, tell, num_generations=num_generations, seed=seed)
        if isinstance(listener, EarlyCalls):
            spans.append((start, time.monotonic()))
        return found

    monkeypatch.setattr(NativeSampler, "sample_telling", waiting)
    folder = train(recipe)
    assert len(spans) == 4  # two steps, two rounds each, as no group has a signal
    assert all(any(start < call < end for call, _ in began(recipe)) for start, end in spans)
    metrics = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert [line["rewards/slow/mean"] for line in metrics] == [1.0, 1.0]
    messages = [line["message"] for line in read_jsonl(folder / "events.jsonl")]
    assert "called while sampling goes on: slow; other rewards after it" in messages


def test_sampling_that_fails_in_a_run_leaves_no_process(recipe, monkeypatch):
    sample = NativeSampler.sample_telling

    def failing(self, examples, listener, *, num_generations, seed, first_group=0):
        before = len(began(recipe))

        def tell(ended) -> None:
            listener(ended)
            if ended and isinstance(listener, EarlyCalls):
                wait_for(lambda: listener({}) or len(began(recipe)) > before)
                raise RuntimeError("out of memory")

        return sample(self, examples, tell, num_generations=num_generations, seed=seed)

    monkeypatch.setattr(NativeSampler, "sample_telling", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(recipe, "stages.grpo.evaluation=null")
    assert began(recipe)
    assert not any(Path(f"/proc/{pid}").exists() for _, pid in began(recipe))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sampling.backend=hf", 'score_while_sampling: sampling.backend "hf" tells of no answer early; set native'),
        ("rewards=[{name: length}]", "score_while_sampling: no reward here can be called early"),
        (
            "rewards=[{name: length}, {name: slow, only_if: length}]",
            "score_while_sampling: no reward here can be called early",
        ),
        ("engine=trl", 'score_while_sampling: engine "trl": GRPOTrainer scores when a step\'s sampling is over'),
    ],
)
def test_a_recipe_in_which_nothing_could_begin_early_is_refused(recipe, override, problem):
    with pytest.raises(RecipeError) as error:
        assemble(load(recipe, [f"stages.grpo.{override}"]))
    assert any(problem in each for each in error.value.problems), error.value.problems


def test_several_processes_are_refused(recipe):
    with pytest.raises(RecipeError, match="score_while_sampling: several processes score when all have sampled"):
        assemble(load(recipe), num_processes=2)
