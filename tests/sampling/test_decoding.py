import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import TemperatureLogitsWarper

from grpo_lab.recipe.schema import Sampling
from grpo_lab.sampling.decoding import Decoding, draw, filtered, group_noise, inverse_cdf

BELOW_ONE = 1 - 2**-24  # the largest float32 below 1, which torch.rand can return


def sampling_logps(logits, decoding):
    return filtered(logits, decoding).log_softmax(-1)


def logits_of(*probs):
    return torch.tensor([probs]).log()


def kept(probs, **decoding):
    return sampling_logps(logits_of(*probs), Decoding(1, **decoding)).exp()[0].tolist()


@pytest.mark.parametrize(
    "decoding, expected",
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 9}, [0.1, 0.5, 0.15, 0.25]),  # more than there are
        ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),  # .5 is not enough, .5 + .25 is
        ({"top_p": 0.4}, [0, 1, 0, 0]),  # the likeliest always stays
        ({"top_p": 0.95}, [0.1, 0.5, 0.15, 0.25]),
        ({"min_p": 0.29}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),  # at least .29 * .5
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),  # the mass is of what top_k left: 5/9, 2.5/9
        ({"top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),  # 7.5/9 is enough; of everything, .75 would not be
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 0.5, "min_p": 0.26}, [0, 1, 0, 0]),  # after the temperature: .0625 / .25 = .25
    ],
)
def test_filters_by_hand(decoding, expected):
    assert kept([0.1, 0.5, 0.15, 0.25], **decoding) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("top_k", [None, 5, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_filters_equal_those_of_transformers_in_its_order(temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(64, 283, generator=torch.Generator().manual_seed(0))
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(chain)(torch.zeros(64, 1, dtype=torch.long), logits).log_softmax(-1)
    logps = sampling_logps(logits, Decoding(1, temperature, top_k, top_p, min_p))
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=0)


def test_filtering_leaves_the_logits_untouched():
    logits = torch.randn(4, 20)
    before = logits.clone()
    sampling_logps(logits, Decoding(1, 0.5, 3, 0.5, 0.1))
    assert torch.equal(logits, before)


def test_log_probs_are_float32_for_bfloat16_logits():
    logits = torch.tensor([[9.0, 8.0]], dtype=torch.bfloat16)
    logps = sampling_logps(logits, Decoding(1, temperature=0.7))
    assert logps.dtype == torch.float32
    assert float(logps[0, 1]) == pytest.approx(-1 / 0.7 - math.log1p(math.exp(-1 / 0.7)), abs=1e-5)


@pytest.mark.parametrize(
    "uniform, token",
    [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (BELOW_ONE, 4), (1.0, 4)],
)
def test_the_token_is_the_one_whose_share_of_the_unit_interval_holds_the_noise(uniform, token):
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0]])
    assert inverse_cdf(probs, torch.tensor([uniform])).tolist() == [token]


def test_the_noise_is_scaled_by_what_the_probabilities_really_sum_to():
    probs = torch.tensor([[0.2, 0.2, 0.0]])
    assert [inverse_cdf(probs, torch.tensor([u])).item() for u in (0.3, 0.49, 0.51, 0.9)] == [0, 0, 1, 1]
    assert [inverse_cdf(5 * probs, torch.tensor([u])).item() for u in (0.3, 0.49, 0.51, 0.9)] == [0, 0, 1, 1]


def test_evenly_spaced_noise_gives_every_token_its_share():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.125, 0.125])
    uniform = (torch.arange(8000) + 0.5) / 8000
    counts = inverse_cdf(probs.expand(8000, -1), uniform).bincount(minlength=6)
    torch.testing.assert_close(counts, torch.tensor([4000, 0, 1600, 400, 1000, 1000]), atol=1, rtol=0)


