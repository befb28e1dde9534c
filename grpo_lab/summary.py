"""What a run achieved: held-out numbers before and after each GRPO stage, with intervals, and answers to compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from grpo_lab.algorithm.intervals import bootstrap_interval
from grpo_lab.corpus_evaluation import corpus_differences, corpus_signatures, corpus_values, resampled
from grpo_lab.corpus_metrics import CorpusMetric, corpus_metrics
from grpo_lab.evaluate import mean_and_interval
from grpo_lab.recipe import load_recipe
from grpo_lab.recipe.schema import GrpoStage, SftStage
from grpo_lab.tracking.console import safe
from grpo_lab.tracking.files import read_json, read_jsonl
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder

NUM_EXAMPLES = 3
WIDE = 100  # columns
TOKENS, FINISHED = "completion tokens", "completion ended"  # no reward can have a name with a space
Rows = Sequence[Mapping[str, Any]]


def summarise(run: Path) -> dict[str, Any]:
    """The run's outcome as plain values: what `--json` prints and the table shows."""
    recipe = load_recipe(run / RESOLVED)
    info = read_json(run / RUN)
    stages = {name: stage_outcome(run, name, stage) for name, stage in recipe.stages.items()}
    return {"run": str(run), "status": info["status"], "exact": info["exact"], "seed": recipe.seed, "stages": stages}


def stage_outcome(run: Path, name: str, stage: SftStage | GrpoStage) -> dict[str, Any]:
    """What a stage achieved, as far as it was measured; before and after once it is finished."""
    folder = StageFolder(run / name)
    found: dict[str, Any] = {"kind": stage.kind, "steps": stage.steps, "final": str(folder.final)}
    if not folder.result.is_file():
        return found
    if isinstance(stage, GrpoStage) and stage.evaluation is not None:
        before, after = (read_jsonl(folder.evaluation(step)) for step in (0, stage.steps))
        of_corpus = corpus_metrics({term.name: term.options for term in stage.reward_terms})
        held_out = before_and_after(before, after) | corpus_before_and_after(before, after, of_corpus)
        greedy = [row for row in after if row["arm"] == "greedy"]
        found |= {"held_out": held_out, "examples": pairs(before, after)}
        found |= {"signatures": corpus_signatures(greedy, of_corpus)}
    elif stage.evaluation is not None:
        measured = [line for line in read_jsonl(folder.metrics) if "eval_loss" in line]
        selected = read_json(folder.result).get("selected", measured[-1]["step"])
        (final,) = (line for line in measured if line["step"] == selected)
        found |= {"eval_loss": {"before": measured[0]["eval_loss"], "after": final["eval_loss"]}}
    return found


def before_and_after(before: Rows, after: Rows) -> dict[str, dict[str, Any]]:
    """For every quantity of every arm: mean and 95 % interval before, after, and of the paired difference."""
    table = {}
    for arm in dict.fromkeys(row["arm"] for row in before):
        old, new = by_prompt(before, arm), by_prompt(after, arm)
        for name in old:
            difference = new[name].nanmean(1) - old[name].nanmean(1)
            difference = difference[~difference.isnan()]
            if len(difference) == 0:  # the reward applies to none of these prompts
                continue
            low, high = bootstrap_interval(difference)
            table[f"{arm}/{name}"] = {
                "before": interval(old[name]),
                "after": interval(new[name]),
                "change": {"mean": float(difference.mean()), "low": low, "high": high},
                "num_prompts": len(difference),
            }
    return table


def corpus_before_and_after(
    before: Rows, after: Rows, metrics: Mapping[str, CorpusMetric]
) -> dict[str, dict[str, Any]]:
    """The same for metrics of the whole corpus."""
    table: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(row["arm"] for row in before) if metrics else ():
        rows_of_arm = [[row for row in rows if row["arm"] == arm] for rows in (before, after)]
        old, new = (resampled(rows, metrics) for rows in rows_of_arm)
        values = corpus_values(old), corpus_values(new), corpus_differences(old, new)
        for name in values[0]:
            found = dict(zip(("before", "after", "change"), (each[name] for each in values), strict=True))
            table[f"{arm}/{name}"] = found | {"num_prompts": len({row["unit"] for row in rows_of_arm[1]})}
    return table


