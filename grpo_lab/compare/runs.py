"""Finished runs side by side: what their recipes differ in, their last metrics, and held-out results item by item."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_lab.algorithm.intervals import bootstrap_interval
from grpo_lab.compare.gates import new_table
from grpo_lab.compare.picture import Curve, draw, sparkline
from grpo_lab.compare.picture import bounds as bounds_of
from grpo_lab.corpus_evaluation import corpus_differences, corpus_values, resampled
from grpo_lab.corpus_metrics import CorpusMetric, corpus_metrics
from grpo_lab.errors import UsageError
from grpo_lab.recipe import Recipe, load_recipe
from grpo_lab.recipe.resolved import difference
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.summary import Rows, by_prompt, interval
from grpo_lab.tracking.console import safe
from grpo_lab.tracking.files import read_json, read_jsonl
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder

LAST_STEPS = 10  # training metrics are averaged over so many last steps
GREEDY = "eval_greedy/reward/mean"
VERSIONS = ("grpo-lab", "trl", "torch", "transformers")
METRICS = ("reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "loss")


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Every run against the first one.

    Raises:
        UsageError: a path is no run, a run is not finished, or two runs share no GRPO stage.
    """
    recipes = [finished_recipe(path) for path in paths]
    base = recipes[0]
    return {
        "runs": [str(path) for path in paths],
        "versions": [versions(path) for path in paths],
        "recipe_differences": {str(p): difference(base, r) for p, r in zip(paths[1:], recipes[1:], strict=True)},
        "stages": {name: compare_stage(name, paths, recipes) for name in common_stages(paths, recipes)},
    }


def finished_recipe(path: Path) -> Recipe:
    """The recipe of a finished run."""
    if not (path / RUN).is_file():
        raise UsageError(f"{path}: is no run folder (it has no {RUN}); give folders that `grpo-lab train` made")
    status = read_json(path / RUN)["status"]
    if status != "finished":
        raise UsageError(f"{path}: the run is {status}, not finished; grpo-lab train --resume goes on with it")
    return load_recipe(path / RESOLVED)


def versions(path: Path) -> dict[str, str | None]:
    """What the run was made with, as its run.json says."""
    known = read_json(path / RUN)["environment"]["versions"]
    return {name: known[name] for name in VERSIONS}


def common_stages(paths: Sequence[Path], recipes: Sequence[Recipe]) -> list[str]:
    """GRPO stages that all runs have, by name."""
    grpo = [[name for name, stage in recipe.stages.items() if isinstance(stage, GrpoStage)] for recipe in recipes]
    common = [name for name in grpo[0] if all(name in names for names in grpo)]
    if not common:
        found = "; ".join(f"{path}: {', '.join(names) or 'none'}" for path, names in zip(paths, grpo, strict=True))
        raise UsageError(f"the runs have no GRPO stage of the same name ({found})")
    return common


