import math

import pytest
import torch

from grpo_lab.algorithm.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (8, 10, 0.4901625, 0.9433178),
        (1, 10, 0.0178762, 0.4041500),
        (81, 263, 0.2552907, 0.3661811),  # Newcombe (1998), Statistics in Medicine 17, method 3: .2553 to .3662
        (15, 148, 0.0624, 0.1605),  # Newcombe: .0624 to .1605
        (0, 20, 0.0, 0.1611),  # Newcombe: .0000 to .1611
        (1, 29, 0.0061, 0.1718),  # Newcombe: .0061 to .1718
    ],
)
def test_wilson_intervals_are_the_published_ones(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("trials", [1, 2, 7, 200, 10_000])
def test_none_and_all_have_intervals_that_end_exactly_at_0_and_1(trials):
    z2 = 1.959963984540054**2
    low, high = wilson_interval(0, trials)
    assert (low, high) == (0.0, pytest.approx(z2 / (trials + z2)))
    assert wilson_interval(trials, trials) == (pytest.approx(1 - high), 1.0)


def test_the_wilson_interval_is_where_the_score_test_just_rejects():
    for successes, trials in ((3, 7), (8, 10), (50, 60)):
        for share in wilson_interval(successes, trials):
            z = (successes / trials - share) / math.sqrt(share * (1 - share) / trials)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


def test_wilson_without_trials_is_an_error():
    with pytest.raises(ValueError, match="^an interval needs at least one trial$"):
        wilson_interval(0, 0)


def test_the_bootstrap_is_a_function_of_values_and_seed():
    values = torch.rand(30, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    first = bootstrap_interval(values)
    state = torch.get_rng_state()
    assert bootstrap_interval(values) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert bootstrap_interval(values, seed=1) != first


def test_equal_values_have_no_width():
    assert bootstrap_interval(torch.full((9,), 0.5)) == (0.5, 0.5)


def test_shifting_and_scaling_values_shifts_and_scales_the_bootstrap_interval():
    values = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values * 3 - 1) == pytest.approx((low * 3 - 1, high * 3 - 1))


def test_the_bootstrap_interval_of_many_values_is_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, error = float(values.mean()), float(values.std()) / 20
    low, high = bootstrap_interval(values, num_resamples=5000)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_nineteen_in_twenty_bootstrap_intervals_hold_the_true_mean():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(400, 50, generator=generator, dtype=torch.float64) ** 2  # skewed, mean 1/3
    intervals = [bootstrap_interval(sample, num_resamples=500) for sample in samples]
    covered = sum(low <= 1 / 3 <= high for low, high in intervals) / len(intervals)
    assert 0.91 <= covered <= 0.975
    below = sum(high < 1 / 3 for _, high in intervals)
    above = sum(low > 1 / 3 for low, _ in intervals)
    assert min(below, above) >= 2  # it misses on both sides
