from inspect import unwrap

import pytest
import torch

from grpo_lab.algorithm.advantages import (
    batch_advantages,
    group_advantages,
    has_signal,
    leave_one_out_advantages,
    normalize_then_sum,
)

NAN = float("nan")


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), **tolerance)


@pytest.mark.parametrize("eps, size", [(1e-8, 0.8660254), (1e-4, 0.8658754)])
def test_two_of_four_right(eps, size):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])  # mean 0.5, sample std 0.57735
    expected = [[size, -size, -size, size], [-size, -size, size, size]]
    close(group_advantages(rewards, eps=eps), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps, size", [(0.0, 0.935414), (1e-4, 0.935239)])
def test_four_of_eight_right(eps, size):
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])  # sample std 0.534522
    close(group_advantages(rewards, eps=eps), [[size] * 4 + [-size] * 4], atol=1e-6, rtol=0)


def test_the_default_eps_is_trls():
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    close(group_advantages(rewards), [[0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)]])


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.2, -3.3])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_zero_advantage(reward, scale):
    rewards = torch.tensor([[reward] * 8, [0.0, 1.0] * 4])
    assert group_advantages(rewards, scale=scale)[0].tolist() == [0.0] * 8
    assert leave_one_out_advantages(rewards)[0].tolist() == [0.0] * 8
    assert has_signal(rewards).tolist() == [False, True]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_adding_a_constant_to_rewards_changes_nothing(scale):
    rewards = torch.tensor([[1.0, 0.25, 0.0, 0.5], [3.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards + 7.0, scale=scale), group_advantages(rewards, scale=scale))
    torch.testing.assert_close(leave_one_out_advantages(rewards + 7.0), leave_one_out_advantages(rewards))


def test_multiplying_rewards_changes_nothing_when_scaled_by_the_group():
    rewards = torch.tensor([[1.0, 0.25, 0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(10 * rewards, eps=0.0), group_advantages(rewards, eps=0.0))


def test_advantages_of_a_group_sum_to_zero():
    rewards = torch.tensor([[1.0, 0.3, 0.0, 0.5], [NAN, 2.0, 2.5, 0.0]], dtype=torch.float64)
    for advantages in (
        group_advantages(rewards),
        group_advantages(rewards, scale="batch"),
        group_advantages(rewards, scale="none"),
        leave_one_out_advantages(rewards),
    ):
        close(advantages.sum(1), [0.0, 0.0], atol=1e-12, rtol=0)


def test_groups_do_not_see_each_other():
    one, other = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[9.0, 4.0, 5.0]])
    both = group_advantages(torch.cat([one, other]))
    assert torch.equal(both, torch.cat([group_advantages(one), group_advantages(other)]))


def test_batch_scale_divides_by_the_std_of_all_rewards():
    rewards = torch.tensor([[1.0, 3.0], [6.0, 6.0]])  # all four: mean 4, squares 9 + 1 + 4 + 4 = 18, 18/3 = 6
    std = 6.0**0.5
    close(group_advantages(rewards, scale="batch", eps=0.0), [[-1 / std, 1 / std], [0.0, 0.0]])


def test_an_unscored_completion_is_out_of_mean_and_std():
    with_gap = group_advantages(torch.tensor([[1.0, NAN, 0.0, 0.0]]))
    without = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))
    assert with_gap[0, [0, 2, 3]].tolist() == without[0].tolist()
    assert with_gap[0, 1] == 0


def test_an_unscored_completion_is_out_of_the_batchs_std():
    with_gap = group_advantages(torch.tensor([[1.0, NAN, 3.0], [6.0, 6.0, NAN]]), scale="batch", eps=0.0)
    close(with_gap, [[-1 / 6**0.5, 0.0, 1 / 6**0.5], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_fewer_than_two_scored_completions_give_zero(scale):
    rewards = torch.tensor([[5.0, NAN, NAN], [NAN, NAN, NAN]])
    assert group_advantages(rewards, scale=scale).tolist() == [[0.0] * 3] * 2
    assert leave_one_out_advantages(rewards).tolist() == [[0.0] * 3] * 2
    assert has_signal(rewards).tolist() == [False, False]


def test_a_group_of_one_gives_zero():
    assert group_advantages(torch.tensor([[5.0], [1.0]]), scale="batch").tolist() == [[0.0], [0.0]]
    assert leave_one_out_advantages(torch.tensor([[5.0]])).tolist() == [[0.0]]


def test_scored_rewards_that_are_equal_give_zero_beside_unscored_ones():
    rewards = torch.tensor([[1.2] * 7 + [NAN]])
    assert group_advantages(rewards).tolist() == [[0.0] * 8]
    assert has_signal(rewards).tolist() == [False]


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0, NAN]])  # 1 - 8/2, 2 - 7/2, 6 - 3/2
    close(leave_one_out_advantages(rewards), [[-3.0, -1.5, 4.5, 0.0]])


def test_leave_one_out_is_the_centred_reward_times_n_over_n_minus_1():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_advantages(rewards), group_advantages(rewards, scale="none") * 4 / 3)


