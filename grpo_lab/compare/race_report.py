"""What a race measured: reward curves over seeds, held-out differences on the same items, speed by phase, memory."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_lab.compare.gates import new_table
from grpo_lab.compare.picture import Curve, draw
from grpo_lab.compare.race import PROCESSES, Race, Run
from grpo_lab.compare.runs import LAST_STEPS, bounds, held_out, item
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.summary import Rows
from grpo_lab.tracking.console import safe
from grpo_lab.tracking.environment import environment
from grpo_lab.tracking.files import read_json, read_jsonl, write_atomic, write_json
from grpo_lab.tracking.run_folder import StageFolder

REPORT, PICTURE = "race.json", "race.svg"
PHASES = ("sample", "score", "learn")


def race_report(race: Race) -> dict[str, Any]:
    """Everything as plain values; written to the race's folder with the picture."""
    stage = race.runs[-1].recipe.stages[race.stage]
    assert isinstance(stage, GrpoStage)
    arms = race.arms
    found: dict[str, Any] = {
        "folder": str(race.folder),
        "recipe": race.folder.name.removesuffix("-race"),
        "stage": race.stage,
        "seeds": list(race.seeds),
        "versions": {name: version(name) for name in ("grpo-lab", "trl", "torch", "transformers")},
        "environment": environment(),
        "runs": {arm: [str(run.folder) for run in race.of(arm)] for arm in arms},
        "curves": {arm: curve(race, arm) for arm in arms},
        "speed": {arm: [speed(race, run) for run in race.of(arm)] for arm in arms},
    }
    found["last_reward"] = {arm: [last(race, run) for run in race.of(arm)] for arm in arms}
    if stage.evaluation is not None:
        steps = {"before": 0, "after": stage.steps}
        rows = {when: {arm: evaluated(race, arm, step) for arm in arms} for when, step in steps.items()}
        found["same_start"] = {arm: rows["before"][arm] == rows["before"][arms[0]] for arm in arms[1:]}
        found["held_out"] = {when: held_out([pooled(rows[when][arm]) for arm in arms]) for when in steps}
    write_json(race.folder / REPORT, found)
    write_atomic(race.folder / PICTURE, picture(found))
    return {**found, "picture": str(race.folder / PICTURE)}


def metrics(race: Race, run: Run) -> Rows:
    """The raced stage's log."""
    return read_jsonl(StageFolder(run.folder / race.stage).metrics)


def rewards(race: Race, run: Run) -> dict[int, float]:
    """Step -> what the sampled answers were worth; under a control that is not what was learnt from."""
    lines = [line for line in metrics(race, run) if "reward" in line]
    return {line["step"]: line.get("lab/real_reward", line["reward"]) for line in lines}


def last(race: Race, run: Run) -> float:
    """The reward of the last steps."""
    return mean(list(rewards(race, run).values())[-LAST_STEPS:])


def curve(race: Race, arm: str) -> dict[str, Any]:
    """The arm's reward by step: mean, least and greatest over the seeds; and held-out rewards where measured."""
    of_seeds = [rewards(race, run) for run in race.of(arm)]
    shared = [step for step in of_seeds[0] if all(step in each for each in of_seeds)]
    values = {step: [each[step] for each in of_seeds] for step in shared}
    greedy: dict[int, list[float]] = {}
    for run in race.of(arm):
        for line in metrics(race, run):
            if "eval_greedy/reward/mean" in line:
                greedy.setdefault(line["step"], []).append(line["eval_greedy/reward/mean"])
    return {
        "training": [{"step": s, "mean": mean(v), "low": min(v), "high": max(v)} for s, v in values.items()],
        "held_out": [{"step": step, "mean": mean(v)} for step, v in greedy.items()],
    }


def speed(race: Race, run: Run) -> dict[str, float]:
    """Completions per second of each phase and of whole steps, peak memory, and what the process took in all."""
    lines = [line for line in read_jsonl(StageFolder(run.folder / race.stage).timing) if "step_seconds" in line]
    seconds = {
        name: sum(line.get(f"{name}_seconds", 0.0) for line in lines if "completions_per_second" in line)
        for name in (*PHASES, "step")
    }
    completions = sum(line["completions_per_second"] * line["step_seconds"] for line in lines)
    tokens = sum(line["tokens_per_second"] * line["step_seconds"] for line in lines)
    rates = {f"{name}_per_second": completions / value for name, value in seconds.items() if value > 0}
    taken = read_json(race.folder / PROCESSES)[run.recipe.name]
    wall = sum(each["wall"] for each in taken)
    return {
        **rates,
        "tokens_per_second": tokens / seconds["step"],
        "peak_memory_mib": max(line["peak_memory_mib"] for line in lines),
        "wall_seconds": wall,
        "cpu_seconds": sum(each["cpu"] for each in taken),
        "beside_steps_seconds": wall - seconds["step"],
        "starts": float(len(taken)),
    }


def evaluated(race: Race, arm: str, step: int) -> list[Rows]:
    """The arm's held-out rows after `step` steps, one list per seed."""
    return [read_jsonl(StageFolder(run.folder / race.stage).evaluation(step)) for run in race.of(arm)]


