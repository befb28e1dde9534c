"""Whole runs with adapters: a full warm start, an adapter on it, the adapter gone on with, and stages that start elsewhere."""

import hashlib
import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_lab.assemble import assemble
from grpo_lab.errors import CheckpointError, RecipeError
from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load, load_recipe, resolved_yaml
from grpo_lab.tracking.files import read_json, read_jsonl

RECIPE = """\
name: adapters
num_threads: 1
plugins: [./odd.py]
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 280}
stages:
  full:
    kind: sft
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 20}}
    batch_size: 8
    steps: 2
    optimizer: {learning_rate: 2.0e-3}
  lora_sft:
    kind: sft
    model: {lora: {r: 3, alpha: 6, dropout: 0.1}}
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 20}}
    batch_size: 8
    micro_batch_size: 3
    steps: 3
    optimizer: {learning_rate: 1.0e-2}
    checkpoint: {every: 1, keep: 99}
  fresh:
    kind: grpo
    start_from: full
    model: {lora: {r: 2, alpha: 4}}
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: odd}]
    algorithm: {beta: 0.04, num_iterations: 2, reference_refresh: {every: 2}}
    prompts_per_step: 2
    micro_batch_size: 3
    steps: 4
    optimizer: {learning_rate: 1.0e-2}
    checkpoint: {every: 1, keep: 99}
  warm:
    kind: grpo
    start_from: lora_sft
    model: {lora: {r: 3, alpha: 6}}
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: odd}]
    algorithm: {beta: 0.04}
    prompts_per_step: 2
    steps: 3
    optimizer: {learning_rate: 1.0e-2}
    checkpoint: {every: 1, keep: 99}
  merged:
    kind: sft
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 20}}
    batch_size: 8
    steps: 1
    optimizer: {learning_rate: 1.0e-3}
  from_base:
    kind: sft
    start_from: base
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 20}}
    batch_size: 8
    steps: 1
    optimizer: {name: sgd, learning_rate: 1.0e-9}
"""

PLUGIN = """\
from grpo_lab.scoring import reward

@reward
def odd(completion):
    "Odd token ids."
    return float(sum(token % 2 for token in completion.token_ids))
"""


