"""Writing files so that a kill or a full disk leaves no half of one behind, in JSON that any program can read."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo_lab.errors import CheckpointError, DiskError

BLOCK_BYTES = 1 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn every failure to write `path` into a DiskError (exit 8) that names it."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DiskError(
            f"{path}: could not be written: {reason}; what was saved before is intact: make room, then --resume"
        ) from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that at every moment either the old or the new content is there, whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C included: the half-written file goes, the error stays
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, mapping: Mapping[str, Any]) -> None:
    """Add one JSON line to a log. If the disk fills up on the way, the log is cut back to its last whole line."""
    data = memoryview(f"{dump_line(mapping)}\n".encode())
    with disk_errors(path), path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def write_json(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write a JSON file for programs and people, atomically."""
    write_atomic(path, json.dumps(_strict(mapping), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one mapping.

    Raises:
        CheckpointError: the file is missing or broken; the message says which.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a mapping, found {type(value).__name__}")
    return value


def dump_line(mapping: Mapping[str, Any]) -> str:
    """One line of strict JSON, keys in the order given, without the line's end.

    nan and inf, which JSON does not have, become null. Everything outside printable ASCII is escaped, so that
    terminal escapes, bidi marks, NUL and lone surrogates in model text are inert and still come back as they were.

    >>> dump_line({"reward": float("nan"), "text": "a\\n"})
    '{"reward": null, "text": "a\\\\n"}'
    """
    return json.dumps(_strict(mapping), allow_nan=False)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line that a kill cut short is left out; a broken one before it is an error."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        rows.append(parse_line(path, number, line))
    return rows


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line of a log; `number` counts from 1 and is for the error message."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{path}:{number}: not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise CheckpointError(f"{path}:{number}: must hold a mapping, found {type(row).__name__}")
    return row


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_source(path: Path) -> str:
    """sha256 of a source file, or of the names and contents of all files in a source folder (byte code left out)."""
    if path.is_file():
        return hash_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    listing = "".join(f"{hash_file(file)} {json.dumps(file.relative_to(path).as_posix())}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _strict(value: Any) -> Any:
    """The same value without what strict JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
