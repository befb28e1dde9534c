"""One reward against cases that somebody wrote down: what it must pay for which answer."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError, model_validator
from rich.console import Console

from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Block
from grpo_lab.scoring import RewardSet
from grpo_lab.tracking.console import safe
from grpo_lab.types import Completion, Example, Group

Expected = float | None
MAX_SHOWN = 60  # characters of an answer


class Answer(Block):
    """One completion, where its length matters."""

    completion: str
    """The text."""
    num_tokens: Annotated[int, Field(ge=0)] | None = None
    """How many tokens it has, the end included; null counts its words."""
    finished: bool = True
    """False: the length limit cut it off."""


class Case(Block):
    """A line of a cases file: one `completion`, or all the answers of a `group`, and what they must get."""

    completion: str | None = None
    """The answer to score."""
    group: list[str | Answer] | None = None
    """Instead: all answers to the prompt, for rewards that compare them."""
    expected: Expected | list[Expected]
    """The value it must get (null: the reward abstains); for a group a list of them."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """How far the value may be from it."""
    prompt: str | list[dict[str, Any]] = ""
    """The prompt: text or chat messages."""
    columns: dict[str, JsonValue] = {}
    """The data set's columns."""
    num_tokens: Annotated[int, Field(ge=0)] | None = None
    """With completion: as in a group's answers."""
    finished: bool = True
    """With completion: as in a group's answers."""
    why: str = ""
    """What the case shows; for readers."""

    @model_validator(mode="after")
    def _one_form(self) -> "Case":
        if (self.completion is None) == (self.group is None):
            raise ValueError("give either completion or group")
        if self.group is None and isinstance(self.expected, list):
            raise ValueError("expected is one value (a list goes with group)")
        if self.group is not None and (not isinstance(self.expected, list) or len(self.expected) != len(self.group)):
            raise ValueError("expected is a list with one value for each answer of the group")
        return self

    def as_group(self, name: str) -> Group:
        """What a RewardSet scores."""
        answers = self.group
        if answers is None:
            answers = [Answer(completion=self.completion or "", num_tokens=self.num_tokens, finished=self.finished)]
        answers = [Answer(completion=each) if isinstance(each, str) else each for each in answers]
        text = self.prompt if isinstance(self.prompt, str) else "\n".join(str(each["content"]) for each in self.prompt)
        messages = None if isinstance(self.prompt, str) else tuple(self.prompt)
        return Group(Example(name, text, (), self.columns, messages), tuple(map(_completion, answers)))


def _completion(answer: Answer) -> Completion:
    count = len(answer.completion.split()) if answer.num_tokens is None else answer.num_tokens
    return Completion(answer.completion, tuple(range(count)), answer.finished)


def read_cases(file: Path) -> list[tuple[int, Case]]:
    """The cases of a jsonl file with their line numbers, from 1; empty lines count for nothing.

    Raises:
        RecipeError: every line that is no case, and why.
    """
    if not file.is_file():
        raise RecipeError(f"{file}: no such file")
    cases, problems = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            cases.append((number, TypeAdapter(Case).validate_json(line, strict=True)))
        except ValidationError as error:
            problems += [
                f"{file}:{number}: {'.'.join(map(str, each['loc'])) or 'case'}: {each['msg']}"
                for each in error.errors(include_url=False)
            ]
    if problems or not cases:
        raise RecipeError(problems or f"{file}: no cases")
    return cases


def run_cases(rewards: RewardSet, file: Path) -> dict[str, Any]:
    """Every value that the reward gives against the one it must give, in plain values."""
    results = []
    for number, case in read_cases(file):
        group = case.as_group(f"{file.name}:{number}")
        scores = rewards.score([group])
        (name,) = rewards.names
        expected = case.expected if isinstance(case.expected, list) else [case.expected]
        for index, want in enumerate(expected):
            status, value = scores.status[name][0][index], float(scores.terms[name][0, index])
            got = value if status == "ok" else None
            passed = status == "abstained" if want is None else got is not None and _near(got, want, case.tolerance)
            results.append(
                {
                    "line": number,
                    "answer": index,
                    "completion": group.completions[index].text,
                    "expected": want,
                    "got": got,
                    "status": status,
                    "reason": scores.reasons.get(name, "") if status not in ("ok", "abstained") else "",
                    "passed": passed,
                }
            )
    num_failed = sum(not each["passed"] for each in results)
    return {
        "reward": rewards.names[0],
        "cases": str(file),
        "num_values": len(results),
        "num_failed": num_failed,
        "results": results,
        "passed": num_failed == 0,
    }


def _near(got: float, want: float, tolerance: float) -> bool:
    # values are kept in float32
    return math.isclose(got, want, rel_tol=1e-6, abs_tol=tolerance)


def show_cases(found: Mapping[str, Any], console: Console) -> None:
    """The failures, a line each, and how many there are."""
    for each in found["results"]:
        if not each["passed"]:
            line = (
                f"{found['cases']}:{each['line']}: expected {_shown(each['expected'])}, got "
                f"{each['reason'] or _shown(each['got'])}: {_cut(each['completion'])}"
            )
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    passed = found["num_values"] - found["num_failed"]
    summary = f"{found['reward']}: {passed} of {found['num_values']} values as expected"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "nothing (it abstains)" if value is None else f"{value:.6g}"


def _cut(text: str) -> str:
    shown = json.dumps(text)
    return safe(shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '..."')


def cases_beside(file: str) -> Path:
    """Where the cases of a reward's file are looked for: `name.cases.jsonl` beside it."""
    return Path(file).with_suffix(".cases.jsonl")
