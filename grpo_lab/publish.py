"""A finished stage's model on the hub, private unless said otherwise, with its card."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter of what the hub's client is made of

from grpo_lab.card import model_card
from grpo_lab.errors import GrpoLabError, SetupError, UsageError
from grpo_lab.finished import CARD, Finished, export, finished_stage
from grpo_lab.policy.adapter_files import base_of, is_adapter
from grpo_lab.policy.load import first_line, has_adapter, load_policy, write_policy
from grpo_lab.recipe import Recipe
from grpo_lab.recipe.schema import Push
from grpo_lab.tracking.folders import MANIFEST
from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import Policy

HUB_ERRORS = (HfHubHTTPError, HTTPError, OSError, ValueError)


@dataclass(frozen=True)
class Upload:
    """A folder with everything that goes to the hub."""

    folder: Path
    kind: str

    @property
    def files(self) -> dict[str, Path]:
        """What is sent, by its name in the repository. The manifest is this machine's and stays."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @property
    def operations(self) -> list[CommitOperationAdd]:
        """The same as one commit's work."""
        return [CommitOperationAdd(name, str(path)) for name, path in self.files.items()]


def prepared(of: Finished, folder: Path, *, merge: bool) -> Upload:
    """The stage's model, checked as `export` checks it, with its card, in a new folder.

    Raises:
        UsageError: an adapter whose base only this machine has.
    """
    if is_adapter(of.final) and not merge and Path(base_of(str(of.final))).is_absolute():
        raise UsageError(
            f"{of.final}: the adapter's base is a folder of this machine, so nobody could use it; add --merge"
        )
    found = export(of, folder, merge=merge, dtype=None)
    return Upload(folder, found["kind"])


def push(upload: Upload, repo: str, *, public: bool, message: str) -> str:
    """Send everything in one commit and return its address. The token is the environment's or the hub's own.

    Raises:
        UsageError: the repository is there and public, and that was not asked for. Nothing is sent.
        SetupError: the hub could not be reached, or refused.
    """
    ready(repo, public=public)
    with said_by_the_hub(repo):
        return str(HfApi().create_commit(repo, upload.operations, commit_message=message).commit_url)


def ready(repo: str, *, public: bool) -> None:
    """See that the repository is there and as public as was asked for; raises as `push` does."""
    with said_by_the_hub(repo):
        HfApi().create_repo(repo, private=not public, exist_ok=True)
        if not public and not HfApi().model_info(repo).private:
            raise UsageError(
                f"{repo}: is there and public; ask for that (--public, in a recipe public: true) or name another"
            )


@contextmanager
def said_by_the_hub(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line."""
    try:
        yield
    except HUB_ERRORS as error:
        raise SetupError(f"{repo}: the hub said no: {first_line(error)}") from error


class Publisher:
    """Sends the last stage's model to the hub while the run trains: `tracking.push`.

    At every checkpoint, in the background; a checkpoint is left out while the one before it is still on its way. Nothing
    that goes wrong here stops the run: it is said.
    """

    def __init__(self, recipe: Recipe, run: Path, settings: Push, sinks: Sinks) -> None:
        self.recipe, self.run, self.settings, self.sinks = recipe, run, settings, sinks
        self.stage = list(recipe.stages)[-1]
        self._sending: tuple[int, Future[Any], TemporaryDirectory[str]] | None = None

    def checkpoint(self, stage: str, policy: Policy, step: int) -> None:
        """The policy as it is after `step` steps."""
        if stage != self.stage or not self.settings.checkpoints:
            return
        if self._sending is not None and not self._sending[1].done():
            self._say("info", step, f"step {step} is not sent: step {self._sending[0]} is still on its way")
            return
        self._settle()
        folder = TemporaryDirectory()
        try:
            upload = written(self.recipe, self.stage, self.run, policy, Path(folder.name), merge=self.settings.merge)
            with said_by_the_hub(self.settings.repo):
                message = f"grpo-lab: stage {stage} of {self.run.name}, step {step}"
                future = HfApi().create_commit(
                    self.settings.repo, upload.operations, commit_message=message, run_as_future=True
                )
        except (GrpoLabError, torch.OutOfMemoryError, MemoryError) as error:
            folder.cleanup()
            self._say("warning", step, f"step {step} was not sent: {error}")
            return
        self._sending = step, future, folder

    def finish(self) -> None:
        """The finished model, when run.json says that the run is finished."""
        self._settle()
        steps = self.recipe.stages[self.stage].steps
        settings = self.settings
        try:
            with TemporaryDirectory() as folder:
                upload = prepared(finished_stage(self.run, None), Path(folder) / "model", merge=settings.merge)
                message = f"grpo-lab: stage {self.stage} of {self.run.name}"
                sent = push(upload, settings.repo, public=settings.public, message=message)
        except GrpoLabError as error:
            self._say("warning", steps, f"the finished model was not sent: {error}; grpo-lab push sends it")
            return
        self._say("info", steps, f"sent the finished model: {sent}")

    def _settle(self) -> None:
        """Wait for what is on its way, and say what came of it."""
        if self._sending is None:
            return
        step, future, folder = self._sending
        self._sending = None
        try:
            self._say("info", step, f"sent step {step}: {future.result().commit_url}")
        except HUB_ERRORS as error:
            self._say("warning", step, f"step {step} was not sent: {first_line(error)}")
        finally:
            folder.cleanup()

    def _say(self, kind: str, step: int, message: str) -> None:
        self.sinks.event(self.stage, step, kind, f"{self.settings.repo}: {message}", {})


def written(recipe: Recipe, stage: str, run: Path, policy: Policy, folder: Path, *, merge: bool) -> Upload:
    """A policy in training as it stands, with its card; an adapter merged, at the model's own precision, if asked for."""
    model = recipe.model_of(recipe.stages[stage])
    adapted = has_adapter(policy.model)
    kind = ("merged" if merge else "adapter") if adapted else "whole"
    if kind == "merged":
        write_policy(policy, folder / "adapter", model.quantization)
        whole = model.model_copy(update={"lora": None, "quantization": None, "gradient_checkpointing": False})
        policy = load_policy(whole, policy.tokenizer, seed=0, folder=folder / "adapter")
    write_policy(policy, folder / "model", model.quantization if kind == "adapter" else None)
    (folder / "model" / CARD).write_text(model_card(run, stage, kind=kind), encoding="utf-8")
    return Upload(folder / "model", kind)
