"""LoRA adapters through peft: attached, read back, counted, and written so that transformers and peft load them.

Importing this file takes a second: do it where an adapter is used.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from grpo_lab.errors import RecipeError
from grpo_lab.policy.adapter_files import CONFIG, QUANTIZATION, WEIGHTS
from grpo_lab.recipe.schema import Lora, Quantization
from grpo_lab.seeds import derive_seed

# What of an adapter's settings must be the same where a stage goes on with it: the recipe's key and peft's.
SETTINGS = {"r": "r", "alpha": "lora_alpha", "bias": "bias", "rslora": "use_rslora", "dora": "use_dora"}


def attach(network: Any, lora: Lora, *, seed: int) -> Any:
    """The network with a fresh adapter, which changes nothing yet; only the adapter learns (and biases, if asked for).

    The adapter's weights are float32 whatever the network's type, and a function of `seed`.

    Raises:
        RecipeError: no layer has a name in `target_modules`, or peft cannot put an adapter on one.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            return get_peft_model(network, config)
        except ValueError as error:
            raise RecipeError(f"model.lora: {str(error).strip().splitlines()[0]}") from error


def attach_saved(network: Any, folder: Path, lora: Lora | None, *, seed: int) -> Any:
    """The network with the adapter in `folder`, to go on learning it.

    Args:
        lora: the settings it must have; None merges it into the network, all of which then learns.

    Raises:
        RecipeError: the settings differ, or the weights do not fit.
    """
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    saved = Lora.model_validate({key: written[name] for key, name in SETTINGS.items()} | targets(written))
    if lora is not None:
        for key in SETTINGS:
            if getattr(lora, key) != getattr(saved, key):
                raise RecipeError(
                    f"model.lora.{key}: {getattr(lora, key)}, but the adapter in {folder} has {getattr(saved, key)}; "
                    "give the same, or set lora: null to merge it into the weights and train those"
                )
    model = attach(network, lora or saved, seed=seed)
    if not (folder / WEIGHTS).is_file():
        raise RecipeError(f"model: {folder}: {WEIGHTS} is missing (weights are read as safetensors only)")
    tensors = load_file(folder / WEIGHTS)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise RecipeError(
            f"model.lora.target_modules: the adapter in {folder} has other layers, the first that differs is {odd[0]}"
        )
    set_peft_model_state_dict(model, tensors)
    return model if lora is not None else model.merge_and_unload().requires_grad_(True)


def targets(written: dict[str, Any]) -> dict[str, Any]:
    """The recipe's `target_modules` from what peft wrote, which is the resolved list."""
    return {"target_modules": sorted(written["target_modules"])}


def write_adapter(model: PeftModel, folder: Path, quantization: Quantization | None) -> None:
    """Write the adapter alone, its base named by where it was loaded from; the same bytes for the same adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": model.get_base_model().name_or_path}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if quantization is not None:
        (folder / QUANTIZATION).write_text(quantization.model_dump_json() + "\n", encoding="utf-8")
