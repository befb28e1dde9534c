"""From logits to the log-probabilities of the tokens that were written, and to the entropy of the choice. In nats.

Both compute in float32 or better whatever the model's dtype: bfloat16 keeps 8 bits, and a ratio is a difference of
log-probabilities.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def selected_logps(
    logits: Float[Tensor, "N T V"], ids: Int[Tensor, "N T"], *, temperature: float = 1.0
) -> Float[Tensor, "N T"]:
    """The log-probability of each token in `ids` under softmax(logits / temperature).

    `logits[:, t]` must be the prediction *of* `ids[:, t]`, that is the model's output one position before it.
    The temperature is the sampler's; policy, old policy and reference all use the same one.

    >>> selected_logps(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), torch.tensor([[1, 0]]), temperature=2.0)
    tensor([[-0.6931, -0.3133]])
    """
    if temperature <= 0:
        raise ValueError(f"selected_logps: temperature is {temperature}; it must be above 0")
    logits = _at_least_float32(logits)
    if temperature != 1.0:  # the division would copy [N, T, V] for nothing
        logits = logits / temperature
    # Not log_softmax: autograd would keep its [N, T, V] result beside the logits.
    return logits.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def entropy(logits: Float[Tensor, "N T V"]) -> Float[Tensor, "N T"]:
    """How undecided each position is: 0 when one token has all the mass, log(V) when all are equally likely.

    H = -sum_v p_v log p_v with p = softmax(logits). Divide the logits by the temperature before, to get the entropy of
    the distribution that is sampled from. A token with a logit of -inf has no mass and adds nothing.

    >>> entropy(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]]]))
    tensor([[1.3863, 0.6931]])
    """
    logps = _at_least_float32(logits).log_softmax(dim=-1)
    finite_logps = logps.clamp(min=torch.finfo(logps.dtype).min)  # 0 * -inf would be nan
    return -(logps.exp() * finite_logps).sum(dim=-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
