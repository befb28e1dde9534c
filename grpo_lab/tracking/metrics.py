"""The names of all metrics, and how a step's are computed. Names are TRL's, so that dashboards made for it work.

A value that does not exist (the KL without a reference, the std of one reward) is left out, never a made-up 0.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_lab.types import Attempts, Group, Scores, UpdateStats

DESCRIPTIONS: Mapping[str, str] = {
    "loss": "The loss that was minimised; with beta 0 and one update per batch it stays at 0 while the policy learns.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of the step.",
    "reward": "Mean total reward of the scored completions.",
    "reward_std": "Sample std of the total reward over all scored completions of the step.",
    "frac_reward_zero_std": "Share of groups whose scored completions (two or more) all got the same total reward.",
    "rewards/<name>/mean": "Mean of one reward where it gave a value, before its weight.",
    "rewards/<name>/std": "Sample std of one reward where it gave a value, before its weight.",
    "kl": "KL estimate to the reference policy, mean over completion tokens, in nats.",
    "entropy": "Entropy of the policy's next-token distribution, mean over completion tokens, in nats.",
    "mean_token_accuracy": "Supervised: share of learnt tokens that were the model's first choice.",
    "perplexity": "Supervised, held out: exp(loss), the loss being the mean over learnt tokens, each counted once.",
    "completions/mean_length": "Mean completion length in tokens, EOS included.",
    "completions/min_length": "Shortest completion in tokens.",
    "completions/max_length": "Longest completion in tokens.",
    "completions/clipped_ratio": "Share of completions cut off by the length limit.",
    "completions/mean_terminated_length": "Mean length of the completions that ended by themselves, in tokens.",
    "completions/min_terminated_length": "Shortest completion that ended by itself, in tokens.",
    "completions/max_terminated_length": "Longest completion that ended by itself, in tokens.",
    "clip_ratio/low_mean": "Share of tokens clipped below: ratio under 1 - epsilon_low with a negative advantage.",
    "clip_ratio/high_mean": "Share of tokens clipped above: ratio over 1 + epsilon_high (cispo: over the cap) with a positive advantage.",
    "clip_ratio/region_mean": "Share of tokens clipped either way; they get no gradient from the surrogate (cispo: a capped one).",
    "lab/groups_all_equal_high": "Share of groups with equal rewards that lie high: most likely all right, too easy.",
    "lab/groups_all_equal_low": "Share of groups with equal rewards that lie low: most likely all wrong, too hard.",
    "lab/real_reward": "Mean of what the answers were worth, where a reward control has the policy learn from other totals.",
    "lab/unscored": "Share of completions without a total reward; they are out of baseline and loss.",
    "lab/failed/<name>": "Share of completions on which one reward failed (error, timeout, bad value, crash).",
    "lab/logged/<name>": "What a reward logged through `log_metric`, mean over the step's calls.",
    "lab/ratio_mean": "Mean importance ratio pi / pi_old over completion tokens; 1 at the first update of a batch.",
    "lab/sampling_attempts": "Dynamic sampling: rounds of sampling that the step took, the first included.",
    "lab/groups_drawn": "Dynamic sampling: groups sampled in all rounds; those without signal gave way to others.",
    "lab/sampling_exhausted": "Dynamic sampling: 1 where the attempts ran out and groups without signal stayed, else 0.",
    "lab/skipped_updates": "Optimiser steps left out because the loss or a gradient was not finite.",
    "lab/sampler_gap": "Mean absolute difference of the trainer's and the sampler's log-probs over completion tokens, in nats.",
}

TIMING: Mapping[str, str] = {
    "step_seconds": "Wall-clock seconds of the whole step.",
    "<name>_seconds": "Wall-clock seconds of one phase of the step, for example sample_seconds.",
    "completions_per_second": "Completions drawn, scored and learnt from per second of the step.",
    "tokens_per_second": "Completion tokens drawn, scored and learnt from per second of the step.",
    "peak_memory_mib": "Most resident memory the process has held so far, in MiB.",
}

FAILED = frozenset({"error", "timeout", "bad_type", "non_finite", "crashed"})


def description(name: str) -> str:
    """What a metric means, evaluation metrics (`eval_...`) and those with a reward's name in them included.

    >>> description("eval_reward")
    'Mean total reward of the scored completions.'

    Raises:
        KeyError: no metric has this name.
    """
    known = {**DESCRIPTIONS, **TIMING}
    plain = name.removeprefix("eval_")
    pattern = r"^(rewards/).+(/mean|/std)$|^(lab/failed/|lab/logged/).+$|^\w+(_seconds)$"
    placed = re.sub(pattern, r"\1\3<name>\2\4", plain)
    return known[plain] if plain in known else known[placed]


def step_metrics(groups: Sequence[Group], scores: Scores, stats: UpdateStats) -> dict[str, float]:
    """Every metric of one GRPO step; each is explained in `DESCRIPTIONS`."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [len(completion.token_ids) for completion in completions if completion.finished]
    return _existing(
        {
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            **_reward_metrics(scores),
            "kl": stats.kl,
            "entropy": stats.entropy,
            **_length_metrics(lengths, "length"),
            "completions/clipped_ratio": (len(lengths) - len(ended)) / len(lengths) if lengths else None,
            **_length_metrics(ended, "terminated_length"),
            "clip_ratio/low_mean": stats.clip_low,
            "clip_ratio/high_mean": stats.clip_high,
            "clip_ratio/region_mean": _sum(stats.clip_low, stats.clip_high),
            "lab/ratio_mean": stats.ratio_mean,
            "lab/skipped_updates": float(stats.skipped),
            "lab/sampler_gap": stats.sampler_gap,
        }
    )


