import math
from dataclasses import replace

import pytest
import torch

from grpo_lab.tracking.metrics import (
    DESCRIPTIONS,
    description,
    equal_groups,
    sampling_metrics,
    sft_metrics,
    step_metrics,
)
from grpo_lab.types import Attempts, Completion, Example, Group, Scores, UpdateStats

NAN = float("nan")
STATS = UpdateStats(
    loss=0.5, grad_norm=2.0, learning_rate=1e-3, kl=0.01, entropy=1.5, ratio_mean=1.0, clip_low=0.125, clip_high=0.25,
    skipped=0, sampler_gap=0.001,
)  # fmt: skip


def group(*lengths_and_ends):
    completions = tuple(Completion("x", tuple(range(length)), finished) for length, finished in lengths_and_ends)
    return Group(Example("e", "p", (1,), {}), completions)


def scores(total, statuses):
    return Scores(total=total, terms={"accuracy": total}, status={"accuracy": statuses})


OK = (("ok", "ok"), ("ok", "ok"))


def test_every_metric_of_a_step_by_hand():
    groups = [group((2, True), (3, False)), group((1, True), (6, True))]
    total = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    metrics = step_metrics(groups, scores(total, OK), STATS)
    assert metrics == {
        "loss": 0.5,
        "grad_norm": 2.0,
        "learning_rate": 1e-3,
        "reward": 0.75,
        "reward_std": 0.5,  # sqrt((3 * .25^2 + .75^2) / 3)
        "frac_reward_zero_std": 0.5,
        "rewards/accuracy/mean": 0.75,
        "rewards/accuracy/std": 0.5,
        "lab/groups_all_equal_high": 0.5,
        "lab/groups_all_equal_low": 0.0,
        "lab/unscored": 0.0,
        "lab/failed/accuracy": 0.0,
        "kl": 0.01,
        "entropy": 1.5,
        "lab/sampler_gap": 0.001,
        "completions/mean_length": 3.0,
        "completions/min_length": 1.0,
        "completions/max_length": 6.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 3.0,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 6.0,
        "clip_ratio/low_mean": 0.125,
        "clip_ratio/high_mean": 0.25,
        "clip_ratio/region_mean": 0.375,
        "lab/ratio_mean": 1.0,
        "lab/skipped_updates": 0.0,
    }


def test_what_does_not_exist_is_left_out_and_nothing_is_nan():
    groups = [group((2, False), (3, False)), group((1, False), (6, False))]
    total = torch.full((2, 2), NAN)
    stats = UpdateStats(NAN, math.inf, 1e-3, None, 1.5, 1.0, 0.0, 0.0, 1)
    failed = (("error", "timeout"), ("abstained", "gated"))
    metrics = step_metrics(groups, scores(total, failed), stats)
    assert metrics == {
        "learning_rate": 1e-3,
        "frac_reward_zero_std": 0.0,
        "lab/groups_all_equal_high": 0.0,
        "lab/groups_all_equal_low": 0.0,
        "lab/unscored": 1.0,
        "lab/failed/accuracy": 0.5,
        "entropy": 1.5,
        "completions/mean_length": 3.0,
        "completions/min_length": 1.0,
        "completions/max_length": 6.0,
        "completions/clipped_ratio": 1.0,
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.0,
        "clip_ratio/region_mean": 0.0,
        "lab/ratio_mean": 1.0,
        "lab/skipped_updates": 1.0,
    }


def test_unscored_completions_are_out_of_the_reward():
    total = torch.tensor([[1.0, NAN], [0.0, 0.0]])
    metrics = step_metrics([group((1, True), (1, True))] * 2, scores(total, OK), STATS)
    assert metrics["reward"] == pytest.approx(1 / 3)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(1 / 3))
    assert metrics["lab/unscored"] == 0.25
    assert metrics["frac_reward_zero_std"] == 0.5  # the first group has one score only: it has no std


@pytest.mark.parametrize("status", ["error", "timeout", "bad_type", "non_finite", "crashed"])
def test_each_way_to_fail_counts_as_failed(status):
    statuses = ((status, "ok"), ("ok", "ok"))
    metrics = step_metrics([group((1, True), (1, True))] * 2, scores(torch.zeros(2, 2), statuses), STATS)
    assert metrics["lab/failed/accuracy"] == 0.25


@pytest.mark.parametrize(
    "total, high, low",
    [
        ([[1, 1], [0, 0], [0, 1]], [True, False, False], [False, True, False]),
        ([[0, 0], [0, 0]], [False, False], [True, True]),
        ([[1, 1], [1, 1]], [True, True], [False, False]),
        ([[2.5, 2.5], [0.5, 0.5], [2.4, 2.4]], [True, False, True], [False, True, False]),
        ([[-1, -1], [-2, -2]], [False, False], [True, True]),
        ([[NAN, 1], [NAN, NAN], [0, 1]], [False, False, False], [False, False, False]),
        ([[1.2] * 8, [0.7] * 7 + [NAN]], [True, False], [False, True]),
    ],
)
def test_groups_without_signal_are_split_into_high_and_low(total, high, low):
    found = equal_groups(torch.tensor(total, dtype=torch.float32))
    assert (found[0].tolist(), found[1].tolist()) == (high, low)


def test_dynamic_sampling_is_reported_only_where_it_is_on():
    assert sampling_metrics(Attempts(limit=1, used=1, num_drawn=4, num_without_signal=2)) == {}
    sufficed = sampling_metrics(Attempts(limit=3, used=3, num_drawn=9, num_without_signal=0))
    assert sufficed == {"lab/sampling_attempts": 3, "lab/groups_drawn": 9, "lab/sampling_exhausted": 0}
    assert sampling_metrics(Attempts(3, 3, 9, 1))["lab/sampling_exhausted"] == 1


def test_a_surrogate_that_never_clips_has_no_clip_ratio():
    stats = replace(STATS, clip_low=None, clip_high=None)
    metrics = step_metrics([group((2, True), (3, False))], scores(torch.tensor([[1.0, 0.0]]), OK[:1]), stats)
    assert not [name for name in metrics if name.startswith("clip_ratio")]


def test_every_metric_has_a_description():
    groups = [group((2, True), (3, False))] * 2
    total = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    metrics = step_metrics(groups, replace(scores(total, OK), real_total=total, logged={"mine": (1.0, 2.0)}), STATS)
    assert metrics["lab/logged/mine"] == 1.5
    supervised = sft_metrics(loss=1.0, grad_norm=1.0, learning_rate=1.0, entropy=1.0, accuracy=0.5)
    resampling = sampling_metrics(Attempts(limit=3, used=3, num_drawn=9, num_without_signal=1))
    described = {description(name) for name in [*metrics, *supervised, *resampling, "eval_perplexity"]}
    assert described == set(DESCRIPTIONS.values())
    assert description("eval_rewards/my/odd.name/mean") == DESCRIPTIONS["rewards/<name>/mean"]
    assert description("sample_seconds") == "Wall-clock seconds of one phase of the step, for example sample_seconds."
    assert description("step_seconds") == "Wall-clock seconds of the whole step."
    with pytest.raises(KeyError):
        description("rewardd")
