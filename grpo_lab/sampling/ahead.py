"""Samplers elsewhere, one step ahead: the next step's completions are drawn while this step is learnt."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from grpo_lab.sampling.decoding import Sampler
from grpo_lab.types import Example, Group, Policy


class Draw(NamedTuple):
    """What is asked of a sampler."""

    examples: list[Example]
    num_generations: int
    seed: int


class AheadSampler:
    """A queue of depth one before a sampler that works elsewhere. `draw_of(step)` is what a step asks for, None after the last.

    When step k asks, its completions are there or nearly so; the sampler then gets the newest weights and is asked for
    step k + 1, and k is learnt meanwhile. So what is learnt from was drawn by the policy of one update earlier. The first
    step's completions are drawn by the newest weights, and so is whatever else is asked for in between (dynamic
    sampling's other prompts).
    """

    def __init__(self, sampler: Sampler, draw_of: Callable[[int], Draw | None], *, step: int) -> None:
        self._sampler = sampler
        self._draw_of = draw_of
        self._step = step
        self._newer: Policy | None = None  # has learnt a step that the sampler does not know of
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ahead: Future[list[Group]] | None = None  # completions of `_step`

    def sync(self, policy: Policy) -> None:
        """Note that the policy has learnt a step. Its weights are sent when the next one asks: completions are under way."""
        self._newer = policy

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example."""
        asked = Draw(examples, num_generations, seed)
        if asked != self._draw_of(self._step):
            return self._sampler.sample(examples, num_generations=num_generations, seed=seed, first_group=first_group)
        groups = None if self._ahead is None else self._ahead.result()
        if self._newer is not None:
            self._sampler.sync(self._newer)
            self._newer = None
        if groups is None:
            groups = self._draw(asked)
        self._step += 1
        upcoming = self._draw_of(self._step)
        self._ahead = None if upcoming is None else self._pool.submit(self._draw, upcoming)
        return groups

    def close(self) -> None:
        """Wait for what is being drawn: the servers' weights may not be taken away before."""
        self._pool.shutdown()

    def _draw(self, draw: Draw) -> list[Group]:
        return self._sampler.sample(draw.examples, num_generations=draw.num_generations, seed=draw.seed)
