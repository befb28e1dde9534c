"""Rewards: how they are marked (mark.py), found (registry.py), checked against a recipe (terms.py), called (calls.py),
what they may write down (notes.py), how they are weighted (composition.py) and combined (reward_set.py), and when their
failures stop a run (budget.py)."""

from grpo_lab.scoring.budget import check_budget
from grpo_lab.scoring.composition import before_step
from grpo_lab.scoring.mark import Reward, reward
from grpo_lab.scoring.registry import Registry, discover
from grpo_lab.scoring.reward_set import RewardSet, bind
from grpo_lab.scoring.terms import BoundTerm, problems

__all__ = [
    "BoundTerm",
    "Registry",
    "Reward",
    "RewardSet",
    "before_step",
    "bind",
    "check_budget",
    "discover",
    "problems",
    "reward",
]
