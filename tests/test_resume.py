"""The promise: same recipe, same machine, same versions, the same bytes, also after kill -9 and resume.

One toy run is trained without interruption. Others are stopped or killed for real, each in a forked process, at every
step and at the writes between steps; what they leave in the end must be the same bytes.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from grpo_lab.cli import main
from grpo_lab.data.tasks import task_rows
from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load
from grpo_lab.tracking.files import read_json, read_jsonl
from grpo_lab.tracking.run_folder import RunFolder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the promise of equal bytes is for CPUs")

# Two passes over two mini-batches, micro-batches that do not divide them, an epoch of 2.5 steps, dropout in the warm
# start, evaluations in between; every checkpoint is kept, to be compared.
RECIPE = """\
name: whole
num_threads: 1
plugins: [./variety.py]
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true, attention_dropout: 0.1}
  tokenizer: {vocab_size: 280}
stages:
  warm_start:
    kind: sft
    data: {source: file, path: demonstrations.jsonl, prompt: prompt, completion: completion}
    batch_size: 8
    micro_batch_size: 3
    steps: 3
    optimizer: {learning_rate: 2.0e-3, schedule: linear, warmup_steps: 1}
    checkpoint: {every: 1, keep: 99}
    evaluation: {data: {source: file, path: demonstrations.jsonl, prompt: prompt, completion: completion, limit: 5}, every: 2}
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: variety}, {name: accuracy}, {name: ending, weight: 0.3}, {name: differing}]
    algorithm: {beta: 0.04, num_iterations: 2, num_minibatches: 2}
    prompts_per_step: 4
    micro_batch_size: 5
    steps: 12
    optimizer: {learning_rate: 3.0e-3, schedule: cosine, weight_decay: 0.01}
    checkpoint: {every: 1, keep: 99}
    evaluation:
      data: {source: task, path: addition, split: test, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 4}}
      every: 5
"""
PLUGIN = """\
from grpo_lab.scoring import reward

