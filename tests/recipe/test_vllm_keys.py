"""What a recipe says of vLLM: what is filled, and keys that would have no effect."""

import pytest
import yaml

from grpo_lab.errors import RecipeError
from grpo_lab.recipe import load_recipe, resolved_yaml

RECIPE = {
    "name": "x",
    "model": {"path": "somewhere"},
    "stages": {
        "g": {
            "kind": "grpo",
            "data": {"source": "task", "path": "addition", "prompt": "prompt"},
            "sampling": {"num_generations": 2, "max_completion_length": 8},
            "rewards": [{"name": "length", "options": {"target": 3}}],
            "prompts_per_step": 2,
            "steps": 3,
            "optimizer": {"learning_rate": 0.001, "betas": [0.8, 0.9]},
        }
    },
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(RECIPE))

    def read(**settings):
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return load_recipe(path, [text.replace("s.g.", "stages.g.", 1) for text in overrides])

    return read


@pytest.mark.parametrize("backend", ["vllm", "vllm-server"])
def test_tokens_are_weighted_for_vllm_unless_the_recipe_says_otherwise(recipe, backend, tmp_path):
    urls = {"s__g__sampling__vllm__urls": "[http://127.0.0.1:8000]"} if backend == "vllm-server" else {}
    of = recipe(s__g__sampling__backend=backend, **urls)
    assert of.stages["g"].algorithm.sampler_correction == "truncate"
    assert "sampler_correction: truncate" in resolved_yaml(of)
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(of))
    assert load_recipe(again) == of
    off = recipe(s__g__sampling__backend=backend, s__g__algorithm__sampler_correction="none", **urls)
    assert off.stages["g"].algorithm.sampler_correction == "none"
    assert recipe().stages["g"].algorithm.sampler_correction == "none"


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 1e-3),
        ({"model__dtype": "bfloat16"}, 0.1),
        ({"s__g__sampling__max_logps_gap": 0.5}, 0.5),
        ({"s__g__sampling__max_logps_gap": "null"}, None),
        # the mass that is left out is part of the gap
        ({"s__g__sampling__top_k": 5, "s__g__algorithm__sampler_correction": "truncate"}, None),
    ],
    ids=str,
)
def test_the_gap_that_stops_a_run_depends_on_the_dtype(recipe, settings, expected):
    assert recipe(**settings).stages["g"].sampling.max_logps_gap == expected


VLLM = "s__g__sampling__vllm"
AHEAD = {
    "s__g__sampling__backend": "vllm-server",
    f"{VLLM}__urls": "[http://127.0.0.1:8000]",
    f"{VLLM}__one_step_off": "true",
}


def test_one_step_off_allows_for_what_an_update_changes_and_needs_the_correction_for_it(recipe):
    stage = recipe(**AHEAD).stages["g"]
    assert (stage.sampling.max_logps_gap, stage.algorithm.sampler_correction) == (0.1, "truncate")
    with pytest.raises(
        RecipeError, match="so the gradient would be biased; set algorithm.sampler_correction: truncate"
    ):
        recipe(**AHEAD, s__g__algorithm__sampler_correction="none")


@pytest.mark.parametrize(
    "backend, settings, problem",
    [
        ("native", {f"{VLLM}__sleep": "true"}, "vllm has no effect with backend: native; leave it out"),
        ("vllm", {VLLM: "null"}, "backend: vllm needs the block vllm; leave it out, or say what differs"),
        (
            "vllm",
            {f"{VLLM}__urls": "[http://127.0.0.1:8000]"},
            "vllm.urls has no effect with backend: vllm; leave it out",
        ),
        (
            "vllm-server",
            {f"{VLLM}__urls": "[http://127.0.0.1:8000]", f"{VLLM}__cache_gib": 3, "s__g__sampling__max_rows": 4},
            "vllm.cache_gib has no effect with backend: vllm-server; leave it out",
        ),
        ("vllm-server", {}, "backend: vllm-server needs vllm.urls, for example [http://127.0.0.1:8000]"),
        ("vllm", {f"{VLLM}__one_step_off": "true"}, "vllm.one_step_off has no effect with backend: vllm; leave it out"),
        (
            "vllm-server",
            {f"{VLLM}__urls": "[127.0.0.1:8000]"},
            'urls: "127.0.0.1:8000" is no address of a server; write http',
        ),
    ],
)
def test_a_key_without_effect_is_an_error(recipe, backend, settings, problem):
    with pytest.raises(RecipeError) as error:
        recipe(s__g__sampling__backend=backend, **settings)
    assert problem in str(error.value)
