"""Every recipe key is passed to TRL, used by a shared part, or refused before anything is loaded."""

import importlib.metadata
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from grpo_lab.engines import trl_config
from grpo_lab.engines.trl_config import PASSED, REFUSED, SHARED, arguments, differences, require_trl, sizes, unsupported
from grpo_lab.errors import SetupError
from grpo_lab.recipe.presets import PRESETS
from grpo_lab.recipe.schema import GrpoStage, Model

STAGE = {
    "kind": "grpo",
    "engine": "trl",
    "data": {"source": "task", "path": "addition", "prompt": "prompt"},
    "steps": 3,
    "optimizer": {"learning_rate": 1e-3},
    "sampling": {"num_generations": 4, "max_completion_length": 8},
    "rewards": [{"name": "accuracy", "weight": 2.0}],
    "algorithm": {},
    "prompts_per_step": 4,
}
MODEL = {"path": "somewhere"}


def changed(key: str, value: Any, stage: dict = STAGE) -> dict:
    """The stage with one dotted key set; in a list, in its first entry."""
    head, _, rest = key.partition(".")
    if not rest:
        return {**stage, head: value}
    inner = stage.get(head) or {}
    if isinstance(inner, list):
        return {**stage, head: [changed(rest, value, inner[0]), *inner[1:]]}
    return {**stage, head: changed(rest, value, inner)}


def stage_with(values: dict[str, Any]) -> GrpoStage:
    stage = STAGE
    for key, value in values.items():
        stage = changed(key, value, stage)
    return GrpoStage(**stage)


def blocks_of(annotation: Any) -> list[type[BaseModel]]:
    """The recipe blocks that a type is made of, through Optional, Annotated and list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in typing.get_args(annotation) for block in blocks_of(part)]


def keys_of(block: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key that a block takes, dotted, down to the last level."""
    for name, field in block.model_fields.items():
        inner = blocks_of(field.annotation)
        if not inner:
            yield above + name
        for each in inner:
            yield from keys_of(each, f"{above}{name}.")


def unknown(keys: Iterator[str]) -> list[str]:
    """The keys that no table knows: not themselves, and not as part of a block that a shared part takes whole."""
    tables = {*PASSED, *REFUSED}

    def is_known(key: str) -> bool:
        parts = key.split(".")
        return key in tables or any(".".join(parts[:length]) in SHARED for length in range(1, len(parts) + 1))

    return sorted(key for key in set(keys) if not is_known(key))


def test_every_key_of_a_stage_and_its_model_is_passed_shared_or_refused():
    assert unknown(keys_of(GrpoStage)) == []
    assert unknown(f"model.{key}" for key in keys_of(Model)) == []


def test_a_key_that_no_table_knows_is_found():
    class Wider(GrpoStage):
        new: int = 0
        """A key that somebody adds."""

    assert unknown(keys_of(Wider)) == ["new"]


def test_no_block_with_keys_of_its_own_is_taken_whole_where_it_decides_what_trl_computes():
    assert not {"algorithm", "sampling", "algorithm.reference_refresh"} & SHARED.keys()


def test_the_tables_know_no_key_that_is_gone():
    known = {*keys_of(GrpoStage), *(f"model.{key}" for key in keys_of(Model))}
    for key in {*PASSED, *REFUSED, *SHARED}:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key


VLLM = {"sampling.backend": "vllm"}
SERVER = {"sampling.backend": "vllm-server", "sampling.vllm.urls": ["http://127.0.0.1:8000"]}

