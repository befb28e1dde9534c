from functools import partial
from inspect import unwrap

import pytest
import torch

from grpo_lab.algorithm.losses import (
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    importance_ratio,
    plain_surrogate,
    sampler_correction_weights,
    sapo_surrogate,
)

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
SAPO = {"temperature_pos": 1.0, "temperature_neg": 1.05}


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def slope(function, ratio, advantage):
    """d function / d ratio at one point."""
    at = row(ratio).requires_grad_()
    function(at, torch.tensor([advantage], dtype=torch.float64)).sum().backward()
    return at.grad.item()


# --- the ratio


def test_the_ratio_of_an_unchanged_policy_is_exactly_one():
    logps = torch.tensor([[-0.3, -7.1, -1e-9]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert importance_ratio(logps, logps, mask).tolist() == [[1.0, 1.0, 1.0]]
    assert importance_ratio(logps, logps, mask, level="sequence").tolist() == [[1.0, 1.0, 1.0]]


def test_ratios_by_hand():
    logps, old = row(0.6, 0.1, 0.3).log(), row(0.5, 0.2, 0.1).log()
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(importance_ratio(logps, old, mask), row(1.2, 0.5, 1.0))
    geometric_mean = (1.2 * 0.5) ** 0.5
    torch.testing.assert_close(importance_ratio(logps, old, mask, level="sequence"), row(*[geometric_mean] * 3))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_garbage_at_masked_positions_reaches_neither_ratio_nor_gradient(level, garbage):
    logps = row(-1.0, -2.0, garbage).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    ratio = importance_ratio(logps, row(-1.1, -2.0, 0.0), mask, level=level)
    ratio.sum().backward()
    assert ratio.isfinite().all()
    assert logps.grad.isfinite().all()
    assert logps.grad[0, 2] == 0


def test_a_completion_of_no_tokens_has_ratio_one():
    mask = torch.zeros(1, 2, dtype=torch.bool)
    assert importance_ratio(row(-1.0, -2.0), row(-3.0, -1.0), mask, level="sequence").tolist() == [[1.0, 1.0]]


def test_the_sequence_ratio_spreads_its_gradient_evenly_over_the_completion():
    logps = row(-1.0, -2.0, -3.0, 0.0).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    ratio = importance_ratio(logps, row(-1.3, -2.0, -3.0, 0.0), mask, level="sequence")
    ratio[0, 0].backward()  # exp(mean of 0.3, 0, 0), and a third of it to each token
    torch.testing.assert_close(logps.grad, row(*[torch.tensor(0.1).exp().item() / 3] * 3, 0.0))


def test_an_unknown_ratio_level_is_an_error():
    with pytest.raises(ValueError) as error:
        unwrap(importance_ratio)(row(0.0), row(0.0), torch.tensor([[True]]), level="word")
    assert str(error.value) == 'importance_ratio: level is "word"; use "token", "sequence" or "sequence_sum"'


def test_truncated_sampler_weights_are_capped_and_have_no_gradient():
    old = row(0.5, 0.4, 0.1).log().requires_grad_()
    weights = sampler_correction_weights(old, row(0.4, 0.1, 0.2).log(), torch.ones(1, 3, dtype=torch.bool), cap=2.0)
    torch.testing.assert_close(weights, row(1.25, 2.0, 0.5))
    assert not weights.requires_grad


# --- the clipped surrogate


@pytest.mark.parametrize(
    "ratio, advantage, objective, gradient",
    [
        (1.8, 1.0, 1.2, 0.0),  # helped enough
        (1.8, -1.0, -1.8, -1.0),  # a bad token made likelier: pushed back with full force
        (0.4, 1.0, 0.4, 1.0),  # a good token made unlikelier: pulled back
        (0.4, -1.0, -0.8, 0.0),  # avoided enough
        (1.4, 0.94, 1.128, 0.0),
        (1.1, 1.0, 1.1, 1.0),
        (0.9, -1.0, -0.9, -1.0),
        (1.0, 1.0, 1.0, 1.0),
        (1.0, -1.0, -1.0, -1.0),
    ],
)
def test_clip_stops_gradient_only_in_the_direction_that_helps(ratio, advantage, objective, gradient):
    surrogate = partial(clipped_surrogate, **CLIP)
    value = surrogate(row(ratio), torch.tensor([advantage], dtype=torch.float64)).item()
    assert value == pytest.approx(objective)
    assert slope(surrogate, ratio, advantage) == pytest.approx(gradient)


@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_clipped_tokens_are_those_without_gradient(ratio, advantage):
    clip = {"epsilon_low": 0.2, "epsilon_high": 0.28}
    advantages = torch.tensor([advantage], dtype=torch.float64)
    low, high = clipped_tokens(row(ratio), advantages, **clip)
    cut = slope(partial(clipped_surrogate, **clip), ratio, advantage) == 0 and advantage != 0
    assert (low | high).item() == cut
    assert low.item() == (cut and ratio < 1)
    assert high.item() == (cut and ratio > 1)


def test_clip_higher_leaves_more_room_above():
    surrogate = partial(clipped_surrogate, epsilon_low=0.2, epsilon_high=0.28)
    advantages = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(surrogate(row(1.25, 1.5, 0.7), advantages), row(1.25, 1.28, 0.7))
    torch.testing.assert_close(surrogate(row(1.25, 1.5, 0.7), -advantages), row(-1.25, -1.5, -0.8))


def test_delta_bounds_the_push_on_a_bad_token_made_likelier():
    surrogate = partial(clipped_surrogate, **CLIP, delta=4.0)
    torch.testing.assert_close(surrogate(row(9.0, 3.0), -torch.ones(1, dtype=torch.float64)), row(-4.0, -3.0))
    assert slope(surrogate, 9.0, -1.0) == 0.0
    assert slope(surrogate, 3.0, -1.0) == -1.0


def test_advantages_may_be_per_token():
    ratio = torch.tensor([[1.8, 1.8], [0.4, 0.4]], dtype=torch.float64)
    per_token = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([[1.2, -1.8], [0.4, -0.8]], dtype=torch.float64)
    torch.testing.assert_close(clipped_surrogate(ratio, per_token, **CLIP), expected)
    low, high = clipped_tokens(ratio, per_token, **CLIP)
    assert low.tolist() == [[False, False], [False, True]]
    assert high.tolist() == [[True, False], [False, False]]


def test_advantages_per_completion_go_to_rows_also_when_the_batch_is_square():
    ratio = torch.ones(2, 2, dtype=torch.float64)
    advantages = torch.tensor([3.0, -5.0], dtype=torch.float64)
    expected = [[3.0, 3.0], [-5.0, -5.0]]
    assert clipped_surrogate(ratio, advantages, **CLIP).tolist() == expected
    assert cispo_surrogate(ratio, ratio, advantages, epsilon_high=5.0).tolist() == expected
    assert sapo_surrogate(ratio, advantages, temperature_pos=2.0, temperature_neg=2.0).tolist() == expected


# --- cispo and sapo


def test_cispo_caps_the_weight_and_keeps_every_tokens_gradient():
    logps = row(-1.0, -2.0, -0.5).requires_grad_()
    ratio = row(8.0, 0.01, 5.0).requires_grad_()
    objective = cispo_surrogate(ratio, logps, torch.tensor([2.0], dtype=torch.float64), epsilon_high=5.0)
    objective.sum().backward()
    torch.testing.assert_close(objective, row(-10.0, -0.04, -5.0))
    torch.testing.assert_close(logps.grad, row(10.0, 0.02, 10.0))
    assert ratio.grad is None


def test_sapo_has_the_unclipped_slope_at_ratio_one_and_fades_on_both_sides():
    surrogate = partial(sapo_surrogate, **SAPO)
    assert slope(surrogate, 1.0, 2.0) == pytest.approx(2.0)
    assert slope(surrogate, 1.0, -2.0) == pytest.approx(-2.0)
    assert abs(slope(surrogate, 3.0, 1.0)) < abs(slope(surrogate, 1.5, 1.0)) < 1
    assert abs(slope(surrogate, 0.0, 1.0)) < abs(slope(surrogate, 0.5, 1.0)) < 1


def test_sapo_by_hand():
    # ratio 2: sigmoid(1) = 0.7310586 and 4 of it; for A < 0 sigmoid(1.05) = 0.7407749 times 4/1.05
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(
        sapo_surrogate(row(2.0, 2.0), advantages, **SAPO), row(2.9242343, -2.8219996), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("advantage", [1.3, -0.7])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 1.1, 1.7])
def test_slopes_agree_with_finite_differences(ratio, advantage):
    advantages = torch.tensor([advantage], dtype=torch.float64)
    for surrogate in (
        partial(clipped_surrogate, **CLIP),
        partial(clipped_surrogate, **CLIP, delta=1.5),
        partial(sapo_surrogate, **SAPO),
    ):
        above, below = surrogate(row(ratio + 1e-6), advantages), surrogate(row(ratio - 1e-6), advantages)
        assert slope(surrogate, ratio, advantage) == pytest.approx(((above - below) / 2e-6).item(), abs=1e-6)


# --- whole completions


def test_the_ratio_of_whole_completions_is_the_product_and_its_gradient_the_sum_over_tokens():
    logps = row(0.6, 0.1, 0.9).log().requires_grad_()
    mask = torch.tensor([[True, True, False]])
    ratio = importance_ratio(logps, row(0.5, 0.2, 0.3).log(), mask, level="sequence_sum")
    torch.testing.assert_close(ratio, row(0.6, 0.6, 0.6))  # 1.2 * .5
    (gradient,) = torch.autograd.grad(ratio[0, 0], logps)
    torch.testing.assert_close(gradient, row(0.6, 0.6, 0.0))


def test_without_a_clip_the_slope_is_the_advantage_everywhere():
    for ratio in (0.01, 1.0, 50.0):
        assert slope(plain_surrogate, ratio, -0.7) == pytest.approx(-0.7)


# --- samplers that are not quite the policy

SAMPLED = {"old_logps": row(0.5, 0.4, 0.3).log(), "sampler_logps": row(0.4, 0.1, 0.3).log()}  # quotients 1.25, 4, 1


@pytest.mark.parametrize(
    "mode, level, cap, expected",
    [
        ("truncate", "token", 2.0, [1.25, 2.0, 1.0]),
        ("mask", "token", 2.0, [1.25, 0.0, 1.0]),
        ("mask", "token", 4.5, [1.25, 4.0, 1.0]),
        ("truncate", "sequence", 3.0, [3.0, 3.0, 3.0]),
        ("truncate", "sequence", 9.0, [5.0, 5.0, 5.0]),
        ("mask", "sequence", 3.0, [0.0, 0.0, 0.0]),
        ("mask", "sequence", 9.0, [5.0, 5.0, 5.0]),
    ],
)
def test_sampler_weights_by_hand(mode, level, cap, expected):
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = sampler_correction_weights(**SAMPLED, mask=mask, mode=mode, level=level, cap=cap)
    torch.testing.assert_close(weights, row(*expected))


def test_what_stands_beyond_a_completion_does_not_change_its_sampler_weight():
    mask = torch.tensor([[True, False, True]])
    weights = sampler_correction_weights(**SAMPLED, mask=mask, level="sequence", cap=9.0)
    torch.testing.assert_close(weights, row(1.25, 1.25, 1.25))


@pytest.mark.parametrize(
    "wrong, names", [({"mode": "clip"}, '"truncate" or "mask"'), ({"level": "word"}, '"token" or "sequence"')]
)
def test_an_unknown_sampler_correction_is_an_error(wrong, names):
    with pytest.raises(ValueError, match=names):
        unwrap(sampler_correction_weights)(**SAMPLED, mask=torch.ones(1, 3, dtype=torch.bool), cap=2.0, **wrong)
