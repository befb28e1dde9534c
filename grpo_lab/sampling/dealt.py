"""Sampling by several processes: each draws the completions of its share of the groups, and all get all of them."""

from itertools import chain

from grpo_lab.distributed.ranks import Ranks
from grpo_lab.sampling.decoding import Sampler
from grpo_lab.types import Example, Group, Policy


class FirstSampler:
    """A sampler that only the first process has, since others (servers) do its work; all get what it draws."""

    def __init__(self, sampler: Sampler | None, ranks: Ranks) -> None:
        self.sampler = sampler
        self.ranks = ranks

    def sync(self, policy: Policy) -> None:
        """Have the sampler take over the policy's weights; nobody goes on before it has."""
        if self.sampler is not None:
            self.sampler.sync(policy)
        self.ranks.wait()

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example; all processes must ask for the same."""

        def draw() -> list[Group]:
            assert self.sampler is not None  # only the first process draws
            return self.sampler.sample(examples, num_generations=num_generations, seed=seed, first_group=first_group)

        return self.ranks.from_first(draw)


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
        own = self.sampler.sample(
            examples[mine], num_generations=num_generations, seed=seed, first_group=first_group + mine.start
        )
        completions = chain.from_iterable(self.ranks.gather([group.completions for group in own]))
        return [Group(example, each) for example, each in zip(examples, completions, strict=True)]
