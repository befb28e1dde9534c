"""What a person should hear while a run learns nothing: said once, with what to try."""

from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import StepEnd

PATIENCE = 10  # steps in a row; what was asked for and could not be had is said at once
AT_ONCE = {"lab/sampling_exhausted"}


class Advice:
    """Watches for steps that cannot teach: no group with a signal, every completion cut off, or too few groups with one."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self.steps_in_a_row = dict.fromkeys(ADVICE, 0)

    def __call__(self, end: StepEnd) -> None:
        if end.step == 1 and end.scores is not None and end.scores.real_total is not None:
            self.sinks.event(end.stage, end.step, "advice", CONTROL, {})
        for name, text in ADVICE.items():
            holds = end.metrics.get(name) == 1.0
            self.steps_in_a_row[name] = self.steps_in_a_row[name] + 1 if holds else 0
            patience = 1 if name in AT_ONCE else PATIENCE
            if self.steps_in_a_row[name] == patience:
                said = text if patience == 1 else f"{patience} steps in a row: {text}"
                self.sinks.event(end.stage, end.step, "advice", said, {"metric": name})


CONTROL = "reward_control is on: the policy learns from totals that say nothing; lab/real_reward is what its answers are worth"

ADVICE = {
    "frac_reward_zero_std": (
        "all completions of every group got the same reward, so nothing was learnt. If rewards are high the task is too "
        "easy, if low it is too hard: change the data, warm up longer, or raise sampling.temperature or num_generations"
    ),
    "completions/clipped_ratio": (
        "every completion was cut off by the length limit. Raise sampling.max_completion_length, or warm up until the "
        "model ends its answers"
    ),
    "lab/sampling_exhausted": (
        "dynamic sampling ran out of attempts: the step goes on with groups that teach nothing. Raise "
        "algorithm.sampling_attempts or sampling.num_generations, or change the data (said again only after a step in "
        "which the attempts sufficed)"
    ),
}
