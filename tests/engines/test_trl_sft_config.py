"""Every recipe key of a supervised stage is passed to TRL, used by a shared part, or refused before anything is loaded."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from grpo_lab.engines.trl_sft_config import (
    PASSED,
    REFUSED,
    SHARED,
    sft_arguments,
    sft_differences,
    unsupported_sft,
)
from grpo_lab.engines.trl_trainer import equal_parts
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Model, SftStage

STAGE = {
    "kind": "sft",
    "engine": "trl",
    "data": {"source": "task", "path": "addition", "prompt": "prompt", "completion": "completion"},
    "steps": 3,
    "batch_size": 8,
    "micro_batch_size": 4,
    "optimizer": {"learning_rate": 1e-3},
}
MODEL = {"path": "somewhere"}


def grpo_walk() -> Any:
    """The walk through a schema that the test of the GRPO stage has."""
    spec = importlib.util.spec_from_file_location("walk", Path(__file__).with_name("test_trl_config.py"))
    walk = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(walk)
    return walk


def unknown(keys) -> list[str]:
    tables = {*PASSED, *REFUSED}
    above = lambda key: [".".join(key.split(".")[:length]) for length in range(1, key.count(".") + 2)]  # noqa: E731
    return sorted(key for key in set(keys) if not any(each in SHARED or each in tables for each in above(key)))


def test_every_key_of_a_stage_and_its_model_is_passed_shared_or_refused():
    keys_of = grpo_walk().keys_of
    assert unknown(keys_of(SftStage)) == []
    assert unknown(f"model.{key}" for key in keys_of(Model)) == []
    assert unknown(["new", "optimiser.name"]) == ["new", "optimiser.name"]


def test_the_tables_know_no_key_that_is_gone():
    keys_of = grpo_walk().keys_of
    known = {*keys_of(SftStage), *(f"model.{key}" for key in keys_of(Model))}
    for key in {*PASSED, *REFUSED, *SHARED}:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({"steps": 5}, {}),
    "batch_size": ({"batch_size": 16}, {}),
    "micro_batch_size": ({"micro_batch_size": 2}, {}),
    "packing": ({"packing": False}, {}),
    "optimizer.learning_rate": ({"optimizer": {"learning_rate": 0.5}}, {}),
    "optimizer.max_grad_norm": ({"optimizer": {"learning_rate": 1e-3, "max_grad_norm": 0.1}}, {}),
    "model.gradient_checkpointing": ({}, {"gradient_checkpointing": True}),
    "model.trust_remote_code": ({}, {"trust_remote_code": True}),
}


@pytest.mark.parametrize("key", sorted(PASSED))
def test_a_passed_key_changes_the_argument_it_names(key):
    stage, model = OTHERS[key]
    base = sft_arguments(SftStage(**STAGE), Model(**MODEL), seed=0)
    other = sft_arguments(SftStage(**{**STAGE, **stage}), Model(**{**MODEL, **model}), seed=0)
    assert other[PASSED[key]] != base[PASSED[key]]


IMPOSSIBLE = {
    "key_tokens": ({"key_tokens": {"weight": 2, "tag": "answer"}}, {}),
    "model.quantization": ({}, {"quantization": {}, "lora": {}}),
}


def test_there_is_an_example_of_everything_that_is_refused():
    assert IMPOSSIBLE.keys() == REFUSED.keys()


@pytest.mark.parametrize("key", sorted(IMPOSSIBLE))
def test_what_trl_cannot_do_is_refused_at_its_key_with_a_remedy(key):
    stage, model = IMPOSSIBLE[key]
    found = dict(unsupported_sft(SftStage(**{**STAGE, **stage}), Model(**{**MODEL, **model})))
    assert list(found) == [tuple(key.split("."))]
    assert found[tuple(key.split("."))].startswith('engine "trl": ')
    assert "set engine: native" in found[tuple(key.split("."))]
    assert unsupported_sft(SftStage(**STAGE), Model(**MODEL)) == []


def test_a_refusal_comes_with_the_recipe_before_a_model_is_made(tmp_path):
    from grpo_lab.assemble import assemble
    from grpo_lab.recipe import load

    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {config: {model_type: llama}, tokenizer: {vocab_size: 300}}\nstages:\n  a:\n    kind: sft\n"
        "    engine: trl\n    data: {source: task, path: addition, prompt: prompt, completion: completion}\n"
        "    steps: 1\n    batch_size: 2\n    optimizer: {learning_rate: 1.0}\n    key_tokens: {weight: 2, tag: answer}\n"
    )
    with pytest.raises(RecipeError) as error:
        assemble(load(tmp_path / "r.yaml"))
    assert error.value.problems == [
        f'{tmp_path}/r.yaml:11:5: stages.a.key_tokens: engine "trl": SFTTrainer counts every token the same; leave it '
        "out or set engine: native"
    ]


@pytest.mark.parametrize("batch_size", [1, 6, 7, 8])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 4, 100])
def test_equal_parts_make_up_the_step(batch_size, micro_batch_size):
    stage = SftStage(**{**STAGE, "batch_size": batch_size, "micro_batch_size": micro_batch_size})
    arguments = sft_arguments(stage, Model(**MODEL), seed=0)
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == batch_size
    assert (
        arguments["per_device_train_batch_size"]
        == equal_parts(batch_size, micro_batch_size)
        <= (micro_batch_size or batch_size)
    )


def test_what_is_realised_differently_is_said():
    stage = SftStage(**{**STAGE, "batch_size": 8, "micro_batch_size": 3, "packing": False})
    assert sft_differences(stage)[-1] == "TRL needs equal micro-batches: 2 rows instead of 3"
    assert any(line.startswith("packing: ") for line in sft_differences(SftStage(**STAGE)))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_every_argument_is_one_of_trl_s():
    from trl import SFTConfig

    config = SFTConfig(output_dir="unused", use_cpu=True, **sft_arguments(SftStage(**STAGE), Model(**MODEL), seed=0))
    assert (config.padding_free, config.packing, config.bf16, config.pad_to_multiple_of) == (True, False, False, None)
