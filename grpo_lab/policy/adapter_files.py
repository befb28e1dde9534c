"""What a folder with a LoRA adapter says of itself, read without peft."""

import json
from pathlib import Path
from typing import Any

from grpo_lab.errors import RecipeError

CONFIG, WEIGHTS, QUANTIZATION = "adapter_config.json", "adapter_model.safetensors", "quantization.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (Path(folder) / CONFIG).is_file()


def base_of(source: str) -> str:
    """Where the whole weights are: `source` itself, or what the adapter in it was trained on.

    An adapter of a run names a folder of the run; if the run was moved, the folder of that name in the run is taken.

    Raises:
        RecipeError: the adapter names a folder that is not there.
    """
    if not is_adapter(source):
        return source
    folder = Path(source)
    base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str):
        raise RecipeError(f"model: {folder / CONFIG} does not say what model the adapter belongs to")
    path = Path(base)
    if not path.is_absolute() or path.is_dir():
        return base
    run = (
        folder.absolute().parent.parent
    )  # the adapter is <run>/<stage>/final, its base <run>/<stage>/final or <run>/base
    for moved in (run / path.parent.name / path.name, run / path.name):
        if moved.is_dir():
            return str(moved)
    raise RecipeError(f"model: {folder / CONFIG} names {base} as the adapter's base, which is not there")


def quantization_of(source: str) -> dict[str, Any] | None:
    """How the weights were kept beside which an adapter learnt; None if not quantized, or if this is no adapter."""
    path = Path(source) / QUANTIZATION
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
