"""The whole loss, on random rows of different lengths in float64."""

import math
from functools import partial

import pytest
import torch

from grpo_lab.algorithm.kl import KL_ESTIMATORS
from grpo_lab.algorithm.losses import cispo_surrogate, clipped_surrogate, grpo_loss, sapo_surrogate
from grpo_lab.algorithm.weights import token_weights

LENGTHS = [5, 3, 1, 4, 0, 5]
ADVANTAGES = torch.tensor([1.2, -0.8, 0.5, -1.5, 2.0, 0.0], dtype=torch.float64)
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
REDUCTIONS = ["sequence", "token", "constant"]
LEVELS = ["token", "sequence"]

clipped = partial(clipped_surrogate, epsilon_low=0.2, epsilon_high=0.28)
sapo = partial(sapo_surrogate, temperature_pos=1.0, temperature_neg=1.05)


def cispo(logps):
    return lambda ratio, advantages: cispo_surrogate(ratio, logps, advantages, epsilon_high=1.3)


def random_logps(seed, spread=0.4):
    """Policy, old and reference, close to each other, so that some tokens are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    base = -2 * torch.rand(6, 5, generator=generator, dtype=torch.float64) - 0.5
    noise = spread * torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    return base + noise[0], base + noise[1], base + noise[2]


def weights_of(mask=MASK, reduction="sequence", **counts):
    return token_weights(mask, reduction=reduction, max_completion_length=8, **counts).double()


def loss_of(logps, old, ref, advantages=ADVANTAGES, mask=MASK, weights=None, **options):
    defaults = {"surrogate": clipped, "ratio_level": "token", "beta": 0.1, "kl_estimator": "k3"}
    weights = weights_of(mask) if weights is None else weights
    return grpo_loss(logps, old, ref, advantages, mask, weights, **{**defaults, **options})


def gradient_of(logps, *others, **options):
    logps = logps.clone().requires_grad_()
    loss_of(logps, *others, **options).loss.backward()
    return logps.grad


# --- on fresh samples


def test_on_policy_gradient_is_reinforce():
    logps, _, _ = random_logps(0)
    weights = weights_of()
    for old in (logps, None):
        gradient = gradient_of(logps, old, None, beta=0.0)
        torch.testing.assert_close(gradient, -ADVANTAGES[:, None] * weights)


def test_all_surrogates_are_reinforce_on_policy():
    logps, _, _ = random_logps(1)
    expected = gradient_of(logps, logps, None, beta=0.0)
    torch.testing.assert_close(gradient_of(logps, logps, None, beta=0.0, surrogate=sapo), expected)
    torch.testing.assert_close(gradient_of(logps, logps, None, beta=0.0, ratio_level="sequence"), expected)
    leaf = logps.clone().requires_grad_()
    loss_of(leaf, logps, None, beta=0.0, surrogate=cispo(leaf)).loss.backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_on_policy_loss_is_the_weighted_kl_when_advantages_sum_to_zero():
    logps, _, ref = random_logps(2)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.8, -0.4, -0.4], dtype=torch.float64)
    weights = weights_of(mask)
    output = loss_of(logps, logps, ref, advantages, mask, weights, beta=0.04)
    assert output.loss.item() == pytest.approx(0.04 * (output.kl * weights).sum().item(), abs=1e-7)
    without_kl = loss_of(logps, logps, None, advantages, mask, weights, beta=0.0)
    assert without_kl.loss.item() == pytest.approx(0, abs=1e-7)  # the weights are float32


def test_the_ratio_reported_is_one_and_nothing_reported_has_a_gradient():
    logps, _, ref = random_logps(3)
    output = loss_of(logps.requires_grad_(), None, ref)
    assert (output.ratio == 1).all()
    assert not output.ratio.requires_grad
    assert not output.kl.requires_grad
    assert output.loss.requires_grad


# --- what must not matter


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_padding_changes_nothing(reduction, level):
    inputs = random_logps(4)
    generator = torch.Generator().manual_seed(0)
    padded = [torch.cat([x, torch.randn(6, 3, generator=generator, dtype=torch.float64)], dim=1) for x in inputs]
    mask = torch.cat([MASK, torch.zeros(6, 3, dtype=torch.bool)], dim=1)
    short = {"weights": weights_of(MASK, reduction), "ratio_level": level}
    long = {"weights": weights_of(mask, reduction), "ratio_level": level, "mask": mask}
    torch.testing.assert_close(loss_of(*padded, **long).loss, loss_of(*inputs, **short).loss)
    torch.testing.assert_close(gradient_of(*padded, **long)[:, :5], gradient_of(*inputs, **short))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cut", [[6], [1] * 6, [2, 4], [5, 1]])
def test_micro_batches_sum_to_the_whole(reduction, cut):
    inputs = random_logps(5)
    weights = weights_of(MASK, reduction)
    whole, whole_gradient = loss_of(*inputs, weights=weights).loss, gradient_of(*inputs, weights=weights)
    total, gradients = torch.zeros((), dtype=torch.float64), []
    for rows in torch.arange(6).split(cut):
        part = [x[rows] for x in inputs]
        options = {"advantages": ADVANTAGES[rows], "mask": MASK[rows], "weights": weights[rows]}
        total = total + loss_of(*part, **options).loss
        gradients.append(gradient_of(*part, **options))
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.cat(gradients), whole_gradient)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), -1e30, 1e30])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_masked_tokens_get_no_gradient_whatever_stands_there(level, garbage, estimator):
    logps, old, ref = random_logps(6)
    options = {"ratio_level": level, "kl_estimator": estimator, "kl_bias_correction": True}
    sampler_weights = torch.full_like(logps, 0.9)
    clean = gradient_of(logps, old, ref, **options, sampler_weights=sampler_weights)
    soiled = [x.masked_fill(~MASK, garbage) for x in (logps, old, ref)]
    gradient = gradient_of(*soiled, **options, sampler_weights=sampler_weights.masked_fill(~MASK, garbage))
    assert (gradient[~MASK] == 0).all()
    assert torch.equal(gradient, clean)
    output = loss_of(*soiled, **options)
    assert torch.equal(output.loss, loss_of(logps, old, ref, **options).loss)
    assert output.kl.isfinite().all()
    assert output.ratio.isfinite().all()


def test_cispo_ignores_garbage_at_masked_positions():
    logps, old, _ = random_logps(7)
    leaf = logps.masked_fill(~MASK, float("nan")).requires_grad_()
    output = loss_of(leaf, old, None, beta=0.0, surrogate=cispo(leaf))
    output.loss.backward()
    assert output.loss.isfinite()
    assert (leaf.grad[~MASK] == 0).all()
    assert leaf.grad.isfinite().all()


def test_a_weight_at_a_masked_position_adds_nothing():
    inputs = random_logps(8)
    weights = weights_of()
    torch.testing.assert_close(
        gradient_of(*inputs, weights=weights.masked_fill(~MASK, 3.0)), gradient_of(*inputs, weights=weights)
    )


def test_a_batch_of_no_tokens_has_loss_zero_and_no_gradient():
    mask = torch.zeros(6, 5, dtype=torch.bool)
    inputs = random_logps(9)
    for level in LEVELS:
        assert loss_of(*inputs, mask=mask, ratio_level=level).loss.item() == 0
        assert (gradient_of(*inputs, mask=mask, ratio_level=level) == 0).all()


def test_per_token_advantages_that_are_equal_are_those_of_the_completion():
    inputs = random_logps(10)
    spread = ADVANTAGES[:, None].expand(6, 5)
    torch.testing.assert_close(loss_of(*inputs, advantages=spread).loss, loss_of(*inputs).loss)


def test_inputs_are_not_written_to():
    inputs = [*random_logps(11), ADVANTAGES.clone(), MASK.clone(), weights_of()]
    sampler_weights, policy_mask = torch.ones(6, 5, dtype=torch.float64), MASK.clone()
    loss_of(*inputs, sampler_weights=sampler_weights, policy_mask=policy_mask, kl_bias_correction=True)
    assert [x._version for x in [*inputs, sampler_weights, policy_mask]] == [0] * 8


# --- the parts


def test_the_reference_and_the_old_policy_are_not_trained():
    logps, old, ref = (x.requires_grad_() for x in random_logps(12))
    loss = loss_of(logps, old.detach(), ref.detach()).loss
    assert loss.requires_grad
    loss_of(logps, None, ref.detach()).loss.backward()
    assert logps.grad is not None
    assert old.grad is None
    assert ref.grad is None


def test_without_beta_no_reference_is_needed_and_one_that_is_given_is_only_reported():
    logps, old, ref = random_logps(13)
    alone = loss_of(logps, old, None, beta=0.0)
    watched = loss_of(logps, old, ref, beta=0.0)
    assert alone.kl is None
    assert torch.equal(watched.loss, alone.loss)
    torch.testing.assert_close(watched.kl[MASK], KL_ESTIMATORS["k3"](logps, ref)[MASK])
    assert torch.equal(gradient_of(logps, old, ref, beta=0.0), gradient_of(logps, old, None, beta=0.0))


def test_beta_without_a_reference_is_an_error():
    logps, old, _ = random_logps(14)
    with pytest.raises(ValueError) as error:
        loss_of(logps, old, None, beta=0.04)
    assert str(error.value) == "grpo_loss: beta is 0.04 but ref_logps is None; pass the reference's or set beta to 0"


def test_policy_mask_and_sampler_weights_leave_the_kl_alone():
    logps, _, ref = random_logps(15)
    none = torch.zeros(6, 5, dtype=torch.bool)
    nothing = torch.zeros(6, 5, dtype=torch.float64)
    only_kl = gradient_of(logps, None, ref, advantages=torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(gradient_of(logps, None, ref, policy_mask=none), only_kl)
    torch.testing.assert_close(gradient_of(logps, None, ref, sampler_weights=nothing), only_kl)


def test_policy_mask_takes_single_tokens_out_of_the_surrogate():
    logps, old, _ = random_logps(16)
    policy_mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    gradient = gradient_of(logps, old, None, beta=0.0, policy_mask=policy_mask)
    expected = gradient_of(logps, old, None, beta=0.0).masked_fill(~policy_mask, 0.0)
    torch.testing.assert_close(gradient, expected)


def test_a_kl_estimator_may_be_a_function():
    inputs = random_logps(17)
    by_name = loss_of(*inputs, kl_estimator="k2").loss
    assert torch.equal(loss_of(*inputs, kl_estimator=KL_ESTIMATORS["k2"]).loss, by_name)


# --- finite differences


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("surrogate", [clipped, sapo])
def test_gradient_passes_gradcheck(level, bias_correction, surrogate):
    logps, old, ref = random_logps(18)
    options = {"ratio_level": level, "kl_bias_correction": bias_correction, "surrogate": surrogate}
    assert torch.autograd.gradcheck(lambda x: loss_of(x, old, ref, **options).loss, logps.requires_grad_())


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_agrees_with_differences_taken_by_hand(level):
    logps, old, ref = random_logps(19)
    options = {"ratio_level": level, "kl_bias_correction": True, "sampler_weights": torch.rand(6, 5).double()}
    gradient = gradient_of(logps, old, ref, **options)
    for i, t in [(0, 0), (1, 2), (2, 0), (2, 3), (3, 1), (4, 0), (5, 4)]:
        step = torch.zeros_like(logps)
        step[i, t] = 1e-6
        above, below = loss_of(logps + step, old, ref, **options).loss, loss_of(logps - step, old, ref, **options).loss
        assert gradient[i, t].item() == pytest.approx(((above - below) / 2e-6).item(), abs=1e-8)


# --- independent implementations


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("delta", [None, 1.1])
def test_loss_equals_a_slow_loop(level, reduction, delta):
    logps, old, ref = random_logps(20)
    surrogate = partial(clipped_surrogate, epsilon_low=0.2, epsilon_high=0.28, delta=delta)
    output = loss_of(
        logps, old, ref, weights=weights_of(MASK, reduction), surrogate=surrogate, ratio_level=level, beta=0.3
    )
    total = 0.0
    for i, length in enumerate(LENGTHS):
        differences = [(logps[i, t] - old[i, t]).item() for t in range(length)]
        for t in range(length):
            ratio = math.exp(differences[t] if level == "token" else sum(differences) / length)
            advantage = ADVANTAGES[i].item()
            inside = min(max(ratio, 0.8), 1.28)
            capped = ratio if delta is None else min(ratio, delta)
            log_ratio = (ref[i, t] - logps[i, t]).item()
            kl = math.exp(log_ratio) - log_ratio - 1
            # five of the six completions have tokens, 18 tokens in all
            divisor = {"sequence": length * 5, "token": 18, "constant": 5 * 8}[reduction]
            total += (-min(capped * advantage, inside * advantage) + 0.3 * kl) / divisor
    assert output.loss.item() == pytest.approx(total, rel=1e-6)  # the weights are float32


def trl_loss(logps, old, ref, mask, *, loss_type, level, beta, bias_correction, keep, sampler_weights):
    """What GRPOTrainer._compute_loss of TRL 1.16.0 computes in one process with one micro-batch."""
    advantages = ADVANTAGES[: len(logps), None]
    log_weights = logps - old
    if level == "sequence":
        log_weights = ((log_weights * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = torch.exp(log_weights)
    if loss_type == "cispo":
        loss = -torch.clamp(ratio, max=1.3).detach() * advantages * logps
    elif loss_type == "sapo":
        tau = torch.where(advantages > 0, 1.0, 1.05)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    else:
        loss = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.28) * advantages)
    loss = loss * keep * sampler_weights
    kl = torch.exp(ref - logps) - (ref - logps) - 1
    loss = loss + beta * (kl * ratio if bias_correction else kl)
    if loss_type in ("grpo", "sapo"):
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "dr_grpo":
        return (loss * mask).sum() / (len(logps) * 8)
    return (loss * mask).sum() / mask.sum()  # dapo, cispo: num_items_in_batch is the number of tokens


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo", "sapo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias_correction", [False, True])
def test_loss_equals_trl(loss_type, level, bias_correction):
    rows = torch.tensor([0, 1, 2, 3, 5])  # TRL has no completions without tokens: EOS at least
    logps, old, ref = (x[rows] for x in random_logps(21))
    mask, generator = MASK[rows], torch.Generator().manual_seed(1)
    keep = torch.rand(5, 5, generator=generator) < 0.7
    sampler_weights = 0.5 + torch.rand(5, 5, generator=generator, dtype=torch.float64)
    reduction = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant"}.get(loss_type, "token")
    ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    surrogate = {"cispo": cispo(ours), "sapo": sapo}.get(loss_type, clipped)
    output = loss_of(
        ours,
        old,
        ref,
        advantages=ADVANTAGES[:5],
        mask=mask,
        weights=weights_of(mask, reduction),
        surrogate=surrogate,
        ratio_level=level,
        kl_bias_correction=bias_correction,
        policy_mask=keep,
        sampler_weights=sampler_weights,
    )
    options = {"loss_type": loss_type, "level": level, "beta": 0.1, "bias_correction": bias_correction}
    expected = trl_loss(theirs, old, ref, mask.double(), **options, keep=keep, sampler_weights=sampler_weights)
    output.loss.backward()
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
