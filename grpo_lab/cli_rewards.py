"""The command line's part about rewards, and the options that it shares with the rest."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

rewards_app = typer.Typer(help="The rewards a recipe can name.", no_args_is_help=True)

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. seed=1 stages.grpo.steps=10")]
Json = Annotated[bool, typer.Option("--json", help="print JSON on standard output")]
Plugins = Annotated[list[Path] | None, typer.Option(help="also a plugin's rewards: a file or folder")]


@contextmanager
def importing() -> Iterator[None]:
    """Imports made in here leave a million objects, which stay: they are not searched for garbage, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@rewards_app.command("ls")
def list_rewards(
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List rewards with their options and the data set columns they need."""
    from grpo_lab.scoring import discover

    registry = discover(plugin or [])
    found = [registry.get(name).describe() for name in registry.names()]
    show(found, as_json, [line for row in found for line in _reward_lines(row)])


@rewards_app.command("show")
def show_reward(
    name: Annotated[str, typer.Argument(help="a reward's name, or a dotted path")],
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show a reward: its manual, options with what they mean, columns, range, source, version."""
    from grpo_lab.scoring import discover

    row = discover(plugin or []).get(name).describe()
    low, high = row["range"] or (None, None)
    lines = [
        *_reward_lines(row, about=True),
        f"    scores a {row['scope']}" if row["scope"] != "completions" else "    scores all completions of a step",
        f"    returns {'-inf' if low is None else low} to {'inf' if high is None else high}"
        if row["range"]
        else "    returns a number of unknown range",
        f"    from {row['source']}, {row['version']} (sha256 {row['sha256'][:12]})",
    ]
    show(row, as_json, lines)


@rewards_app.command("new")
def new_reward(
    name: Annotated[str, typer.Argument(help="the reward's name")],
    folder: Annotated[Path, typer.Option(help="where NAME.py and NAME.cases.jsonl are written")] = Path(),
) -> None:
    """Write a reward to start from, with cases beside it; nothing is overwritten."""
    from grpo_lab.bench.starter import write_starter

    file, cases = write_starter(name, folder)
    typer.echo(f"{file}\n{cases}\ngrpo-lab rewards test {file}")


@rewards_app.command("test")
def check_reward(
    target: Annotated[str, typer.Argument(help="a recipe, or with --cases a reward: its name, dotted path or file")],
    overrides: Overrides = None,
    cases: Annotated[Path | None, typer.Option(help="a jsonl file of answers and what they must get")] = None,
    options: Annotated[list[str] | None, typer.Option(help="key=value: an option of the reward")] = None,
    plugin: Plugins = None,
    stage: Annotated[str | None, typer.Option(help="which GRPO stage of the recipe; all if not given")] = None,
    limit: Annotated[int, typer.Option(min=1, help="rows of the recipe's data")] = 100,
    as_json: Json = False,
) -> None:
    """Test a reward against cases, or a recipe's whole reward against golds and junk on its own data."""
    with importing():
        from grpo_lab.commands import rewards

    passed = rewards.check_reward(
        target,
        overrides or [],
        cases=cases,
        options=options or [],
        plugins=plugin or [],
        stage=stage,
        limit=limit,
        as_json=as_json,
    )
    raise typer.Exit(0 if passed else 1)


@rewards_app.command("score")
def score_again(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    other: Annotated[str, typer.Option("--with", help="a recipe, or a reward: its name, dotted path or file")],
    options: Annotated[list[str] | None, typer.Option(help="key=value: an option of the reward")] = None,
    plugin: Plugins = None,
    stage: Annotated[str | None, typer.Option(help="which GRPO stage; the last one if not given")] = None,
    as_json: Json = False,
) -> None:
    """Score a run's stored answers again with another reward: distribution before and after, and whose order changed."""
    with importing():
        from grpo_lab.commands import rewards

    rewards.score_again(run, other=other, options=options or [], plugins=plugin or [], stage=stage, as_json=as_json)


def _reward_lines(row: dict[str, Any], *, about: bool = False) -> list[str]:
    lines = [f"{row['name']}: {row['manual' if about else 'doc']}"]
    for name, option in row["options"].items():
        lines.append(f"    option {name}: {option['type']} = {json.dumps(option['default'], default=str)}")
        lines += [f"        {option['doc']}"] if about and option["doc"] else []
    if about:
        lines.insert(1, "")
    return [*lines, *([f"    needs the column {', '.join(row['columns'])}"] if row["columns"] else [])]


def show(values: Any, as_json: bool, lines: list[str]) -> None:
    """JSON, or the lines for people."""
    for line in [json.dumps(values, indent=1)] if as_json else lines:
        typer.echo(line)
