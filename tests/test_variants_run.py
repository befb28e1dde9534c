"""Whole runs of every variant on a toy task, and exact resume where the reference moves and groups are drawn again."""

import hashlib
import io
import shutil

import pytest
import torch
from rich.console import Console

from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load
from grpo_lab.recipe.presets import PRESETS
from grpo_lab.tracking.files import read_jsonl

RECIPE = """\
name: run
num_threads: 1
plugins: [./variety.py]
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 280}
stages:
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 12}}
    sampling: {num_generations: 3, max_completion_length: 5}
    rewards: [{name: variety}, {name: accuracy}]
    algorithm: {preset: grpo}
    prompts_per_step: 4
    micro_batch_size: 5
    steps: 2
    optimizer: {learning_rate: 3.0e-3}
    checkpoint: {every: 1, keep: 99}
"""
PLUGIN = """\
from grpo_lab.scoring import reward

@reward
def variety(completion):
    "Whether the first token is even: often equal in a group of three."
    return float(completion.token_ids[0] % 2)
"""
NOT_COMPARED = {"timing.jsonl", "events.jsonl", "run.json", "recipe.yaml", "resolved.yaml", ".lock"}


@pytest.fixture
def run(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "variety.py").write_text(PLUGIN)

    def train(name, **settings):
        overrides = [f"stages.grpo.{key}={value}" for key, value in settings.items()]
        loaded = load(recipe, [f"name={name}", f"output_dir={tmp_path}/runs", *overrides])
        return train_recipe(loaded, RECIPE, go_on=True, console=Console(file=io.StringIO()), quiet=True)

    return train


@pytest.mark.parametrize("preset", PRESETS)
def test_every_variant_trains(run, preset):
    path = run(preset, **{"algorithm.preset": preset})
    lines = read_jsonl(path / "grpo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert any(line["grad_norm"] > 0 for line in lines)
    assert all(line["lab/skipped_updates"] == 0 for line in lines)
    assert ("rewards/overlong/mean" in lines[0]) == ("lab/sampling_attempts" in lines[0]) == (preset == "dapo")
    assert ("kl" in lines[0]) == (PRESETS[preset].get("beta", 0.04) > 0)
    assert (path / "grpo" / "final" / "model.safetensors").exists()


def content(folder):
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NOT_COMPARED]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


MOVING = {
    "steps": 6,
    "algorithm.beta": 0.3,
    "algorithm.reference_refresh": "{every: 2, alpha: 0.5}",
    "algorithm.sampling_attempts": 3,
    "algorithm.num_iterations": 2,
    "algorithm.entropy_bonus": 0.01,
    "algorithm.top_entropy_quantile": 0.6,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the promise of equal bytes is for CPUs")
def test_a_resumed_run_with_a_moving_reference_and_dynamic_sampling_is_the_same_run(run, tmp_path):
    whole = run("whole", **MOVING)
    expected = content(whole)
    lines = read_jsonl(whole / "grpo" / "metrics.jsonl")
    assert any(line["lab/sampling_attempts"] > 1 for line in lines)
    assert any("lab/sampling_exhausted" in line for line in lines)
    assert "grpo/checkpoints/step-000003/reference.safetensors" in expected
    for last in (1, 2, 3, 5):  # before a refresh, at one, after one
        shutil.rmtree(whole / "grpo" / "final")
        (whole / "grpo" / "result.json").unlink()
        for step in range(last + 1, 7):
            shutil.rmtree(whole / "grpo" / "checkpoints" / f"step-{step:06d}")
        assert content(run("whole", **MOVING)) == expected, f"resumed after step {last}"


def test_the_reference_is_in_checkpoints_only_if_it_moves_and_the_kl_falls_where_it_does(run):
    still = run("still", **{**MOVING, "algorithm.reference_refresh": "null"})
    assert not (still / "grpo" / "checkpoints" / "step-000006" / "reference.safetensors").exists()
    follows = run("follows", **{**MOVING, "algorithm.reference_refresh": "{every: 1, alpha: 1.0}"})
    kl = [read_jsonl(path / "grpo" / "metrics.jsonl")[-1]["kl"] for path in (still, follows)]
    assert kl[1] < kl[0]
