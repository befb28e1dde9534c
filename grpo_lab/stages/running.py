"""What every stage does around its steps: resume, log, evaluate, save, stop when asked, and leave a final model."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.weights import Strategy
from grpo_lab.errors import StopRequested
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.policy.load import write_checked
from grpo_lab.policy.trainable import fingerprint, learned, parameter_count, restore, state
from grpo_lab.recipe import Recipe
from grpo_lab.recipe.schema import Checkpoint, Evaluation, Model
from grpo_lab.scoring import RewardSet
from grpo_lab.stages.selection import Best
from grpo_lab.tracking.checkpoints import load_latest, optimizer_state, optimizer_tensors, save_checkpoint
from grpo_lab.tracking.files import write_json
from grpo_lab.tracking.folders import save_folder_atomic
from grpo_lab.tracking.jsonl import JsonlSink
from grpo_lab.tracking.run_folder import StageFolder
from grpo_lab.tracking.sinks import SilentSink, Sinks
from grpo_lab.types import Callback, Policy, StepEnd

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopSignal:
    """SIGTERM or Ctrl-C asks: the step in progress is finished and saved. The second time ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._on_signal) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def asked(self, ranks: Ranks) -> bool:
        """Whether any process was asked to stop: the same answer for all of them."""
        self.agreed = max(ranks.gather(self.received or 0)) or None
        return self.agreed is not None

    def check(self, where: str) -> None:
        """Leave if `asked` found that someone asked. Call it where everything needed to go on is on the disk."""
        if self.agreed is not None:
            name = signal.Signals(self.agreed).name
            raise StopRequested(f"{name}: stopped {where}; --resume goes on from here", EXIT_CODES[self.agreed])


@dataclass(frozen=True)
class Context:
    """What a stage needs from the run that it is part of. `start` is the folder to begin with; None = the recipe's model.

    Where several processes train, only the first has files and sinks that write.
    """

    recipe: Recipe
    tokenizer: Any
    folder: StageFolder
    start: Path | None
    files: JsonlSink | SilentSink
    sinks: Sinks
    stop: StopSignal
    mark_inexact: Callable[[str], None]
    publish: Callable[[str, Policy, int], None] | None = None
    """Sends a stage's policy to the hub as it is after that many steps; None where the recipe does not ask for it."""
    ranks: Ranks = ALONE

    def saved(self, stage: str, policy: Policy, step: int, *, last: bool) -> None:
        """A checkpoint is on the disk: send it (the last one is sent as the finished model), or stop if asked to.

        All processes must call this.
        """
        asked = self.stop.asked(self.ranks)
        if self.publish is not None and not last and not asked:
            self.publish(stage, policy, step)
        self.stop.check(f"after step {step} of stage {stage}, saved")

    @property
    def strategy(self) -> Strategy:
        """How the weights that learn are held; one process holds all."""
        return self.recipe.distributed.strategy if self.ranks.world > 1 else "ddp"


def resume(
    context: Context,
    name: str,
    policy: Policy,
    learner: Learner,
    *,
    moving_reference: Policy | None = None,
    rewards: RewardSet | None = None,
    best: Best | None = None,
) -> int:
    """Load the newest readable checkpoint, cut the logs back to it, and say how many steps are done.

    `moving_reference` is a reference that training changes, `rewards` may be stateful, `best` is the best model so far:
    they are part of the state.
    """
    loaded = load_latest(context.folder.checkpoints)
    context.ranks.refuse_differences("newest checkpoint", loaded and loaded.step)
    context.files.truncate(name, loaded.step if loaded else -1)
    if loaded is None:
        return 0
    for problem in loaded.skipped:
        context.sinks.event(name, loaded.step, "warning", f"checkpoint left out: {problem}", {})
    restore(policy.model, loaded.tensors["model"])
    if moving_reference is not None:
        restore(moving_reference.model, loaded.tensors["reference"])
    learner.resume(
        optimizer_state(loaded.tensors["optimizer"], loaded.state["optimizer"]),
        steps_done=loaded.state["steps_done"],
        skipped_in_a_row=loaded.state["skipped_in_a_row"],
    )
    if rewards is not None:
        rewards.load_state_dict(loaded.state["rewards"])
    if best is not None:
        best.load(loaded.state["best"], loaded.tensors["best"])
    context.sinks.event(name, loaded.step, "info", f"resumed from {loaded.path.name}", {})
    return loaded.step


def say_what_learns(context: Context, name: str, policy: Policy) -> None:
    """The number and share of parameters that learn, before the first step."""
    context.sinks.event(name, 0, "info", parameter_count(policy.model), {})


