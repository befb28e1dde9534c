"""A recipe's whole reward on its own data: golds must reach the maximum, junk must not, and the rest must hold still."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_lab.assemble import ACCURACIES, Plan
from grpo_lab.bench import dressing, probes
from grpo_lab.bench.dressing import EPSILON, Row
from grpo_lab.bench.probes import GOLD, OWN, WRONG, is_junk
from grpo_lab.data.sources import load_rows
from grpo_lab.errors import UsageError
from grpo_lab.recipe.schema import SftStage
from grpo_lab.scoring import BoundTerm, RewardSet, bind
from grpo_lab.scoring.calls import FAILURES
from grpo_lab.scoring.composition import in_words, summed, weighted
from grpo_lab.scoring.mark import BATCH_PARAMETERS
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.types import Completion, Group, Scores

NUM_TIMED = 16  # rows
NUM_SHOWN = 3  # rows that a failed check names


def recipe_report(plan: Plan, *, stage: str | None, limit: int) -> dict[str, Any]:
    """Every GRPO stage's reward, or one's, on the first `limit` rows of its data, as plain values."""
    plans = [each for each in plan.stages if isinstance(each, GrpoPlan) and stage in (None, each.name)]
    if not plans:
        known = ", ".join(each.name for each in plan.stages if isinstance(each, GrpoPlan))
        raise UsageError(f"no GRPO stage{'' if stage is None else f' {stage}'}; there are: {known or 'none'}")
    stages = {each.name: stage_report(plan, each, limit=limit) for each in plans}
    return {"recipe": plan.recipe.name, "stages": stages, "passed": all(each["passed"] for each in stages.values())}


@dataclass(frozen=True)
class Bench:
    """A stage's reward with its probes: groups of one row's probes each, all in the same order."""

    rewards: RewardSet
    rows: list[Row]
    names: list[str]
    groups: list[Group]
    judged: bool
    maximum: float

    def of(self, values: Tensor, name: str) -> Tensor:
        """One probe's values, by row."""
        return values[:, self.names.index(name)]


def stage_report(plan: Plan, stage: GrpoPlan, *, limit: int) -> dict[str, Any]:
    """One stage: what every probe gets, the checks, and how long a call takes."""

    def encode(text: str) -> Completion:
        ids = plan.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Completion(text, (*ids, plan.tokenizer.eos_token_id), True)

    rewards = stage.rewards
    tags, prefilled = dressing.form_options(rewards)
    rows = rows_of(plan, stage, limit, tags)
    maximum = summed(weighted(term.range, [term.weight_at()]) for term in rewards.terms)[1]
    longest = stage.stage.sampling.max_completion_length
    forms = dressing.dressings(rewards, rows, tags, prefilled=prefilled)
    dressed = dressing.choose(rewards, rows, forms, encode, maximum=maximum, longest=longest)
    texts = probes.probe_texts(rows, dressed)
    names = list(texts)
    groups = [Group(row.example, tuple(encode(texts[name][index]) for name in names)) for index, row in enumerate(rows)]
    bench = Bench(rewards, rows, names, groups, _reads_data(rewards, rows), maximum)
    timing = {term.label: call_times(term, groups[:NUM_TIMED]) for term in rewards.terms}
    scores = rewards.score(groups)
    checks = [
        scored(bench, scores),
        golds(bench, scores),
        junk(bench, scores),
        wrong(bench, scores),
        ranges(bench, scores),
        repeatable(bench, scores),
        orderly(bench, scores),
    ]
    return {
        "num_rows": len(rows),
        "range": in_words(summed(weighted(term.range, [term.weight_at()]) for term in rewards.terms)),
        "maximum": maximum if math.isfinite(maximum) else None,
        "golds_written": dressed.name if GOLD in names else None,
        "probes": {name: means(bench, scores, name) for name in names},
        "checks": checks,
        "warnings": warnings(bench, scores),
        "agreement": agreement(plan, bench),
        "milliseconds_per_call": timing,
        "examples": {name: texts[name][0] for name in names},
        "passed": all(each["result"] != "FAIL" for each in checks),
    }


def rows_of(plan: Plan, stage: GrpoPlan, limit: int, tags: Sequence[str]) -> list[Row]:
    """The first rows with a gold answer and, where the recipe or the data has one, a whole solution."""
    data, recipe = stage.stage.data, plan.recipe
    own = load_rows(data, root=Path(recipe.data_root or "."), seed=recipe.seed)
    columns = ["answer", *(name for term in stage.rewards.terms for name in term.reward.columns)]
    examples = list(islice(stage.prompts.items, limit))
    golds = [dressing.gold_of(example.columns, columns) for example in examples]
    specs = [each.data.completion for each in recipe.stages.values() if isinstance(each, SftStage)]
    specs = [spec for spec in specs if spec is not None]
    kept = [index for index, gold in enumerate(golds) if gold is not None] or range(len(examples))
    return [
        Row(examples[index], golds[index], dressing.demonstration(own[index], specs, golds[index], tags))
        for index in kept
    ]


