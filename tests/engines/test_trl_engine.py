"""A recipe with `engine: trl` from the command line: the run folder, checkpoints of TRL's with our manifest, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lab.engines import trl_config
from grpo_lab.engines.trl import plain_generation
from grpo_lab.engines.trl_rollouts import as_trl_prompt, check_same_tokens
from grpo_lab.errors import RecipeError
from grpo_lab.recipe import load
from grpo_lab.stages.running import StopSignal
from grpo_lab.tracking.files import read_json, read_jsonl
from grpo_lab.tracking.folders import verify_folder
from grpo_lab.types import Example

RECIPE = """\
name: toy
num_threads: 1
plugins: [./share.py, ./plugin.py]
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, attention_dropout: 0.1}
  tokenizer: {vocab_size: 280}
stages:
  grpo:
    kind: grpo
    engine: trl
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: share}, {name: accuracy, weight: 0.5}, {name: remembers, label: counted, weight: 0.0}]
    algorithm: {beta: 0.04, num_iterations: 2, num_minibatches: 2}
    prompts_per_step: 4
    micro_batch_size: 5
    steps: 6
    optimizer: {learning_rate: 3.0e-3, schedule: cosine}
    checkpoint: {every: 2, keep: 2}
    evaluation:
      data: {source: task, path: addition, split: test, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 4}}
      every: 3
"""
PLUGIN = """\
from pathlib import Path
import signal
import os
from grpo_lab.scoring import reward

calls = [0]

@reward
def share(completion):
    "The share of tokens with an odd number."
    ask = Path(__file__).with_name("ask")
    calls[0] += 1
    at, trainer = map(int, ask.read_text().split()) if ask.exists() else (0, 0)
    if calls[0] == at:
        os.kill(trainer, signal.SIGTERM)
    return sum(token % 2 for token in completion.token_ids) / len(completion.token_ids)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "share.py").write_text(PLUGIN)
    shutil.copy(Path(__file__).parents[1] / "distributed" / "plugin.py", folder)
    return folder


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """A run of six steps without interruption."""
    return run(world, "whole")


def run(world: Path, name: str, *overrides: str) -> Path:
    import io

    from rich.console import Console

    from grpo_lab.pipeline import train_recipe

    loaded = load(world / "recipe.yaml", [f"output_dir={world}/runs", f"name={name}", *overrides])
    return train_recipe(loaded, RECIPE, go_on=True, console=Console(file=io.StringIO()), quiet=True)


@pytest.fixture
def copied(world, finished) -> Path:
    """The finished run as if it had been killed after its fifth step, under another name."""
    path = world / "runs" / "whole"
    backup = world / "backup"
    shutil.copytree(path, backup)
    (path / "grpo" / "result.json").unlink()
    shutil.rmtree(path / "grpo" / "final")
    shutil.rmtree(path / "grpo" / "checkpoints" / "checkpoint-24")
    yield path
    shutil.rmtree(path)
    shutil.move(backup, path)


