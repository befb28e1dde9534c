"""The reward control: totals that say nothing, the same for every engine; what the answers were worth stays visible."""

import json

import pytest
import torch

from grpo_lab.scoring import controlled
from grpo_lab.types import Scores

NAN = float("nan")
TOTAL = torch.tensor([[1.0, 2.0, NAN], [4.0, 5.0, 6.0]])


def scores(total=TOTAL):
    return Scores(total, {"accuracy": total}, {"accuracy": (("ok",) * total.shape[1],) * total.shape[0]})


def test_no_control_changes_nothing():
    given = scores()
    assert controlled(given, None, seed=0) is given


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_control_changes_the_totals_only_and_is_a_function_of_the_seed(kind):
    one, again, other = (controlled(scores(), kind, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.total.nan_to_num(-1), again.total.nan_to_num(-1))
    assert not torch.equal(one.total.nan_to_num(-1), other.total.nan_to_num(-1))
    assert torch.equal(one.total.isnan(), TOTAL.isnan())
    assert one.terms["accuracy"] is TOTAL
    assert one.real_total is TOTAL
    assert TOTAL[0, 0] == 1.0


def test_shuffled_totals_are_the_real_ones_at_other_places_of_the_whole_step():
    moved = {controlled(scores(), "shuffled", seed=seed).total[0, 0].item() for seed in range(50)}
    assert moved == {1.0, 2.0, 4.0, 5.0, 6.0}
    dealt = controlled(scores(), "shuffled", seed=0).total
    assert sorted(dealt[~dealt.isnan()].tolist()) == [1.0, 2.0, 4.0, 5.0, 6.0]


def test_random_totals_are_uniform_and_know_nothing_of_the_real_ones():
    total = torch.arange(4000.0).reshape(500, 8)
    drawn = controlled(scores(total), "random", seed=0).total
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), total.flatten()]))[0, 1])) < 0.05


def test_a_draw_belongs_to_its_place_whoever_was_scored():
    whole = TOTAL.nan_to_num(0.0)
    one, other = (controlled(scores(total), "random", seed=1).total for total in (TOTAL, whole))
    assert torch.equal(one[~TOTAL.isnan()], other[~TOTAL.isnan()])


@pytest.mark.parametrize("aggregation", [[], ["stages.grpo.algorithm.preset=gdpo"]], ids=["sum", "gdpo"])
def test_both_engines_learn_from_the_same_control_and_log_the_real_reward(cli, toy_recipe, tmp_path, aggregation):
    lines, rows = {}, {}
    for engine in ("native", "trl"):
        overrides = ["stages.grpo.sampling.backend=native", f"stages.grpo.engine={engine}", "stages.grpo.steps=1"]
        overrides += [
            "stages.grpo.reward_control=random",
            "stages.warm_start.steps=1",
            "stages.grpo.algorithm.num_iterations=1",
        ]
        overrides += ["stages.grpo.algorithm.num_minibatches=1"]
        ran = cli("train", toy_recipe, *overrides, *aggregation, "--name", engine, "--output-dir", tmp_path, "--quiet")
        assert ran.code == 0, ran.err
        folder = tmp_path / engine / "grpo"
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[engine] = next(line for line in found if "reward" in line)
        rollouts = (folder / "rollouts" / "step-000001.jsonl").read_text().splitlines()
        rows[engine] = [json.loads(row) for row in rollouts]
        assert "reward_control is on" in (folder / "events.jsonl").read_text()
    totals = [[row["total"] for row in rows[engine]] for engine in ("native", "trl")]
    assert totals[0] == totals[1]
    assert len(set(totals[0])) == len(totals[0])
    line = lines["native"]
    assert line["lab/real_reward"] == pytest.approx(
        line["rewards/accuracy/mean"] + 0.1 * line["rewards/length/mean"], abs=1e-6
    )
    assert line["reward"] != line["lab/real_reward"]
    assert line["lab/real_reward"] == lines["trl"]["lab/real_reward"]
    assert line["grad_norm"] == pytest.approx(lines["trl"]["grad_norm"], rel=1e-3)