def sampling_metrics(attempts: Attempts) -> dict[str, float]:
    """What dynamic sampling did, under its names; nothing where it is off."""
    if attempts.limit == 1:
        return {}
    exhausted = attempts.used == attempts.limit and attempts.num_without_signal > 0
    return {
        "lab/sampling_attempts": float(attempts.used),
        "lab/groups_drawn": float(attempts.num_drawn),
        "lab/sampling_exhausted": float(exhausted),
    }


def sft_metrics(
    *, loss: float, grad_norm: float, learning_rate: float, entropy: float | None, accuracy: float | None
) -> dict[str, float]:
    """The metrics of one supervised step, under their names."""
    return _existing(
        {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "entropy": entropy,
            "mean_token_accuracy": accuracy,
        }
    )


def equal_groups(total: Float[Tensor, "P G"]) -> tuple[Bool[Tensor, "P"], Bool[Tensor, "P"]]:
    """Which groups teach nothing because all their rewards are equal, split into (high, low).

    What is a right answer is the reward's business, so this is a guess from the numbers: high is above 0 and in the
    upper half of the step's range. It is exact for 0/1 rewards. A group with fewer than two scored completions is
    in neither.
    """
    scored = ~total.isnan()
    lowest = total.masked_fill(~scored, math.inf).amin(1)
    highest = total.masked_fill(~scored, -math.inf).amax(1)
    equal = (lowest == highest) & (scored.sum(1) >= 2)
    is_high = (highest > 0) & (highest >= (lowest.amin() + highest.amax()) / 2)
    return equal & is_high, equal & ~is_high


def _reward_metrics(scores: Scores) -> dict[str, float | None]:
    high, low = equal_groups(scores.total)
    metrics = {
        "reward": _mean(scores.total),
        "reward_std": _std(scores.total),
        "frac_reward_zero_std": _share(high | low),
    }
    for name, values in scores.terms.items():
        metrics |= {f"rewards/{name}/mean": _mean(values), f"rewards/{name}/std": _std(values)}
    metrics |= {
        "lab/real_reward": None if scores.real_total is None else _mean(scores.real_total),
        "lab/groups_all_equal_high": _share(high),
        "lab/groups_all_equal_low": _share(low),
        "lab/unscored": _share(scores.total.isnan()),
    }
    for name, groups in scores.status.items():
        failed = [status in FAILED for group in groups for status in group]
        metrics[f"lab/failed/{name}"] = sum(failed) / len(failed)
    return metrics | {f"lab/logged/{name}": sum(values) / len(values) for name, values in scores.logged.items()}


def _length_metrics(lengths: Sequence[int], name: str) -> dict[str, float | None]:
    return {
        f"completions/mean_{name}": sum(lengths) / len(lengths) if lengths else None,
        f"completions/min_{name}": float(min(lengths)) if lengths else None,
        f"completions/max_{name}": float(max(lengths)) if lengths else None,
    }


def _mean(values: Tensor) -> float:
    return float(torch.nanmean(values.double()))


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _share(facts: Tensor) -> float:
    return float(facts.double().mean())


def _std(values: Tensor) -> float | None:
    known = values[~values.isnan()].double()
    return float(known.std()) if known.numel() > 1 else None


def _existing(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