def test_the_run_folder_is_that_of_every_engine(finished):
    stage = finished / "grpo"
    lines = read_jsonl(stage / "metrics.jsonl")
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_jsonl(stage / "timing.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert {"sample_seconds", "score_seconds", "learn_seconds"} <= read_jsonl(stage / "timing.jsonl")[0].keys()
    assert [line["step"] for line in lines if "eval_greedy/reward/mean" in line] == [0, 3, 6]
    assert sorted(path.name for path in (stage / "evaluations").iterdir()) == [
        f"step-00000{n}.jsonl" for n in (0, 3, 6)
    ]
    for step in range(1, 7):
        rows = read_jsonl(stage / "rollouts" / f"step-{step:06d}.jsonl")
        assert len(rows) == 16
        assert [rows[first]["example"] for first in range(0, 16, 4)] == list(
            dict.fromkeys(row["example"] for row in rows)
        )
        assert sum(row["total"] for row in rows) / 16 == pytest.approx(steps[step - 1]["reward"])
    assert read_json(stage / "result.json") == {"steps": 6}


def test_the_final_model_loads_with_transformers_and_has_learnt(finished):
    final = AutoModelForCausalLM.from_pretrained(finished / "grpo" / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "grpo" / "final")
    base = AutoModelForCausalLM.from_pretrained(finished / "base")
    moved = [float((a - b).detach().abs().max()) for a, b in zip(final.parameters(), base.parameters(), strict=True)]
    assert max(moved) > 1e-3
    assert tokenizer.chat_template
    assert final.config.attention_dropout == 0.1
    assert final.generation_config.eos_token_id == base.generation_config.eos_token_id
    assert str(finished) not in (finished / "grpo" / "final" / "config.json").read_text()
    verify_folder(finished / "grpo" / "final")


def test_the_run_says_that_it_is_not_exact_and_why(finished):
    info = read_json(finished / "run.json")
    assert (info["status"], info["exact"], info["inexact_because"]) == ("finished", False, [trl_config.INEXACT])
    assert info["environment"]["versions"]["trl"] == trl_config.VERSION


def test_trl_s_checkpoints_have_our_manifest_and_the_newest_are_kept(finished):
    folders = sorted((finished / "grpo" / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in folders] == ["checkpoint-16", "checkpoint-24"]  # four optimiser steps in each step
    for path in folders:
        verify_folder(path)
        assert "optimizer.pt" in json.loads((path / "manifest.json").read_text())["files"]


def test_the_learning_rate_is_the_recipe_s(finished):
    from grpo_lab.engines.learner import learning_rate

    settings = load(finished / "resolved.yaml", []).recipe.stages["grpo"].optimizer
    rates = [line["learning_rate"] for line in read_jsonl(finished / "grpo" / "metrics.jsonl") if "reward" in line]
    assert rates == pytest.approx([learning_rate(settings, 4 * step + 3, 24) for step in range(6)], rel=1e-12)


def test_resume_goes_on_from_the_last_checkpoint_with_the_next_prompts(world, copied):
    whole = world / "backup"
    run(world, "whole")
    for name in ("timing.jsonl", "metrics.jsonl"):
        mine, other = ([line["step"] for line in read_jsonl(path / "grpo" / name)] for path in (copied, whole))
        assert mine == other  # no step missing or twice
    for step in range(1, 7):
        mine, other = (
            [row["example"] for row in read_jsonl(path / "grpo" / "rollouts" / f"step-{step:06d}.jsonl")]
            for path in (copied, whole)
        )
        assert mine == other
    lines = [line for line in read_jsonl(copied / "grpo" / "metrics.jsonl") if "reward" in line]
    expected = [line for line in read_jsonl(whole / "grpo" / "metrics.jsonl") if "reward" in line]
    assert lines[:4] == expected[:4]
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in expected]
    assert lines[4]["kl"] == pytest.approx(expected[4]["kl"], rel=0.5)  # to the stage's start, not to the checkpoint
    assert read_json(copied / "run.json")["status"] == "finished"
    states = [read_json(path / "grpo" / "checkpoints" / "checkpoint-24" / "rewards.json") for path in (copied, whole)]
    assert states == [{"counted": 6 * 16 + 3 * 4 * 2}] * 2  # six steps, and three evaluations, greedy and sampled


def test_a_damaged_checkpoint_is_left_out_and_one_cut_short_is_no_checkpoint(world, copied):
    shutil.copytree(copied / "grpo" / "checkpoints" / "checkpoint-16", copied / "grpo" / "checkpoints" / "checkpoint-8")
    damaged = copied / "grpo" / "checkpoints" / "checkpoint-16" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    short = copied / "grpo" / "checkpoints" / "checkpoint-20"
    short.mkdir()
    (short / "model.safetensors").write_bytes(b"half")
    _make_checkpoint_of_step(copied, 8)
    run(world, "whole")
    messages = [line["message"] for line in read_jsonl(copied / "grpo" / "events.jsonl")]
    assert any("checkpoint left out" in message and "optimizer.pt" in message for message in messages)
    assert "resumed from checkpoint-8" in messages
    assert not short.exists()
    assert [line["step"] for line in read_jsonl(copied / "grpo" / "timing.jsonl")] == [1, 2, 3, 4, 5, 6]
    for path in (copied / "grpo" / "checkpoints").glob("checkpoint-*"):
        verify_folder(path)


def _make_checkpoint_of_step(path: Path, updates: int) -> None:
    """Turn a copy of a later checkpoint into one of fewer optimiser steps, sealed again."""
    from grpo_lab.tracking.folders import seal_folder

    folder = path / "grpo" / "checkpoints" / f"checkpoint-{updates}"
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": updates}))
    (folder / "manifest.json").unlink()
    seal_folder(folder)


def test_without_any_readable_checkpoint_the_run_ends_with_exit_7(world, copied, cli):
    checkpoint = copied / "grpo" / "checkpoints" / "checkpoint-16"
    (checkpoint / "model.safetensors").write_bytes(b"")
    ran = cli("train", world / "recipe.yaml", f"output_dir={world}/runs", "name=whole", "--resume", "--quiet")
    assert ran.code == 7
    assert "model.safetensors" in ran.err


def test_sigterm_finishes_the_step_saves_and_resumes(world, cli):
    (world / "ask").write_text(f"20 {os.getpid()}")  # in the second step; the reward has a process of its own
    arguments = ("train", world / "recipe.yaml", f"output_dir={world}/runs", "name=asked", "checkpoint_every=99")
    try:
        ran = cli(*arguments[:-1], "stages.grpo.checkpoint.every=99", "stages.grpo.evaluation=null", "--quiet")
    finally:
        (world / "ask").unlink()
    assert ran.code == 75
    stage = world / "runs" / "asked" / "grpo"
    stopped = max(line["step"] for line in read_jsonl(stage / "timing.jsonl"))
    assert [path.name for path in (stage / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{4 * stopped}"]
    path = run(world, "asked", "stages.grpo.checkpoint.every=99", "stages.grpo.evaluation=null")
    assert [line["step"] for line in read_jsonl(path / "grpo" / "timing.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert StopSignal().received is None


def test_a_reference_that_moved_is_in_the_checkpoint_and_comes_back(world, monkeypatch):
    refresh = ("stages.grpo.algorithm.reference_refresh={every: 1, alpha: 1.0}", "stages.grpo.algorithm.beta=0.5")
    short = (*refresh, "stages.grpo.evaluation=null", "stages.grpo.checkpoint.every=1", "stages.grpo.steps=3")
    path = run(world, "moving", *short)
    checkpoint = path / "grpo" / "checkpoints" / "checkpoint-12"
    policy, reference = (AutoModelForCausalLM.from_pretrained(each) for each in (checkpoint, checkpoint / "reference"))
    for mine, other in zip(policy.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, other)  # alpha 1: the reference is the policy
    from grpo_lab.stages import grpo_trl

    taken = []
    monkeypatch.setattr(grpo_trl, "train", lambda parts, *_, **__: taken.append(parts.reference))
    (path / "grpo" / "result.json").unlink()
    run(world, "moving", *short)
    assert taken == [str(checkpoint / "reference")]


def test_what_trl_cannot_do_is_refused_at_its_line_before_anything_is_loaded(world, cli):
    keys = ("stages.grpo.algorithm.kl_estimator=k1", "stages.grpo.sampling.max_rows=4")
    ran = cli("train", world / "recipe.yaml", f"output_dir={world}/runs", "name=refused", *keys)
    assert ran.code == 3
    reasons = dict(line.partition('engine "trl": ')[::2] for line in ran.err.splitlines())
    places = {place.split(":")[-2].strip().partition("=")[0]: reason for place, reason in reasons.items()}
    assert places["stages.grpo.algorithm.kl_estimator"] == "TRL has the k3 estimator only; set k3 or engine: native"
    assert places["stages.grpo.sampling.max_rows"].startswith(
        "TRL's own generation, and the vLLM that it starts, decode all"
    )
    assert not (world / "runs" / "refused").exists()


def test_another_version_of_trl_ends_with_exit_4(world, cli, monkeypatch):
    monkeypatch.setattr(trl_config, "version", lambda name: "1.17.0")
    ran = cli("train", world / "recipe.yaml", f"output_dir={world}/runs", "name=version")
    assert ran.code == 4
    assert 'engine "trl" needs trl 1.16.0, found 1.17.0' in ran.err


TELEMETRY = """\
import importlib
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry

def queued():
    _telemetry.send_telemetry("test")
    return _telemetry._TELEMETRY_QUEUE.qsize()

_telemetry._start_telemetry_thread = lambda: None  # what is queued stays there
for name in ("grpo_lab.engines.trl", "grpo_lab.engines.trl_probe"):
    constants.HF_HUB_DISABLE_TELEMETRY = False
    importlib.import_module(name)
    print(queued())
constants.HF_HUB_DISABLE_TELEMETRY = False
print(queued())
"""


def test_trl_sends_no_telemetry_whatever_the_environment_says():
    switches = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    plain = {key: value for key, value in os.environ.items() if key not in switches}
    ran = subprocess.run([sys.executable, "-c", TELEMETRY], capture_output=True, text=True, check=True, env=plain)
    assert ran.stdout.split() == ["0", "0", "1"]  # the last one shows that something would have been sent


def test_a_prompt_that_trl_would_tokenise_otherwise_is_refused(tokenizer):
    text = "1+2="
    ids = tuple(tokenizer(text)["input_ids"])
    check_same_tokens(tokenizer, Example("a", text, ids, {}))
    with pytest.raises(RecipeError, match="a: TRL makes other tokens of this prompt .* set sampling.backend: native"):
        check_same_tokens(tokenizer, Example("a", text, (*ids, ids[0]), {}))


def test_chat_prompts_reach_trl_as_messages_and_plain_ones_as_text(tokenizer):
    messages = ({"role": "user", "content": "1+2="},)
    assert as_trl_prompt(Example("a", "<|im_start|>...", (1,), {}, messages)) == [{"role": "user", "content": "1+2="}]
    assert as_trl_prompt(Example("a", "1+2=", (1,), {})) == "1+2="


def test_generation_ends_at_every_end_token_and_the_model_s_own_settings_come_back(tiny_policy):
    own = tiny_policy.model.generation_config
    own.repetition_penalty = 1.5
    with plain_generation(tiny_policy):
        assert tiny_policy.model.generation_config.repetition_penalty is None
        assert tiny_policy.model.generation_config.eos_token_id == list(tiny_policy.eos_ids)
    assert tiny_policy.model.generation_config is own
