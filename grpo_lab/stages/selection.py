"""Which of a stage's models it ends with: the best one on held-out data, and when to stop looking for a better."""

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grpo_lab.policy.trainable import learned, restore, state
from grpo_lab.recipe.schema import Selection
from grpo_lab.types import Policy


class Best:
    """The model that measured best so far, and how long ago that was. All of it is part of a checkpoint.

    A model is better if it beats the best one by more than `min_improvement`; a measurement that is not a number never
    is. The first measurement, before any step, counts as well.
    """

    def __init__(self, settings: Selection, policy: Policy) -> None:
        self.settings = settings
        self.step = 0
        self.value = math.nan
        self.since = 0  # evaluations in a row that were no better
        self.tensors: Mapping[str, Tensor] = {}
        self._policy = policy

    @property
    def is_final(self) -> bool:
        """Whether the search is over: `patience` evaluations in a row were no better."""
        return self.settings.patience is not None and self.since >= self.settings.patience

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out data was measured after `step` steps: keep the policy as it is now if it is the best."""
        value = metrics[self.settings.metric]
        gain = self.value - value if self.settings.metric == "loss" else value - self.value
        if not (gain > self.settings.min_improvement or (not self.tensors and math.isfinite(value))):
            self.since += 1
            return
        self.step, self.value, self.since = step, value, 0
        names = learned(self._policy.model)
        self.tensors = copy.deepcopy(state(self._policy.model, names))  # what is tied stays tied

    def put_back(self) -> None:
        """Make the policy the best one."""
        if self.tensors:
            restore(self._policy.model, self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        return {"step": self.step, "value": None if math.isnan(self.value) else self.value, "since": self.since}

    def load(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` and `tensors` were."""
        value = saved["value"]
        self.step, self.since, self.tensors = saved["step"], saved["since"], dict(tensors)
        self.value = math.nan if value is None else value

    def report(self) -> str:
        """The outcome, for people."""
        return f"the model after step {self.step} measured best: held-out {self.settings.metric} {self.value:.6g}"
