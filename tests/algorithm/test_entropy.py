from inspect import unwrap

import pytest
import torch

from grpo_lab.algorithm.entropy import entropy_bonus, high_entropy_mask

ENTROPY = torch.tensor([[0.1, 2.0, 0.3], [1.0, 0.2, torch.nan]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    "share, expected",  # ordered: .1 .2 .3 1 2; the quantile at place (1 - share) * 4, between neighbours linear
    [
        (1.0, [[True, True, True], [True, True, False]]),
        (0.75, [[False, True, True], [True, True, False]]),  # at place 1: .2, which is kept
        (0.5, [[False, True, True], [True, False, False]]),  # at place 2: .3
        (0.2, [[False, True, False], [False, False, False]]),  # at place 3.2: 1.2
        (0.01, [[False, True, False], [False, False, False]]),
    ],
)
def test_the_least_decided_tokens_by_hand(share, expected):
    assert high_entropy_mask(ENTROPY, MASK, share=share).tolist() == expected


def test_the_threshold_is_torchs_quantile():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(7, 9, generator=generator)
    mask = torch.rand(7, 9, generator=generator) < 0.7
    for share in (0.05, 0.2, 0.37, 0.8, 0.99):
        expected = mask & (values >= torch.quantile(values[mask], 1 - share))
        assert torch.equal(high_entropy_mask(values, mask, share=share), expected)


def test_equal_entropies_are_kept_together():
    assert high_entropy_mask(torch.full((2, 3), 0.7), MASK, share=0.2).equal(MASK)


def test_of_no_tokens_none_are_kept():
    assert not high_entropy_mask(ENTROPY, torch.zeros_like(MASK), share=0.2).any()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_an_error(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        unwrap(high_entropy_mask)(ENTROPY, MASK, share=share)


def test_the_bonus_is_the_weighted_mean_and_its_gradient_the_weights():
    entropy = ENTROPY.clone().requires_grad_()
    weights = MASK.float() / 5
    bonus = entropy_bonus(entropy, MASK, weights)
    bonus.backward()
    assert bonus.item() == pytest.approx((0.1 + 2.0 + 0.3 + 1.0 + 0.2) / 5)
    assert torch.equal(entropy.grad, weights)
