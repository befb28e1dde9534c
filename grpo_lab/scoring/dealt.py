"""Scoring by several processes: each scores its share of the groups, or the first scores all where rewards look further."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.scoring.early import EarlyCalls
from grpo_lab.scoring.reward_set import RewardSet
from grpo_lab.types import FINISHED, Group, Progress, Scores


def dealt(rewards: RewardSet, ranks: Ranks) -> RewardSet:
    """The same rewards, called by all processes."""
    return rewards if ranks.world == 1 else DealtRewards(rewards.terms, rewards.workers, ranks)


def scores_here(rewards: RewardSet, ranks: Ranks) -> bool:
    """Whether this process ever calls a reward."""
    return ranks.is_first or not _by_first(rewards)


def _by_first(rewards: RewardSet) -> bool:
    return any(term.reward.scope == "completions" or term.reward.may_keep_state for term in rewards.terms)


@dataclass(frozen=True)
class DealtRewards(RewardSet):
    """Rewards whose scores all processes get, the same as one process would find.

    A reward over one completion or one group is called where its group is dealt to. If any reward takes whole batches or
    may remember what it saw, the first process scores everything and the others wait: such a reward must see all.
    """

    ranks: Ranks = ALONE

    def score(self, groups: Sequence[Group], progress: Progress = FINISHED, early: EarlyCalls | None = None) -> Scores:
        """As RewardSet.score, by all processes together; none of them was told of an answer early."""
        assert early is None
        if _by_first(self):
            return self.ranks.from_first(lambda: RewardSet.score(self, groups, progress))
        own = groups[self.ranks.share(len(groups))]
        found = self.ranks.gather(RewardSet.score(self, own, progress) if own else None)
        return joined([scores for scores in found if scores is not None])

    def inexact_because(self) -> list[str]:
        """What any process knows of."""
        return list(dict.fromkeys(chain.from_iterable(self.ranks.gather(RewardSet.inexact_because(self)))))

    def state_dict(self) -> dict[str, Any]:
        """The first process's states: where a reward has one, that process alone has scored."""
        return self.ranks.from_first(lambda: RewardSet.state_dict(self))


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive groups as one; of a failing term the first reason stays.

    Only rewards over whole batches write down `extra` and `logged`, and those are not dealt.
    """
    reasons: dict[str, str] = {}
    for part in reversed(parts):
        reasons |= part.reasons
    return Scores(
        total=torch.cat([part.total for part in parts]),
        terms={name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
        status={name: tuple(chain.from_iterable(part.status[name] for part in parts)) for name in parts[0].status},
        reasons=reasons,
        weights=parts[0].weights,
    )
