"""Adapters through TRL: a fresh one, then the same one gone on with; checkpoints and final hold one adapter."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from grpo_lab.assemble import assemble
from grpo_lab.errors import RecipeError
from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load
from grpo_lab.tracking.files import read_json, read_jsonl

STAGE = """\
    kind: grpo
    engine: trl
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: odd}]
    algorithm: {beta: 0.04}
    prompts_per_step: 4
    steps: 3
    optimizer: {learning_rate: 1.0e-2}
    checkpoint: {every: 1, keep: 9}
"""
RECIPE = f"""\
name: trl-lora
num_threads: 1
plugins: [./odd.py]
model:
  config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64}}
  tokenizer: {{vocab_size: 280}}
  lora: {{r: 2, alpha: 4, dropout: 0.1}}
stages:
  fresh:
{STAGE}  warm:
{STAGE}"""
PLUGIN = """\
from grpo_lab.scoring import reward

@reward
def odd(completion):
    "Odd token ids."
    return sum(token % 2 for token in completion.token_ids) / len(completion.token_ids)
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


def steps(run: Path, stage: str) -> list[dict[str, float]]:
    return [line for line in read_jsonl(run / stage / "metrics.jsonl") if "reward" in line]


@pytest.mark.parametrize("stage", ["fresh", "warm"])
def test_the_reference_is_the_policy_as_the_stage_began(run, stage):
    kls = [line["kl"] for line in steps(run, stage)]
    assert kls[0] == pytest.approx(0.0, abs=1e-7)
    assert kls[-1] > 1e-6


def test_final_is_one_adapter_on_the_recipe_s_model_and_has_learnt(run):
    adapters = {stage: load_file(run / stage / "final" / "adapter_model.safetensors") for stage in ("fresh", "warm")}
    assert adapters["fresh"].keys() == adapters["warm"].keys()
    assert not any(".ref." in name for name in adapters["warm"])
    assert any(not torch.equal(adapters["fresh"][name], adapters["warm"][name]) for name in adapters["fresh"])
    assert read_json(run / "warm" / "final" / "adapter_config.json")["base_model_name_or_path"] == str(run / "base")
    ids = torch.tensor([[5, 6, 7]])
    base, final = (AutoModelForCausalLM.from_pretrained(run / name)(ids).logits for name in ("base", "warm/final"))
    assert not torch.allclose(base, final, atol=1e-3)


def test_a_resumed_adapter_keeps_the_reference_of_the_stage_s_start(run, tmp_path):
    whole = steps(run, "warm")
    kept = tmp_path / "kept"
    shutil.copytree(run, kept)
    try:
        (run / "warm" / "result.json").unlink()
        shutil.rmtree(run / "warm" / "final")
        shutil.rmtree(run / "warm" / "checkpoints" / "checkpoint-3")
        train(run.parent.parent)
        again = steps(run, "warm")
        assert [line["step"] for line in again] == [1, 2, 3]
        assert again[:2] == whole[:2]
        assert again[2]["kl"] == pytest.approx(whole[2]["kl"], rel=0.5)
    finally:
        shutil.rmtree(run)
        shutil.move(kept, run)


class Watcher(TrainerCallback):
    """What learns, and what the optimiser holds: before a step's reference pass, and when its gradient is there."""

    def __init__(self) -> None:
        self.seen: list[tuple[set[str], set[str]]] = []
        self.all: set[str] = set()

    def look(self, args, state, control, **kwargs):
        names = {id(parameter): name for name, parameter in kwargs["model"].named_parameters()}
        learns = {name for name, parameter in kwargs["model"].named_parameters() if parameter.requires_grad}
        held = {names[id(each)] for group in kwargs["optimizer"].param_groups for each in group["params"]}
        self.seen.append((learns, held))
        self.all |= set(names.values())

    on_step_begin = on_pre_optimizer_step = look


@pytest.mark.parametrize(
    "lora, beta",
    [("r: 2, rslora: true", 0.04), ("r: 2, dora: true", 0.04), ("r: 2, bias: all", 0.0)],
    ids=["rslora", "dora", "bias"],
)
def test_only_the_adapter_learns_and_the_reference_pass_changes_no_flag(tmp_path, monkeypatch, lora, beta):
    import grpo_lab.stages.grpo_trl as module

    watcher, train_with_trl = Watcher(), module.train

    def watched(parts, model, *, callbacks, **rest):
        train_with_trl(parts, model, callbacks=[*callbacks, watcher], **rest)

    monkeypatch.setattr(module, "train", watched)
    text = RECIPE[: RECIPE.index("  warm:")].replace("model_type: llama", "model_type: qwen2")  # it has biases
    text = text.replace("r: 2, alpha: 4, dropout: 0.1", lora).replace("beta: 0.04", f"beta: {beta}")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "odd.py").write_text(PLUGIN)
    run = train(tmp_path)
    learns, held = watcher.seen[0]
    assert watcher.seen == [(learns, held)] * 6
    assert held == learns
    assert not any(".ref." in name for name in learns)
    assert any(".ref." in name for name in watcher.all) == (beta > 0)
    final = load_file(run / "fresh" / "final" / "adapter_model.safetensors")
    assert len(final) == len(learns)
    kinds = {"rslora": (), "dora": ("lora_magnitude_vector",), "bias": (".bias",)}
    assert all(any(kind in name for name in final) for key, parts in kinds.items() if key in lora for kind in parts)
    count = sum(tensor.numel() for tensor in final.values())
    assert read_jsonl(run / "fresh" / "events.jsonl")[0]["message"].startswith(f"{count:,} of ")


def test_what_trl_cannot_do_beside_an_adapter_is_refused(run):
    recipe = run.parent.parent / "recipe.yaml"
    with pytest.raises(RecipeError) as error:
        assemble(
            load(
                recipe,
                ["model.quantization={}", "stages.warm.algorithm.reference_refresh={every: 2}", "model.lora.bias=all"],
            )
        )
    assert len(error.value.problems) == 5
    for key in (
        "stages.fresh.model.quantization",
        "stages.warm.model.quantization",
        "stages.warm.algorithm.reference_ref",
        "stages.fresh.model.lora.bias",
        "stages.warm.model.lora.bias",
    ):
        assert key in str(error.value)
