"""Frozen weights in 4 bits through bitsandbytes, and the optimisers that keep their state in 8 bits."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import Optimizer, Quantization

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


BLOCK = 64  # weights that share a scale


def keep_weights_as_loaded(network: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for good at the first forward pass without gradient.

    It does so on CPUs with avx512_bf16; afterwards the gradients and merges that read those weights are wrong, and
    nothing is raised (bitsandbytes 0.50).

    Raises:
        SetupError: on a CPU, a layer whose number of inputs is no multiple of 64. There bitsandbytes gives back wrong
            weights (off by a quarter of their spread instead of a tenth), and says nothing.
    """
    linear = require_bitsandbytes("model.quantization").nn.Linear4bit
    for name, module in network.named_modules():
        if not isinstance(module, linear):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.weight.device.type == "cpu" and module.in_features % BLOCK:
            raise SetupError(
                f"model.quantization: {name} takes {module.in_features} inputs, no multiple of {BLOCK}; bitsandbytes "
                "reads such weights wrongly on a CPU. Leave quantization out, or use a GPU"
            )


def adamw_8bit(groups: Sequence[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW that keeps its moments in 8 bits (tensors below 4096 values in 32); paged where the device can page.

    Raises:
        SetupError: bitsandbytes is missing, or has no such optimiser for the device.
    """
    library = require_bitsandbytes(f"optimizer.name: {settings.name}")
    kind = library.optim.PagedAdamW8bit if settings.name == "paged_adamw_8bit" else library.optim.AdamW8bit
    device = groups[0]["params"][0].device
    trial = torch.nn.Parameter(torch.zeros(4096, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        kind([trial]).step()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        message = str(error).strip().partition("\n")[0]
        raise SetupError(
            f"optimizer.name: {settings.name} does not run on {device.type} ({message}); set adamw"
        ) from error
    optimizer: torch.optim.Optimizer = kind(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return optimizer
