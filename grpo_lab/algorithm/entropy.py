"""Where the policy is undecided: the tokens worth learning from, and a reason to stay undecided."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def high_entropy_mask(entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], *, share: float) -> Bool[Tensor, "N T"]:
    """The `share` of tokens at which the policy was least decided: the forks, not the words that follow from them.

    entropy_t >= quantile(entropy over the mask, 1 - share)     "Beyond the 80/20 Rule" (arXiv:2506.01939)

    The quantile (linear between neighbours, as in TRL's top_entropy_quantile) belongs to the rows of a whole optimiser
    step: over a micro-batch the selection would depend on how the step is cut. Tokens at the threshold are kept, so
    equal entropies are kept or left together; a mask of no tokens gives one of no tokens.

    Args:
        entropy: in nats; what stands at masked positions is never used.
        share: in (0, 1]; 1 keeps every token.

    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> high_entropy_mask(torch.tensor([[0.1, 2.0, 0.3], [1.0, 0.2, 9.0]]), mask, share=0.4)
    tensor([[False,  True, False],
            [ True, False, False]])
    """
    if not 0 < share <= 1:
        raise ValueError(f"high_entropy_mask: share is {share}; it must be above 0 and at most 1")
    if not bool(mask.any()):
        return mask
    threshold = _quantile(entropy[mask].float(), 1 - share)
    return mask & (entropy >= threshold)


def entropy_bonus(
    entropy: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], weights: Float[Tensor, "N T"]
) -> Float[Tensor, ""]:
    """What is taken from the loss, times a coefficient, so that the policy keeps exploring: mean entropy, in nats.

    sum_t weight_t * H_t over the mask                          as in A3C (arXiv:1602.01783)

    With `token_weights(..., reduction="token")` of the whole optimiser step this is
    the mean over tokens, and the shares of micro-batches add up to it. The entropy must carry its gradient.

    >>> mask = torch.tensor([[True, True, False]])
    >>> entropy_bonus(torch.tensor([[1.0, 2.0, torch.nan]]), mask, torch.tensor([[0.5, 0.5, 0.0]]))
    tensor(1.5000)
    """
    return (entropy.masked_fill(~mask, 0.0) * weights).sum()


def _quantile(values: Float[Tensor, "K"], q: float) -> Float[Tensor, ""]:
    """As torch.quantile, which refuses more than 16 million values."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
