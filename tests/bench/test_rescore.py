"""`rewards score RUN --with ...`: stored answers under another reward."""

import json

import pytest
import torch

from grpo_lab.bench.rescore import distribution, order_changes
from grpo_lab.tracking.files import read_jsonl

NAN = float("nan")


def block(step: int, *texts: str) -> list[dict]:
    return [{"step": step, "example": f"e{step}", "prompt": "p", "completion": text} for text in texts]


def test_pairs_that_turn_round_are_counted_where_both_rewards_tell_them_apart():
    blocks = [block(1, "a", "b", "c"), block(2, "d", "e", "f"), block(3, "g", "h", "i")]
    before = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 1.0, NAN]])
    after = torch.tensor([[2.0, 1.0, 2.5], [0.0, 5.0, 0.0], [0.0, 1.0, 7.0]])
    found = order_changes(blocks, before, after)
    # group 1: only (a, b) turns; group 2: (d, e) was a tie, (d, f) is one now; group 3: i had no reward
    assert found["order"] == {"pairs": 5, "pairs_turned": 1, "groups": 3, "groups_changed": 1, "best_changed": 1}
    assert found["changed"] == [{"step": 1, "example": "e1"}]
    (example,) = found["examples"]
    assert [(each["completion"], each["before"], each["after"]) for each in example["answers"]] == [
        ("c", 2.0, 2.5),
        ("a", 0.0, 2.0),
        ("b", 1.0, 1.0),
    ]


def test_a_distribution_leaves_out_what_was_not_scored_and_counts_it():
    found = distribution(torch.tensor([[1.0, 3.0, NAN], [2.0, 2.0, 2.0]]))
    assert (found["mean"], found["min"], found["p50"], found["max"]) == (2.0, 1.0, 2.0, 3.0)
    assert (found["unscored"], found["groups_with_signal"]) == (1.0, 0.5)
    nothing = distribution(torch.tensor([[NAN]]))
    assert (nothing["mean"], nothing["unscored"], nothing["groups_with_signal"]) == (None, 1.0, 0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_text):
    import sys

    from grpo_lab.cli import main

    folder = tmp_path_factory.mktemp("rescore")
    (folder / "toy.yaml").write_text(toy_text)
    argv, sys.argv = sys.argv, ["grpo-lab", "train", f"{folder}/toy.yaml", f"output_dir={folder}/runs", "--max-steps", "2", "--quiet"]  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    sys.argv = argv
    return folder / "runs" / "toy"


def test_the_stage_s_own_recipe_gives_the_stored_totals_again(cli, run):
    found = json.loads(cli("rewards", "score", run, "--with", run / "resolved.yaml", "--json").out)
    assert (found["num_completions"], found["before"]) == (32, found["after"])
    assert found["order"]["pairs_turned"] == 0
    rows = [row for file in sorted((run / "grpo" / "rollouts").iterdir()) for row in read_jsonl(file)]
    mean = sum(row["total"] for row in rows) / len(rows)
    assert found["before"]["mean"] == pytest.approx(mean)
    assert found["terms"].keys() == {"accuracy", "length"}


def test_another_reward_is_given_by_name_with_its_options(cli, run):
    target = {"long": "12", "short": "1"}
    found = {
        name: json.loads(cli("rewards", "score", run, "--with", "length", "--options", f"target={value}", "--json").out)
        for name, value in target.items()
    }
    rows = [row for file in sorted((run / "grpo" / "rollouts").iterdir()) for row in read_jsonl(file)]
    for name, value in target.items():
        expected = sum(-abs(row["num_tokens"] - int(value)) / int(value) for row in rows) / len(rows)
        assert found[name]["after"]["mean"] == pytest.approx(expected, abs=1e-5)
    out = cli("rewards", "score", run, "--with", "length").out
    assert "32 stored completions, scored with length" in out
    assert "order within groups: " in out


def test_what_is_no_run_exits_2(cli, tmp_path):
    ran = cli("rewards", "score", tmp_path, "--with", "length")
    assert (ran.code, ran.err) == (2, f"error: {tmp_path}: is no run folder\n")
