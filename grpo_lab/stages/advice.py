"""What a person should hear while a run learns nothing: said once, with what to try."""

from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import StepEnd

PATIENCE = 10  # steps in a row


class Advice:
    """Watches for steps that cannot teach: no group with a signal, or every completion cut off."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self.steps_in_a_row = {"frac_reward_zero_std": 0, "completions/clipped_ratio": 0}

    def __call__(self, end: StepEnd) -> None:
        for name, text in ADVICE.items():
            holds = end.metrics.get(name) == 1.0
            self.steps_in_a_row[name] = self.steps_in_a_row[name] + 1 if holds else 0
            if self.steps_in_a_row[name] == PATIENCE:
                self.sinks.event(end.stage, end.step, "advice", f"{PATIENCE} steps in a row: {text}", {"metric": name})


ADVICE = {
    "frac_reward_zero_std": (
        "all completions of every group got the same reward, so nothing was learnt. If rewards are high the task is too "
        "easy, if low it is too hard: change the data, warm up longer, or raise sampling.temperature or num_generations"
    ),
    "completions/clipped_ratio": (
        "every completion was cut off by the length limit. Raise sampling.max_completion_length, or warm up until the "
        "model ends its answers"
    ),
}
