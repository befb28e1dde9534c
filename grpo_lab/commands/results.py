"""What a finished stage is good for: exported, sampled from, talked to."""

import shlex
import subprocess
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_lab import finished
from grpo_lab.commands.showing import print_json, wide_console
from grpo_lab.errors import SetupError, UsageError
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.policy.adapter_files import is_adapter
from grpo_lab.policy.load import DTYPES
from grpo_lab.tracking.console import safe
from grpo_lab.types import Policy


def export(
    run: Path, *, to: Path | None, stage: str | None, merge: bool, dtype: str | None, gguf: bool, as_json: bool
) -> None:
    """Write a run's model for others."""
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: choose {' or '.join(DTYPES)}")
    quiet_libraries()
    of = finished.finished_stage(run, stage)
    if gguf and not merge and is_adapter(of.final):
        raise UsageError("--gguf needs a whole model: add --merge")
    folder = to or run.with_name(f"{run.name}-{of.stage}" + ("-merged" if merge else ""))
    found = finished.export(of, folder, merge=merge, dtype=dtype)
    if gguf:
        command = finished.gguf_command(folder)
        found["gguf"] = shlex.join(command)
        if Path(command[0]).is_absolute():
            convert(command)
    if as_json:
        print_json(found)
        return
    lines = [f"{found['kind']} model, {found['dtype']}, in {folder}"]
    if "gap" in found:
        gaps = f"{found['merge_gap']:.1g} in float32, {found['gap']:.1g} in {found['dtype']}"
        lines.append(f"its logits differ from the run's by {gaps} (of the largest)")
    if gguf and not Path(command[0]).is_absolute():
        lines.append(f"llama.cpp's {finished.CONVERTER} is not on the path; with it: {found['gguf']}")
    for line in lines:
        Console(soft_wrap=True).print(line, markup=False, highlight=False)


def convert(command: list[str]) -> None:
    """Run llama.cpp's converter; what it writes on its way is shown only if it fails.

    Raises:
        SetupError: it failed; the exported model stays.
    """
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode != 0:
        said = "\n".join(ran.stdout.strip().splitlines()[-5:])
        raise SetupError(f"{shlex.join(command)} ended with exit code {ran.returncode}:\n{said}")


def sample(run: Path, prompt: str, *, stage: str | None, count: int, both: bool, seed: int, as_json: bool) -> None:
    """Ask a run's model, and the one before it if `both`."""
    quiet_libraries()
    of = finished.finished_stage(run, stage)
    messages = [{"role": "user", "content": prompt}]
    found = {
        name: finished.answers(of, policy, messages, count=count, seed=seed) for name, policy in asked(of, both).items()
    }
    if as_json:
        print_json({"prompt": prompt, **found})
    else:
        show_answers(found)


def asked(of: finished.Finished, both: bool) -> dict[str, Policy]:
    """The policies that are asked: before the stage and after it, or after it alone."""
    before = {"before": finished.load_finished(of, before=True)} if both else {}
    return {**before, "after": finished.load_finished(of)}


def show_answers(found: dict[str, list[str]]) -> None:
    """Answers row by row, one column for each policy."""
    table = Table(*found, show_header=len(found) > 1, show_lines=True)
    for row in zip(*found.values(), strict=True):
        table.add_row(*(Text("\n".join(map(safe, text.splitlines()))) for text in row))
    wide_console().print(table)


def chat(run: Path, *, stage: str | None, both: bool) -> None:
    """Lines from standard input, answered with the whole conversation in mind; each policy has its own."""
    quiet_libraries()
    of = finished.finished_stage(run, stage)
    policies = asked(of, both)
    talks: dict[str, list[dict[str, str]]] = {name: [] for name in policies}
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        found = {}
        for name, policy in policies.items():
            talks[name].append({"role": "user", "content": line})
            found[name] = finished.answers(of, policy, talks[name], count=1, seed=0)
            talks[name].append({"role": "assistant", "content": found[name][0]})
        show_answers(found)