def compare_stage(name: str, paths: Sequence[Path], recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Training metrics of each run, and held-out quantities with their paired difference to the first run."""
    folders = [StageFolder(path / name) for path in paths]
    logs = [read_jsonl(folder.metrics) for folder in folders]
    found: dict[str, Any] = {"training": [last_metrics(lines) for lines in logs], "curves": [curve(ls) for ls in logs]}
    stages = [recipe.stages[name] for recipe in recipes]
    if all(stage.evaluation is not None for stage in stages):
        rows = [read_jsonl(folder.evaluation(stage.steps)) for folder, stage in zip(folders, stages, strict=True)]
        of_corpus = corpus_metrics({term.name: term.options for term in stages[0].reward_terms})
        found["held_out"] = held_out(rows, of_corpus)
    return found


def last_metrics(lines: Rows) -> dict[str, float]:
    """Means over the last steps."""
    out = {}
    for name in METRICS:
        values = [line[name] for line in lines if line.get(name) is not None][-LAST_STEPS:]
        if values:
            out[name] = sum(values) / len(values)
    return out


def curve(lines: Rows) -> dict[str, list[list[Any]]]:
    """[step, reward] while training (what answers were worth, whatever was learnt from), and held-out and greedy."""
    return {
        "training": [[x["step"], x.get("lab/real_reward", x["reward"])] for x in lines if x.get("reward") is not None],
        "held_out": [[x["step"], x[GREEDY]] for x in lines if x.get(GREEDY) is not None],
    }


def picture(found: Mapping[str, Any]) -> str:
    """All runs' curves, as SVG; of the last stage that they share."""
    name, stage = list(found["stages"].items())[-1]
    curves = [
        Curve(Path(run).name, [(x, y) for x, y in each["training"]], rings=[(x, y) for x, y in each["held_out"]])
        for run, each in zip(found["runs"], stage["curves"], strict=True)
    ]
    return draw(f"{name}: reward by step: lines = sampled while training, rings = held-out, greedy", curves)


def held_out(runs: Sequence[Rows], of_corpus: Mapping[str, CorpusMetric] | None = None) -> dict[str, dict[str, Any]]:
    """For every quantity of every arm that all runs have: each run's mean, and differences on the items they share.

    An item is a prompt: its id and its text. Several samples of one prompt are one item, by their mean.
    `of_corpus` are metrics of all items together.
    """
    table: dict[str, dict[str, Any]] = {}
    of_corpus = of_corpus or {}
    for arm in dict.fromkeys(row["arm"] for row in runs[0]):
        shared = shared_items(runs, arm)
        if not shared:
            continue
        ordered = [sorted((r for r in rows if item(r) in shared), key=lambda r: shared[item(r)]) for rows in runs]
        values = [by_prompt(rows, arm) for rows in ordered]
        for name in values[0]:
            if all(name in each for each in values):
                table[f"{arm}/{name}"] = quantity([each[name] for each in values])
        drawn = [resampled(rows, of_corpus) for rows in ordered]
        of_runs = [corpus_values(each) for each in drawn]
        changes = [corpus_differences(drawn[0], each) for each in drawn[1:]]
        for name in of_runs[0]:
            differences = [{**each[name], "num_items": len(shared)} for each in changes]
            table[f"{arm}/{name}"] = {"runs": [each[name] for each in of_runs], "differences": differences}
    return table


def item(row: Mapping[str, Any]) -> tuple[str, str]:
    """What makes two held-out rows the same item."""
    return row["id"], row["prompt"]


def shared_items(runs: Sequence[Rows], arm: str) -> dict[tuple[str, str], int]:
    """The items that every run measured in this arm, with their place."""
    items = [dict.fromkeys(item(row) for row in rows if row["arm"] == arm) for rows in runs]
    common = [each for each in items[0] if all(each in other for other in items)]
    return {each: place for place, each in enumerate(common)}


def quantity(values: Sequence[Any]) -> dict[str, Any]:
    """Means with 95 % intervals, and for each later run the paired bootstrap of its difference to the first."""
    changes = []
    for other in values[1:]:
        change = other.nanmean(1) - values[0].nanmean(1)
        change = change[~change.isnan()]
        low, high = bootstrap_interval(change) if len(change) else (float("nan"), float("nan"))
        mean = float(change.mean()) if len(change) else float("nan")
        changes.append({"mean": mean, "low": low, "high": high, "num_items": len(change)})
    return {"runs": [interval(each) for each in values], "differences": changes}


def show_runs(found: Mapping[str, Any], console: Console) -> None:
    """Versions and recipe differences as lines, then one table per stage."""
    for run, numbers in zip(found["runs"], found["versions"], strict=True):
        made_with = ", ".join(f"{name} {number or 'none'}" for name, number in numbers.items())
        console.print(f"{run}: {made_with}", markup=False, highlight=False, soft_wrap=True)
    for path, lines in found["recipe_differences"].items():
        console.print(f"{path} against {found['runs'][0]}:", markup=False, highlight=False, soft_wrap=True)
        for line in lines or ["the same recipe"]:
            console.print(f"  {safe(line)}", markup=False, highlight=False, soft_wrap=True)
    for name, stage in found["stages"].items():
        console.print(training_table(name, found["runs"], stage["training"], sparklines(stage["curves"])))
        if stage.get("held_out"):
            console.print(held_out_table(name, found["runs"], stage["held_out"]))


def sparklines(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each run's reward by step as a line of blocks; all between the same lowest and highest."""
    rewards = [[value for _, value in each["training"]] for each in curves]
    low, high = bounds_of([value for values in rewards for value in values])
    return [sparkline(values, low=low, high=high) for values in rewards]


def training_table(
    stage: str, runs: Sequence[str], metrics: Sequence[Mapping[str, float]], curves: Sequence[str]
) -> Table:
    """One row per metric, one column per run; first the course of the reward."""
    shown = new_table(
        f"{stage}: training, mean of the last {LAST_STEPS} steps", ["metric", *(Path(r).name for r in runs)]
    )
    shown.add_row("reward, all steps", *curves)
    for name in METRICS:
        if any(name in each for each in metrics):
            shown.add_row(name, *(f"{each[name]:.4f}" if name in each else "" for each in metrics))
    return shown


def held_out_table(stage: str, runs: Sequence[str], quantities: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per quantity: each run, then each later run minus the first, with 95 % intervals."""
    items = next(iter(quantities.values()))["differences"][0]["num_items"]
    names = [Path(run).name for run in runs]
    title = f"{stage}: held-out, {items} shared items, 95 % intervals; differences are paired"
    shown = new_table(title, ["quantity", *names, *(f"{name} - {names[0]}" for name in names[1:])])
    for name, values in quantities.items():
        cells = [bounds(each, "") for each in values["runs"]] + [bounds(each, "+") for each in values["differences"]]
        shown.add_row(safe(name), *cells)
    return shown


def bounds(values: Mapping[str, float], sign: str) -> str:
    """`mean [low, high]`, escaped for rich."""
    return f"{values['mean']:{sign}.3f} \\[{values['low']:{sign}.3f}, {values['high']:{sign}.3f}]"
