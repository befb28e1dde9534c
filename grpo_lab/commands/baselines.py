"""Baselines of a task: what its held-out rows give without a model, alone or beside a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_lab.assemble import assemble
from grpo_lab.baselines import baselines
from grpo_lab.bundled import find_recipe
from grpo_lab.commands.recipes import measured_stage
from grpo_lab.commands.showing import print_json, wide_console
from grpo_lab.compare.gates import new_table
from grpo_lab.compare.runs import bounds, finished_recipe, held_out
from grpo_lab.corpus_metrics import corpus_metrics
from grpo_lab.errors import UsageError
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.recipe import load
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.tracking.run_folder import RESOLVED, RUN, StageFolder


def baseline(target: str, overrides: Sequence[str], *, stage: str | None, as_json: bool) -> None:
    """Every baseline of the stage's task; of a run also its greedy answers, and their difference to each baseline."""
    quiet_libraries()
    run = Path(target)
    is_run = (run / RUN).is_file()
    if is_run:
        if overrides:
            raise UsageError("a run is measured as it was trained; overrides go with a recipe")
        finished_recipe(run)
    loaded = load(run / RESOLVED if is_run else find_recipe(target), overrides)
    name = measured_stage(loaded.recipe, stage)
    plan = assemble(loaded)
    of_stage = next(each for each in plan.stages if isinstance(each, GrpoPlan) and each.name == name)
    of_corpus = corpus_metrics({term.name: term.options for term in of_stage.stage.reward_terms})
    answers = {each: found.rows for each, found in baselines(of_stage, plan.tokenizer).items()}
    if is_run:
        rows = read_jsonl(StageFolder(run / name).evaluation(of_stage.stage.steps))
        greedy = [row for row in rows if row["arm"] == "greedy"]
        tables = {each: held_out([rows_of, greedy], of_corpus) for each, rows_of in answers.items()}
    else:
        tables = {each: held_out([rows_of], of_corpus) for each, rows_of in answers.items()}
    prompts = len(of_stage.held_out)
    if as_json:
        print_json({"target": target, "stage": name, "num_prompts": prompts, "baselines": tables})
    else:
        wide_console(width=160).print(table(f"{name}: held-out, {prompts} prompts, 95 % intervals", tables))


def table(title: str, tables: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per quantity: each baseline; of a run also the run, and the run minus each baseline."""
    first = next(iter(tables.values()))
    compared = len(next(iter(first.values()))["runs"]) > 1
    more = ["run", *(f"run - {name}" for name in tables)] if compared else []
    shown = new_table(title, ["quantity", *tables, *more])
    for quantity in first:
        of_each = [found[quantity] for found in tables.values()]
        cells = [bounds(each["runs"][0], "") for each in of_each]
        if compared:
            cells += [bounds(of_each[0]["runs"][1], ""), *(bounds(each["differences"][0], "+") for each in of_each)]
        shown.add_row(quantity.removeprefix("greedy/"), *cells)
    return shown
