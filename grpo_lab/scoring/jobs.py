"""Which calls of a reward a step's groups need, and with which arguments."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lab.scoring.calls import GATED, Job, Outcome
from grpo_lab.scoring.terms import BoundTerm
from grpo_lab.types import Completion, Example, Group

# Names that the batched contract gives a meaning of its own, so a column of that name is not passed; as in TRL.
_RESERVED = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})


def jobs_of(
    term: BoundTerm, groups: Sequence[Group], is_open: Sequence[bool], extras: Mapping[str, Any]
) -> list[Job | list[Outcome]]:
    """The calls to be made, and the outcomes where none is: behind a closed gate, or without a column."""
    if term.reward.scope == "completions":
        return [Job(_batch_arguments(term, groups, extras), len(is_open))]
    if term.reward.scope == "group":
        return [job_of(term, "group", group, group.example, len(group.completions)) for group in groups]
    rows = [(group.example, completion) for group in groups for completion in group.completions]
    return [
        job_of(term, "completion", completion, example, 1) if row_is_open else [GATED]
        for (example, completion), row_is_open in zip(rows, is_open, strict=True)
    ]


def job_of(
    term: BoundTerm, scope: str, scored: Completion | Group, example: Example, num_completions: int
) -> Job | list[Outcome]:
    missing = [name for name in term.reward.columns if name not in example.columns]
    if missing:
        return [Outcome(math.nan, "error", f'found no column "{missing[0]}"')] * num_completions
    return Job({scope: scored, **{name: example.columns[name] for name in term.reward.columns}}, num_completions)


def _batch_arguments(term: BoundTerm, groups: Sequence[Group], extras: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL's trainer passes: prompts, completions and their ids as lists with one entry per completion, and the
    columns likewise. Chat prompts are lists of messages, and their completions then are, too."""
    rows = [(group.example, completion) for group in groups for completion in group.completions]
    shared = [name for name in rows[0][0].columns if all(name in example.columns for example, _ in rows)]
    arguments: dict[str, Any] = {
        **{name: [example.columns[name] for example, _ in rows] for name in shared if name not in _RESERVED},
        "prompts": [_messages(example) for example, _ in rows],
        "completions": [_answer(example, completion) for example, completion in rows],
        "completion_ids": [list(completion.token_ids) for _, completion in rows],
        **extras,
    }
    if term.reward.takes_all_columns:
        return arguments
    return {name: value for name, value in arguments.items() if name in term.reward.named}


def _messages(example: Example) -> str | list[dict[str, Any]]:
    return example.prompt if example.messages is None else [dict(message) for message in example.messages]


def _answer(example: Example, completion: Completion) -> str | list[dict[str, Any]]:
    return completion.text if example.messages is None else [{"role": "assistant", "content": completion.text}]
