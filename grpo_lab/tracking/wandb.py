"""Weights & Biases: a second home for metrics. Offline it needs neither account nor network."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import Wandb
from grpo_lab.types import StepEnd

INIT_TIMEOUT_SECONDS = 30.0


class WandbSink:
    """Logs each stage as one wandb run, grouped by the run's name, with its files inside the run folder.

    Names are those that transformers and TRL use there: `train/reward`, `eval/reward`, against `train/global_step`.
    A resumed run is a new wandb run of the same group, so that steps which were lost and redone do not mix.
    """

    def __init__(self, folder: Path, *, name: str, options: Wandb, config: Mapping[str, Any]) -> None:
        """Check that wandb is there; it starts with the first step.

        Args:
            config: the resolved recipe, shown beside the curves.

        Raises:
            SetupError: wandb is not installed.
        """
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise SetupError('tracking.wandb: "wandb" is not installed; pip install "grpo-lab[wandb]"') from error
        self._folder = folder
        self._name = name
        self._options = options
        self._config = dict(config)
        self._stage: str | None = None
        self._run: Any = None

    def step(self, end: StepEnd) -> None:
        """Log the step's metrics and times."""
        values = {f"train/{name}": value for name, value in {**end.metrics, **end.timing}.items()}
        self._log(end.stage, end.step, values)

    def evaluation(
        self, stage: str, step: int, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log the evaluation's metrics; its rows stay in the run folder."""
        self._log(stage, step, {f"eval/{name}": value for name, value in metrics.items()})

    def event(self, stage: str, step: int, kind: str, message: str, data: Mapping[str, Any]) -> None:
        """Events stay in the run folder."""

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
            self._stage = None

    def _log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage != self._stage:
            self.close()
            self._start(stage)
        self._run.log({"train/global_step": step, **values})

    def _start(self, stage: str) -> None:
        # No host, user, git, code or console text: what a run stores must not depend on who ran it where.
        settings = self._wandb.Settings(
            init_timeout=INIT_TIMEOUT_SECONDS,
            host="not recorded",
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run = self._wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            mode=self._options.mode,
            dir=str(self._folder),
            name=f"{self._name}/{stage}",
            group=self._name,
            job_type=stage,
            config=self._config,
            settings=settings,
        )
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step")
        self._stage = stage
