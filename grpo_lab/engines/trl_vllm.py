"""What the vLLM backends mean in TRL's words; `trl_config.py` has the other keys. Imports no TRL and no vLLM.

TRL starts its own engine in this process (`vllm_mode: colocate`), or sends weights to a server over NCCL.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from grpo_lab.recipe.schema import GrpoStage, Vllm
from grpo_lab.sampling.vllm_needs import check_heads

# recipe key -> the argument of GRPOConfig that it decides, alone or with others
PASSED: Mapping[str, str] = {
    "sampling.backend": "use_vllm",
    "sampling.vllm.memory_share": "vllm_gpu_memory_utilization",
    "sampling.vllm.max_model_length": "vllm_max_model_length",
    "sampling.vllm.sleep": "vllm_enable_sleep_mode",
    "sampling.vllm.urls": "vllm_server_base_url",
    "sampling.vllm.timeout_seconds": "vllm_server_timeout",
    "algorithm.sampler_correction": "vllm_importance_sampling_correction",
    "algorithm.sampler_correction_level": "vllm_importance_sampling_mode",
    "algorithm.sampler_correction_cap": "vllm_importance_sampling_clip_max",
}

# recipe key -> the part of this project that uses it
SHARED: Mapping[str, str] = {
    "sampling.max_logps_gap": "refusing_stale, where TRL measures the gap (with its correction on)",
    "sampling.vllm.cache_gib": "VLLM_CPU_KVCACHE_SPACE, which vLLM reads on a CPU",
}

# recipe key -> when TRL cannot do what it asks for, and what to do instead
REFUSED: Mapping[str, tuple[Callable[[GrpoStage], bool], str]] = {
    "sampling.vllm.urls": (
        lambda stage: stage.sampling.vllm is not None and len(stage.sampling.vllm.urls) > 1,
        "TRL speaks to one server; set one url, or engine: native",
    ),
    "sampling.vllm.exchange": (
        lambda stage: stage.sampling.vllm is not None and stage.sampling.vllm.exchange is not None,
        "TRL sends weights over NCCL and not as files; set exchange: null",
    ),
    "sampling.vllm.one_step_off": (
        lambda stage: stage.sampling.one_step_off,
        "TRL's GRPOTrainer draws and learns in turn; set one_step_off: false",
    ),
    "algorithm.sampler_correction": (
        lambda stage: stage.algorithm.sampler_correction != "none" and not stage.sampling.has_own_weights,
        "TRL corrects for vLLM's distribution only; sample untruncated (top_p 1, no top_k, min_p 0) or set engine: native",
    ),
}


def vllm_arguments(stage: GrpoStage) -> dict[str, Any]:
    """The arguments of GRPOConfig that say whether and how vLLM samples."""
    settings, algorithm = stage.sampling.vllm or Vllm(), stage.algorithm
    mode = "mask" if algorithm.sampler_correction == "mask" else "truncate"
    return {
        "use_vllm": stage.sampling.has_own_weights,
        "vllm_mode": "server" if stage.sampling.backend == "vllm-server" else "colocate",
        "vllm_gpu_memory_utilization": settings.memory_share,
        "vllm_max_model_length": settings.max_model_length,
        "vllm_enable_sleep_mode": settings.sleep,
        "vllm_server_base_url": settings.urls[0] if settings.urls else None,
        "vllm_server_timeout": settings.timeout_seconds,
        "vllm_importance_sampling_correction": algorithm.sampler_correction != "none",
        "vllm_importance_sampling_mode": f"{algorithm.sampler_correction_level}_{mode}",
        "vllm_importance_sampling_clip_max": algorithm.sampler_correction_cap,
    }


@contextmanager
def beside_vllm(stage: GrpoStage) -> Iterator[None]:
    """While TRL builds and uses an engine of its own in this process: what vLLM needs there, and what it changes."""
    if stage.sampling.backend != "vllm":
        yield
        return
    from grpo_lab.sampling.undisturbed import undisturbed  # a second of import, needed only here
    from grpo_lab.sampling.vllm_plugin import keep_weights_loadable

    assert stage.sampling.vllm is not None
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    settings["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(stage.sampling.vllm.cache_gib))
        settings["TORCH_COMPILE_DISABLE"] = "1"  # TRL cannot ask for an engine that compiles nothing
    with undisturbed(**settings):
        keep_weights_loadable()
        yield


@contextmanager
def own_engine(trainer: Any, stage: GrpoStage) -> Iterator[None]:
    """Use the engine that TRL's trainer has started, if it has; it is stopped in the end.

    Raises:
        SetupError: vLLM cannot compute the model.
    """
    if stage.sampling.backend != "vllm":
        yield
        return
    from grpo_lab.sampling.vllm import shut_down

    engine = trainer.vllm_generation.llm
    try:
        check_heads(engine)
        yield
    finally:
        shut_down(engine)