def pooled(seeds: Sequence[Rows]) -> Rows:
    """All seeds' rows. Where every seed measured the same items, an item's value is its mean over seeds."""
    items = [{item(row) for row in rows} for rows in seeds]
    if all(each == items[0] for each in items):
        return [row for rows in seeds for row in rows]
    return [{**row, "id": f"seed {index}: {row['id']}"} for index, rows in enumerate(seeds) for row in rows]


def picture(found: Mapping[str, Any]) -> str:
    """All arms' curves."""
    count = len(found["seeds"])
    band = f", bands = lowest to highest of {count} seeds" if count > 1 else f", seed {found['seeds'][0]}"
    title = f"reward by step: lines = sampled while training, rings = held-out, greedy{band}"
    curves = [
        Curve(
            arm if arm in ("native", "trl") else f"native, rewards {arm}",
            [(each["step"], each["mean"]) for each in values["training"]],
            [(each["step"], each["low"], each["high"]) for each in values["training"]] if count > 1 else (),
            [(each["step"], each["mean"]) for each in values["held_out"]],
        )
        for arm, values in found["curves"].items()
    ]
    return draw(title, curves)


def show_race(found: Mapping[str, Any], console: Console) -> None:
    """One table: held-out results, rewards, speed and memory, side by side."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    seeds = ", ".join(map(str, found["seeds"]))
    print_line(console, f"{found['recipe']}, stage {found['stage']}, seeds {seeds}; {versions}")
    arms = list(found["curves"])
    others = arms[1:]
    names = [arm if arm in ("native", "trl") else f"native, {arm}" for arm in arms]
    headings = ["quantity", "before", *names, *(f"{name} - native" for name in names[1:])]
    shown = new_table("both engines, the same recipe", headings)
    if "held_out" in found:
        add_held_out(shown, found["held_out"]["before"], found["held_out"]["after"])
    add_numbers(shown, f"reward, last {LAST_STEPS} steps", found["last_reward"], "{:.3f}", "{:+.3f}")
    shown.add_section()
    for key, label in SPEEDS.items():
        values = {arm: [each.get(key, float("nan")) for each in found["speed"][arm]] for arm in arms}
        add_numbers(shown, label, values, "{:,.0f}", "x {:.2f}", ratio=True)
    console.print(shown)
    if "same_start" in found:
        same = all(found["same_start"][arm] for arm in others)
        print_line(
            console, "before the first step every arm gave the same held-out answers: " + ("yes" if same else "NO")
        )
    for note in notes(found):
        print_line(console, note)


SPEEDS = {
    "sample_per_second": "completions/s, sampling",
    "score_per_second": "completions/s, scoring",
    "learn_per_second": "completions/s, learning",
    "step_per_second": "completions/s, whole step",
    "tokens_per_second": "tokens/s, whole step",
    "peak_memory_mib": "peak memory, MiB",
    "wall_seconds": "process, seconds",
    "cpu_seconds": "process, CPU seconds",
    "beside_steps_seconds": "seconds beside its steps",
}


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the numbers are and are not."""
    count = len(found["seeds"])
    said = ["held-out intervals are 95 %, paired by item; an item's value is its mean over samples and seeds"]
    if count > 1:
        said.append(f"other numbers are means [lowest, highest] over {count} seeds")
    said.append("seconds beside its steps: start-up, evaluation, checkpoints")
    resumed = [
        f"{arm}, seed {seed}"
        for arm, runs in found["speed"].items()
        for seed, each in zip(found["seeds"], runs, strict=True)
        if each["starts"] > 1
    ]
    if resumed:
        said.append(f"interrupted and resumed, so that its process times count every start: {'; '.join(resumed)}")
    return [*said, f"picture: {found['picture']}  (numbers: {REPORT} beside it; runs in the same folder)"]


def add_held_out(shown: Table, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """One row per quantity: before (which all arms share), after, and the later arms' paired difference to the first."""
    for name, values in after.items():
        start = bounds(before[name]["runs"][0], "") if name in before else ""
        ends = [bounds(each, "") for each in values["runs"]]
        shown.add_row(safe(name), start, *ends, *(bounds(each, "+") for each in values["differences"]))
    shown.add_section()


def add_numbers(
    shown: Table, label: str, values: Mapping[str, Sequence[float]], form: str, change: str, *, ratio: bool = False
) -> None:
    """One row: each arm's mean over seeds with its range, and how the later arms stand to the first."""
    means = [mean(each) for each in values.values()]
    cells = []
    for each, middle in zip(values.values(), means, strict=True):
        spread = f" \\[{form.format(min(each))}, {form.format(max(each))}]" if len(each) > 1 else ""
        cells.append(form.format(middle) + spread)
    first = means[0]
    changes = [change.format(other / first if ratio else other - first) for other in means[1:]]
    shown.add_row(safe(label), "", *cells, *changes)


def print_line(console: Console, text: str) -> None:
    """One line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
