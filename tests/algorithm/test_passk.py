from itertools import combinations
from math import comb

import pytest
import torch

from grpo_lab.algorithm.passk import pass_at_k


def answers(num_right, num_answers):
    return torch.tensor([[i < num_right for i in range(num_answers)]])


@pytest.mark.parametrize("num_right, k, expected", [(0, 1, 0.0), (1, 1, 0.25), (1, 2, 0.5), (2, 2, 5 / 6), (3, 2, 1.0)])
def test_four_answers_by_hand(num_right, k, expected):
    assert pass_at_k(answers(num_right, 4), k).item() == pytest.approx(expected)


def test_it_is_the_share_of_draws_that_hold_a_right_answer():
    correct = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        draws = list(combinations(correct, k))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(torch.tensor([correct]), k).item() == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("num_right", [0, 1, 7, 150, 200])
@pytest.mark.parametrize("k", [1, 10, 100, 200])
def test_it_equals_the_binomials_for_many_answers(num_right, k):
    expected = 1 - comb(200 - num_right, k) / comb(200, k)
    assert pass_at_k(answers(num_right, 200), k).item() == pytest.approx(expected, rel=1e-6)


def test_the_order_of_answers_does_not_matter_and_prompts_are_separate():
    correct = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    assert pass_at_k(correct, 2).tolist() == pytest.approx([2 / 3, 2 / 3, 0.0])


def test_pass_at_1_is_the_mean():
    correct = torch.tensor([[True, False, True, True, False]])
    assert pass_at_k(correct, 1).item() == pytest.approx(0.6)


@pytest.mark.parametrize("k", [0, 5])
def test_more_draws_than_answers_is_an_error(k):
    with pytest.raises(ValueError) as error:
        pass_at_k(answers(2, 4), k)
    assert str(error.value) == f"pass_at_k: k is {k}, with 4 answers per prompt; use 1 to 4"
