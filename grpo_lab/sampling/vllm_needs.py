"""What the vLLM backends need, and what cannot work: said before anything is loaded. Imports no vLLM."""

import os
from importlib.util import find_spec
from typing import Any

import torch

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import GrpoStage, Model


def require_vllm(stage: GrpoStage, model: Model) -> None:
    """Refuse a stage whose sampler cannot be had here. `model` is the model block as it holds for the stage.

    Raises:
        SetupError: with what to do instead.
    """
    if stage.sampling.has_own_weights:
        problem = why_not(stage, model, on_gpu=torch.cuda.is_available())
        if problem is not None:
            raise SetupError(f"sampling.backend: {stage.sampling.backend}: {problem}")


def why_not(stage: GrpoStage, model: Model, *, on_gpu: bool) -> str | None:
    """Why a stage cannot sample with vLLM, and what to do instead; None where it can."""
    sampling, lora = stage.sampling, model.lora
    assert sampling.vllm is not None
    if model.quantization is not None:
        return (
            "vLLM cannot hold the policy's 4-bit weights as they are; set model.quantization: null, or backend: native"
        )
    if lora is not None and lora.dora:
        return "vLLM has no DoRA; set model.lora.dora: false, or backend: native"
    if lora is not None and lora.bias != "none":
        return "vLLM's adapters have no biases; set model.lora.bias: none, or backend: native"
    if sampling.backend == "vllm-server":
        if stage.engine == "trl" and not on_gpu:
            return "TRL sends weights to its server over NCCL, which needs a GPU; set backend: vllm, or engine: native"
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "works with one trainer process only; train without --nproc, or set backend: vllm-server or native"
    if find_spec("vllm") is None:
        return 'vLLM is not installed; pip install "grpo-lab[vllm]" (without a GPU: as scripts/test_vllm.sh does)'
    if sampling.vllm.sleep and not on_gpu:
        return "vLLM sleeps on a GPU only; leave vllm.sleep out"
    return None


def check_heads(engine: Any) -> None:
    """Refuse a model whose heads vLLM's attention on a CPU has no code for; vLLM itself looks only when it computes.

    Raises:
        SetupError: with the sizes that it takes.
    """
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # needs vLLM

    size, possible = engine.llm_engine.model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in possible:
        raise SetupError(
            f"sampling.backend: vllm cannot serve this model here: its heads are of {size}, and on a CPU vLLM takes "
            f"{', '.join(map(str, possible))}"
        )
