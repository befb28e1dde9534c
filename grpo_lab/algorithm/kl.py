"""How far the policy has moved from the reference: three per-token estimators of KL(pi || ref), in nats.

With the token sampled from pi, the *values* of k1 and k3 are unbiased for KL(pi || ref); k2 is biased but close when
the two are close. The names are John Schulman's ("Approximating KL Divergence", joschu.net/blog/kl-approx.html, 2020).

As a *loss* only the gradient matters, and there they differ more. On-policy (tokens from pi itself):

    E[grad k1] = 0                    no penalty at all, only noise
    E[grad k2] = grad KL(pi || ref)   the penalty usually meant
    E[grad k3] = grad KL(ref || pi)   the other direction; GRPO's choice (DeepSeekMath, arXiv:2402.03300)

Differentiating the sample's log-probability alone misses that pi also chose the sample; k1 has its whole gradient in
that missing part. Multiplied by the importance ratio with its gradient (`kl_bias_correction` of `grpo_loss`), k1 and k3
both have the gradient of KL(pi || ref), also on samples of pi_old. `tests/algorithm/test_kl.py` shows all of this
exactly on a distribution of three symbols.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

KlEstimator = Callable[[Float[Tensor, "N T"], Float[Tensor, "N T"]], Float[Tensor, "N T"]]


def k1(logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The log-ratio log(pi/ref): unbiased, of either sign; for the reward, useless as a loss.

    >>> k1(torch.tensor([[0.9]]).log(), torch.tensor([[0.5]]).log())
    tensor([[0.5878]])
    """
    return logps - ref_logps


def k2(logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Half the squared log-ratio: never negative, biased as a value, the right gradient for KL(pi || ref).

    >>> k2(torch.tensor([[0.9]]).log(), torch.tensor([[0.5]]).log())
    tensor([[0.1727]])
    """
    return (logps - ref_logps).square() / 2


def k3(logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """ref/pi - log(ref/pi) - 1: unbiased and never negative, GRPO's penalty (DeepSeekMath, section 4.1.1).

    Not clamped: a token that the policy has all but forgotten costs e to its log-ratio.

    >>> k3(torch.tensor([[0.9, 0.2, 0.7]]).log(), torch.tensor([[0.5, 0.5, 0.5]]).log())
    tensor([[0.1433, 0.5837, 0.0508]])
    """
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio  # expm1: exp(x) - 1 rounds the small values near ref == pi away


KL_ESTIMATORS: Mapping[str, KlEstimator] = {"k1": k1, "k2": k2, "k3": k3}
