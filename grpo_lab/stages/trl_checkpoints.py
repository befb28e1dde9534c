"""TRL's own checkpoints, sealed and verified: asked for where the recipe wants them, and the newest whole one to go on from."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_lab.errors import CheckpointError
from grpo_lab.recipe.schema import StageBase
from grpo_lab.stages.running import Context
from grpo_lab.tracking.files import disk_errors
from grpo_lab.tracking.folders import MANIFEST, is_complete, seal_folder, verify_folder
from grpo_lab.types import Policy


@dataclass(frozen=True)
class Found:
    """A checkpoint of TRL's whose every byte is as it was written."""

    path: Path
    step: int


def resume(context: Context, name: str, *, updates: int) -> Found | None:
    """The newest checkpoint that can be trusted. The logs are cut back to it; what is newer is deleted.

    `updates`: optimiser steps of one step of the stage, which is what TRL counts.

    Raises:
        CheckpointError: there are sealed checkpoints, and none is as it was written.
    """
    found, problems = None, []
    for count, path in sorted(checkpoints(context.folder.checkpoints).items(), reverse=True):
        try:
            verify_folder(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        found = Found(path, count // updates)
        break
    if found is None and problems:
        raise CheckpointError(
            f"{context.folder.checkpoints}: none of {len(problems)} checkpoints can be read: {problems[0]}; start again "
            "under another --name"
        )
    _delete_unusable(context.folder.checkpoints, found)
    context.files.truncate(name, found.step if found else -1)
    if found is not None:
        for problem in problems:
            context.sinks.event(name, found.step, "warning", f"checkpoint left out: {problem}", {})
        context.sinks.event(name, found.step, "info", f"resumed from {found.path.name}", {})
    return found


def checkpoints(folder: Path) -> dict[int, Path]:
    """TRL's checkpoints by their number of optimiser steps; a folder without manifest is a write that was cut short."""
    return {updates: path for updates, path in _folders(folder).items() if (path / MANIFEST).exists()}


def _folders(folder: Path) -> dict[int, Path]:
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in matches.items() if match}


def _delete_unusable(folder: Path, found: Found | None) -> None:
    """What is newer than the checkpoint in use, or was cut short, would mix with what TRL writes there next."""
    sealed = checkpoints(folder)
    newest = -1 if found is None else max(updates for updates, path in sealed.items() if path == found.path)
    with disk_errors(folder):
        for updates, path in _folders(folder).items():
            if updates > newest or updates not in sealed:
                shutil.rmtree(path)


class Saving(TrainerCallback):
    """Asks TRL for a checkpoint where the recipe wants one, seals it, keeps the newest, and stops if asked to.

    `write` adds to the checkpoint's folder what TRL does not know of.
    """

    def __init__(
        self,
        context: Context,
        name: str,
        stage: StageBase,
        policy: Policy,
        *,
        updates: int,
        write: Callable[[Path], None],
    ) -> None:
        self.context = context
        self.name = name
        self.stage = stage
        self.policy = policy
        self.updates = updates
        self.write = write

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step, rest = divmod(state.global_step, self.updates)
        asked = self.context.stop.received is not None
        due = step % self.stage.checkpoint.every == 0 or step == self.stage.steps
        control.should_save = rest == 0 and (asked or due)
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self.context.folder.checkpoints
        path = folder / f"checkpoint-{state.global_step}"
        with disk_errors(path):
            self.write(path)
            seal_folder(path)
            self._prune(folder)
        step = state.global_step // self.updates
        self.context.saved(self.name, self.policy, step, last=step == self.stage.steps)

    def _prune(self, folder: Path) -> None:
        complete = sorted((updates for updates, path in checkpoints(folder).items() if is_complete(path)), reverse=True)
        for updates in complete[self.stage.checkpoint.keep :]:
            shutil.rmtree(folder / f"checkpoint-{updates}")
