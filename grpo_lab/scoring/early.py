"""Scoring while sampling goes on: calls of rewards in other processes that begin as soon as the answers they need have ended."""

from collections.abc import Mapping, Sequence

from grpo_lab.scoring.calls import Job, Outcome
from grpo_lab.scoring.jobs import job_of
from grpo_lab.scoring.terms import BoundTerm
from grpo_lab.scoring.workers import Calls, is_users
from grpo_lab.types import Completion, Example, Group

NONE_EARLY = (
    "no reward here can be called early: it takes code, judge or one of your own (a plugin's, a package's, a dotted path's), "
    "a function over completion without only_if, or over group; leave it out"
)


def may_begin_early(term: BoundTerm) -> bool:
    """Whether a reward is worth calling before all answers of a step are there, and has then the values it has anyway.

    Worth it are those that leave the trainer's process alone: users' ones, and of ours those that wait for others. Not
    called early is what takes whole steps, whose gate may turn out closed, or that may remember its calls: answers end
    in another order than they stand in.
    """
    if not (is_users(term) or term.reward.waits) or term.reward.may_keep_state or term.reward.scope == "completions":
        return False
    return term.reward.scope == "group" or term.only_if is None


class EarlyCalls:
    """The calls of one step's early terms. A sampler's listener: it is told of the answers that end after every token.

    It uses no thread: workers are given calls, and heard, whenever it is told something, be it that nothing ended.
    """

    def __init__(
        self, calls: Sequence[tuple[BoundTerm, Calls]], examples: Sequence[Example], num_generations: int
    ) -> None:
        self._calls = {term.label: (term, each) for term, each in calls}
        self._examples, self._num_generations = examples, num_generations
        self._told: dict[int, Completion] = {}

    def __call__(self, ended: Mapping[int, Completion]) -> None:
        """Begin the calls that these answers make possible, by row: group * num_generations + index."""
        self._told |= ended
        for term, calls in self._calls.values():
            numbers = ended if term.reward.scope == "completion" else self._whole_groups(ended)
            for number in numbers:
                job = self._job(term, number)
                if isinstance(job, Job):
                    calls.add(number, job)
            calls.advance()

    def of(self, term: BoundTerm) -> Calls | None:
        """What was begun of a term; None if it is not one of the early ones."""
        return self._calls[term.label][1] if term.label in self._calls else None

    def refuse_others(self, groups: Sequence[Group]) -> None:
        """See that these groups hold the answers that were told, so that no value belongs to another text.

        Raises:
            ValueError: they do not.
        """
        for row, completion in self._told.items():
            if groups[row // self._num_generations].completions[row % self._num_generations] != completion:
                raise ValueError(f"the sampler told another answer {row} than it gave")

    def _whole_groups(self, ended: Mapping[int, Completion]) -> list[int]:
        """The groups whose last answers these are."""
        groups = dict.fromkeys(row // self._num_generations for row in ended)
        return [group for group in groups if all(row in self._told for row in self._rows(group))]

    def _rows(self, group: int) -> range:
        return range(group * self._num_generations, (group + 1) * self._num_generations)

    def _job(self, term: BoundTerm, number: int) -> Job | list[Outcome]:
        if term.reward.scope == "completion":
            return job_of(term, "completion", self._told[number], self._examples[number // self._num_generations], 1)
        example = self._examples[number]
        group = Group(example, tuple(self._told[row] for row in self._rows(number)))
        return job_of(term, "group", group, example, self._num_generations)