def _reads_data(rewards: RewardSet, rows: Sequence[Row]) -> bool:
    """Whether any reward that counts looks at the data, so that it can tell right from wrong."""
    columns = set(rows[0].example.columns) - set(BATCH_PARAMETERS)
    gates = {term.only_if for term in rewards.terms}
    counting = [term.reward for term in rewards.terms if term.weight_at() != 0 or term.label in gates]
    return any(
        reward.columns or reward.takes_all_columns or (reward.scope == "completions" and columns & reward.named)
        for reward in counting
    )


def call_times(term: BoundTerm, groups: Sequence[Group]) -> dict[str, float | int]:
    """The median and the 95th percentile of a call's milliseconds, and how many calls. Only golds were scored before."""
    alone = RewardSet((replace(term, only_if=None),))
    calls = [groups] if term.reward.scope == "completions" else [[group] for group in groups]
    if term.reward.scope == "completion":
        calls = [[replace(group, completions=(each,))] for group in groups for each in group.completions]
    times = []
    for call in calls:
        start = time.perf_counter()
        alone.score(call)
        times.append(1000 * (time.perf_counter() - start))
    times.sort()
    return {"calls": len(times), "p50": times[len(times) // 2], "p95": times[int(0.95 * (len(times) - 1))]}


def means(bench: Bench, scores: Scores, name: str) -> dict[str, float | None]:
    """What a probe gets on average: each term, and the total."""
    found = {
        label: bench.of(values, name).double() for label, values in {**scores.terms, "total": scores.total}.items()
    }
    return {label: None if values.isnan().all() else float(values.nanmean()) for label, values in found.items()}


def check(name: str, failures: Sequence[str], passed: str, *, shown: int = NUM_SHOWN) -> dict[str, Any]:
    """A check's outcome in words: what holds, or the first failures and how many there are."""
    more = f"; {len(failures) - shown} more" if len(failures) > shown else ""
    detail = "; ".join(failures[:shown]) + more or passed
    return {"check": name, "result": "FAIL" if failures else "pass", "detail": detail}


def not_asked(name: str, why: str) -> dict[str, Any]:
    """A check that makes no sense here."""
    return {"check": name, "result": "not asked", "detail": why}


def scored(bench: Bench, scores: Scores) -> dict[str, Any]:
    """No reward may fail on any of these answers: in training that completion would be lost."""
    failures = [
        f"{sum(status in FAILURES for row in rows for status in row)} failed: {scores.reasons[label]}"
        for label, rows in scores.status.items()
        if label in scores.reasons
    ]
    return check("no reward fails", failures, f"on {len(bench.names)} kinds of answers to {len(bench.rows)} rows")


def golds(bench: Bench, scores: Scores) -> dict[str, Any]:
    """Every gold answer gets the maximum, if that is known."""
    if GOLD not in bench.names:
        return not_asked("golds reach the maximum", "the data has no gold answers that rewards read")
    totals = bench.of(scores.total, GOLD)
    if not math.isfinite(bench.maximum):
        return not_asked("golds reach the maximum", "a reward declares no highest value (range in its mark)")
    failures = [
        f"{row.example.id}: {total:.6g} of {bench.maximum:.6g} ({_short_terms(bench, scores, index)})"
        for index, (row, total) in enumerate(zip(bench.rows, totals.tolist(), strict=True))
        if not total >= bench.maximum - EPSILON
    ]
    return check("golds reach the maximum", failures, f"{len(totals)} of {len(totals)} get {bench.maximum:.6g}")


def _short_terms(bench: Bench, scores: Scores, row: int) -> str:
    place = bench.names.index(GOLD)
    found = {term.label: (float(scores.terms[term.label][row, place]), term.range[1]) for term in bench.rewards.terms}
    return ", ".join(f"{label} {value:.4g} of {best:.4g}" for label, (value, best) in found.items() if value != best)


def junk(bench: Bench, scores: Scores) -> dict[str, Any]:
    """No junk gets what the gold of its row gets, nor the maximum."""
    failures = []
    for name in bench.names:
        if is_junk(name, judged=bench.judged):
            totals = bench.of(scores.total, name)
            high = totals >= bench.maximum - EPSILON
            if GOLD in bench.names:
                high = high | (totals >= bench.of(scores.total, GOLD) - EPSILON)
            if high.any():
                first = int(high.nonzero()[0])
                failures.append(
                    f'"{name}" pays like a gold on {int(high.sum())} rows, e.g. {bench.rows[first].example.id}'
                )
    asked = [name for name in bench.names if is_junk(name, judged=bench.judged)]
    return check("junk stays below", failures, f"{len(asked)} kinds", shown=len(asked))


def wrong(bench: Bench, scores: Scores) -> dict[str, Any]:
    """A wrong answer in the right form gets less than the gold, and on average no less than no answer at all."""
    name = "wrong answers score between"
    if GOLD not in bench.names or not bench.judged:
        return not_asked(name, "no reward with a weight reads the data, so none can tell right from wrong")
    totals, empty = bench.of(scores.total, WRONG), bench.of(scores.total, "empty")
    paid = totals >= bench.of(scores.total, GOLD) - EPSILON
    failures = [
        f"{bench.rows[index].example.id}: {totals[index]:.6g}, like its gold" for index in paid.nonzero().flatten()
    ]
    if float(totals.nanmean()) < float(empty.nanmean()) - EPSILON:
        failures.append(
            f"on average {float(totals.nanmean()):.4g}, less than an empty answer ({float(empty.nanmean()):.4g})"
        )
    return check(name, failures, f"{float(empty.nanmean()):.4g} (empty) <= {float(totals.nanmean()):.4g} < the gold's")


def ranges(bench: Bench, scores: Scores) -> dict[str, Any]:
    """Values lie where the reward's mark says they do."""
    failures = []
    for term in bench.rewards.terms:
        values = scores.terms[term.label]
        low, high = min(term.range[0], 0.0) if term.only_if else term.range[0], term.range[1]
        outside = values[(values < low - EPSILON) | (values > high + EPSILON)]
        if outside.numel():
            failures.append(f"{term.label}: {float(outside[0]):.6g} is outside {in_words(term.range)}")
    return check("values lie in their declared range", failures, "so far as one is declared")


def repeatable(bench: Bench, scores: Scores) -> dict[str, Any]:
    """Scored again, everything is the same."""
    if any(term.reward.may_keep_state for term in bench.rewards.terms):
        return not_asked("the same again", "of rewards that may keep a state")
    again = bench.rewards.score(bench.groups)
    return check("the same again", _differences(scores, again, torch.arange(len(bench.names))), "deterministic")


def orderly(bench: Bench, scores: Scores) -> dict[str, Any]:
    """Rows and siblings in another order get the same."""
    if any(term.reward.may_keep_state for term in bench.rewards.terms):
        return not_asked("the same in another order", "of rewards that may keep a state")
    turned = [replace(group, completions=group.completions[::-1]) for group in reversed(bench.groups)]
    found = bench.rewards.score(turned)
    back = replace(found, terms={name: values.flip(0) for name, values in found.terms.items()})
    order = torch.arange(len(bench.names) - 1, -1, -1)
    return check("the same in another order", _differences(scores, back, order), "rows and siblings reversed")


def _differences(scores: Scores, others: Scores, order: Tensor) -> list[str]:
    failures = []
    for name, values in scores.terms.items():
        same = (values == others.terms[name][:, order]) | (values.isnan() & others.terms[name][:, order].isnan())
        if not same.all():
            failures.append(f"{name}: {int((~same).sum())} of {same.numel()} values differ")
    return failures


def warnings(bench: Bench, scores: Scores) -> list[str]:
    """What is no failure and should be known."""
    found = []
    for term in bench.rewards.terms:
        values = scores.terms[term.label]
        known = values[~values.isnan()]
        if known.numel() and bool((known == known[0]).all()):
            found.append(f"{term.label}: always {float(known[0]):.6g}; it tells none of these answers apart")
        if term.reward.range is None and term.clip is None and term.weight_at():
            found.append(
                f"{term.label}: declares no range, so the maximum is unknown; @reward(range=(lowest, highest)) or clip"
            )
    if not bench.judged and GOLD in bench.names:
        found.append("no reward with a weight reads the data: wrong answers in the right form are paid like golds")
    if OWN in bench.names and GOLD in bench.names:
        short = means(bench, scores, OWN)["total"]
        if short is not None and short < (means(bench, scores, GOLD)["total"] or 0.0) - EPSILON:
            found.append(
                f"the data's own solutions get {short:.4g} on average, less than golds written for this reward"
            )
    return found


def agreement(plan: Plan, bench: Bench) -> dict[str, dict[str, float]]:
    """How often strict and lenient reading give the same value, by kind of answer: of every reward that has the option
    `strict`, and of accuracy, which every evaluation reports both ways, where the data has answers."""
    found = {}
    terms = [term for term in bench.rewards.terms if "strict" in term.reward.options]
    if "answer" in bench.rows[0].example.columns and not any(term.reward.name == "accuracy" for term in terms):
        terms.append(replace(bind(ACCURACIES[:1], plan.registry).terms[0], label="accuracy (evaluation)"))
    for term in terms:
        both = [
            RewardSet((replace(term, only_if=None, options={**(term.options or {}), "strict": strict}),)).score(
                bench.groups
            )
            for strict in (True, False)
        ]
        one, other = (scores.terms[term.label] for scores in both)
        same = ((one == other) | (one.isnan() & other.isnan())).double()
        found[term.label] = {name: float(bench.of(same, name).mean()) for name in bench.names}
    return found
