import json

import pytest
import torch

from grpo_lab.errors import RewardError
from grpo_lab.scoring import check_budget
from grpo_lab.types import Completion, Example, Group, Scores

COMPLETIONS = tuple(Completion(text, (1,), finished=True) for text in ("a", "b\ud800", "c", "d"))
GROUPS = [Group(Example("x", "prompt", (1,), {"answer": 3, "set": {1}}), COMPLETIONS)]


def scores(*statuses, **more):
    status = {"parse": (statuses,), **{name: (each,) for name, each in more.items()}}
    nan = torch.full((1, 4), torch.nan)
    reasons = {name: f'reward "{name}" raised ValueError: no' for name in status}
    return Scores(nan, dict.fromkeys(status, nan), status, reasons)


def test_failures_within_the_budget_pass(tmp_path):
    check_budget(scores("error", "ok", "ok", "ok"), GROUPS, max_failed=0.25, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_abstaining_and_gates_are_no_failures():
    check_budget(scores("abstained", "gated", "abstained", "gated"), GROUPS, max_failed=0.0, folder=None)


def test_too_many_failures_stop_the_run_and_are_saved(tmp_path):
    found = scores("error", "non_finite", "ok", "abstained")
    with pytest.raises(RewardError) as error:
        check_budget(found, GROUPS, max_failed=0.25, folder=tmp_path / "run")
    file = tmp_path / "run" / "failed_completions.json"
    assert str(error.value) == (
        'reward "parse": 2 of 4 completions could not be scored (max_failed_rewards: 0.25); '
        f'the first: reward "parse" raised ValueError: no; saved to {file}'
    )
    assert error.value.exit_code == 5
    saved = json.loads(file.read_text())
    assert saved["reasons"] == {"parse": 'reward "parse" raised ValueError: no'}
    assert saved["completions"][1] == {
        "example": "x",
        "completion": 1,
        "failures": {"parse": "non_finite"},
        "prompt": "prompt",
        "columns": {"answer": 3, "set": "{1}"},
        "text": "b\ud800",
    }


@pytest.mark.parametrize("status", ["error", "timeout", "bad_type", "non_finite", "crashed"])
def test_every_kind_of_failure_counts(status):
    with pytest.raises(RewardError):
        check_budget(scores(status, "ok", "ok", "ok"), GROUPS, max_failed=0.0, folder=None)


def test_a_completion_counts_once_and_the_worst_reward_is_named():
    ok, error = ("ok",) * 4, ("error", "error", "ok", "ok")
    found = scores("error", "ok", "ok", "ok", judge=error, fine=ok)
    with pytest.raises(RewardError) as stopped:
        check_budget(found, GROUPS, max_failed=0.4, folder=None)
    assert str(stopped.value) == (
        'reward "judge": 2 of 4 completions could not be scored (max_failed_rewards: 0.4); '
        'the first: reward "judge" raised ValueError: no'
    )
