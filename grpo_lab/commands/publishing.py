"""A finished stage's model, sent to the hub."""

import tempfile
from pathlib import Path

from rich.console import Console

from grpo_lab.commands.showing import print_json
from grpo_lab.finished import finished_stage
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.publish import prepared
from grpo_lab.publish import push as send


def push(run: Path, *, repo: str, stage: str | None, merge: bool, public: bool, dry_run: bool, as_json: bool) -> None:
    """Prepare everything that is sent, then send it, unless this is a dry run."""
    quiet_libraries()
    of = finished_stage(run, stage)
    with tempfile.TemporaryDirectory() as folder:
        upload = prepared(of, Path(folder) / "model", merge=merge)
        sizes = {name: path.stat().st_size for name, path in upload.files.items()}
        sent = None
        if not dry_run:
            sent = send(upload, repo, public=public, message=f"grpo-lab: stage {of.stage} of {run.name}")
    found = {"repo": repo, "private": not public, "kind": upload.kind, "files": sizes, "sent": sent}
    if as_json:
        print_json(found)
        return
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    lines.append(sent or f"nothing was sent: {len(sizes)} files, {upload.kind} model, would go to {repo}")
    for line in lines:
        Console(soft_wrap=True).print(line, markup=False, highlight=False)
