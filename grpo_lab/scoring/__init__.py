"""Rewards: how they are marked (mark.py), found (registry.py), checked against a recipe (terms.py), called (calls.py;
users' ones in processes of their own: workers.py, processes.py, nursery.py), what they may write down (notes.py), how
they are weighted (composition.py) and combined (reward_set.py), when their failures stop a run (budget.py), and a
control without them (control.py)."""

from grpo_lab.scoring.budget import check_budget
from grpo_lab.scoring.composition import before_step
from grpo_lab.scoring.control import controlled
from grpo_lab.scoring.mark import Reward, checked_by, reward
from grpo_lab.scoring.processes import start_nursery
from grpo_lab.scoring.registry import Registry, discover
from grpo_lab.scoring.reward_set import RewardSet, bind
from grpo_lab.scoring.terms import BoundTerm, problems
from grpo_lab.scoring.workers import Settings, Workers

__all__ = [
    "BoundTerm",
    "Registry",
    "Reward",
    "RewardSet",
    "Settings",
    "Workers",
    "before_step",
    "bind",
    "check_budget",
    "checked_by",
    "controlled",
    "discover",
    "problems",
    "reward",
    "start_nursery",
]