# key -> another value (and what else it needs), so that the argument it decides must change
OTHERS: dict[str, dict[str, Any]] = {
    "steps": {"steps": 5},
    "prompts_per_step": {"prompts_per_step": 8},
    "micro_batch_size": {"micro_batch_size": 2},
    "optimizer.learning_rate": {"optimizer.learning_rate": 0.5},
    "optimizer.max_grad_norm": {"optimizer.max_grad_norm": 0.1},
    "sampling.num_generations": {"sampling.num_generations": 2},
    "sampling.max_completion_length": {"sampling.max_completion_length": 16},
    "sampling.temperature": {"sampling.temperature": 0.7},
    "sampling.top_p": {"sampling.top_p": 0.9, "algorithm.sampler_correction": "truncate"},
    "sampling.top_k": {"sampling.top_k": 5, "algorithm.sampler_correction": "truncate"},
    "sampling.min_p": {"sampling.min_p": 0.1, "algorithm.sampler_correction": "truncate"},
    "sampling.backend": {"sampling.backend": "vllm"},
    "sampling.vllm.memory_share": {**VLLM, "sampling.vllm.memory_share": 0.5},
    "sampling.vllm.max_model_length": {**VLLM, "sampling.vllm.max_model_length": 64},
    "sampling.vllm.sleep": {**VLLM, "sampling.vllm.sleep": True},
    "sampling.vllm.urls": SERVER,
    "sampling.vllm.timeout_seconds": {**SERVER, "sampling.vllm.timeout_seconds": 5.0},
    "algorithm.sampler_correction": VLLM,
    "algorithm.sampler_correction_level": {**VLLM, "algorithm.sampler_correction_level": "sequence"},
    "algorithm.sampler_correction_cap": {**VLLM, "algorithm.sampler_correction_cap": 3.0},
    "rewards.weight": {"rewards.weight": 3.0},
    "algorithm.reward_aggregation": {
        "algorithm.reward_aggregation": "normalize_then_sum",
        "algorithm.advantage_scale": "centred",
    },
    "algorithm.advantage_scale": {"algorithm.advantage_scale": "none"},
    "algorithm.surrogate": {"algorithm.surrogate": "sapo"},
    "algorithm.ratio_level": {"algorithm.ratio_level": "sequence"},
    "algorithm.epsilon_low": {"algorithm.epsilon_low": 0.1},
    "algorithm.epsilon_high": {"algorithm.epsilon_high": 0.3},
    "algorithm.delta": {"algorithm.delta": 3.0},
    "algorithm.sapo_temperature_pos": {"algorithm.sapo_temperature_pos": 2.0, "algorithm.surrogate": "sapo"},
    "algorithm.sapo_temperature_neg": {"algorithm.sapo_temperature_neg": 2.0, "algorithm.surrogate": "sapo"},
    "algorithm.reduction": {"algorithm.reduction": "constant"},
    "algorithm.beta": {"algorithm.beta": 0.5},
    "algorithm.kl_bias_correction": {"algorithm.kl_bias_correction": True},
    "algorithm.reference_refresh.every": {"algorithm.reference_refresh.every": 7},
    "algorithm.reference_refresh.alpha": {
        "algorithm.reference_refresh.every": 7,
        "algorithm.reference_refresh.alpha": 0.5,
    },
    "algorithm.entropy_bonus": {"algorithm.entropy_bonus": 0.01},
    "algorithm.top_entropy_quantile": {"algorithm.top_entropy_quantile": 0.2},
    "algorithm.mask_truncated_completions": {"algorithm.mask_truncated_completions": True},
    "algorithm.num_iterations": {"algorithm.num_iterations": 3},
    "algorithm.num_minibatches": {"algorithm.num_minibatches": 2},
}


@pytest.mark.parametrize("key", sorted(key for key in PASSED if not key.startswith("model.")))
def test_a_passed_key_changes_the_argument_it_names(key):
    base = arguments(stage_with({"micro_batch_size": 4}), Model(**MODEL), seed=0)
    other = arguments(stage_with({"micro_batch_size": 4, **OTHERS[key]}), Model(**MODEL), seed=0)
    assert other[PASSED[key]] != base[PASSED[key]]


@pytest.mark.parametrize("key", sorted(key for key in PASSED if key.startswith("model.")))
def test_a_passed_model_key_changes_the_argument_it_names(key):
    base = arguments(stage_with({}), Model(**MODEL), seed=0)
    other = arguments(stage_with({}), Model(**MODEL, **{key.removeprefix("model."): True}), seed=0)
    assert (base[PASSED[key]], other[PASSED[key]]) == (False, True)


