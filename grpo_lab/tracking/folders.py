"""Folders that appear whole or not at all, and that can prove later that nothing in them changed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from grpo_lab.errors import CheckpointError
from grpo_lab.tracking.files import disk_errors, hash_file, read_json, sync_folder, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
TEMPORARY = ".tmp-"


def save_folder_atomic(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder; put it at `target`, with a manifest, only when every byte is on the disk.

    A folder that was at `target` stays until then. A kill leaves at most hidden `.tmp-*` folders beside it.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    with disk_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()
            write(temporary)
            seal_folder(temporary)
            _put_in_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def seal_folder(folder: Path) -> None:
    """Put every byte of a folder on the disk, then write its manifest: a folder without one is not complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files
    }
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(inner)


def verify_folder(path: Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        CheckpointError: names the first file that is missing, has another size or other bytes.
    """
    for name, expected in read_manifest(path).items():
        file = path / name
        check_size(file, expected)
        if hash_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: its bytes changed: sha256 is not the one in {MANIFEST}")


def is_complete(path: Path) -> bool:
    """Whether every file is there with its size. Cheap: it reads no content, unlike `verify_folder`."""
    try:
        for name, expected in read_manifest(path).items():
            check_size(path / name, expected)
    except CheckpointError:
        return False
    return True


def check_size(file: Path, expected: dict[str, int | str]) -> None:
    """Raise CheckpointError unless `file` exists with the size its manifest states."""
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing")
    if file.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, {MANIFEST} says {expected['bytes']}")


def read_manifest(path: Path) -> dict[str, dict[str, int | str]]:
    """What the manifest says of each file, by its name inside the folder."""
    file = path / MANIFEST
    manifest = read_json(file)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format_version is {manifest.get('format_version')}, expected {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{file}: lists no files")
    for name, expected in files.items():
        if not _is_inside(name) or not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{file}: its entry {name!r} is not a file of this folder with bytes and sha256")
    return files


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writes left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        _remove(path)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _put_in_place(temporary: Path, target: Path) -> None:
    aside = target.with_name(f"{TEMPORARY}old-{target.name}")
    if target.exists():  # a folder cannot be renamed onto one with content
        _remove(aside)
        os.rename(target, aside)
    os.rename(temporary, target)
    sync_folder(target.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