def train(folder: Path) -> Path:
    loaded = load(folder / "recipe.yaml", [f"output_dir={folder}/runs"])
    return train_recipe(loaded, RECIPE, go_on=True, console=Console(file=io.StringIO()), quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "odd.py").write_text(PLUGIN)
    return train(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def content(folder: Path) -> dict[str, str]:
    """The sha256 of every file that is a function of the recipe."""
    kinds = ("*.safetensors", "metrics.jsonl", "rollouts/*", "adapter_config.json", "result.json")
    found = sorted({path for kind in kinds for path in folder.rglob(kind)})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_every_stage_says_what_learns(run):
    said = {
        path.parent.name: next(event["message"] for event in read_jsonl(path) if "learn" in event["message"])
        for path in run.glob("*/events.jsonl")
    }
    assert said["full"].endswith("parameters learn (100 %)")
    assert said["merged"] == said["full"]
    # per layer: q and o r(16+16), k and v r(16+8), three r(16+32)
    for stage, r in (("lora_sft", 3), ("fresh", 2), ("warm", 3)):
        assert said[stage].startswith(f"{2 * r * (2 * 32 + 2 * 24 + 3 * 48):,} of ")


@pytest.mark.parametrize("stage, begins", [("lora_sft", "full"), ("fresh", "full"), ("warm", "full")])
def test_an_adapter_names_the_whole_model_it_belongs_to(run, stage, begins):
    assert read_json(run / stage / "final" / "adapter_config.json")["base_model_name_or_path"] == str(
        run / begins / "final"
    )


def test_the_kl_is_0_at_the_first_step_and_not_later(run):
    kls = {stage: [line.get("kl") for line in read_jsonl(run / stage / "metrics.jsonl")] for stage in ("fresh", "warm")}
    assert kls["warm"][0] == 0
    assert kls["warm"][-1] > 1e-6
    assert kls["fresh"][-1] > 1e-6


@pytest.mark.parametrize("beta, copies", [(0.0, 0), (0.04, 1)])
def test_without_a_kl_there_is_no_reference(tmp_path, monkeypatch, toy_text, beta, copies):
    from grpo_lab.stages import grpo

    made, copy_of = [], grpo.frozen_copy
    monkeypatch.setattr(grpo, "frozen_copy", lambda policy: made.append(copy_of(policy)) or made[-1])
    (tmp_path / "toy.yaml").write_text(toy_text)
    changes = ["stages.warm_start.steps=1", "stages.grpo.steps=1", "stages.grpo.evaluation=null"]
    changes += [f"output_dir={tmp_path}/runs", f"stages.grpo.algorithm.beta={beta}"]
    loaded = load(tmp_path / "toy.yaml", changes)
    train_recipe(loaded, toy_text, go_on=False, console=Console(file=io.StringIO()), quiet=True)
    assert len(made) == copies


def test_checkpoints_and_final_hold_the_adapter_and_no_reference(run):
    names = set(load_file(run / "warm" / "final" / "adapter_model.safetensors"))
    saved = load_file(run / "warm" / "checkpoints" / "step-000003" / "model.safetensors")
    assert {name.replace(".default.", ".") for name in saved} == names
    assert not (run / "warm" / "checkpoints" / "step-000003" / "reference.safetensors").exists()
    moving = load_file(run / "fresh" / "checkpoints" / "step-000003" / "reference.safetensors")
    assert moving.keys() == load_file(run / "fresh" / "checkpoints" / "step-000003" / "model.safetensors").keys()


def test_a_stage_without_lora_merges_the_adapter_it_starts_from(run):
    assert (run / "merged" / "final" / "model.safetensors").is_file()
    adapter = load_file(run / "warm" / "final" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = weights(run / "full" / "final")[f"{name}.weight"] + 2.0 * b @ a
    assert torch.allclose(weights(run / "merged" / "final")[f"{name}.weight"], expected, atol=3e-3)  # one Adam step
    assert not torch.allclose(weights(run / "full" / "final")[f"{name}.weight"], expected, atol=3e-3)


def test_a_stage_can_start_from_the_recipe_s_model_again(run):
    base, final = weights(run / "base"), weights(run / "from_base" / "final")
    assert all(torch.allclose(base[name], final[name], atol=1e-6) for name in base)
    assert not torch.allclose(base["lm_head.weight"], weights(run / "full" / "final")["lm_head.weight"], atol=1e-4)


@pytest.mark.parametrize("stage, step", [("lora_sft", 1), ("fresh", 1), ("fresh", 3), ("warm", 2)])
def test_a_resumed_adapter_ends_in_the_same_bytes(run, stage, step, tmp_path):
    whole = content(run)
    kept = tmp_path / "kept"
    shutil.copytree(run, kept)
    try:
        stages = ["full", "lora_sft", "fresh", "warm", "merged", "from_base"]
        for later in stages[stages.index(stage) + 1 :]:
            shutil.rmtree(run / later)
        shutil.rmtree(run / stage / "final")
        (run / stage / "result.json").unlink()
        for path in (run / stage / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        assert content(run) != whole
        train(run.parent.parent)
        assert content(run) == whole
    finally:
        shutil.rmtree(run)
        shutil.move(kept, run)


def problems(tmp_path, text: str) -> str:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        assemble(load(tmp_path / "x.yaml"))
    return str(error.value)


def test_a_start_that_is_no_earlier_stage_is_refused(tmp_path):
    text = RECIPE.replace("start_from: lora_sft", "start_from: merged")
    assert 'stages.warm.start_from: "merged" is none of previous, base, full, lora_sft, fresh' in problems(
        tmp_path, text
    )
    text = RECIPE.replace("  full:", "  previous:").replace("start_from: full", "start_from: previous")
    assert 'stages.previous: "previous" has a meaning in start_from' in problems(tmp_path, text)


def test_quantized_weights_without_an_adapter_are_refused(tmp_path):
    text = RECIPE.replace("start_from: base", "model: {quantization: {}}")
    assert "quantization: weights in 4 bits cannot learn; add lora" in problems(tmp_path, text)


def test_a_stage_takes_from_the_recipe_s_model_what_it_does_not_say(tmp_path):
    text = RECIPE.replace(
        "tokenizer: {vocab_size: 280}", "tokenizer: {vocab_size: 280}\n  lora: {r: 7}\n  quantization: {}"
    )
    (tmp_path / "x.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "x.yaml")
    models = {name: recipe.model_of(stage) for name, stage in recipe.stages.items()}
    assert (models["full"].lora.r, models["fresh"].lora.r) == (7, 2)
    assert models["full"].quantization == models["fresh"].quantization is not None
    (tmp_path / "y.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(tmp_path / "y.yaml") == recipe
    (tmp_path / "z.yaml").write_text(text.replace("{lora: {r: 2, alpha: 4}}", "{lora: {r: 2}, quantization: null}"))
    recipe = load_recipe(tmp_path / "z.yaml")
    assert recipe.model_of(recipe.stages["fresh"]).quantization is None


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """A run whose GRPO stage learns an adapter beside 4-bit weights, with an optimiser whose state is in 8 bits."""
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    folder = tmp_path_factory.mktemp("world")
    text = RECIPE[: RECIPE.index("  warm:")].replace(
        "hidden_size: 16, intermediate_size: 32", "hidden_size: 64, intermediate_size: 128"
    )
    text = text.replace("lora: {r: 2, alpha: 4}}", "lora: {r: 64, alpha: 64}, quantization: {}}")
    text = text.replace(
        "algorithm: {beta: 0.04, num_iterations: 2, reference_refresh: {every: 2}}", "algorithm: {beta: 0.04}"
    )
    head, _, tail = text.rpartition("optimizer: {learning_rate")
    (folder / "recipe.yaml").write_text(head + "optimizer: {name: paged_adamw_8bit, learning_rate" + tail)
    (folder / "odd.py").write_text(PLUGIN)
    return train(folder)


def test_a_quantized_run_resumes_to_the_same_bytes_and_final_says_how_it_was_quantized(quantized, tmp_path):
    lines = read_jsonl(quantized / "fresh" / "metrics.jsonl")
    assert (lines[0]["kl"], lines[-1]["kl"] > 1e-6) == (0, True)
    final = quantized / "fresh" / "final"
    assert read_json(final / "quantization.json") == {"type": "nf4", "double_quant": True, "compute_dtype": None}
    kinds = {
        tensor.dtype
        for tensor in load_file(quantized / "fresh" / "checkpoints" / "step-000004" / "optimizer.safetensors").values()
    }
    assert torch.uint8 in kinds
    whole = content(quantized)
    shutil.rmtree(final)
    (quantized / "fresh" / "result.json").unlink()
    for step in (3, 4):
        shutil.rmtree(quantized / "fresh" / "checkpoints" / f"step-00000{step}")
    train(quantized.parent.parent)
    assert content(quantized) == whole


def test_final_is_called_saved_after_it_was_loaded_again(run):
    last = read_jsonl(run / "warm" / "events.jsonl")[-1]["message"]
    start, end = f"saved {run / 'warm' / 'final'}; loaded again, its logits differ by ", " of the largest"
    assert last.startswith(start)
    assert last.endswith(end)
    assert float(last.removeprefix(start).removesuffix(end)) < 1e-6  # what was trained is fused, what was loaded is not


def test_a_model_that_is_written_wrongly_is_not_saved(run, tmp_path, monkeypatch):
    """E1: corrupt adapter keys on save."""
    import grpo_lab.policy.load as module

    kept = tmp_path / "kept"
    shutil.copytree(run, kept)
    write = module.write_policy

    def corrupted(policy, folder, quantization=None):
        write(policy, folder, quantization)
        weights = load_file(folder / "adapter_model.safetensors")
        first = next(name for name in sorted(weights) if "lora_B" in name)
        save_file({**weights, first: weights[first] + 1}, folder / "adapter_model.safetensors")

    try:
        shutil.rmtree(run / "warm" / "final")
        (run / "warm" / "result.json").unlink()
        monkeypatch.setattr(module, "write_policy", corrupted)
        with pytest.raises(CheckpointError, match="the model that was written is not the model: its logits differ by"):
            train(run.parent.parent)
        assert not (run / "warm" / "final").exists()
        assert not (run / "warm" / "result.json").exists()
    finally:
        shutil.rmtree(run)
        shutil.move(kept, run)