def by_prompt(rows: Rows, arm: str) -> dict[str, torch.Tensor]:
    """Every quantity of one arm as values [P, samples], in the order of the prompts."""
    grouped: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if row["arm"] == arm:
            values = dict(row["terms"])
            values |= {"reward": row["reward"], TOKENS: row["num_tokens"], FINISHED: row["finished"]}
            grouped.setdefault(row["id"], []).append(values)
    names = list(next(iter(grouped.values()))[0])
    nan = float("nan")
    return {
        name: torch.tensor(
            [[nan if s[name] is None else float(s[name]) for s in samples] for samples in grouped.values()],
            dtype=torch.float64,
        )
        for name in names
    }


def interval(values: torch.Tensor) -> dict[str, float]:
    """Mean and bounds under their names."""
    mean, low, high = mean_and_interval(values.float())
    return {"mean": mean, "low": low, "high": high}


def pairs(before: Rows, after: Rows) -> list[dict[str, Any]]:
    """The first greedy answers before and after, those that changed from wrong to right first."""
    old = [row for row in before if row["arm"] == "greedy"]
    new = {row["id"]: row for row in after if row["arm"] == "greedy"}
    found = [
        {
            "prompt": row["prompt"],
            "before": row["completion"],
            "after": new[row["id"]]["completion"],
            "reward_before": row["reward"],
            "reward_after": new[row["id"]]["reward"],
        }
        for row in old
        if row["id"] in new
    ]
    gain = [(pair["reward_after"] or 0.0) - (pair["reward_before"] or 0.0) for pair in found]
    order = sorted(range(len(found)), key=lambda index: -gain[index])
    return [found[index] for index in order[:NUM_EXAMPLES]]


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The before/after table, three answers before and after, where the run is, and what to try next."""
    for name, stage in summary["stages"].items():
        if "held_out" in stage:
            console.print(held_out_table(name, stage["held_out"], width=console.width))
            for kind, signature in stage.get("signatures", {}).items():
                console.print(f"  {kind}: {signature}", markup=False, highlight=False, soft_wrap=True)
            for pair in stage["examples"]:
                for label, key in (("prompt", "prompt"), ("before", "before"), ("after ", "after")):
                    text = f"  {label}  {safe(pair[key])}"
                    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
                console.print()
        elif "eval_loss" in stage:
            losses = stage["eval_loss"]
            console.print(f"{name}: held-out loss {losses['before']:.3f} -> {losses['after']:.3f}", highlight=False)
    last = list(summary["stages"].values())[-1]
    for line in (
        f"run:   {summary['run']}  (metrics.jsonl, rollouts/ and evaluations/ lie in each stage's folder)",
        f"model: {last['final']}  (loads with transformers)",
        f"next:  grpo-lab eval {summary['run']} --samples 8   measures it further",
        "       grpo-lab train <recipe> --name other seed=1   is the same recipe with other draws",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def held_out_table(stage: str, quantities: Mapping[str, Mapping[str, Any]], *, width: int) -> Table:
    """One row per quantity: before, after, change, each with its 95 % interval (under it, where lines are short)."""
    between = " " if width >= WIDE else "\n"
    prompts = next(iter(quantities.values()))["num_prompts"]
    title = f"{stage}: held-out, {prompts} prompts, 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("quantity", "before", "after", "change"):
        table.add_column(column, no_wrap=True)
    for name, values in quantities.items():
        cells = [
            f"{values[key]['mean']:{sign}.3f}{between}[{values[key]['low']:{sign}.3f}, {values[key]['high']:{sign}.3f}]"
            for key, sign in (("before", ""), ("after", ""), ("change", "+"))
        ]
        table.add_row(safe(name), *(cell.replace("[", r"\[") for cell in cells))
    return table
