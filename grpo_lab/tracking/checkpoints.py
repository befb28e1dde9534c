"""Checkpoints: tensors as safetensors, the rest as JSON, checked byte by byte before they are used. No pickle."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_lab.errors import CheckpointError, NumericError
from grpo_lab.tracking.files import disk_errors, write_json
from grpo_lab.tracking.folders import is_complete, remove_leftovers, save_folder_atomic, verify_folder

STATE = "state.json"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and verified. `skipped` says which newer ones could not be, and why."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()


def save_checkpoint(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Save everything a run needs to go on from `step`; returns the checkpoint's folder.

    Args:
        folder: the stage's `checkpoints/`.
        tensors: by file stem, e.g. {"model": model.state_dict(), "optimizer": ...}. Tied tensors are stored once.
        state: JSON values; tuples come back as lists, keys as strings.
        keep: how many checkpoints stay, this one included; only complete ones count.

    Raises:
        NumericError: a tensor or a number in `state` is not finite; nothing was written.
        DiskError: the checkpoint could not be written; the older ones are intact.
    """
    _refuse_non_finite(step, tensors, state)

    def write(path: Path) -> None:
        aliases = {}
        for stem, named in tensors.items():
            aliases[stem] = write_tensors(path / f"{stem}.safetensors", named)
        write_json(path / STATE, {"step": step, "aliases": aliases, "state": state})

    path = folder / f"step-{step:06d}"
    with disk_errors(folder):
        remove_leftovers(folder)
        save_folder_atomic(path, write)
        _prune(folder, step=step, keep=keep)
    return path


def load_latest(folder: Path) -> Loaded | None:
    """The newest checkpoint whose every byte is as it was written; None if none was ever saved.

    Raises:
        CheckpointError: there are checkpoints and none can be read; names the first bad file.
    """
    skipped: list[str] = []
    for step, path in sorted(_steps(folder).items(), reverse=True):
        try:
            tensors, state = _read(path, step)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return Loaded(step, tensors, state, path, tuple(skipped))
    if skipped:
        raise CheckpointError(
            f"{folder}: none of {len(skipped)} checkpoints can be read: {skipped[0]}; start again under another --name"
        )
    return None


def write_tensors(path: Path, named: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors as safetensors, tied ones once; returns which names stand for another one's tensor."""
    stored, aliases = _store_once(named)
    save_file(stored, path, metadata={"format": "pt"})
    return aliases


def read_tensors(path: Path, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """What `write_tensors` wrote."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def optimizer_tensors(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split `optimizer.state_dict()` into tensors and JSON, so that it needs no pickle. Inverse: `optimizer_state`.

    Tensors are named `state.<parameter>.<key>`; what is no tensor (a momentum buffer that is still None) and the
    parameter groups are JSON.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, nested in state_dict["state"].items():
        entries: dict[str, Any] = {}
        for key, item in nested.items():  # bitsandbytes keeps its 8-bit tensors one level deeper, and takes them flat
            entries |= item if isinstance(item, dict) else {key: item}
        values[str(index)] = {key: item for key, item in entries.items() if not isinstance(item, Tensor)}
        tensors |= {f"state.{index}.{key}": item for key, item in entries.items() if isinstance(item, Tensor)}
    return tensors, {"param_groups": state_dict["param_groups"], "values": values}


def optimizer_state(tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from the two parts that `optimizer_tensors` made."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in saved["values"].items()}
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        state[int(index)][key] = tensor
    groups = [  # JSON has no tuples: betas went in as one and come back as one
        {key: tuple(item) if isinstance(item, list) and key != "params" else item for key, item in group.items()}
        for group in saved["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def _refuse_non_finite(step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for stem, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                count = int((~tensor.isfinite()).sum())
                raise NumericError(
                    f"checkpoint of step {step}: {stem}: {name} has {count} of {tensor.numel()} values that are not "
                    "finite; nothing was written, the checkpoint before stays"
                )
    try:
        json.dumps(state, allow_nan=False)
    except ValueError as error:
        raise NumericError(f"checkpoint of step {step}: state: {error}; nothing was written") from error


def _store_once(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that safetensors can write, and which other names stand for the same memory (tied weights)."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in first_name:
            aliases[name] = first_name[memory]
            continue
        first_name[memory] = name
        plain = tensor.detach().cpu().contiguous()
        # A view holds on to memory it does not show, maybe another tensor's: only a copy may be stored.
        storage = plain.untyped_storage()
        is_view = storage.nbytes() != plain.numel() * plain.element_size() or storage.data_ptr() in storages
        stored[name] = plain.clone() if is_view else plain
        storages.add(storage.data_ptr())
    return stored, aliases


def _read(path: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    verify_folder(path)
    try:
        saved = json.loads((path / STATE).read_bytes())
        if saved["step"] != step:
            raise ValueError(f"state is of step {saved['step']}")
        files = saved["aliases"].items()
        return {stem: read_tensors(path / f"{stem}.safetensors", aliases) for stem, aliases in files}, saved["state"]
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint of step {step}: {error}") from error


def _steps(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = {path: re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in matches.items() if match}


def _prune(folder: Path, *, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep` complete checkpoints up to `step`.

    Later ones can only be those that a resume could not read: they neither count nor go; a new save replaces them.
    """
    steps = _steps(folder)
    complete = sorted(past for past, path in steps.items() if past <= step and is_complete(path))
    for past, path in steps.items():
        if past < complete[-keep:][0]:
            shutil.rmtree(path)
