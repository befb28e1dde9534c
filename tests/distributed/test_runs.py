"""Whole runs by two processes: the same first rollouts as one, stopped and resumed, ended by an error, and what is refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_lab.distributed.dealing import cuts, own_rows
from grpo_lab.distributed.ranks import Ranks, buckets, joined
from grpo_lab.errors import SetupError
from grpo_lab.padding import length_mask
from grpo_lab.tracking.files import read_json
from grpo_lab.types import Batch

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: shared
num_threads: 1
plugins: [./plugin.py]
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 280}
stages:
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: variety}, {name: remembers, label: counting, weight: 0.1}]
    algorithm: {beta: 0.04, num_iterations: 2, sampling_attempts: 2}
    prompts_per_step: 3
    steps: 3
    optimizer: {learning_rate: 1.0e-2}
    checkpoint: {every: 1, keep: 9}
    evaluation:
      data: {source: task, path: addition, split: test, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 3}}
  tuning:
    kind: sft
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 9}}
    batch_size: 3
    steps: 2
    optimizer: {learning_rate: 1.0e-3}
    evaluation:
      data: {source: task, path: addition, split: test, prompt: prompt, completion: completion, options: {digits: 1, size: 3}}
"""
PLUGIN = Path(__file__).with_name("plugin.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    shutil.copy(PLUGIN, path)
    (path / "shared.yaml").write_text(RECIPE)
    return path


def start(folder: Path, name: str, *arguments: str, torchrun: bool = False) -> subprocess.Popen[str]:
    """`grpo-lab train` by two processes, through `--nproc` or through torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    command = [sys.executable, *launcher, "-m", "grpo_lab", "train", str(folder / "shared.yaml"), "--name", name]
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    return subprocess.Popen(
        [*command, "--output-dir", str(folder), "--quiet", *([] if torchrun else ["--nproc", "2"]), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(run: Path) -> dict[str, bytes]:
    """Every file whose bytes are a function of the recipe."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.json", "timing.jsonl", "events.jsonl")
    }


@pytest.fixture(scope="module")
def uninterrupted(folder) -> Path:
    process = start(folder, "whole")
    assert (process.communicate()[1], process.returncode) == ("", 0)
    return folder / "whole"


@pytest.fixture(scope="module")
def in_pieces(folder) -> Path:
    process = start(folder, "pieces", "distributed.strategy=fsdp2")
    assert (process.communicate()[1], process.returncode) == ("", 0)
    return folder / "pieces"


