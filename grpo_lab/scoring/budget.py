"""When failing rewards stop a run: past the budget, with the failed completions saved for whoever repairs them."""

import json
from collections.abc import Sequence
from pathlib import Path

from grpo_lab.errors import RewardError
from grpo_lab.scoring.calls import FAILURES
from grpo_lab.types import Group, Scores

FILE_NAME = "failed_completions.json"


def check_budget(scores: Scores, groups: Sequence[Group], *, max_failed: float, folder: Path | None) -> None:
    """Stop when more than a share `max_failed` of these completions could not be scored because a reward failed.

    Abstaining and gated rewards are no failures. The failed completions are written to `failed_completions.json` in
    `folder`; with None they are not written.

    Raises:
        RewardError: names the reward that failed most, the share, its first cause and the file.
    """
    failed = [
        (group_index, index)
        for group_index, group in enumerate(groups)
        for index in range(len(group.completions))
        if _failures(scores, group_index, index)
    ]
    num_completions = sum(len(group.completions) for group in groups)
    if len(failed) <= max_failed * num_completions:
        return
    worst = max(scores.status, key=lambda name: sum(name in _failures(scores, *place) for place in failed))
    message = (
        f'reward "{worst}": {len(failed)} of {num_completions} completions could not be scored '
        f"(max_failed_rewards: {max_failed:g}); the first: {scores.reasons[worst]}"
    )
    if folder is not None:
        message += f"; saved to {_save(scores, groups, failed, folder)}"
    raise RewardError(message)


def _failures(scores: Scores, group_index: int, index: int) -> dict[str, str]:
    """The terms that failed on one completion, with their status."""
    statuses = {name: status[group_index][index] for name, status in scores.status.items()}
    return {name: status for name, status in statuses.items() if status in FAILURES}


def _save(scores: Scores, groups: Sequence[Group], failed: Sequence[tuple[int, int]], folder: Path) -> Path:
    rows = [
        {
            "example": groups[group_index].example.id,
            "completion": index,
            "failures": _failures(scores, group_index, index),
            "prompt": groups[group_index].example.prompt,
            "columns": dict(groups[group_index].example.columns),
            "text": groups[group_index].completions[index].text,
        }
        for group_index, index in failed
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    file.write_text(json.dumps({"reasons": dict(scores.reasons), "completions": rows}, indent=1, default=str))
    return file
