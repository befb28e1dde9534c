"""What cannot work with vLLM is refused in one line, before anything is loaded."""

import importlib.util

import pytest

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import GrpoStage, Model
from grpo_lab.sampling import vllm_needs
from grpo_lab.sampling.vllm_needs import require_vllm, why_not

STAGE = {
    "kind": "grpo",
    "data": {"source": "task", "path": "addition", "prompt": "prompt"},
    "steps": 3,
    "optimizer": {"learning_rate": 1e-3},
    "rewards": [{"name": "accuracy"}],
    "prompts_per_step": 4,
}
SAMPLING = {"num_generations": 4, "max_completion_length": 8}
URLS = {"urls": ["http://127.0.0.1:8000"]}


def stage(backend="vllm", *, engine="native", **vllm) -> GrpoStage:
    sampling = {**SAMPLING, "backend": backend} | ({"vllm": vllm} if vllm else {})
    return GrpoStage(**STAGE, engine=engine, sampling=sampling)


@pytest.mark.parametrize(
    "of, model, on_gpu, begins",
    [
        (stage(), {"quantization": {}, "lora": {}}, True, "vLLM cannot hold the policy's 4-bit weights"),
        (stage(), {"lora": {"dora": True}}, True, "vLLM has no DoRA"),
        (stage(), {"lora": {"bias": "all"}}, True, "vLLM's adapters have no biases"),
        (stage(sleep=True), {}, False, "vLLM sleeps on a GPU only; leave vllm.sleep out"),
        (stage("vllm-server", engine="trl", **URLS), {}, False, "TRL sends weights to its server over NCCL"),
        (stage(sleep=True), {}, True, None),
        (stage("vllm-server", engine="trl", **URLS), {}, True, None),
        (stage("vllm-server", **URLS), {"lora": {}}, False, None),
        (stage(engine="trl"), {}, False, None),
    ],
)
def test_what_cannot_work_says_why_and_what_to_do(monkeypatch, of, model, on_gpu, begins):
    monkeypatch.setattr(vllm_needs, "find_spec", lambda name: importlib.util.find_spec("sys"))  # as if installed
    found = why_not(of, Model(path="x", **model), on_gpu=on_gpu)
    assert found is None if begins is None else (found or "").startswith(begins)


def test_several_trainer_processes_need_a_server(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (why_not(stage(), Model(path="x"), on_gpu=False) or "").startswith("works with one trainer process only")
    assert why_not(stage("vllm-server", **URLS), Model(path="x"), on_gpu=False) is None


def test_without_vllm_a_recipe_that_wants_it_ends_with_exit_4_and_its_remedy(monkeypatch, cli, toy_recipe):
    monkeypatch.setattr(vllm_needs, "find_spec", lambda name: None)
    with pytest.raises(SetupError) as error:
        require_vllm(stage(), Model(path="x"))
    line = (
        'sampling.backend: vllm: vLLM is not installed; pip install "grpo-lab[vllm]" (without a GPU: as '
        "scripts/test_vllm.sh does)"
    )
    assert str(error.value) == line
    ran = cli("train", toy_recipe, "stages.grpo.sampling.backend=vllm", f"output_dir={toy_recipe.parent}")
    assert ran.code == 4
    assert ran.err.strip().endswith(line)


def test_a_native_stage_needs_nothing(monkeypatch):
    monkeypatch.setattr(vllm_needs, "find_spec", lambda name: None)
    require_vllm(GrpoStage(**STAGE, sampling=SAMPLING), Model(path="x", quantization={}, lora={}))
