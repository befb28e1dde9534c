"""How commands show what they found."""

import json
from typing import Any

from rich.console import Console

from grpo_lab.summary import show


def output(summary: Any, *, as_json: bool, quiet: bool) -> None:
    """The outcome on standard output."""
    if as_json:
        print_json(summary)
    elif not quiet:
        show(summary, wide_console())


def show_metrics(metrics: dict[str, float], console: Console) -> None:
    """One line per quantity, with its interval where it has one."""
    for name, value in metrics.items():
        if name.endswith(("/low", "/high")):
            continue
        base = name.removesuffix("/mean")
        bounds = f" [{metrics[f'{base}/low']:.4f}, {metrics[f'{base}/high']:.4f}]" if f"{base}/low" in metrics else ""
        console.print(f"{base:32} {value:.4f}{bounds}", markup=False, highlight=False, soft_wrap=True)


def wide_console(width: int = 120) -> Console:
    """Standard output; a pipe or file, which has no width, gets tables whole."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_json(values: Any) -> None:
    """JSON and nothing else on standard output."""
    Console(soft_wrap=True).out(json.dumps(values, indent=1), highlight=False)
