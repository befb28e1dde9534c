"""From the rewards of a group to the advantages of its completions.

A reward of nan means "not scored": that completion is out of its group's mean and std, and its advantage is 0.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def has_signal(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, "P"]:
    """Whether a group teaches anything: at least two scored completions, not all with the same reward.

    >>> has_signal(torch.tensor([[1.0, 0.0], [1.2, 1.2], [1.0, torch.nan]]))
    tensor([ True, False, False])
    """
    missing = rewards.isnan()
    lowest = rewards.masked_fill(missing, torch.inf).amin(dim=1)
    highest = rewards.masked_fill(missing, -torch.inf).amax(dim=1)
    return lowest < highest


def group_advantages(
    rewards: Float[Tensor, "P G"], *, scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """How much better each completion is than its siblings.

    A_ig = (r_ig - mean_g r_i) / (std_g r_i + eps)            DeepSeekMath (arXiv:2402.03300), section 4.1.2

    std is the sample std (divide by G-1), as in TRL. A group whose rewards are all equal, or that has fewer than two
    scored completions, gets exactly zero.

    Args:
        scale: what to divide by. "group" as in the paper; "none" is Dr. GRPO (arXiv:2503.20783), which shows that the
            division favours prompts with low variance; "batch" divides by the std of all scored rewards of the P
            groups (around their common mean, as in TRL).
        eps: in reward units; 1e-4 as in TRL.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), scale="none")
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659]])
    """
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        advantages = centred / (_scored_std(rewards, dim=1) + eps)
    elif scale == "batch":
        advantages = centred / (_scored_std(rewards, dim=(0, 1)) + eps)
    elif scale == "none":
        advantages = centred
    else:
        raise ValueError(f'group_advantages: scale is "{scale}"; use "group", "batch" or "none"')
    return _zero_without_signal(advantages, rewards)


def leave_one_out_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """How much better each completion is than the mean of the others in its group.

    A_ig = r_ig - mean_{h != g} r_ih                          RLOO (arXiv:2402.14740)

    The baseline does not contain the completion's own reward, so the policy gradient is unbiased. Equals the centred
    reward times n/(n-1), n being the number of scored completions in the group.

    >>> leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 0.6667, -0.6667, -0.6667,  0.6667]])
    """
    num_others = (~rewards.isnan()).sum(dim=1, keepdim=True) - 1
    others_sum = rewards.nansum(dim=1, keepdim=True) - rewards
    return _zero_without_signal(rewards - others_sum / num_others, rewards)


def _scored_std(rewards: Float[Tensor, "P G"], dim: int | tuple[int, int]) -> Tensor:
    """Sample std (divide by n-1) of the scored rewards; the reduced axes stay, of size 1."""
    deviations = rewards - rewards.nanmean(dim=dim, keepdim=True)
    num_scored = (~rewards.isnan()).sum(dim=dim, keepdim=True)
    return (deviations.square().nansum(dim=dim, keepdim=True) / (num_scored - 1)).sqrt()


def _zero_without_signal(advantages: Float[Tensor, "P G"], rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    # Not left to arithmetic: the float32 mean of eight rewards of 1.2 is not 1.2, and (tiny / (0 + eps)) is not 0.
    teaches = has_signal(rewards)[:, None] & ~rewards.isnan()
    return torch.where(teaches, advantages, 0.0)
