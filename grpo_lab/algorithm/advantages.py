"""From the rewards of a group to the advantages of its completions.

A reward of nan means "not scored": that completion is out of its group's mean and std, and its advantage is 0.
"""

from collections.abc import Sequence
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
    rewards: Float[Tensor, "P G"], *, scale: Literal["group", "batch", "centred", "none"] = "group", eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """How much better each completion is than its siblings.

    A_ig = (r_ig - mean_g r_i) / (std_g r_i + eps)            DeepSeekMath (arXiv:2402.03300), section 4.1.2

    std is the sample std (divide by G-1), as in TRL. A group whose rewards are all equal, or that has fewer than two
    scored completions, gets exactly zero.

    Args:
        scale: what to divide by. "group" as in the paper; "none" is Dr. GRPO (arXiv:2503.20783), which shows that the
            division favours prompts with low variance; "batch" divides by the std of all scored rewards of the P
            groups (around their common mean, as in TRL; Lite PPO, arXiv:2508.08221); "centred" by the std of all the
            differences r_ig - mean_g r_i, so that how far prompts lie apart does not count (REINFORCE++ with baseline,
            arXiv:2501.03262).
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
    elif scale == "centred":
        advantages = centred / (_scored_std(centred, dim=(0, 1)) + eps)
    elif scale == "none":
        advantages = centred
    else:
        raise ValueError(f'group_advantages: scale is "{scale}"; use "group", "batch", "centred" or "none"')
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


def batch_advantages(
    rewards: Float[Tensor, "P G"], *, scale: Literal["batch", "none"] = "batch", eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """How much better each completion is than all completions of the step, whatever their prompts.

    A_ig = (r_ig - mean r) / (std r + eps), over all scored rewards         REINFORCE++ (arXiv:2501.03262)

    A group whose rewards are equal still has an advantage here: an easy prompt counts as a success. If all rewards of
    the step are equal, every advantage is exactly zero.

    Args:
        scale: "none" leaves the division out.
        eps: in reward units.

    >>> batch_advantages(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[ 0.8659,  0.8659],
            [-0.8659, -0.8659]])
    """
    if scale not in ("batch", "none"):
        raise ValueError(f'batch_advantages: scale is "{scale}"; use "batch" or "none"')
    step = rewards.reshape(1, -1)  # the step as one group
    return group_advantages(step, scale="group" if scale == "batch" else "none", eps=eps).reshape(rewards.shape)


def normalize_then_sum(
    terms: Sequence[Float[Tensor, "P G"]], weights: Sequence[float], *, eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """One reward from several, each first centred and scaled within its group, so that none drowns the others.

    r_ig = sum_k w_k * (r_igk - mean_g r_ik) / (std_g r_ik + eps)           GDPO (arXiv:2601.05242)

    Summing first would let the reward with the largest spread decide. A term that is nan (it does not apply) adds 0;
    where all are nan the result is nan. A term that is equal in a whole group adds exactly 0.

    >>> normalize_then_sum([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 100.0]])], [1.0, 0.5], eps=0.0)
    tensor([[ 0.3536, -0.3536]])
    """
    parts = [
        weight * group_advantages(term, scale="group", eps=eps) for term, weight in zip(terms, weights, strict=True)
    ]
    missing = torch.stack([term.isnan() for term in terms]).all(dim=0)
    return torch.stack(parts).sum(dim=0).masked_fill(missing, torch.nan)


def _scored_std(rewards: Float[Tensor, "P G"], dim: int | tuple[int, int]) -> Tensor:
    """Sample std (divide by n-1) of the scored rewards; the reduced axes stay, of size 1."""
    deviations = rewards - rewards.nanmean(dim=dim, keepdim=True)
    num_scored = (~rewards.isnan()).sum(dim=dim, keepdim=True)
    return (deviations.square().nansum(dim=dim, keepdim=True) / (num_scored - 1)).sqrt()


def _zero_without_signal(advantages: Float[Tensor, "P G"], rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    # Not left to arithmetic: the float32 mean of eight rewards of 1.2 is not 1.2, and (tiny / (0 + eps)) is not 0.
    teaches = has_signal(rewards)[:, None] & ~rewards.isnan()
    return torch.where(teaches, advantages, 0.0)
