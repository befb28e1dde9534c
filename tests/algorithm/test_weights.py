from inspect import unwrap

import pytest
import torch

from grpo_lab.algorithm.weights import token_weights

MASK = torch.tensor([[True, True, True, True], [True, False, False, False]])
REDUCTIONS = ["sequence", "token", "constant"]


def weights_of(mask, reduction, **counts):
    return token_weights(mask, reduction=reduction, max_completion_length=8, **counts)


@pytest.mark.parametrize(
    "reduction, long, short",
    [("sequence", 1 / 4 / 2, 1 / 1 / 2), ("token", 1 / 5, 1 / 5), ("constant", 1 / 16, 1 / 16)],
)
def test_weights_by_hand(reduction, long, short):
    expected = torch.tensor([[long] * 4, [short, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(weights_of(MASK, reduction), expected)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_weights_sum_to_one(reduction):
    assert weights_of(MASK, reduction).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_changes_no_weight(reduction):
    padded = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    assert torch.equal(weights_of(padded, reduction)[:, :4], weights_of(MASK, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_without_tokens_count_for_nothing(reduction):
    unscored = torch.zeros(1, 4, dtype=torch.bool)
    with_row = weights_of(torch.cat([MASK, unscored]), reduction)
    assert torch.equal(with_row[:2], weights_of(MASK, reduction))
    assert with_row[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("counts", [{}, {"num_sequences": 0, "num_tokens": 0}])
def test_a_mask_without_tokens_has_zero_weights(reduction, counts):
    assert weights_of(torch.zeros(2, 3, dtype=torch.bool), reduction, **counts).tolist() == [[0.0] * 3] * 2
    assert weights_of(torch.zeros(0, 3, dtype=torch.bool), reduction, **counts).shape == (0, 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_sum_to_the_whole(reduction):
    counts = {"num_sequences": 2, "num_tokens": 5}
    # each row on its own, cut to its own length, as a micro-batch is
    parts = [weights_of(MASK[:1], reduction, **counts), weights_of(MASK[1:, :1], reduction, **counts)]
    whole = weights_of(MASK, reduction)
    assert torch.equal(parts[0], whole[:1])
    assert torch.equal(parts[1], whole[1:, :1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_are_float32_and_the_mask_is_not_written_to(reduction):
    mask = MASK.clone()
    assert weights_of(mask, reduction).dtype == torch.float32
    assert mask._version == 0


def test_holes_in_the_mask_get_no_weight():
    mask = torch.tensor([[True, False, True]])
    assert token_weights(mask).tolist() == [[0.5, 0.0, 0.5]]


def test_constant_without_a_length_is_an_error():
    with pytest.raises(ValueError) as error:
        token_weights(MASK, reduction="constant")
    assert str(error.value) == 'token_weights: reduction "constant" divides by max_completion_length; pass it'


def test_an_unknown_reduction_is_an_error():
    with pytest.raises(ValueError) as error:
        unwrap(token_weights)(MASK, reduction="mean")
    assert str(error.value) == 'token_weights: reduction is "mean"; use "sequence", "token" or "constant"'
