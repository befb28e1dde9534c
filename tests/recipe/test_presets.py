"""The table of variants: every row is a recipe that loads, and keys that would have no effect are refused."""

from typing import get_args

import pytest
from pydantic import ValidationError

from grpo_lab.recipe.presets import PRESETS, VARIANTS
from grpo_lab.recipe.schema import Algorithm, GrpoStage

KL_IN_REWARD = {"kl_estimator": "k1", "kl_placement": "reward"}
ROWS = {
    "grpo": {},
    "dr_grpo": {"advantage_scale": "none", "reduction": "constant", "beta": 0.0},
    "dapo": {"epsilon_high": 0.28, "reduction": "token", "beta": 0.0, "sampling_attempts": 4, "overlong_buffer": 0.2},
    "gspo": {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
    "cispo": {"surrogate": "cispo", "epsilon_high": 5.0, "reduction": "token", "beta": 0.0},
    "sapo": {"surrogate": "sapo", "beta": 0.0},
    "rloo": {
        "advantage_baseline": "leave_one_out", "advantage_scale": "none", "surrogate": "none",
        "ratio_level": "sequence_sum", "beta": 0.05, **KL_IN_REWARD,
    },
    "reinforce_pp": {
        "advantage_baseline": "batch", "advantage_scale": "batch", "reduction": "token", "beta": 0.01, **KL_IN_REWARD,
    },
    "reinforce_pp_baseline": {"advantage_scale": "centred", "reduction": "token", "beta": 0.01, "kl_estimator": "k2"},
    "gdpo": {"reward_aggregation": "normalize_then_sum", "advantage_scale": "centred"},
    "trl_default": {"reduction": "token", "beta": 0.0, "kl_bias_correction": True},
}  # fmt: skip


def test_the_schema_knows_every_row():
    assert set(get_args(Algorithm.model_fields["preset"].annotation)) == set(PRESETS) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_grpo_in_just_these_keys(name):
    plain, row = Algorithm().model_dump(), Algorithm(preset=name).model_dump()
    assert {key: value for key, value in row.items() if value != plain[key] and key != "preset"} == ROWS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_written_out_in_full_is_the_same_row(name):
    row = Algorithm(preset=name)
    assert Algorithm(**row.model_dump()) == row


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_every_row_takes_a_kl_penalty_and_does_without(name, beta):
    assert Algorithm(preset=name, beta=beta).beta == beta


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_says_what_it_is_and_where_it_is_from(name):
    assert VARIANTS[name].idea
    assert VARIANTS[name].source


def test_trl_default_is_trls_own_default():
    from dataclasses import fields

    from trl import GRPOConfig

    trl = {field.name: field.default for field in fields(GRPOConfig)}
    ours = Algorithm(preset="trl_default")
    assert (trl["loss_type"], ours.surrogate, ours.reduction) == ("dapo", "clipped", "token")
    assert (trl["beta"], trl["epsilon"], trl["epsilon_high"], trl["delta"]) == (ours.beta, ours.epsilon_low, None, None)
    assert ours.epsilon_high == ours.epsilon_low
    assert trl["use_bias_correction_kl"] is ours.kl_bias_correction is True
    assert (trl["scale_rewards"], trl["importance_sampling_level"]) == (ours.advantage_scale, ours.ratio_level)
    assert (trl["num_iterations"], trl["entropy_coef"], trl["top_entropy_quantile"]) == (1, 0.0, 1.0)
    assert (trl["mask_truncated_completions"], trl["sync_ref_model"]) == (False, False)
    assert trl["multi_objective_aggregation"] == "sum_then_normalize"
    sapo = Algorithm(preset="sapo")
    assert (trl["sapo_temperature_pos"], trl["sapo_temperature_neg"]) == (
        sapo.sapo_temperature_pos,
        sapo.sapo_temperature_neg,
    )


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"surrogate": "sapo", "delta": 2.0}, "delta has no effect with surrogate: sapo; leave it at null"),
        (
            {"surrogate": "cispo", "epsilon_low": 0.1},
            "epsilon_low has no effect with surrogate: cispo; leave it at 0.2",
        ),
        (
            {"surrogate": "none", "epsilon_high": 0.3},
            "epsilon_high has no effect with surrogate: none; leave it at 0.2",
        ),
        ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg has no effect with surrogate: clipped; leave it at 1.05"),
        (
            {"kl_placement": "reward", "kl_bias_correction": True},
            "kl_bias_correction has no effect with kl_placement: reward; leave it at false",
        ),
        (
            {"beta": 0.0, "reference_refresh": {"every": 2}},
            "reference_refresh has no effect with beta: 0.0; leave it at null",
        ),
        (
            {"sampler_correction_cap": 3.0},
            "sampler_correction_cap has no effect with sampler_correction: none; leave it at 2.0",
        ),
        (
            {"advantage_baseline": "leave_one_out"},
            "advantage_scale must be none with advantage_baseline: leave_one_out, got group",
        ),
        (
            {"advantage_baseline": "batch", "advantage_scale": "batch", "sampling_attempts": 2},
            "sampling_attempts must be 1 with advantage_baseline: batch, got 2",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(values, problem):
    with pytest.raises(ValidationError) as error:
        Algorithm(**values)
    assert [each["msg"] for each in error.value.errors()] == [f"Value error, {problem}"]


def stage(algorithm, **changes):
    values = {
        "kind": "grpo", "data": {"source": "task", "path": "addition", "prompt": "prompt"}, "steps": 1,
        "optimizer": {"learning_rate": 1e-3}, "sampling": {"num_generations": 2, "max_completion_length": 50},
        "rewards": [{"name": "accuracy"}], "algorithm": algorithm, "prompts_per_step": 2,
    }  # fmt: skip
    return GrpoStage(**{**values, **changes})


def test_dapo_brings_its_overlong_penalty_unless_the_recipe_has_one():
    added = stage({"preset": "dapo"}).reward_terms[1]
    assert (added.name, added.weight, added.options) == ("overlong", 1.0, {"max_length": 50, "buffer": 10})
    own = [{"name": "accuracy"}, {"name": "overlong", "weight": 0.5, "options": {"max_length": 40, "buffer": 4}}]
    assert stage({"preset": "dapo"}, rewards=own).reward_terms == stage({}, rewards=own).rewards
    assert [term.name for term in stage({"preset": "dapo", "overlong_buffer": 0.0}).reward_terms] == ["accuracy"]
    assert [term.name for term in stage({}).reward_terms] == ["accuracy"]


def test_dynamic_sampling_needs_data_that_can_be_drawn_from():
    data = {"source": "file", "path": "x.jsonl", "prompt": "prompt", "streaming": True}
    with pytest.raises(ValidationError, match="sampling_attempts draws other prompts at random"):
        stage({"sampling_attempts": 2}, data=data)
