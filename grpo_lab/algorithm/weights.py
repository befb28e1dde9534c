"""How much every token counts. Each published reduction is one weight matrix: loss = sum(l_t * weight_t)."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor


def token_weights(
    mask: Bool[Tensor, "N T"],
    *,
    reduction: Literal["sequence", "token", "constant"] = "sequence",
    max_completion_length: int | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
) -> Float[Tensor, "N T"]:
    """What each token's loss is multiplied by before everything is summed.

    sequence    mask / |o_i| / N                     every completion counts the same: GRPO (arXiv:2402.03300)
    token       mask / sum_i |o_i|                   every token counts the same: DAPO (arXiv:2503.14476)
    constant    mask / (N * max_completion_length)   no favour for short answers: Dr. GRPO (arXiv:2503.20783)

    N counts the completions with at least one token; a completion that must not count (not scored, empty) is a row of
    False. A mask of no tokens gives weights of 0.

    Args:
        max_completion_length: needed by "constant" only; the length that every completion is taken to have.
        num_sequences, num_tokens: the counts of the whole optimiser step, when `mask` is a part of it (a micro-batch,
            one process): the parts' losses then sum to the loss of the whole. None = the counts of this mask.

    >>> import torch
    >>> mask = torch.tensor([[True, True, False], [True, False, False]])
    >>> token_weights(mask)
    tensor([[0.2500, 0.2500, 0.0000],
            [0.5000, 0.0000, 0.0000]])
    >>> token_weights(mask, reduction="token")
    tensor([[0.3333, 0.3333, 0.0000],
            [0.3333, 0.0000, 0.0000]])
    >>> token_weights(mask, reduction="constant", max_completion_length=5)
    tensor([[0.1000, 0.1000, 0.0000],
            [0.1000, 0.0000, 0.0000]])
    """
    lengths = mask.sum(dim=1, keepdim=True)
    sequences = max(1, int((lengths > 0).sum()) if num_sequences is None else num_sequences)
    tokens = max(1, int(lengths.sum()) if num_tokens is None else num_tokens)
    if reduction == "sequence":
        return mask.float() / lengths.clamp(min=1) / sequences
    if reduction == "token":
        return mask.float() / tokens
    if reduction != "constant":
        raise ValueError(f'token_weights: reduction is "{reduction}"; use "sequence", "token" or "constant"')
    if max_completion_length is None:
        raise ValueError('token_weights: reduction "constant" divides by max_completion_length; pass it')
    return mask.float() / (sequences * max_completion_length)
