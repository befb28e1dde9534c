"""The GRPO stage through TRL: the same frame as `grpo.py` around another engine, and TRL's own checkpoints, verified."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_lab.engines.trl import REFERENCE, train
from grpo_lab.engines.trl_config import sizes
from grpo_lab.engines.trl_rollouts import TrlParts
from grpo_lab.errors import CheckpointError
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe.schema.sampling import OWN_WEIGHTS
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.stages.advice import Advice
from grpo_lab.stages.grpo import measure_policy
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.stages.running import Context, admitting, evaluating, finish, reporting, say_notes, say_what_learns
from grpo_lab.stages.sampler import refusing_stale
from grpo_lab.tracking.files import disk_errors, read_json, write_json
from grpo_lab.tracking.folders import MANIFEST, is_complete, seal_folder, verify_folder

SERVED_IN_BFLOAT16 = (
    "TRL gives vLLM no dtype, which then serves this float32 model in bfloat16 (or float16): the policy that samples is not "
    "quite the one that learns; algorithm.sampler_correction weights for it, engine: native has no such gap"
)
REWARDS = "rewards.json"  # in a checkpoint: the states of stateful rewards


def run_grpo_trl(context: Context, plan: GrpoPlan) -> None:
    """Train the stage from where it stands to its end, and leave its final model."""
    stage, recipe = plan.stage, context.recipe
    policy = load_policy(recipe.model_of(stage), context.tokenizer, seed=recipe.seed, folder=context.start)
    resumed = resume(context, plan)
    if resumed is not None:
        plan.rewards.load_state_dict(read_json(resumed.path / REWARDS))
    say_notes(context, plan.name, resumed.step if resumed else 0, plan.rewards)

    def measure(step: int) -> None:
        result = measure_policy(policy, plan, seed=recipe.seed)
        context.sinks.evaluation(plan.name, step, result.metrics, result.rows)

    if resumed is None:
        say_what_learns(context, plan.name, policy)
    if stage.sampling.has_own_weights and recipe.model.dtype == "float32":
        context.sinks.event(plan.name, resumed.step if resumed else 0, "warning", SERVED_IN_BFLOAT16, {})
    if resumed is None and stage.evaluation is not None:
        measure(0)
    backend = stage.sampling.backend
    parts = TrlParts(
        name=plan.name,
        stage=stage,
        seed=recipe.seed,
        policy=policy,
        reference=reference(context, plan, resumed),
        prompts=plan.prompts,
        sampler=None
        if backend in ("auto", *OWN_WEIGHTS)
        else make_sampler(backend, policy, Decoding.of(stage.sampling)),
        rewards=plan.rewards,
        folder=context.folder.path,
    )
    train(
        parts,
        recipe.model_of(stage),
        output=context.folder.checkpoints,
        resume_from=resumed.path if resumed else None,
        report=reporting(
            context.sinks.step,
            refusing_stale(stage.sampling),
            Advice(context.sinks),
            evaluating(stage.evaluation, measure),
            admitting(context, plan.rewards),
        ),
        callbacks=[Saving(context, plan)],
    )
    finish(context, plan.name, policy, recipe.model_of(stage), steps=stage.steps)


def reference(context: Context, plan: GrpoPlan, resumed: "Found | None") -> str | None:
    """Where TRL reads the reference from: what the stage starts from, or a moved one that a checkpoint kept."""
    if plan.stage.algorithm.beta == 0:
        return None
    if resumed is not None and plan.stage.algorithm.reference_refresh is not None:
        return str(resumed.path / REFERENCE)
    return str(context.start or context.recipe.model.path)


@dataclass(frozen=True)
class Found:
    """A checkpoint of TRL's whose every byte is as it was written."""

    path: Path
    step: int


def resume(context: Context, plan: GrpoPlan) -> Found | None:
    """The newest checkpoint that can be trusted. The logs are cut back to it; what is newer is deleted.

    Raises:
        CheckpointError: there are sealed checkpoints, and none is as it was written.
    """
    found, problems = None, []
    for updates, path in sorted(checkpoints(context.folder.checkpoints).items(), reverse=True):
        try:
            verify_folder(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        found = Found(path, updates // sizes(plan.stage).updates)
        break
    if found is None and problems:
        raise CheckpointError(
            f"{context.folder.checkpoints}: none of {len(problems)} checkpoints can be read: {problems[0]}; start again "
            "under another --name"
        )
    _delete_unusable(context.folder.checkpoints, found)
    context.files.truncate(plan.name, found.step if found else -1)
    if found is not None:
        for problem in problems:
            context.sinks.event(plan.name, found.step, "warning", f"checkpoint left out: {problem}", {})
        context.sinks.event(plan.name, found.step, "info", f"resumed from {found.path.name}", {})
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
    """Asks TRL for a checkpoint where the recipe wants one, seals it, keeps the newest, and stops if asked to."""

    def __init__(self, context: Context, plan: GrpoPlan) -> None:
        self.context = context
        self.plan = plan
        self.updates = sizes(plan.stage).updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step, rest = divmod(state.global_step, self.updates)
        asked = self.context.stop.received is not None
        due = step % self.plan.stage.checkpoint.every == 0 or step == self.plan.stage.steps
        control.should_save = rest == 0 and (asked or due)
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self.context.folder.checkpoints
        path = folder / f"checkpoint-{state.global_step}"
        with disk_errors(path):
            write_json(path / REWARDS, self.plan.rewards.state_dict())
            seal_folder(path)
            self._prune(folder)
        self.context.stop.check(f"after step {state.global_step // self.updates} of stage {self.plan.name}, saved")

    def _prune(self, folder: Path) -> None:
        complete = sorted((updates for updates, path in checkpoints(folder).items() if is_complete(path)), reverse=True)
        for updates in complete[self.plan.stage.checkpoint.keep :]:
            shutil.rmtree(folder / f"checkpoint-{updates}")
