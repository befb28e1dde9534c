"""What a recipe will take of memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_lab.assemble import assemble
from grpo_lab.bundled import find_recipe
from grpo_lab.commands.showing import print_json, wide_console
from grpo_lab.errors import UsageError
from grpo_lab.estimate.stages import estimate_stage
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.policy.freed import LARGE
from grpo_lab.recipe import load
from grpo_lab.tracking.stopwatch import peak_memory_mib

GIB = 1 << 30
SMALL_MODEL = (
    f"weights below {LARGE >> 20} MiB: the C library keeps freed memory, which is quicker and may take a GiB more; with "
    "MALLOC_MMAP_THRESHOLD_=262144 in the environment it is given back"
)


def estimate(recipe: str, overrides: Sequence[str], *, memory: float | None, as_json: bool) -> None:
    """Every stage's memory. `memory` in GiB is what the whole process may take, imports included."""
    quiet_libraries()
    plan = assemble(load(find_recipe(recipe), overrides))
    import accelerate  # noqa: F401 - what a run imports besides, to know the size of a process that has made nothing
    import peft  # noqa: F401

    imports = round(peak_memory_mib() * (1 << 20))
    room = None if memory is None else round(memory * GIB) - imports
    if room is not None and room <= 0:
        raise UsageError(f"--memory {memory}: Python with its packages takes {imports / GIB:.2f} GiB alone")
    stages = {stage.name: estimate_stage(plan, stage, memory=room) for stage in plan.stages}
    peak = max(stage["peak"] for stage in stages.values())
    found = {"imports": imports, "peak": peak, "stages": stages}
    if as_json:
        print_json(found)
    else:
        show_estimate(found, wide_console(), memory)


def show_estimate(found: Mapping[str, Any], console: Console, memory: float | None) -> None:
    """The same for people, in MiB."""
    for name, stage in found["stages"].items():
        lengths = stage["lengths"]
        title = f"{name}: MiB, with {lengths['prompt']} tokens of prompt and {lengths['completion']} of completion"
        table = Table(title=title, title_justify="left", show_header=False)
        for part, size in stage["parts"].items():
            table.add_row(part.replace("_", " "), f"{size / (1 << 20):,.0f}")
        table.add_section()
        for phase, size in stage["phases"].items():
            table.add_row(f"peak: {phase}", f"{size / (1 << 20):,.0f}", "<- the most" if size == stage["peak"] else "")
        console.print(table)
        for key, size in stage.get("suggested", {}).items():
            console.print(suggestion(key, size, memory), markup=False, highlight=False)
        if not stage.get("fits", True):
            console.print(f"{name} does not fit in {memory} GiB", markup=False, highlight=False)
    total = (found["peak"] + found["imports"]) / GIB
    if any(stage["parts"]["weights"] < LARGE for stage in found["stages"].values()):
        console.print(SMALL_MODEL, markup=False, highlight=False)
    text = f"at most {found['peak'] / GIB:.2f} GiB and {found['imports'] / GIB:.2f} GiB for Python: {total:.2f} GiB"
    console.print(text, markup=False, highlight=False)


def suggestion(key: str, size: int | None, memory: float | None) -> str:
    """One size in words.

    >>> suggestion("max_rows", 8, 4.0)
    'max_rows: 8 fits in 4.0 GiB'
    """
    if size is None:
        return f"{key}: null fits in {memory} GiB"
    return f"{key}: {size} fits in {memory} GiB" if size else f"{key}: not even 1 fits in {memory} GiB"