def test_rewards_are_not_written_to():
    rewards = torch.tensor([[1.0, NAN, 0.0]])
    group_advantages(rewards)
    leave_one_out_advantages(rewards)
    assert rewards._version == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_a_slow_loop(scale):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    rewards[torch.rand(5, 6, generator=generator) < 0.3] = NAN
    every = [r for row in rewards.tolist() for r in row if r == r]
    expected = []
    for row in rewards.tolist():
        scored = [r for r in row if r == r]
        pool = {"group": scored, "batch": every}.get(scale)
        divisor = 1.0 if pool is None else sample_std(pool) + 1e-4
        mean = sum(scored) / len(scored)
        expected.append([(r - mean) / divisor if r == r else 0.0 for r in row])
    close(group_advantages(rewards, scale=scale), expected)


def sample_std(values):
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trls(scale):
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.1], [2.0, 2.0, 2.5, NAN], [1.5, 1.5, 1.5, 1.5]], dtype=torch.float64)
    # GRPOTrainer._generate_and_score_completions of TRL 1.16.0: nanmean by group, then nanstd by group or over all
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    by_group = torch.stack([row[~row.isnan()].std() for row in rewards])[:, None]
    over_all = rewards[~rewards.isnan()].std()
    divisor = {"group": by_group + 1e-4, "batch": over_all + 1e-4, "none": 1.0}[scale]
    torch.testing.assert_close(group_advantages(rewards, scale=scale), (centred / divisor).nan_to_num(nan=0.0))


def test_an_unknown_scale_is_an_error():
    with pytest.raises(ValueError) as error:
        unwrap(group_advantages)(torch.tensor([[1.0, 0.0]]), scale="global")
    assert str(error.value) == 'group_advantages: scale is "global"; use "group", "batch", "centred" or "none"'


# --- centred and scaled over the step (REINFORCE++)


def test_scaled_by_all_differences_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [10.0, 13.0]])  # differences .5, -.5, -1.5, 1.5; their std sqrt(5 / 3)
    std = (5 / 3) ** 0.5
    close(
        group_advantages(rewards, scale="centred", eps=0.0),
        [[0.5 / std, -0.5 / std], [-1.5 / std, 1.5 / std]],
        rtol=1e-6,
        atol=1e-6,
    )


def test_how_far_prompts_lie_apart_counts_for_the_scale_batch_and_not_for_centred():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    apart = rewards + torch.tensor([[0.0], [100.0]])
    close(
        group_advantages(rewards, scale="centred"),
        group_advantages(apart, scale="centred").tolist(),
        rtol=1e-4,
        atol=1e-6,
    )
    assert group_advantages(apart, scale="batch").abs().max() < 0.02


def test_the_steps_mean_as_baseline_by_hand():
    rewards = torch.tensor([[1.0, 1.0], [0.0, NAN], [2.0, 0.0]])  # scored: mean .8, std sqrt(.7)
    std = 0.7**0.5
    expected = [[0.2 / std, 0.2 / std], [-0.8 / std, 0.0], [1.2 / std, -0.8 / std]]
    close(batch_advantages(rewards, eps=0.0), expected, rtol=1e-6, atol=1e-6)
    close(batch_advantages(rewards, scale="none"), [[0.2, 0.2], [-0.8, 0.0], [1.2, -0.8]])


def test_a_step_of_equal_rewards_has_no_advantage_over_itself():
    assert batch_advantages(torch.full((3, 8), 1.2)).eq(0).all()
    assert group_advantages(torch.full((3, 8), 1.2), scale="centred").eq(0).all()


def test_an_unknown_scale_of_the_steps_mean_is_an_error():
    with pytest.raises(ValueError, match='batch_advantages: scale is "group"; use "batch" or "none"'):
        unwrap(batch_advantages)(torch.tensor([[1.0, 0.0]]), scale="group")


# --- GDPO


def test_normalised_rewards_count_by_their_weights_and_not_by_their_spread():
    right, length = torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.0, -900.0, 0.0, -900.0]])
    a = 0.5 / (1 / 3) ** 0.5  # each has |difference| / std = .5 / sqrt(1/3)
    close(normalize_then_sum([right, length], [1.0, 0.5], eps=0.0), [[1.5 * a, -1.5 * a, -0.5 * a, 0.5 * a]])


def test_a_reward_that_is_equal_in_its_group_adds_exactly_nothing():
    right = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    alone = normalize_then_sum([right], [2.0])
    assert torch.equal(normalize_then_sum([right, torch.full((1, 4), 1.2)], [2.0, 3.0]), alone)
    assert not has_signal(normalize_then_sum([torch.full((1, 4), 1.2)] * 2, [1.0, 1.0])).any()


def test_a_reward_that_does_not_apply_adds_nothing_and_where_none_applies_there_is_no_sum():
    some = torch.tensor([[1.0, 0.0, NAN]])
    other = torch.tensor([[NAN, 2.0, NAN]])
    close(normalize_then_sum([some, other], [1.0, 1.0], eps=0.0), [[0.5**0.5, -(0.5**0.5), NAN]], equal_nan=True)


def test_gdpo_advantages_equal_trls():
    generator = torch.Generator().manual_seed(1)
    terms = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)  # [terms, P, G]
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    # GRPOTrainer of TRL 1.16.0, multi_objective_aggregation="normalize_then_sum"
    normalised = (terms - terms.mean(2, keepdim=True)) / (terms.std(2, keepdim=True) + 1e-4)
    summed = (normalised * weights[:, None, None]).sum(0)
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    ours = normalize_then_sum(list(terms), weights.tolist())
    torch.testing.assert_close(group_advantages(ours, scale="centred"), expected, rtol=1e-9, atol=1e-9)