def test_drawn_frequencies_are_the_probabilities():
    probs = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01])
    draws = 40_000
    noise = torch.cat([group_noise(0, group, 8, 50).flatten() for group in range(draws // 400)])
    counts = inverse_cdf(probs.expand(draws, -1), noise).bincount(minlength=5)
    chi_squared = float(((counts - draws * probs).square() / (draws * probs)).sum())
    assert chi_squared < 18.5  # 99.9 % quantile at 4 degrees of freedom


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-10, 1 - 2**-20, BELOW_ONE])
@pytest.mark.parametrize("shape", ["flat", "random", "peaked", "filtered"])
def test_a_large_vocabulary_never_gives_an_index_outside_it_or_a_token_without_mass(uniform, shape):
    size = 152_064
    generator = torch.Generator().manual_seed(0)
    logits = {
        "flat": torch.zeros(4, size),
        "random": torch.randn(4, size, generator=generator),
        "peaked": 12 * torch.randn(4, size, generator=generator),  # most probabilities underflow to 0
        "filtered": torch.randn(4, size, generator=generator),
    }[shape]
    decoding = Decoding(1, top_k=50) if shape == "filtered" else Decoding(1)
    probs = sampling_logps(logits, decoding).exp()
    probs[0, size // 2 :] = 0.0  # and a long tail of tokens that cannot be drawn
    token = inverse_cdf(probs, torch.full((4,), uniform))
    assert token.max() < size
    assert probs.gather(1, token[:, None]).gt(0).all()


def test_noise_just_below_one_gives_the_last_token_with_mass():
    probs = torch.full((1, 152_064), 1 / 152_064)
    assert inverse_cdf(probs, torch.tensor([BELOW_ONE])).item() >= 152_064 - 20
    tail = torch.cat([probs, torch.zeros(1, 1000)], dim=1)
    assert 152_064 - 20 <= inverse_cdf(tail, torch.tensor([BELOW_ONE])).item() < 152_064


def test_noise_is_a_function_of_the_seed_and_the_group_and_of_nothing_else():
    first = group_noise(7, 3, 4, 6)
    torch.manual_seed(0)
    torch.rand(10)
    assert torch.equal(group_noise(7, 3, 4, 6), first)
    assert first.shape == (4, 6)
    others = [group_noise(7, 4, 4, 6), group_noise(8, 3, 4, 6), group_noise(73, 0, 4, 6)]
    assert not any(torch.equal(first, other) for other in others)
    assert len(first.unique()) == 24
    assert 0 <= first.min() < first.max() < 1


def test_a_recipe_s_sampling_block_is_taken_over_whole():
    block = Sampling(
        num_generations=4, max_completion_length=9, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, max_rows=6
    )
    decoding = Decoding.of(block)
    assert decoding == Decoding(9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, max_rows=6)
    assert decoding.greedy() == Decoding(9, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0, max_rows=6)


@pytest.mark.parametrize("size", [64, 65, 100, 128, 1000])
def test_a_large_vocabulary_is_sampled_as_it_should_be(size):
    """Against the running sum in float64, for noise that is not within rounding of an edge."""
    generator = torch.Generator().manual_seed(size)
    masses = torch.rand(50, size, generator=generator) ** 8
    masses[:, :40] = 0.0
    masses[:, -3:] = 0.0
    uniform = torch.rand(50, generator=generator)
    edges = masses.double().cumsum(-1)
    target = uniform.double() * edges[:, -1]
    expected = torch.searchsorted(edges, target[:, None], right=True).squeeze(-1)
    clear = (edges - target[:, None]).abs().amin(-1) > 1e-5
    assert clear.sum() > 40
    assert torch.equal(inverse_cdf(masses, uniform)[clear], expected[clear])


@pytest.mark.parametrize("uniform", [0.0, BELOW_ONE])
def test_the_ends_of_a_large_vocabulary_have_mass(uniform):
    masses = torch.zeros(1, 200)
    masses[0, [70, 71, 190]] = torch.tensor([1e-3, 1.0, 1e-7])
    assert inverse_cdf(masses, torch.tensor([uniform])).item() == {0.0: 70, BELOW_ONE: 190}[uniform]


def test_a_draw_comes_with_the_log_prob_of_what_was_sampled():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 3
    decoding = Decoding(1, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
    token, logp = draw(logits, torch.rand(6, generator=torch.Generator().manual_seed(1)), decoding)
    expected = sampling_logps(logits, decoding).gather(-1, token[:, None]).squeeze(-1)
    torch.testing.assert_close(logp, expected)
