"""All rewards of a stage, combined: total = sum(weight * term), with gates, abstention and failures."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring.calls import FAILURES, GATED, LARGEST, Job, Outcome, call
from grpo_lab.scoring.composition import Range, summed
from grpo_lab.scoring.early import EarlyCalls, may_begin_early
from grpo_lab.scoring.jobs import jobs_of
from grpo_lab.scoring.mark import Stateful, plain_state
from grpo_lab.scoring.notes import Notes
from grpo_lab.scoring.registry import Registry
from grpo_lab.scoring.terms import BoundTerm, bound_terms, gate_order, note
from grpo_lab.scoring.workers import Workers, is_users
from grpo_lab.types import FINISHED, Example, Group, Progress, Scores

T = TypeVar("T")


def bind(terms: Sequence[RewardTerm], registry: Registry, workers: Workers | None = None) -> "RewardSet":
    """The recipe's rewards, ready to score: users' ones in `workers`, or in this process without them.

    Raises:
        RecipeError: every unknown reward, wrong option and circular gate, one line each.
    """
    return RewardSet(bound_terms(terms, registry), workers)


@dataclass(frozen=True)
class RewardSet:
    """Scores groups with a list of terms. With `workers`, users' rewards run there and not in this process."""

    terms: tuple[BoundTerm, ...]
    workers: Workers | None = None

    @property
    def names(self) -> list[str]:
        """The terms' names in metrics, in the recipe's order."""
        return [term.label for term in self.terms]

    @property
    def range(self) -> Range:
        """What the total can be where every term applies, at any time of the weights' schedules; outer bounds."""
        return summed(term.weighted_range for term in self.terms)

    def notes(self) -> list[str]:
        """What a person should know of these rewards before a stage: for example how programs are isolated."""
        said = {term.label: note(term.reward, term.options or {}) for term in self.terms}
        return [f'reward "{label}" {text}' for label, text in said.items() if text]

    def state_dict(self) -> dict[str, Any]:
        """The states of stateful rewards after the last call of `score`, by term, in JSON values.

        Raises:
            RewardError: a state is no JSON.
        """
        states = {} if self.workers is None else self.workers.state_dict()
        return {**states, **{label: plain_state(reward, label) for label, reward in self._stateful_here.items()}}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        here = self._stateful_here
        for label in here.keys() & states.keys():
            here[label].load_state_dict(states[label])
        if self.workers is not None:
            self.workers.load_state_dict({label: state for label, state in states.items() if label not in here})

    @property
    def _stateful_here(self) -> dict[str, Stateful]:
        """The stateful rewards that run in this process; the workers keep the states of theirs."""
        functions: dict[str, Any] = {
            term.label: term.reward.function for term in self.terms if self._workers_of(term) is None
        }
        return {label: function for label, function in functions.items() if isinstance(function, Stateful)}

    def _workers_of(self, term: BoundTerm) -> Workers | None:
        return self.workers if is_users(term) else None

    def inexact_because(self) -> list[str]:
        """Why a resumed run need not be the same run: a reward may keep a state which no checkpoint has, or was stopped."""
        lost = [
            f'reward "{term.label}" is an object without state_dict and load_state_dict: what it remembers is lost on resume'
            for term in self.terms
            if term.reward.may_keep_state and not isinstance(term.reward.function, Stateful)
        ]
        return lost + ([] if self.workers is None else self.workers.inexact_because())

    @property
    def early_terms(self) -> tuple[BoundTerm, ...]:
        """The terms that can be called before all answers of a step are there."""
        return () if self.workers is None else tuple(term for term in self.terms if may_begin_early(term))

    def early(self, examples: Sequence[Example], num_generations: int) -> EarlyCalls:
        """Calls for answers that are still being sampled: what a sampler tells of each, and `score` is given after it."""
        calls = [] if self.workers is None else [(term, self.workers.begin(term)) for term in self.early_terms]
        return EarlyCalls(calls, examples, num_generations)

    def score(self, groups: Sequence[Group], progress: Progress = FINISHED, early: EarlyCalls | None = None) -> Scores:
        """The weighted sum of all terms for every completion, and each term with its status.

        A term that fails (an exception, nan, a wrong type) is never a 0: the completion's total is nan, which takes it
        out of its group's baseline and out of the loss. A gate that is not above 0 makes its term 0; a reward over one
        completion is then not called, and a failure in a call that was made is reported even so.

        A reward that abstains on a whole group adds 0 there. If it abstains on some siblings only, those have no
        total, as theirs would be another sum than their siblings'. Where every term abstains there is no total either.

        `progress` is for weights with a schedule and for rewards that ask for `trainer_state`; without it both are as
        at the end of training. What was called `early` for these groups is not called again; it changes no value.

        Raises:
            RewardError: a reward over several completions returned the wrong number of values.
        """
        num_generations = _num_generations(groups)
        if early is not None:
            early.refuse_others(groups)
        outcomes: dict[str, list[Outcome]] = {}
        weights = {term.label: term.weight_at(progress) for term in self.terms}
        notes: dict[str, Notes] = {}
        by_label = {term.label: term for term in self.terms}
        for label in gate_order({term.label: term.only_if for term in self.terms}):
            term = by_label[label]
            gate = outcomes[term.only_if] if term.only_if is not None else None
            is_open = [gate is None or gate[row].value > 0 for row in range(len(groups) * num_generations)]
            notes[label] = Notes(len(is_open))
            jobs = jobs_of(term, groups, is_open, notes[label].arguments(progress))
            found = self._score_term(term, jobs, early)
            outcomes[label] = _behind_gate([_shaped(term, each) for each in found], is_open)
        totals = self._totals(outcomes, num_generations, weights)
        shape = (len(groups), num_generations)
        return Scores(
            total=torch.tensor(totals, dtype=torch.float32).reshape(shape),
            terms={name: _tensor(outcomes[name]).reshape(shape) for name in self.names},
            status={name: _by_group([each.status for each in outcomes[name]], num_generations) for name in self.names},
            reasons=_reasons({name: outcomes[name] for name in self.names}, groups),
            weights=weights,
            extra=_extra(notes, num_generations),
            logged=_logged(notes),
        )

    def _score_term(
        self, term: BoundTerm, jobs: Sequence[Job | list[Outcome]], early: EarlyCalls | None
    ) -> list[Outcome]:
        calls = {number: job for number, job in enumerate(jobs) if isinstance(job, Job)}
        if early is not None and (begun := early.of(term)) is not None:
            made = begun.finish(calls)
        elif (workers := self._workers_of(term)) is not None:
            made = workers.begin(term).finish(calls)
        else:
            made = {
                number: call(term, job.arguments, num_completions=job.num_completions) for number, job in calls.items()
            }
        return [
            outcome for number, job in enumerate(jobs) for outcome in (made[number] if isinstance(job, Job) else job)
        ]

    def _totals(
        self, outcomes: dict[str, list[Outcome]], num_generations: int, weights: Mapping[str, float]
    ) -> list[float]:
        """The weighted sums, row by row. A sum that is too large becomes the failure of its largest part."""
        num_rows = len(outcomes[self.terms[0].label])
        totals = []
        for start in range(0, num_rows, num_generations):
            rows = range(start, start + num_generations)
            applies = {name for name, found in outcomes.items() if any(found[row].status == "ok" for row in rows)}
            totals += [
                self._total({name: found[row] for name, found in outcomes.items()}, applies, weights) for row in rows
            ]
        for row in [row for row, total in enumerate(totals) if math.isinf(total)]:
            parts = {name: abs(_part(weight, outcomes[name][row])) for name, weight in weights.items()}
            reason = f"made the weighted total larger than {LARGEST:g}"
            outcomes[max(parts, key=parts.__getitem__)][row] = Outcome(math.nan, "non_finite", reason)
            totals[row] = math.nan
        return totals

    def _total(self, row: Mapping[str, Outcome], applies: Collection[str], weights: Mapping[str, float]) -> float:
        """The weighted sum of one completion, nan if it is not scored, inf if it is too large."""
        statuses = {outcome.status for outcome in row.values()}
        other_sum = any(outcome.status == "abstained" and name in applies for name, outcome in row.items())
        if statuses & FAILURES or "ok" not in statuses or other_sum:
            return math.nan
        parts = [_part(weight, row[name]) for name, weight in weights.items()]
        return math.inf if sum(map(abs, parts)) > LARGEST else sum(parts)