# key -> values that TRL cannot do
SCHEDULE = {"start": 0.0, "end": 1.0, "steps": 2}
IMPOSSIBLE: dict[str, list[dict[str, Any]]] = {
    "rewards.weight": [
        {
            "rewards.weight": SCHEDULE,
            "algorithm.reward_aggregation": "normalize_then_sum",
            "algorithm.advantage_scale": "centred",
        }
    ],
    "score_while_sampling": [{"score_while_sampling": True}],
    "sampling.max_rows": [{"sampling.max_rows": 8}, {**VLLM, "sampling.max_rows": 8}],
    "sampling.vllm.urls": [{**SERVER, "sampling.vllm.urls": ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]}],
    "sampling.vllm.exchange": [{**SERVER, "sampling.vllm.exchange": "/shared"}],
    "sampling.vllm.one_step_off": [{**SERVER, "sampling.vllm.one_step_off": True}],
    "algorithm.advantage_baseline": [
        {"algorithm.advantage_baseline": "leave_one_out", "algorithm.advantage_scale": "none"},
        {"algorithm.advantage_baseline": "batch", "algorithm.advantage_scale": "batch"},
    ],
    "algorithm.advantage_scale": [
        {"algorithm.advantage_scale": "centred"},
        {"algorithm.advantage_scale": "group", "algorithm.reward_aggregation": "normalize_then_sum"},
        {"algorithm.advantage_scale": "none", "algorithm.reward_aggregation": "normalize_then_sum"},
    ],
    "algorithm.surrogate": [{"algorithm.surrogate": "none"}],
    "algorithm.reduction": [
        {"algorithm.surrogate": "cispo", "algorithm.reduction": "sequence"},
        {"algorithm.surrogate": "sapo", "algorithm.reduction": "token"},
    ],
    "algorithm.ratio_level": [{"algorithm.ratio_level": "sequence_sum"}],
    "algorithm.kl_estimator": [{"algorithm.kl_estimator": "k1"}, {"algorithm.kl_estimator": "k2"}],
    "algorithm.kl_placement": [{"algorithm.kl_placement": "reward"}],
    "algorithm.sampling_attempts": [{"algorithm.sampling_attempts": 2}],
    "algorithm.sampler_correction": [
        {"algorithm.sampler_correction": "truncate"},
        {"algorithm.sampler_correction": "mask", "sampling.top_p": 0.9},
    ],
}


def test_there_is_an_example_of_everything_that_is_refused():
    assert IMPOSSIBLE.keys() == REFUSED.keys()


@pytest.mark.parametrize(
    "key, values", [(key, values) for key, examples in IMPOSSIBLE.items() for values in examples], ids=str
)
def test_what_trl_cannot_do_is_refused_at_its_key_with_a_remedy(key, values):
    found = dict(unsupported(stage_with(values)))
    assert list(found) == [tuple(key.split("."))]
    assert found[tuple(key.split("."))].startswith('engine "trl": ')
    assert "set " in found[tuple(key.split("."))]


def test_a_weight_with_a_schedule_is_multiplied_in_by_the_terms_function():
    stage = stage_with({"rewards.weight": SCHEDULE})
    assert unsupported(stage) == []
    assert arguments(stage, Model(**MODEL), seed=0)["reward_weights"] == [1.0]
    assert trl_config.scheduled(stage) == {"accuracy"}


def test_under_a_control_trl_gets_one_total_of_weight_1_whatever_the_terms_weights_are():
    normalised = {"preset": "gdpo"}
    stage = stage_with({"rewards.weight": SCHEDULE, "algorithm": normalised, "reward_control": "random"})
    assert unsupported(stage) == []
    assert arguments(stage, Model(**MODEL), seed=0)["reward_weights"] == [1.0]


