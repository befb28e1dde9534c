"""What TRL hands to a reward beside the completions: where training stands, and two functions to write things down with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from grpo_lab.types import Progress


@dataclass(frozen=True)
class TrainerState:
    """Where training stands, in the names that TRL's `trainer_state` has. In an evaluation it is at its end.

    `global_step` of `max_steps` optimiser steps are done, the share `epoch` of one pass.
    """

    global_step: int
    max_steps: int
    epoch: float
    num_train_epochs: int = 1
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True

    @classmethod
    def at(cls, progress: Progress) -> "TrainerState":
        """The state before the step that comes after `progress`."""
        done, steps = progress.step * progress.updates, progress.num_steps * progress.updates
        return cls(done, steps, epoch=done / steps)


@dataclass
class Notes:
    """Collects what one call of a reward writes down: `extra` columns with a value per completion, and `logged` numbers.

    Its two methods are what the reward gets as `log_extra` and `log_metric`. A worker process fills a copy of it, whose
    `plain()` the trainer's own must `add`.
    """

    num_completions: int
    extra: dict[str, list[Any]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Store a value per completion beside the rollouts. What JSON cannot say is stored as text, but for numpy's numbers."""
        if len(values) != self.num_completions:
            raise ValueError(f'log_extra: "{column}" has {len(values)} values for {self.num_completions} completions')
        self.extra[str(column)] = json.loads(json.dumps(list(values), default=_plain))

    def log_metric(self, name: str, value: float | int) -> None:
        """Log a number of this call; a step's metric is the mean over its calls."""
        self.logged.setdefault(str(name), []).append(float(value))

    def arguments(self, progress: Progress) -> dict[str, Any]:
        """What the reward may ask for by name."""
        return {
            "trainer_state": TrainerState.at(progress),
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }

    def plain(self) -> dict[str, Any]:
        """What was written down, in JSON values."""
        return {"extra": self.extra, "logged": self.logged}

    def add(self, plain: Mapping[str, Any]) -> None:
        """Take over what a copy of this has collected."""
        for column, values in plain["extra"].items():
            self.log_extra(column, values)
        for name, numbers in plain["logged"].items():
            for number in numbers:
                self.log_metric(name, number)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0 else str(value)


def notes_of(arguments: Mapping[str, Any]) -> Notes | None:
    """The collector whose methods are among the arguments of a call; None for a reward that takes none."""
    owners = [getattr(arguments.get(name), "__self__", None) for name in ("log_extra", "log_metric")]
    return next((owner for owner in owners if isinstance(owner, Notes)), None)
