"""What the bench found, for people."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_lab.tracking.console import safe


def show_recipe_report(found: Mapping[str, Any], console: Console) -> None:
    """A table of probes, then the checks, the times and what else should be known."""
    for name, stage in found["stages"].items():
        title = f"{found['recipe']}, stage {name}: {stage['num_rows']} rows, reward {stage['range']}"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        if stage["golds_written"]:
            console.print(
                f"golds are written as: {stage['golds_written']}", markup=False, highlight=False, soft_wrap=True
            )
        console.print(_probes(stage))
        for each in stage["checks"]:
            line = f"{each['result']:9}  {each['check']}: {safe(each['detail'])}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for warning in stage["warnings"]:
            console.print(f"note       {safe(warning)}", markup=False, highlight=False, soft_wrap=True)
        for term, shares in stage["agreement"].items():
            console.print(f"           {term}: {_agreement(shares)}", markup=False, highlight=False, soft_wrap=True)
        for term, times in stage["milliseconds_per_call"].items():
            line = f"           {term}: {times['p50']:.3g} ms a call (p50), {times['p95']:.3g} ms (p95), {times['calls']} calls"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _probes(stage: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("mean over rows")
    labels = list(next(iter(stage["probes"].values())))
    for label in labels:
        table.add_column(Text(label), justify="right")
    for name, values in stage["probes"].items():
        table.add_row(name, *("none" if values[label] is None else f"{values[label]:.3f}" for label in labels))
    return table


def _agreement(shares: Mapping[str, float]) -> str:
    differing = ", ".join(f'"{name}" ({share:.0%})' for name, share in shares.items() if share < 1)
    return f"strict and lenient agree on all but {differing}" if differing else "strict and lenient agree on all"


def show_rescored(found: Mapping[str, Any], console: Console) -> None:
    """Both distributions, how the order changed, and the answers that show it."""
    title = f"{found['run']}, stage {found['stage']}: {found['num_completions']} stored completions, {found['with']}"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("total reward")
    for name in found["before"]:
        table.add_column(name.replace("_", " "), justify="right")
    for when in ("before", "after"):
        table.add_row(when, *("none" if each is None else f"{each:.4g}" for each in found[when].values()))
    console.print(table)
    for name, values in found["terms"].items():
        line = f"after, {name}: mean {_number(values['mean'])}, std {_number(values['std'])}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    order = found["order"]
    line = (
        f"order within groups: {order['pairs_turned']} of {order['pairs']} pairs turned round, "
        f"{order['groups_changed']} of {order['groups']} groups changed, the best answer in {order['best_changed']}"
    )
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    for each in found["examples"]:
        console.print(f"step {each['step']}, {each['example']}: {safe(each['prompt'])}", markup=False, highlight=False)
        for row in each["answers"]:
            line = f"  {_number(row['before']):>8} -> {_number(row['after']):>8}  {safe(row['completion'])}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
