"""What a person should hear while a run learns nothing, or not from what it was meant to: said once, with what to try."""

import math
from collections.abc import Mapping

from grpo_lab.tracking.sinks import Sinks
from grpo_lab.types import Scores, StepEnd

PATIENCE = 10  # steps in a row; what was asked for and could not be had is said at once
AT_ONCE = {"lab/sampling_exhausted"}
DOMINANT = 0.95  # the share of the differences within groups from which on one reward is said to decide alone


class Advice:
    """Watches for steps that cannot teach (no group with a signal, every completion cut off, too few groups with one),
    and for rewards that decide alone or say nothing."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self.steps_in_a_row: dict[str, int] = {}

    def __call__(self, end: StepEnd) -> None:
        is_control = end.scores is not None and end.scores.real_total is not None
        if end.step == 1 and is_control:
            self.sinks.event(end.stage, end.step, "advice", CONTROL, {})
        for name, text in ADVICE.items():
            holds = end.metrics.get(name) == 1.0
            self._watch(end, name, text, {"metric": name}, holds=holds, patience=1 if name in AT_ONCE else PATIENCE)
        if end.scores is not None and not is_control and end.metrics.get("frac_reward_zero_std") != 1.0:
            shares = reward_shares(end.scores)
            weighing = [name for name in shares if end.scores.weights.get(name)]
            for name in weighing:
                others = sum(share for other, share in shares.items() if other != name)
                dominates = shares[name] > DOMINANT and others > 0
                self._watch(end, f"dominant {name}", _dominant(name), {"reward": name}, holds=dominates)
                still = shares[name] == 0 and others > 0
                self._watch(end, f"still {name}", _still(name), {"reward": name}, holds=still)

    def _watch(
        self, end: StepEnd, key: str, text: str, data: Mapping[str, str], *, holds: bool, patience: int = PATIENCE
    ) -> None:
        self.steps_in_a_row[key] = self.steps_in_a_row.get(key, 0) + 1 if holds else 0
        if self.steps_in_a_row[key] == patience:
            said = text if patience == 1 else f"{patience} steps in a row: {text}"
            self.sinks.event(end.stage, end.step, "advice", said, data)


def reward_shares(scores: Scores) -> dict[str, float]:
    """Each reward's share of the differences within groups: weight^2 * its mean variance in a group, over their sum.

    Where nothing differs all shares are 0. What was not scored is left out.
    """
    variances = {}
    for name, values in scores.terms.items():
        known = values.double().masked_fill(scores.total.isnan(), math.nan)
        spread = (known - known.nanmean(1, keepdim=True)).square().nanmean(1)
        differs = known.nan_to_num(-math.inf).amax(1) > known.nan_to_num(math.inf).amin(1)  # rounding is no difference
        variances[name] = scores.weights.get(name, 1.0) ** 2 * float(spread[differs].sum())
    total = sum(variances.values())
    return {name: value / total if total else 0.0 for name, value in variances.items()}


def _dominant(name: str) -> str:
    return (
        f'reward "{name}" makes up more than {DOMINANT:.0%} of the differences within groups, so the other rewards hardly '
        "count. If they should, change weight or scale, or set algorithm.reward_aggregation: normalize_then_sum"
    )


def _still(name: str) -> str:
    return (
        f'reward "{name}" is the same for all completions of every group, so it teaches nothing. That is well if it is at '
        "its best (see its mean); otherwise grpo-lab rewards test shows whether it can tell answers apart"
    )


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