@pytest.mark.parametrize(
    "correction, level, expected",
    [
        ("truncate", "token", (True, "token_truncate")),
        ("mask", "sequence", (True, "sequence_mask")),
        ("none", "token", (False, "token_truncate")),
    ],
)
def test_the_correction_for_vllm_is_trl_s(correction, level, expected):
    values = {"algorithm.sampler_correction": correction, "algorithm.sampler_correction_level": level}
    stage = stage_with({**VLLM, **values})
    assert unsupported(stage) == []
    found = arguments(stage, Model(**MODEL), seed=0)
    assert (found["vllm_importance_sampling_correction"], found["vllm_importance_sampling_mode"]) == expected
    assert (found["vllm_mode"], found["vllm_importance_sampling_clip_max"]) == ("colocate", 2.0)


def test_the_default_stage_and_a_sampler_of_ours_with_max_rows_are_not_refused():
    assert unsupported(stage_with({})) == []
    assert unsupported(stage_with({"sampling.max_rows": 8, "sampling.backend": "native"})) == []
    assert unsupported(stage_with({"algorithm.beta": 0.0, "algorithm.kl_estimator": "k1"})) == []


def test_the_presets_that_trl_cannot_do_are_these():
    refused = {name for name in PRESETS if unsupported(stage_with({"algorithm": {"preset": name}}))}
    assert refused == {"dapo", "rloo", "reinforce_pp", "reinforce_pp_baseline"}
    assert unsupported(stage_with({"algorithm": {"preset": "dapo", "sampling_attempts": 1}})) == []


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("num_minibatches", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 4, 5, 100])
@pytest.mark.parametrize("prompts, generations", [(4, 2), (4, 3), (8, 5)])
def test_sizes_hold_whole_groups_and_add_up(prompts, generations, micro_batch_size, num_minibatches, num_iterations):
    stage = stage_with(
        {
            "prompts_per_step": prompts,
            "sampling.num_generations": generations,
            "micro_batch_size": micro_batch_size,
            "algorithm.num_minibatches": num_minibatches,
            "algorithm.num_iterations": num_iterations,
        }
    )
    size = sizes(stage)
    assert size.completions == prompts * generations
    assert size.rows_at_once * size.accumulation * num_minibatches == size.completions
    assert size.rows_at_once <= (micro_batch_size or size.completions)
    assert size.passes == size.accumulation * num_minibatches
    assert size.updates == num_iterations * num_minibatches
    assert arguments(stage, Model(**MODEL), seed=0)["max_steps"] == 3 * size.updates


def test_what_is_realised_differently_is_said():
    common = differences(stage_with({}))
    assert any("means over micro-batches" in line for line in common)
    more = differences(
        stage_with({"algorithm.num_minibatches": 2, "algorithm.reduction": "token", "micro_batch_size": 5})
    )
    assert [line for line in more if line not in common] == [
        "TRL's mini-batches are random rows of the step, the native engine's are whole groups",
        "TRL divides a mini-batch by the step's mean token count per mini-batch, not by its own",
        "TRL needs equal micro-batches: 4 rows instead of 5",
    ]


@pytest.mark.parametrize("installed", ["1.15.0", "1.16.1", None])
def test_another_version_is_refused_with_exit_4(monkeypatch, installed):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(trl_config, "version", version)
    with pytest.raises(
        SetupError, match=f"needs trl 1.16.0, found {installed or 'none'}; pip install trl==1.16.0"
    ) as error:
        require_trl()
    assert error.value.exit_code == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_every_argument_is_one_of_trl_s():
    from trl import GRPOConfig

    config = GRPOConfig(output_dir="unused", use_cpu=True, **arguments(stage_with({}), Model(**MODEL), seed=0))
    assert config.steps_per_generation == 1
    assert config.generation_batch_size == 16


def test_a_native_run_imports_no_trl():
    code = "import sys, grpo_lab.commands.training, grpo_lab.pipeline; print('trl' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