class Variety:
    "Different tokens, and a little that depends on all that was scored before: its state must survive, and its notes."

    def __init__(self):
        self.calls = 0

    def __call__(self, completion_ids, log_extra, log_metric, trainer_state, **kwargs):
        variety = [len(set(ids)) / 8.0 for ids in completion_ids]
        place = [self.calls + index + 1 for index in range(len(variety))]
        self.calls += len(variety)
        log_extra("place", place)
        log_metric("done", trainer_state.global_step / trainer_state.max_steps)
        return [value + 0.1 * (number % 7) for value, number in zip(variety, place)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

variety = reward(Variety())

@reward
def ending(completion):
    "One answer at a time, so that it can be called while others are sampled; it fails on some."
    if sum(completion.token_ids) % 16 == 0:
        raise ValueError("sixteen")
    return (sum(completion.token_ids) % 5) / 5

@reward
def differing(group):
    return [len({each.token_ids for each in group.completions}) / 4] * len(group.completions)
"""
STEPS = {"warm_start": 3, "grpo": 12}
NOT_COMPARED = {"timing.jsonl", "events.jsonl", "run.json", "recipe.yaml", "resolved.yaml", ".lock"}


@dataclass(frozen=True)
class World:
    """A folder with the recipe, its plugin, its data and its runs; `whole` is trained without interruption."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def whole(self) -> Path:
        return self.folder / "runs" / "whole"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(self, *overrides: str, recipe: Path | None = None) -> Path:
        """Train in this process, going on where there is something to go on with."""
        loaded = load(recipe or self.recipe, [f"output_dir={self.folder}/runs", *overrides])
        return train_recipe(loaded, RECIPE, go_on=True, console=Console(file=io.StringIO()), quiet=True)

    def train_forked(self, *overrides: str, meanwhile: Callable[[], None]) -> int:
        """`grpo-lab train --resume` in a forked process that first prepares what happens `meanwhile`; its exit code."""
        child = os.fork()
        if child == 0:
            code = 99
            try:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
                sys.argv = [
                    "grpo-lab",
                    "train",
                    f"{self.recipe}",
                    *overrides,
                    f"output_dir={self.folder}/runs",
                    "--resume",
                ]
                meanwhile()
                main()
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    made.recipe.write_text(RECIPE)
    (made.folder / "variety.py").write_text(PLUGIN)
    rows = task_rows("addition", split="train", options={"digits": 1, "size": 20})
    (made.folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.train()
    return made


@pytest.fixture
def scratch(world, tmp_path) -> Iterator[World]:
    """The world, to be spoilt: it is put back afterwards."""
    shutil.copytree(world.folder, tmp_path / "backup")
    yield world
    shutil.rmtree(world.folder)
    shutil.copytree(tmp_path / "backup", world.folder)


def content(folder: Path) -> dict[str, str]:
    """The sha256 of every file that is a function of the recipe; checkpoints apart, they come and go."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(found.items())
        if path.name not in NOT_COMPARED and "checkpoints" not in path.parts
    }


def newest_checkpoint(run: Path, stage: str) -> Path:
    return max((run / stage / "checkpoints").glob("step-*"))


def assert_same_run(run: Path, whole: Path) -> None:
    """Same bytes, no step missing or twice in any log, nothing left over, the last checkpoint included."""
    assert content(run) == content(whole)
    for stage, steps in STEPS.items():
        last = f"{stage}/checkpoints/step-{steps:06d}"
        assert newest_checkpoint(run, stage) == run / last
        assert content_of_checkpoint(run / last) == content_of_checkpoint(whole / last)
        assert [line["step"] for line in read_jsonl(run / stage / "timing.jsonl")] == list(range(1, steps + 1))
    leftovers = [path for path in run.rglob("*") if path.name.startswith(".tmp-")]
    assert leftovers == []
    assert read_json(run / "run.json")["status"] == "finished"
    assert read_json(run / "run.json")["exact"] is True


def content_of_checkpoint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def before(event: str, place: str, act: Callable[[], object], *, number: int = 1) -> Callable[[], None]:
    """Act just before the n-th file operation of a kind on a path that contains `place`.

    `event` is the operation's audit event; opening a file is `read` or `write`.
    """
    left = [number]

    def watch(name: str, details: tuple[Any, ...]) -> None:
        kind = ("read" if details[1] == "r" else "write") if name == "open" else name
        if kind == event and place in str(details[0]):
            left[0] -= 1
            if left[0] == 0:
                act()

    return lambda: sys.addaudithook(watch)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_toy_run_learns_in_every_step_so_that_equal_bytes_mean_something(world):
    lines = [line for line in read_jsonl(world.whole / "grpo" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 12
    assert all(line["grad_norm"] > 0 and line["kl"] >= 0 for line in lines)
    checkpoints = sorted((world.whole / "grpo" / "checkpoints").iterdir())
    assert read_json(world.whole / "run.json")["exact"] is True  # its stateful reward is in every checkpoint:
    calls = [read_json(path / "state.json")["state"]["rewards"]["variety"]["calls"] for path in checkpoints]
    assert len(set(calls)) == 12
    assert len({content_of_checkpoint(path)["model.safetensors"] for path in checkpoints}) == 12


def test_a_users_reward_gives_the_same_run_in_its_own_process_and_in_this_one(world, monkeypatch):
    """Its values, what it logs, where it sees training stand, and its state. All other tests resume the one apart."""
    monkeypatch.setattr("grpo_lab.scoring.reward_set.is_users", lambda term: False)
    run = world.train("name=here")
    assert_same_run(run, world.whole)
    lines = [line for line in read_jsonl(run / "grpo" / "metrics.jsonl") if "loss" in line]
    assert [line["lab/logged/done"] for line in lines] == [step / 12 for step in range(12)]
    rows = read_jsonl(run / "grpo" / "rollouts" / "step-000001.jsonl")
    assert [row["extra"]["place"] for row in rows] == list(
        range(9, 25)
    )  # after the eight held-out answers before step 1


def test_rewards_called_while_sampling_goes_on_give_the_same_run_also_after_a_stop_and_kill_9(world):
    early = "stages.grpo.score_while_sampling=true"
    stop = before("write", "grpo/timing.jsonl", terminate, number=3)
    assert world.train_forked("name=early", early, meanwhile=stop) == 75
    lost = before("write", "grpo/metrics.jsonl", kill, number=4)
    assert world.train_forked("name=early", early, meanwhile=lost) == -signal.SIGKILL
    assert_same_run(world.train("name=early", early), world.whole)
    statuses = [
        set(row["status"].values()) for row in read_jsonl(world.whole / "grpo" / "rollouts" / "step-000001.jsonl")
    ]
    assert {"ok"} in statuses


def test_stopped_in_every_step_each_checkpoint_and_the_end_are_the_uninterrupted_ones(world):
    run = world.run("stopped")
    for stage, steps in STEPS.items():
        for step in range(1, steps + 1):
            stop = before("write", f"{stage}/timing.jsonl", terminate)
            assert world.train_forked("name=stopped", meanwhile=stop) == 75, f"{stage} {step}"
            assert read_json(run / "run.json")["status"] == "interrupted"
            newest = newest_checkpoint(run, stage)
            assert newest.name == f"step-{step:06d}"
            expected = content_of_checkpoint(world.whole / stage / "checkpoints" / newest.name)
            assert content_of_checkpoint(newest) == expected, f"{stage} {step}"
            log = (run / stage / "metrics.jsonl").read_bytes()
            assert (world.whole / stage / "metrics.jsonl").read_bytes().startswith(log), f"{stage} {step}"
    world.train("name=stopped")
    assert_same_run(run, world.whole)


def test_killed_in_every_step_the_lost_steps_are_redone_alike(world):
    """With a checkpoint every second step, kill -9 in step 1, 2 (before it is saved), 3, ..."""
    overrides = ["name=killed", "stages.grpo.checkpoint.every=2", "stages.grpo.checkpoint.keep=2"]
    for step in range(1, 13):
        saved = max(0, step - 2) // 2 * 2  # by the process before, which was killed in the step before
        in_step = before("write", "grpo/timing.jsonl", kill, number=step - saved)
        assert world.train_forked(*overrides, meanwhile=in_step) == -signal.SIGKILL
        logged = read_jsonl(world.run("killed") / "grpo" / "timing.jsonl") if step > 1 else []
        assert [line["step"] for line in logged] == list(range(1, step))
    world.train(*overrides)
    assert_same_run(world.run("killed"), world.whole)


WRITES = [
    ("os.mkdir", ".tmp-base"),
    ("write", "warm_start/metrics.jsonl"),
    ("write", "warm_start/checkpoints/.tmp-step-000002/.tmp-state.json"),
    ("os.rename", "warm_start/checkpoints/.tmp-step-000003"),
    ("os.mkdir", "warm_start/.tmp-final"),
    ("write", "warm_start/.tmp-result.json"),
    ("write", "grpo/evaluations/.tmp-step-000000.jsonl"),
    ("os.rename", "grpo/rollouts/.tmp-step-000001.jsonl"),
    ("write", "grpo/metrics.jsonl"),
    ("write", "grpo/checkpoints/.tmp-step-000004/.tmp-manifest.json"),
    ("os.rename", "grpo/checkpoints/.tmp-step-000004"),
    ("os.rename", "grpo/evaluations/.tmp-step-000005.jsonl"),
    ("shutil.rmtree", "grpo/checkpoints/step-000003"),
    ("os.rename", "grpo/.tmp-final"),
    ("os.rename", "grpo/.tmp-result.json"),
]


def test_killed_at_writes_all_over_the_run_it_ends_alike(world):
    overrides = ["name=at-writes", "stages.grpo.checkpoint.keep=2"]
    for event, place in WRITES:
        code = world.train_forked(*overrides, meanwhile=before(event, place, kill))
        assert code == -signal.SIGKILL, f"never came to {event} {place}"
    world.train(*overrides)
    assert_same_run(world.run("at-writes"), world.whole)


def on_call(place: str, act: Callable[[], None]) -> Callable[[], None]:
    """Act when a function of ours, `module:Class.name`, is first entered."""
    module, _, path = place.partition(":")

    def prepare() -> None:
        owner, name = sys.modules[module], path
        while "." in name:
            part, _, name = name.partition(".")
            owner = vars(owner)[part]
        original = vars(owner)[name]

        def entered(*arguments: Any, **options: Any) -> Any:
            if vars(owner)[name] is entered:
                setattr(owner, name, original)
                act()
            return original(*arguments, **options)

        setattr(owner, name, entered)

    return prepare


MOMENTS = {
    "load": before("read", "config.json", terminate),
    "learning from demonstrations": on_call("grpo_lab.stages.sft:negative_log_likelihood", interrupt),
    "held-out loss": on_call("grpo_lab.stages.sft:measure_rows", terminate),
    "the end of a stage": before("os.mkdir", ".tmp-final", interrupt),
    "sampling": on_call("grpo_lab.sampling.shared:SharedPromptDecoder._write", terminate),
    "rewards": on_call("grpo_lab.scoring.reward_set:call", interrupt),
    "log-probs": on_call("grpo_lab.engines.native:with_logps", terminate),
    "backward": on_call("grpo_lab.engines.learner:Learner._count", interrupt),
    "evaluation": on_call("grpo_lab.stages.grpo:measure_policy", terminate),
    "save": before("write", ".tmp-state.json", interrupt),
}


def test_sigterm_and_ctrl_c_at_any_moment_save_and_resume_alike(world):
    codes = {moment: world.train_forked("name=signals", meanwhile=meanwhile) for moment, meanwhile in MOMENTS.items()}
    assert codes == {
        "load": 75,
        "learning from demonstrations": 130,
        "held-out loss": 75,
        "the end of a stage": 130,
        "sampling": 75,
        "rewards": 130,
        "log-probs": 75,
        "backward": 130,
        "evaluation": 75,
        "save": 130,
    }
    world.train("name=signals")
    assert_same_run(world.run("signals"), world.whole)


def test_the_second_ctrl_c_ends_the_run_at_once(world):
    def twice() -> None:
        interrupt()
        interrupt()

    at_once = on_call("grpo_lab.sampling.shared:SharedPromptDecoder._write", twice)
    assert world.train_forked("name=twice", meanwhile=at_once) == -signal.SIGINT
    assert not (world.run("twice") / "grpo" / "timing.jsonl").exists()


def test_a_stop_says_how_to_go_on(world, cli, monkeypatch):
    original = vars(sys.modules["grpo_lab.stages.grpo"])["measure_policy"]

    def stopped(*arguments, **options):
        terminate()
        return original(*arguments, **options)

    monkeypatch.setattr("grpo_lab.stages.grpo.measure_policy", stopped)
    ran = cli("train", world.recipe, "--output-dir", world.folder / "runs", "--name", "says", "--quiet")
    assert (ran.code, ran.out) == (75, "")
    assert ran.err == "error: SIGTERM: stopped after step 1 of stage grpo, saved; --resume goes on from here\n"


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # before any run


def test_the_handlers_of_signals_are_given_back(world):
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


def unfinish(run: Path) -> None:
    """As if it had been killed after the last checkpoint."""
    (run / "grpo" / "result.json").unlink()
    shutil.rmtree(run / "grpo" / "final")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_left_out_and_that_is_said(scratch, cli):
    as_it_was = content(scratch.whole)
    unfinish(scratch.whole)
    newest = scratch.whole / "grpo" / "checkpoints" / "step-000012"
    flip(newest / "optimizer.safetensors")
    ran = cli("train", scratch.recipe, f"output_dir={scratch.folder}/runs", "--resume", "--quiet")
    assert ran.code == 0
    assert ran.err == (
        f"grpo warning at step 11: checkpoint left out: {newest}/optimizer.safetensors: its bytes changed: sha256 is "
        "not the one in manifest.json\n"
    )
    assert content(scratch.whole) == as_it_was
    events = read_jsonl(scratch.whole / "grpo" / "events.jsonl")
    assert [event["kind"] for event in events][-3:-1] == ["warning", "info"]
    assert events[-2]["message"] == "resumed from step-000011"


def test_without_a_readable_checkpoint_the_resume_is_refused_and_the_first_bad_file_named(scratch, cli):
    unfinish(scratch.whole)
    folder = scratch.whole / "grpo" / "checkpoints"
    for checkpoint in folder.iterdir():
        flip(checkpoint / "model.safetensors")
    ran = cli("train", scratch.recipe, f"output_dir={scratch.folder}/runs", "--resume", "--quiet")
    assert ran.code == 7
    assert ran.err == (
        f"error: {folder}: none of 12 checkpoints can be read: {folder}/step-000012/model.safetensors: its bytes "
        "changed: sha256 is not the one in manifest.json; start again under another --name\n"
    )
    assert read_json(scratch.whole / "run.json")["status"] == "failed"
    assert len(read_jsonl(scratch.whole / "grpo" / "timing.jsonl")) == 12  # nothing was cut off the logs


def test_a_damaged_result_of_an_earlier_stage_is_not_built_upon(scratch, cli):
    unfinish(scratch.whole)
    model = scratch.whole / "warm_start" / "final" / "model.safetensors"
    flip(model)
    ran = cli("train", scratch.recipe, f"output_dir={scratch.folder}/runs", "--resume", "--quiet")
    assert (ran.code, ran.err) == (
        7,
        f"error: {model}: its bytes changed: sha256 is not the one in manifest.json\n",
    )


def test_a_changed_recipe_is_refused_with_the_difference(world, cli):
    about = (world.whole / "run.json").read_bytes()
    ran = cli(
        "train", world.recipe, f"output_dir={world.folder}/runs", "--resume", "stages.grpo.optimizer.learning_rate=1"
    )
    assert ran.code == 7
    assert ran.err.startswith(
        f"error: {world.whole}: cannot be resumed, something changed since it began; undo it or start another run with "
        "--name:\n--- the run's recipe\n+++ the recipe now\n"
    )
    changed = [line.strip() for line in ran.err.splitlines()[3:] if line[0] in "+-"]
    assert [line[0] + line[1:].strip() for line in changed] == ["-learning_rate: 0.003", "+learning_rate: 1.0"]
    assert (world.whole / "run.json").read_bytes() == about


def test_changed_data_are_refused(scratch, cli):
    with (scratch.folder / "demonstrations.jsonl").open("a") as file:
        file.write('{"prompt": "1+1=", "completion": "3"}\n')
    ran = cli("train", scratch.recipe, f"output_dir={scratch.folder}/runs", "--resume")
    assert ran.code == 7
    assert "\ndata.stages.warm_start: was " in ran.err
    assert "grpo" not in ran.err.partition("--name:")[2]


def test_a_changed_reward_is_refused(scratch, cli):
    (scratch.folder / "variety.py").write_text(PLUGIN.replace("/ 8.0", "/ 8.0 + 0.5"))
    ran = cli("train", scratch.recipe, f"output_dir={scratch.folder}/runs", "--resume")
    assert ran.code == 7
    assert [line.partition(":")[0] for line in ran.err.splitlines()[1:]] == [
        "plugins.variety.py",
        "rewards.grpo.variety",
        "rewards.grpo.ending",
        "rewards.grpo.differing",
    ]


def test_two_processes_cannot_train_in_one_folder(world, cli):
    with RunFolder.open(world.whole):
        ran = cli("train", world.recipe, f"output_dir={world.folder}/runs", "--resume")
    assert ran.code == 3
    assert ran.err == f"error: {world.whole}: is in use by process {os.getpid()}; wait for it or stop it\n"


def test_a_finished_run_resumed_does_nothing_and_shows_what_came_of_it(world, cli):
    written = {path: path.stat().st_mtime_ns for path in world.whole.rglob("*") if "final" in path.parts}
    log = (world.whole / "grpo" / "metrics.jsonl").read_bytes()
    ran = cli("train", world.recipe, f"output_dir={world.folder}/runs", "--resume")
    assert ran.code == 0
    assert (
        ran.err
        == "warm_start info at step 3: finished before, skipped\ngrpo info at step 12: finished before, skipped\n"
    )
    assert "grpo: held-out, 4 prompts" in ran.out
    assert f"run:   {world.whole}  (" in ran.out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (world.whole / "grpo" / "metrics.jsonl").read_bytes() == log


def test_another_thread_count_than_the_run_began_with_makes_it_inexact(scratch):
    info = read_json(scratch.whole / "run.json")
    info["environment"]["num_threads"] = 7
    (scratch.whole / "run.json").write_text(json.dumps(info))
    scratch.train()
    after = read_json(scratch.whole / "run.json")
    assert (after["status"], after["exact"]) == ("finished", False)
    assert after["inexact_because"] == ["resumed elsewhere: num_threads: was 7, is now 1"]


def test_the_resolved_recipe_trains_the_same_run_under_another_name_without_the_plugins_original(scratch):
    (scratch.folder / "variety.py").unlink()
    again = scratch.train("name=again", recipe=scratch.whole / "resolved.yaml")
    assert again == scratch.run("again")
    assert_same_run(again, scratch.whole)


def test_another_seed_is_another_run(world):
    short = ["stages.warm_start.steps=1", "stages.grpo.steps=1"]
    runs = [world.train(f"name=seed-{seed}", f"seed={seed}", *short) for seed in (0, 1)]
    first, second = (content(run) for run in runs)
    assert first.keys() == second.keys()
    differ = {name for name in first if first[name] != second[name]}
    assert {
        "base/model.safetensors",
        "warm_start/metrics.jsonl",
        "grpo/metrics.jsonl",
        "grpo/rollouts/step-000001.jsonl",
    } <= differ


@pytest.mark.slow
def test_a_real_process_killed_from_outside_goes_on_elsewhere(world):
    """No fork, no shape checks, another process: the same bytes."""
    code = "import sys; from grpo_lab.cli import main; main()"
    command = ["train", f"{world.recipe}", "--output-dir", f"{world.folder}/runs", "--name", "outside"]
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
    log = world.run("outside") / "grpo" / "timing.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert read_json(world.run("outside") / "run.json")["status"] == "running"
    world.train("name=outside")
    assert_same_run(world.run("outside"), world.whole)