@pytest.fixture(scope="module")
def stopped(folder) -> tuple[Path, str]:
    """A run whose launcher got SIGTERM during the first steps, and what it said."""
    process, run = start(folder, "stopped"), folder / "stopped"
    while not (run / "grpo" / "checkpoints" / "step-000001" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 75, said
    return run, said


def test_the_first_rollouts_are_those_of_one_process(folder, uninterrupted, in_pieces, cli):
    alone = cli("train", folder / "shared.yaml", "--output-dir", folder, "--name", "alone", "--max-steps", 1, "--quiet")
    assert alone.code == 0, alone.err
    for place in ("rollouts/step-000001.jsonl", "evaluations/step-000000.jsonl"):
        expected = (folder / "alone" / "grpo" / place).read_text()
        assert (uninterrupted / "grpo" / place).read_text() == expected
        assert (in_pieces / "grpo" / place).read_text() == expected
    assert read_json(uninterrupted / "run.json")["environment"]["num_processes"] == 2
    assert read_json(uninterrupted / "run.json")["exact"]


def test_weights_in_pieces_are_saved_as_the_same_files(uninterrupted, in_pieces):
    for place in ("grpo/checkpoints/step-000003", "tuning/checkpoints/step-000002"):
        for name in ("model", "optimizer"):
            mine, theirs = (load_file(run / place / f"{name}.safetensors") for run in (in_pieces, uninterrupted))
            assert {key: value.shape for key, value in mine.items()} == {
                key: value.shape for key, value in theirs.items()
            }
        assert (
            read_json(in_pieces / place / "state.json").keys() == read_json(uninterrupted / place / "state.json").keys()
        )


def test_only_the_first_process_writes(uninterrupted):
    lines = (uninterrupted / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [re.match(r'{"step": (\d)', line)[1] for line in lines] == ["0", "1", "2", "3", "3"]
    state = read_json(uninterrupted / "grpo" / "checkpoints" / "step-000003" / "state.json")["state"]
    drawn = [read_json_count(path) for path in sorted((uninterrupted / "grpo" / "rollouts").iterdir())]
    assert drawn == [12, 12, 12]
    assert state["rewards"]["counting"] >= 36  # groups without signal were drawn and counted, too
    assert not list(uninterrupted.glob(".tmp*"))


def read_json_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_a_signal_to_the_launcher_stops_both_once_it_is_saved(stopped):
    run, said = stopped
    assert re.fullmatch(
        r"error: SIGTERM: stopped after step \d of stage grpo, saved; --resume goes on from here\n", said
    )
    assert read_json(run / "run.json")["status"] == "interrupted"


def test_resumed_by_as_many_processes_it_is_the_same_run_and_torchrun_starts_it_as_well(folder, uninterrupted, stopped):
    process = start(folder, "stopped", "--resume", torchrun=True)
    assert process.communicate()[1].count("error") == 0
    assert process.returncode == 0
    mine, theirs = contents(stopped[0]), contents(uninterrupted)
    for text in ("recipe.yaml", "resolved.yaml"):
        mine.pop(text), theirs.pop(text)
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert read_json(stopped[0] / "run.json")["exact"]


def test_resumed_by_another_number_of_processes_it_says_that_it_is_not_exact(folder, in_pieces, cli):
    run = folder / "fewer"
    shutil.copytree(in_pieces, run)
    for path in (run / "tuning", run / "grpo" / "checkpoints" / "step-000003", run / "grpo" / "final"):
        shutil.rmtree(path)
    (run / "grpo" / "result.json").unlink()
    resolved = (run / "resolved.yaml").read_text()
    (run / "resolved.yaml").write_text(resolved.replace("name: pieces", "name: fewer"))
    found = cli(
        "train",
        folder / "shared.yaml",
        "--output-dir",
        folder,
        "--name",
        "fewer",
        "--resume",
        "--quiet",
        "distributed.strategy=fsdp2",
    )
    assert found.code == 0, found.err
    info = read_json(run / "run.json")
    assert not info["exact"]
    assert "resumed elsewhere: num_processes: was 2, is now 1" in info["inexact_because"]


def test_an_error_in_one_process_ends_both_and_is_said_once(folder):
    process = start(folder, "broken", "stages.grpo.rewards=[{name: broken}]")
    said = process.communicate()[1]
    assert process.returncode == 5
    assert re.fullmatch(r'error: reward "broken" returned 7 values for \d completions; it must return .*\n', said)
    assert read_json(folder / "broken" / "run.json")["status"] == "failed"


def test_a_killed_process_ends_the_other(folder):
    process, run = start(folder, "killed", "stages.grpo.steps=500"), folder / "killed"
    while not (run / "grpo" / "checkpoints" / "step-000001" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        process.wait()
        pytest.skip("needs Linux's list of children")
    second = children.read_text().split()[1]
    os.kill(int(second), signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode in (4, 137)
    assert said.startswith("error: ")
    assert "--resume goes on from the newest checkpoint" in said


# What needs no second process.


def refused(folder, cli, *overrides):
    found = cli("train", folder / "shared.yaml", "--output-dir", folder / "refused", "--quiet", *overrides)
    return found.code, found.err


def test_what_weights_in_pieces_cannot_do_is_refused(folder, cli):
    code, said = refused(
        folder, cli, "distributed.strategy=fsdp2", "model.lora={r: 2}", "stages.tuning.optimizer.name=adamw_8bit"
    )
    assert code == 3
    assert "fsdp2 is for stages in which all weights learn, and grpo learns an adapter; ddp is for those" in said
    assert "stages.tuning.optimizer" in said
    code, said = refused(folder, cli, "distributed.strategy=fsdp2", "stages.grpo.engine=trl")
    assert code == 3
    assert "trl trains in one process here" in said


@pytest.mark.parametrize(
    "name, value, advice",
    [
        ("ACCELERATE_USE_FSDP", "true", "set distributed: {strategy: fsdp2}"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "set model.dtype in the recipe"),
    ],
)
def test_settings_of_accelerate_that_would_do_nothing_are_refused(folder, cli, monkeypatch, name, value, advice):
    monkeypatch.setenv(name, value)
    code, said = refused(folder, cli)
    assert code == 4
    assert advice in said


def test_alone_nothing_is_exchanged():
    with joined() as ranks:
        assert ranks == Ranks()
        assert ranks.gather("x") == ["x"]
        assert ranks.from_first(lambda: 3) == 3
        assert ranks.share(7) == slice(0, 7)
        ones = torch.ones(2)
        ranks.add([ones])
        assert ones.tolist() == [1, 1]
        ranks.refuse_differences("thing", 1)


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([3, 1, 1, 1], 2, [0, 1, 4]),  # 3 against 3
        ([1, 1, 100], 2, [0, 2, 3]),
        ([100, 1, 1], 3, [0, 0, 1, 3]),  # the large one is nobody else's burden
        ([7], 3, [0, 0, 1, 1]),
        ([2] * 6, 3, [0, 2, 4, 6]),
    ],
)
def test_things_are_dealt_in_runs_of_about_equal_size(sizes, count, expected):
    assert cuts(sizes, count) == expected


def test_every_row_belongs_to_one_process_and_no_group_is_split():
    lengths = [9, 1, 1, 1, 2, 2, 5, 5]
    batch = Batch(
        prompt_ids=torch.ones(4, 2, dtype=torch.long),
        prompt_mask=torch.ones(4, 2, dtype=torch.bool),
        prompt_index=torch.arange(4).repeat_interleave(2),
        completion_ids=torch.ones(8, 9, dtype=torch.long),
        completion_mask=length_mask(lengths),
    )
    for world in range(1, 7):
        bounds = [own_rows(batch, Ranks(rank, world)) for rank in range(world)]
        assert [row for start, stop in bounds for row in range(start, stop)] == list(range(8))
        assert all(start % 2 == 0 and stop % 2 == 0 for start, stop in bounds)
    assert own_rows(batch, Ranks(0, 2)) == (0, 4)  # 12 + 4 tokens and 9 + 4 + ... : by tokens, not by rows


def test_messages_hold_one_type_each():
    tensors = [torch.ones(2), torch.ones(1), torch.ones(1, dtype=torch.float64), torch.ones(1)]
    assert [len(bucket) for bucket in buckets(tensors)] == [2, 1, 1]


def test_a_launcher_that_is_not_there_is_no_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert ranks.world == 1


def test_half_a_launcher_is_named(folder, cli, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = refused(folder, cli)
    assert code == 4
    assert "WORLD_SIZE is set, as by torchrun, but:" in said
    assert refused(folder, cli, "--nproc", "3")[0] == 2


def test_processes_that_differ_are_named():
    class Two(Ranks):
        def gather(self, value):
            return [1, value]

    with pytest.raises(SetupError, match="process 1 has another recipe than process 0"):
        Two(0, 2).refuse_differences("recipe", 2)
