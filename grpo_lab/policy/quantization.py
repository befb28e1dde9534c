"""Frozen weights in 4 bits through bitsandbytes, and the optimisers that keep their state in 8 bits."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import Quantization

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def require_bitsandbytes(wanted_by: str) -> Any:
    """The library.

    Raises:
        SetupError: it is not installed, or cannot be used here.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise SetupError(f'{wanted_by} needs bitsandbytes ({error}); pip install "grpo-lab[quantization]"') from error
    return bitsandbytes


def quantization_config(settings: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers takes to load weights in 4 bits; embeddings, norms and the output head stay as they are."""
    require_bitsandbytes("model.quantization")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=COMPUTE[settings.compute_dtype] if settings.compute_dtype else dtype,
    )


def keep_weights_as_loaded(network: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for good at the first forward pass without gradient.

    It does so on CPUs with avx512_bf16; afterwards the gradients and merges that read those weights are wrong, and
    nothing is raised (bitsandbytes 0.50).
    """
    linear = require_bitsandbytes("model.quantization").nn.Linear4bit
    for module in network.modules():
        if isinstance(module, linear):
            module.support_avx512bf16_for_cpu = False