def _tensor(outcomes: Sequence[Outcome]) -> torch.Tensor:
    return torch.tensor([each.value for each in outcomes], dtype=torch.float32)


def _part(weight: float, outcome: Outcome) -> float:
    return weight * outcome.value if outcome.status == "ok" else 0.0


def _shaped(term: BoundTerm, outcome: Outcome) -> Outcome:
    return outcome._replace(value=term.shaped(outcome.value)) if outcome.status == "ok" else outcome


def _extra(notes: Mapping[str, Notes], num_generations: int) -> dict[str, tuple[tuple[Any, ...], ...]]:
    """The columns that rewards wrote, by group; the second of one name gets its term's label before it."""
    columns: dict[str, list[Any]] = {}
    for label, each in notes.items():
        for column, values in each.extra.items():
            columns[f"{label}.{column}" if column in columns else column] = values
    return {column: _by_group(values, num_generations) for column, values in columns.items()}


def _logged(notes: Mapping[str, Notes]) -> dict[str, tuple[float, ...]]:
    names = dict.fromkeys(name for each in notes.values() for name in each.logged)
    return {name: tuple(value for each in notes.values() for value in each.logged.get(name, ())) for name in names}


def _num_generations(groups: Sequence[Group]) -> int:
    sizes = sorted({len(group.completions) for group in groups})
    if len(sizes) != 1 or sizes[0] == 0:
        found = f"sizes {', '.join(map(str, sizes))}" if sizes else "none"
        raise ValueError(f"scoring needs groups with the same number of completions, at least one; found {found}")
    return sizes[0]


def _behind_gate(outcomes: list[Outcome], is_open: Sequence[bool]) -> list[Outcome]:
    return [
        outcome if row_is_open or outcome.status in FAILURES else GATED
        for outcome, row_is_open in zip(outcomes, is_open, strict=True)
    ]


def _by_group(values: Sequence[T], num_generations: int) -> tuple[tuple[T, ...], ...]:
    starts = range(0, len(values), num_generations)
    return tuple(tuple(values[start : start + num_generations]) for start in starts)


def _reasons(outcomes: Mapping[str, list[Outcome]], groups: Sequence[Group]) -> dict[str, str]:
    """The first failure of each term, in words; completions are counted from 0."""
    places = [(group.example.id, index) for group in groups for index in range(len(group.completions))]
    first = {
        name: next(((row, each.reason) for row, each in enumerate(rows) if each.status in FAILURES), None)
        for name, rows in outcomes.items()
    }
    return {
        name: f'reward "{name}" {found[1]} for example {places[found[0]][0]}, completion {places[found[0]][1]}'
        for name, found in first.items()
        if found is not None
    }