def checkpointing(
    context: Context,
    policy: Policy,
    learner: Learner,
    settings: Checkpoint,
    *,
    moving_reference: Policy | None = None,
    rewards: RewardSet | None = None,
    best: Best | None = None,
) -> Callback:
    """Save every `every` steps, after the last one, and when the run was asked to stop (which then happens)."""
    ranks = context.ranks

    def save(end: StepEnd) -> None:
        if not (context.stop.asked(ranks) or end.step % settings.every == 0 or end.step == end.num_steps):
            return
        ranks.refuse_differences("policy", fingerprint(policy.model) if ranks.world > 1 else None)
        optimizer, remembered = learner.optimizer_state(), {} if rewards is None else rewards.state_dict()
        if ranks.is_first:
            write(end, optimizer, remembered)
        ranks.wait()
        context.saved(end.stage, policy, end.step, last=end.step == end.num_steps)

    def write(end: StepEnd, optimizer: dict[str, Any], remembered: dict[str, Any]) -> None:
        tensors, values = optimizer_tensors(optimizer)
        names = learned(policy.model)
        moving = {} if moving_reference is None else {"reference": state(moving_reference.model, names)}
        kept = {} if best is None else {"best": best.tensors}
        save_checkpoint(
            context.folder.checkpoints,
            step=end.step,
            tensors={"model": state(policy.model, names), "optimizer": tensors, **moving, **kept},
            state={
                "optimizer": values,
                "steps_done": learner.steps_done,
                "skipped_in_a_row": learner.skipped_in_a_row,
                "rewards": remembered,
                "best": None if best is None else best.state_dict(),
            },
            keep=settings.keep,
        )

    return save


def say_notes(context: Context, stage: str, step: int, rewards: RewardSet) -> None:
    """Put on record what a person should know of a stage's rewards. After `resume`, which cuts the record."""
    for note in rewards.notes():
        context.sinks.event(stage, step, "info", note, {})


def admitting(context: Context, rewards: RewardSet) -> Callback:
    """Say in run.json that the run is not exact, as soon as a reward made it so."""

    def after_step(end: StepEnd) -> None:
        for reason in rewards.inexact_because():
            context.mark_inexact(reason)

    return after_step


def evaluating(settings: Evaluation | None, measure: Callable[[int], None]) -> Callback:
    """Measure every `every` steps and after the last one."""

    def after_step(end: StepEnd) -> None:
        if settings is None:
            return
        if end.step == end.num_steps or (settings.every is not None and end.step % settings.every == 0):
            measure(end.step)

    return after_step


def saying_halved(context: Context, learner: Learner) -> Callback:
    """Say when memory fell short and micro-batches became smaller: sums in another order, so no longer the same bytes."""
    said: list[int] = []

    def say(end: StepEnd) -> None:
        if learner.halved_to is not None and learner.halved_to not in said:
            said.append(learner.halved_to)
            message = (
                f"out of memory: micro-batches of {learner.halved_to} rows from here on; set micro_batch_size to it"
            )
            context.sinks.event(end.stage, end.step, "warning", message, {"rows": learner.halved_to})
            context.mark_inexact(f"out of memory at step {end.step} of {end.stage}: micro-batches were halved")

    return say


def saying_plain(context: Context, forward: PolicyForward) -> Callback:
    """Say once that the model is computed the slow way, and why."""
    said: list[str] = []

    def say(end: StepEnd) -> None:
        if forward.plain_because is not None and not said:
            said.append(forward.plain_because)
            message = f"prompts and padding are computed for every row, several times slower: {forward.plain_because}"
            context.sinks.event(end.stage, end.step, "info", message, {})

    return say


def reporting(*callbacks: Callback) -> Callback:
    """Several callbacks as one, called in order; saving comes last, so that a checkpoint's logs are complete."""

    def report(end: StepEnd) -> None:
        for callback in callbacks:
            callback(end)

    return report


def finish(
    context: Context, name: str, policy: Policy, model: Model, *, steps: int, selected: int | None = None
) -> None:
    """Write `final/`, see that it is the policy, then write `result.json`, whose presence says that the stage is done.

    `model` is the model block as it holds for the stage. `selected`: the step after which the policy was as it is, where
    that is not the last one by itself.
    """
    if context.ranks.is_first:
        gaps: list[float] = []
        save_folder_atomic(context.folder.final, lambda folder: gaps.append(write_checked(policy, folder, model)))
        done = {"steps": steps} if selected is None else {"steps": steps, "selected": selected}
        write_json(context.folder.result, done)
        message = f"saved {context.folder.final}; loaded again, its logits differ by {gaps[0]:.2g} of the largest"
        context.sinks.event(name, steps, "info", message, {})
    context.ranks.wait()
