"""The GRPO objective, from log-probabilities to one number.

    loss = sum_t weight_t * (-surrogate(ratio_t, A) + beta * kl_t)     DeepSeekMath (arXiv:2402.03300), section 4.1.1

Surrogates return the objective, which is to be maximised; `grpo_loss` negates. Advantages are per completion [N] or per
token [N,T]. Three policies: pi being trained (`logps`), pi_old that sampled (`old_logps`, in the ratio), and the frozen
reference (`ref_logps`, in the KL).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_lab.algorithm.kl import KL_ESTIMATORS, KlEstimator

Advantages = Float[Tensor, "N"] | Float[Tensor, "N T"]
Surrogate = Callable[[Float[Tensor, "N T"], Advantages], Float[Tensor, "N T"]]


class LossOutput(NamedTuple):
    """The loss to call backward on, and for metrics (detached) the KL that was added, if any, and the ratio."""

    loss: Float[Tensor, ""]
    kl: Float[Tensor, "N T"] | None
    ratio: Float[Tensor, "N T"]


def importance_ratio(
    logps: Float[Tensor, "N T"],
    old_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    level: Literal["token", "sequence", "sequence_sum"] = "token",
) -> Float[Tensor, "N T"]:
    """How much likelier the policy makes what was sampled than the policy that sampled it: pi / pi_old.

    token           exp(logp_t - old_logp_t)                              GRPO
    sequence        exp(mean_t (logp_t - old_logp_t)), for every token    GSPO (arXiv:2507.18071)
    sequence_sum    exp(sum_t (logp_t - old_logp_t)), for every token     RLOO (arXiv:2402.14740)

    "sequence_sum" is the ratio of the two policies' probabilities of the whole completion. Its gradient is the sum over
    the tokens, so with "sequence" weights (1/|o_i|) a completion's tokens count |o_i| times what they do otherwise.

    What stands at masked positions is never used and gets no gradient: the ratio there is 1 (at the sequence levels, the
    completion's), and a completion of no tokens has ratio 1.

    >>> old = torch.tensor([[0.5, 0.2, 0.9]]).log()
    >>> new = torch.tensor([[0.6, 0.1, 0.9]]).log()
    >>> mask = torch.tensor([[True, True, False]])
    >>> importance_ratio(new, old, mask)
    tensor([[1.2000, 0.5000, 1.0000]])
    >>> importance_ratio(new, old, mask, level="sequence")
    tensor([[0.7746, 0.7746, 0.7746]])
    >>> importance_ratio(new, old, mask, level="sequence_sum")
    tensor([[0.6000, 0.6000, 0.6000]])
    """
    log_ratio = (logps - old_logps).masked_fill(~mask, 0.0)
    if level == "token":
        return log_ratio.exp()
    total = log_ratio.sum(dim=1, keepdim=True)
    if level == "sequence_sum":
        return total.exp().expand_as(log_ratio)
    if level == "sequence":
        return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).exp().expand_as(log_ratio)
    raise ValueError(f'importance_ratio: level is "{level}"; use "token", "sequence" or "sequence_sum"')


def sampler_correction_weights(
    old_logps: Float[Tensor, "N T"],
    sampler_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    mode: Literal["truncate", "mask"] = "truncate",
    level: Literal["token", "sequence"] = "token",
    cap: float,
) -> Float[Tensor, "N T"]:
    """Corrects for a sampler that is not quite pi_old: pi_old / sampler, bounded by the cap, without gradient.

    truncate    min(pi_old / sampler, cap)                          truncated importance sampling: Yao et al. 2025, "Your
                Efficient RL Framework Secretly Brings You Off-Policy RL Training" (fengyao.notion.site/off-policy-rl)
    mask        pi_old / sampler, and 0 where it exceeds the cap    masked: IcePop, Ring-1T (arXiv:2510.18855), which
                also masks below a lower bound

    Another kernel, dtype or a cut-off such as top_p makes the two differ. The cap bounds the variance that rare tokens
    would bring. At level "sequence" the quotient is the product over a completion's tokens and counts for all of them.
    At masked positions the weight is that of a quotient of 1 (at sequence level, the completion's). As in TRL's
    vllm_importance_sampling_mode. Pass the result to `grpo_loss` as `sampler_weights`.

    >>> old, sampler = torch.tensor([[0.5, 0.4]]).log(), torch.tensor([[0.4, 0.1]]).log()
    >>> mask = torch.tensor([[True, True]])
    >>> sampler_correction_weights(old, sampler, mask, cap=2.0)
    tensor([[1.2500, 2.0000]])
    >>> sampler_correction_weights(old, sampler, mask, mode="mask", cap=2.0)
    tensor([[1.2500, 0.0000]])
    >>> sampler_correction_weights(old, sampler, mask, level="sequence", cap=9.0)
    tensor([[5., 5.]])
    """
    gap = (old_logps - sampler_logps).detach().masked_fill(~mask, 0.0)
    if level == "sequence":
        gap = gap.sum(dim=1, keepdim=True).expand_as(gap)
    elif level != "token":
        raise ValueError(f'sampler_correction_weights: level is "{level}"; use "token" or "sequence"')
    if mode == "truncate":
        return gap.exp().clamp(max=cap)
    if mode == "mask":
        return gap.exp().masked_fill(gap.exp() > cap, 0.0)
    raise ValueError(f'sampler_correction_weights: mode is "{mode}"; use "truncate" or "mask"')


def clipped_surrogate(
    ratio: Float[Tensor, "N T"],
    advantages: Advantages,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Tensor, "N T"]:
    """PPO's pessimistic objective: nothing to gain from pushing a token beyond the clip range where that helps.

    min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A)      PPO (arXiv:1707.06347), section 3

    `epsilon_high` above `epsilon_low` is DAPO's clip-higher (arXiv:2503.14476). A ratio outside the range in the
    direction that hurts is not clipped, so a bad token made likelier is still pushed back, however far; `delta` bounds
    that push by capping the ratio of the first term (INTELLECT-2, arXiv:2505.07291).

    >>> ratio = torch.tensor([[1.8, 0.4]])
    >>> clipped_surrogate(ratio, torch.tensor([1.0]), epsilon_low=0.2, epsilon_high=0.2)
    tensor([[1.2000, 0.4000]])
    >>> clipped_surrogate(ratio, torch.tensor([-1.0]), epsilon_low=0.2, epsilon_high=0.2)
    tensor([[-1.8000, -0.8000]])
    """
    advantages = _per_token(advantages)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    capped = ratio if delta is None else ratio.clamp(max=delta)
    return torch.minimum(capped * advantages, clipped * advantages)


def plain_surrogate(ratio: Float[Tensor, "N T"], advantages: Advantages) -> Float[Tensor, "N T"]:
    """The policy gradient with its importance weight and nothing else: ratio * A.

    Its gradient at ratio 1 is REINFORCE's, A * grad logp.

    >>> plain_surrogate(torch.tensor([[1.8, 0.4]]), torch.tensor([-1.0]))
    tensor([[-1.8000, -0.4000]])
    """
    return ratio * _per_token(advantages)


def clipped_tokens(
    ratio: Float[Tensor, "N T"], advantages: Advantages, *, epsilon_low: float, epsilon_high: float
) -> tuple[Bool[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """Which tokens `clipped_surrogate` gives no gradient: (too unlikely already, too likely already). For metrics.

    Masked positions are included; count with the mask. A cap by `delta` is not counted.

    >>> clipped_tokens(torch.tensor([[1.8, 0.4]]), torch.tensor([1.0]), epsilon_low=0.2, epsilon_high=0.2)
    (tensor([[False, False]]), tensor([[ True, False]]))
    """
    advantages = _per_token(advantages)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low, high


def cispo_surrogate(
    ratio: Float[Tensor, "N T"], logps: Float[Tensor, "N T"], advantages: Advantages, *, epsilon_high: float
) -> Float[Tensor, "N T"]:
    """REINFORCE with a capped importance weight: every token keeps a gradient, none has a large one.

    stop_gradient(min(ratio, epsilon_high)) * A * logp                      CISPO, MiniMax-M1 (arXiv:2506.13585)

    `epsilon_high` is the cap itself, as in TRL, not 1 + epsilon. No lower bound.

    >>> ratio, logps = torch.tensor([[8.0, 0.5]]), torch.tensor([[-1.0, -2.0]])
    >>> cispo_surrogate(ratio, logps, torch.tensor([1.0]), epsilon_high=5.0)
    tensor([[-5., -1.]])
    """
    return ratio.detach().clamp(max=epsilon_high) * _per_token(advantages) * logps


def sapo_surrogate(
    ratio: Float[Tensor, "N T"], advantages: Advantages, *, temperature_pos: float, temperature_neg: float
) -> Float[Tensor, "N T"]:
    """A soft clip: the gradient fades smoothly as the ratio leaves 1, instead of stopping at an edge.

    4/tau * sigmoid(tau * (ratio - 1)) * A, tau by the sign of A            SAPO (arXiv:2511.20347)

    At ratio 1 the slope in the ratio is A, as without any clipping (the value there is 2 A / tau). A larger tau fades
    faster; the paper's 1.05 against 1.0 does so for negative advantages.

    >>> sapo_surrogate(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]), temperature_pos=1.0, temperature_neg=1.05)
    tensor([[2.0000, 2.9242]])
    """
    advantages = _per_token(advantages)
    positive, negative = advantages.new_tensor(temperature_pos), advantages.new_tensor(temperature_neg)
    temperature = torch.where(advantages > 0, positive, negative)
    return 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages


def grpo_loss(
    logps: Float[Tensor, "N T"],
    old_logps: Float[Tensor, "N T"] | None,
    ref_logps: Float[Tensor, "N T"] | None,
    advantages: Advantages,
    mask: Bool[Tensor, "N T"],
    weights: Float[Tensor, "N T"],
    *,
    surrogate: Surrogate,
    ratio_level: Literal["token", "sequence", "sequence_sum"],
    beta: float,
    kl_estimator: Literal["k1", "k2", "k3"] | KlEstimator,
    kl_bias_correction: bool = False,
    sampler_weights: Float[Tensor, "N T"] | None = None,
    policy_mask: Bool[Tensor, "N T"] | None = None,
) -> LossOutput:
    """The loss of these rows: sum of weight * (-surrogate + beta * kl). A sum, so that micro-batches add up.

    On fresh samples the ratio is exactly 1 and, with group-centred advantages and "sequence" weights, the loss *value*
    is beta * sum(kl * weights), 0 without KL, while the policy learns all the same: watch the reward and the gradient.

    Args:
        old_logps: None = sampled by this very policy, so that the ratio is 1.
        ref_logps: needed when beta is not 0. With beta 0 the KL is still reported if they are given.
        weights: from `token_weights`; masked positions add nothing whatever their weight.
        surrogate: called as surrogate(ratio, advantages), its options bound, for example
            `partial(clipped_surrogate, epsilon_low=0.2, epsilon_high=0.2)`. One that needs more binds it too:
            `lambda ratio, advantages: cispo_surrogate(ratio, logps, advantages, epsilon_high=5.0)`.
        kl_estimator: a name in `KL_ESTIMATORS`, or a function like those.
        kl_bias_correction: multiply the KL by the ratio, gradient included. At token level, k1 and k3 then have the
            value and the gradient of KL(pi || ref) on samples of pi_old (DeepSeek-V3.2, arXiv:2512.02556; TRL's
            use_bias_correction_kl). It changes the gradient on fresh samples too, where the ratio is 1.
        sampler_weights: from `sampler_correction_weights`; scale the surrogate, not the KL.
        policy_mask: False takes a token out of the surrogate, not out of the KL or of anyone's weight.
    """
    # Garbage at masked positions must not reach a product: nan * 0 is nan, in the gradient as well.
    logps = logps.masked_fill(~mask, 0.0)
    old_logps = logps.detach() if old_logps is None else old_logps
    ratio = importance_ratio(logps, old_logps, mask, level=ratio_level)

    objective = surrogate(ratio, advantages)
    if policy_mask is not None:
        objective = objective.masked_fill(~policy_mask, 0.0)
    if sampler_weights is not None:
        objective = objective * sampler_weights.masked_fill(~mask, 0.0)
    per_token_loss = -objective

    kl = None
    if ref_logps is not None:
        estimate = KL_ESTIMATORS[kl_estimator] if isinstance(kl_estimator, str) else kl_estimator
        kl = estimate(logps, ref_logps.masked_fill(~mask, 0.0))
        kl = kl * ratio if kl_bias_correction else kl
    if beta != 0:
        if kl is None:
            raise ValueError(f"grpo_loss: beta is {beta} but ref_logps is None; pass the reference's or set beta to 0")
        per_token_loss = per_token_loss + beta * kl

    loss = (per_token_loss.masked_fill(~mask, 0.0) * weights).sum()
    return LossOutput(loss, None if kl is None else kl.detach(), ratio.detach())


def _per_token(advantages: Advantages) -> Float[Tensor, "N _"]:
    return advantages[:, None] if advantages.dim() == 1 else advantages
