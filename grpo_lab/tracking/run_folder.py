"""A run's folder: made whole or not at all, used by one process at a time, and saying what the run was."""

import difflib
import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from grpo_lab.errors import CheckpointError, RecipeError
from grpo_lab.tracking.environment import differences, environment
from grpo_lab.tracking.files import disk_errors, hash_source, read_json, write_atomic, write_json

RUN, RECIPE, RESOLVED, PLUGINS, LOCK = "run.json", "recipe.yaml", "resolved.yaml", "plugins", ".lock"

Status = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class StageFolder:
    """Where a stage's files are. Reading a finished run needs no more than this: `StageFolder(run / "warm_start")`."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One line per step and per evaluation; only values that are a function of the recipe."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """One line per step: seconds, speeds, memory."""
        return self.path / "timing.jsonl"

    @property
    def events(self) -> Path:
        """What happened beside the steps: advice, skipped checkpoints, failed trackers."""
        return self.path / "events.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def rollout(self, step: int) -> Path:
        """The completions of one step."""
        return self.rollouts / f"step-{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """The rows of the evaluation made when `step` steps were done."""
        return self.evaluations / f"step-{step:06d}.jsonl"


class RunFolder:
    """A run folder in use by this process. It stays locked until `close` or the end of the process, kill -9 included."""

    def __init__(self, path: Path, lock: FileIO) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(
        cls, path: Path, *, recipe_text: str, resolved_text: str, plugins: Sequence[Path], facts: Mapping[str, Any]
    ) -> "RunFolder":
        """Make a run's folder, with its recipe, its plugins' source and `run.json`. It appears whole or not at all.

        Args:
            plugins: files or folders with reward functions; they are copied and hashed.
            facts: more for run.json, in JSON values. Its `hashes` are added to those of recipe and plugins.

        Raises:
            RecipeError: the folder exists, or two plugins have one name.
        """
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        with disk_errors(path):
            _refuse_existing(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            try:
                lock = _lock(temporary)
                _fill(temporary, recipe_text=recipe_text, resolved_text=resolved_text, plugins=plugins, facts=facts)
                _rename_new(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return cls(path, lock)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Take an existing run's folder, to go on with it.

        Raises:
            RecipeError: there is no run, or another process uses it.
        """
        if not (path / RUN).is_file():
            raise RecipeError(f"{path}: there is no run here ({RUN} is missing)")
        return cls(path, _lock(path))

    def info(self) -> dict[str, Any]:
        """What run.json says now."""
        return read_json(self.path / RUN)

    def set_status(self, status: Status) -> None:
        """Say in run.json where the run is. A run killed by -9 keeps "running", but its folder is not locked."""
        self._write({"status": status})

    def mark_inexact(self, reason: str) -> None:
        """Say in run.json that repeating this run need not give the same bytes, and why."""
        because = self.info()["inexact_because"]
        if reason not in because:
            self._write({"exact": False, "inexact_because": [*because, reason]})

    def compare_environment(self, num_processes: int = 1) -> list[str]:
        """What differs from the machine and versions the run began with; each difference makes the run inexact."""
        found = differences(self.info()["environment"], environment(num_processes))
        for difference in found:
            self.mark_inexact(f"resumed elsewhere: {difference}")
        return found

    def refuse_changes(self, *, resolved_text: str, plugins: Sequence[Path], hashes: Mapping[str, Any]) -> None:
        """Refuse to go on with another recipe or other sources than the run began with; where it lies does not matter.

        Args:
            hashes: computed now, as `facts["hashes"]` were when the run was made.

        Raises:
            CheckpointError: with the lines of the recipe and the sources that differ.
        """
        before = (self.path / RESOLVED).read_text(encoding="utf-8").splitlines()
        now = resolved_text.splitlines()
        old_text, new_text = ([line for line in text if not line.startswith("output_dir:")] for text in (before, now))
        diff = difflib.unified_diff(old_text, new_text, "the run's recipe", "the recipe now", lineterm="")
        old = {key: value for key, value in self.info()["hashes"].items() if key not in (RECIPE, RESOLVED)}
        changes = [*diff, *differences(old, {PLUGINS: _plugin_hashes(plugins), **hashes})]
        if changes:
            listing = "\n".join(changes)
            raise CheckpointError(
                f"{self.path}: cannot be resumed, something changed since it began; undo it or start another run "
                f"with --name:\n{listing}"
            )

    def stage(self, name: str) -> StageFolder:
        """The folder of one stage, made if it is not there."""
        if not name or Path(name).name != name or name.startswith("."):
            raise RecipeError(f'stages: "{name}" cannot be the name of a folder')
        folder = StageFolder(self.path / name)
        with disk_errors(folder.path):
            for path in (folder.rollouts, folder.evaluations, folder.checkpoints):
                path.mkdir(parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        """Let other processes use the folder. Closing twice does no harm."""
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, changes: Mapping[str, Any]) -> None:
        write_json(self.path / RUN, {**self.info(), **changes, "changed": _now()})


class SharedRunFolder(RunFolder):
    """A run's folder that the first process of the run uses; this one, another of them, only reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set_status(self, status: Status) -> None:
        """The first process says it."""

    def mark_inexact(self, reason: str) -> None:
        """The first process says it."""

    def stage(self, name: str) -> StageFolder:
        """The folder of one stage, which the first process makes."""
        return StageFolder(self.path / name)

    def close(self) -> None:
        """There is no lock."""


def _fill(
    folder: Path, *, recipe_text: str, resolved_text: str, plugins: Sequence[Path], facts: Mapping[str, Any]
) -> None:
    write_atomic(folder / RECIPE, recipe_text)
    write_atomic(folder / RESOLVED, resolved_text)
    _copy_plugins(plugins, folder / PLUGINS)
    hashes = {
        **{name: hash_source(folder / name) for name in (RECIPE, RESOLVED)},
        PLUGINS: _plugin_hashes(plugins),
        **facts.get("hashes", {}),
    }
    about = {"status": "running", "created": _now(), "exact": True, "inexact_because": []}
    write_json(folder / RUN, {**about, "environment": environment(), **facts, "hashes": hashes})


def _copy_plugins(plugins: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    for plugin in plugins:
        copy = folder / plugin.name
        if copy.exists():
            raise RecipeError(f'plugins: two are named "{plugin.name}"; rename one')
        if plugin.is_dir():
            shutil.copytree(plugin, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(plugin, copy)


def _plugin_hashes(plugins: Sequence[Path]) -> dict[str, str]:
    return {plugin.name: hash_source(plugin) for plugin in plugins}


def _refuse_existing(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise RecipeError(f"{path}: exists already; --resume continues it, --name starts another run")


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError:
        _refuse_existing(path)  # another process was faster
        raise


def _lock(folder: Path) -> FileIO:
    """Hold the folder's lock. The file stays for ever: deleting it would let two processes lock two files."""
    with disk_errors(folder / LOCK):
        file = FileIO(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read(20).decode() or "unknown"
            file.close()
            raise RecipeError(f"{folder}: is in use by process {holder}; wait for it or stop it") from error
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
