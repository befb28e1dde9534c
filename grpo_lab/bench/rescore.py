"""A run's stored answers under another reward: how the distribution and the order within groups would have been."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_lab.assemble import Plan
from grpo_lab.data.sources import load_rows
from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.scoring import RewardSet
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.tracking.run_folder import StageFolder
from grpo_lab.types import Completion, Example, Group, Scores

NUM_EXAMPLES = 5
MAX_TEXT = 300  # characters of a prompt or an answer in the report


def rescored(run: Path, plan: Plan, stage: GrpoPlan, rewards: RewardSet, *, said: str) -> dict[str, Any]:
    """The stored rollouts of a stage scored again with `rewards`, as plain values.

    The columns that rewards ask for are read from the run's own data again. A completion's token ids are made from its
    text again, their number is the stored one.

    Raises:
        UsageError: no rollouts are stored.
        RecipeError: the data no longer has a stored example.
    """
    files = sorted(StageFolder(run / stage.name).rollouts.glob("step-*.jsonl"))
    rows = [{**row, "step": int(file.stem.removeprefix("step-"))} for file in files for row in read_jsonl(file)]
    if not rows:
        raise UsageError(f"{run}: stage {stage.name} has stored no rollouts (tracking.rollouts)")
    size = stage.stage.sampling.num_generations
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    examples = _examples(plan, stage, {row["example"] for row in rows})
    groups = [Group(examples[block[0]["example"]], tuple(_completion(plan, row) for row in block)) for block in blocks]
    before = torch.tensor([[math.nan if row["total"] is None else row["total"] for row in block] for block in blocks])
    scores = _score_by_step(rewards, blocks, groups)
    return {
        "run": str(run),
        "stage": stage.name,
        "with": said,
        "num_completions": len(rows),
        "before": distribution(before),
        "after": distribution(scores.total),
        "terms": {name: distribution(values) for name, values in scores.terms.items()},
        "failures": dict(scores.reasons),
        **order_changes(blocks, before, scores.total),
    }


def _examples(plan: Plan, stage: GrpoPlan, wanted: set[str]) -> dict[str, Example]:
    """The stage's examples of these ids, read again."""
    data, recipe = stage.stage.data, plan.recipe
    rows = load_rows(data, root=Path(recipe.data_root or "."), seed=recipe.seed)
    found: dict[str, Example] = {}
    for index, _ in enumerate(rows):
        if rows.id(index) in wanted:
            found[rows.id(index)] = stage.prompts.items[index]
            if len(found) == len(wanted):
                return found
    raise RecipeError(f"data: {sorted(wanted - found.keys())[0]}, whose answers are stored, is no longer there")


def _completion(plan: Plan, row: Mapping[str, Any]) -> Completion:
    text, count = row["completion"], row["num_tokens"]
    ids = [*plan.tokenizer(text, add_special_tokens=False)["input_ids"], *[plan.tokenizer.eos_token_id] * count]
    return Completion(text, tuple(ids[:count]), row["finished"])


def _score_by_step(rewards: RewardSet, blocks: Sequence[Any], groups: Sequence[Group]) -> Scores:
    """All groups, a step at a time as in training."""
    steps = [block[0]["step"] for block in blocks]
    parts = [
        rewards.score([group for group, at in zip(groups, steps, strict=True) if at == step])
        for step in dict.fromkeys(steps)
    ]
    return Scores(
        total=torch.cat([part.total for part in parts]),
        terms={name: torch.cat([part.terms[name] for part in parts]) for name in rewards.names},
        status={name: tuple(row for part in parts for row in part.status[name]) for name in rewards.names},
        reasons={name: reason for part in reversed(parts) for name, reason in part.reasons.items()},
    )


def distribution(values: Tensor) -> dict[str, float | None]:
    """Mean, std and quantiles of the scored values, how many are not scored, and the share of groups with a signal."""
    known = values[~values.isnan()].double()
    names = ("mean", "std", "min", "p25", "p50", "p75", "max")
    found: dict[str, float | None] = dict.fromkeys(names)
    if known.numel():
        quantiles = torch.quantile(known, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
        found = dict(
            zip(names, [float(known.mean()), float(known.std(correction=0)), *quantiles.tolist()], strict=True)
        )
    spread = values.nan_to_num(-math.inf).amax(1) > values.nan_to_num(math.inf).amin(1)
    return {**found, "unscored": float(values.isnan().sum()), "groups_with_signal": float(spread.double().mean())}


def order_changes(blocks: Sequence[Any], before: Tensor, after: Tensor) -> dict[str, Any]:
    """Pairs of siblings whose order turned round, and the groups with most of them.

    A pair counts where both rewards tell the two apart; `best_changed` counts groups none of whose best answers is
    among the best now.
    """
    turned, pairs, best = [], 0, 0
    for old, new in zip(before, after, strict=True):
        one, other = (torch.sign(values[:, None] - values[None]) for values in (old, new))  # nan where not scored
        both = (one * other).triu(1)
        turned.append(int((both == -1).sum()))
        pairs += int((both.abs() == 1).sum())
        best += not _best(old) & _best(new)
    changed = sorted((index for index, count in enumerate(turned) if count), key=lambda index: -turned[index])
    order = {"pairs": pairs, "pairs_turned": sum(turned), "groups": len(blocks)}
    order |= {"groups_changed": len(changed), "best_changed": best}
    examples = [_example(blocks[index], before[index], after[index], turned[index]) for index in changed]
    return {
        "order": order,
        "examples": list(islice(examples, NUM_EXAMPLES)),
        "changed": [_place(blocks[i]) for i in changed],
    }


def _best(values: Tensor) -> set[int]:
    known = values.nan_to_num(-math.inf)
    return set((known == known.max()).nonzero().flatten().tolist())


def _place(block: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"step": block[0]["step"], "example": block[0]["example"]}


def _example(block: Sequence[Mapping[str, Any]], old: Tensor, new: Tensor, turned: int) -> dict[str, Any]:
    rows = sorted(
        zip(block, _plain(old), _plain(new), strict=True), key=lambda row: -(row[2] if row[2] is not None else -1e9)
    )
    answers = [{"before": was, "after": now, "completion": row["completion"][:MAX_TEXT]} for row, was, now in rows]
    return {**_place(block), "pairs_turned": turned, "prompt": block[0]["prompt"][:MAX_TEXT], "answers": answers}


def _plain(values: Tensor) -> Iterator[float | None]:
    return (None if math.isnan(value) else value for value in values.tolist())
