"""Sampling by several processes: each draws its share of the groups, or the first asks a server for all; all get all."""

from itertools import chain

from grpo_lab.distributed.ranks import Ranks
from grpo_lab.sampling.decoding import Sampler
from grpo_lab.types import Example, Group, Policy


class DealtSampler:
    """A sampler whose groups are drawn by all processes. Noise belongs to the group, so they are those of one process."""

    def __init__(self, sampler: Sampler, ranks: Ranks) -> None:
        self.sampler = sampler
        self.ranks = ranks

    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights after an update."""
        self.sampler.sync(policy)

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example; all processes must ask for the same."""
        mine = self.ranks.share(len(examples))
        first = first_group + mine.start
        own = self.sampler.sample(examples[mine], num_generations=num_generations, seed=seed, first_group=first)
        return list(chain.from_iterable(self.ranks.gather(own)))


class FirstSampler:
    """A sampler that only the first process has, because others elsewhere do its work: a client of servers."""

    def __init__(self, sampler: Sampler | None, ranks: Ranks) -> None:
        assert (sampler is not None) == ranks.is_first
        self.sampler = sampler
        self.ranks = ranks

    def sync(self, policy: Policy) -> None:
        """Send the policy's weights after an update; once, and before anyone goes on."""
        if self.sampler is not None:
            self.sampler.sync(policy)
        self.ranks.wait()

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example; all processes must ask for the same."""

        def ask() -> list[Group]:
            assert self.sampler is not None
            return self.sampler.sample(examples, num_generations=num_generations, seed=seed, first_group=first_group)

        return self.ranks.from_first(ask)
