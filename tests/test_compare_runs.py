"""Finished runs side by side: recipes, last metrics, and held-out results item by item."""

import json

import pytest

from grpo_lab.compare.runs import held_out, last_metrics


def row(item, reward, *, arm="greedy", prompt=None):
    terms = {"accuracy": reward}
    prompt = prompt or f"prompt of {item}"
    return {
        "arm": arm,
        "id": item,
        "prompt": prompt,
        "num_tokens": 4,
        "finished": True,
        "terms": terms,
        "reward": reward,
    }


def test_differences_are_paired_by_item_whatever_the_order():
    one = [row("a", 0.0), row("b", 1.0), row("c", 0.0)]
    other = [row("c", 1.0), row("b", 1.0), row("a", 1.0)]
    found = held_out([one, other])["greedy/reward"]
    assert found["runs"][0]["mean"] == pytest.approx(1 / 3)
    assert found["runs"][1]["mean"] == 1.0
    (change,) = found["differences"]
    assert change["mean"] == pytest.approx(2 / 3)
    assert (change["low"], change["high"]) == (0.0, 1.0)
    assert change["num_items"] == 3


def test_a_constant_difference_has_no_width_though_the_runs_vary():
    one = [row(str(i), float(i)) for i in range(10)]
    other = [row(str(i), float(i) + 0.5) for i in range(10)]
    (change,) = held_out([one, other])["greedy/accuracy"]["differences"]
    assert (change["mean"], change["low"], change["high"]) == (0.5, 0.5, 0.5)


def test_only_items_that_all_runs_measured_are_compared():
    one = [row("a", 0.0), row("b", 1.0)]
    other = [row("b", 0.0), row("d", 1.0), row("a", 1.0, prompt="another prompt")]
    (change,) = held_out([one, other])["greedy/reward"]["differences"]
    assert (change["mean"], change["num_items"]) == (-1.0, 1)


def test_runs_that_share_no_item_have_no_held_out_comparison():
    assert held_out([[row("a", 0.0)], [row("b", 0.0)]]) == {}


def test_several_samples_of_a_prompt_are_one_item():
    one = [row("a", 0.0), row("a", 1.0)]
    other = [row("a", 1.0), row("a", 1.0)]
    (change,) = held_out([one, other])["greedy/reward"]["differences"]
    assert (change["mean"], change["num_items"]) == (0.5, 1)


def test_last_metrics_are_means_of_the_last_ten_steps():
    lines = [{"step": i, "reward": float(i)} for i in range(20)] + [{"step": 20, "eval": 1.0}]
    assert last_metrics(lines) == {"reward": 14.5}


@pytest.fixture
def runs(cli, toy_recipe, tmp_path):
    paths = []
    for seed in (0, 1):
        ran = cli(
            "train",
            toy_recipe,
            f"seed={seed}",
            "--name",
            f"s{seed}",
            "--output-dir",
            tmp_path,
            "--max-steps",
            1,
            "--quiet",
        )
        assert ran.code == 0, ran.err
        paths.append(tmp_path / f"s{seed}")
    return paths


def test_two_runs_are_compared(cli, runs):
    ran = cli("compare", *runs, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert "seed: 0 -> 1" in found["recipe_differences"][str(runs[1])]
    assert [each["trl"] for each in found["versions"]] == ["1.16.0"] * 2
    stage = found["stages"]["grpo"]
    assert len(stage["training"]) == 2
    assert stage["held_out"]["greedy/reward"]["differences"][0]["num_items"] > 0

    shown = cli("compare", *runs)
    assert shown.code == 0
    assert "seed: 0 -> 1" in shown.out
    assert "s1 - s0" in shown.out
    assert shown.out.count("trl 1.16.0, torch ") == 2


def test_what_is_no_finished_run_is_refused(cli, runs, tmp_path):
    ran = cli("compare", runs[0], tmp_path)
    assert ran.code == 2
    assert "is no run folder" in ran.err
    info = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps({**info, "status": "interrupted"}))
    ran = cli("compare", *runs)
    assert ran.code == 2
    assert "interrupted, not finished; grpo-lab train --resume" in ran.err


def test_one_run_alone_is_refused(cli, tmp_path):
    ran = cli("compare", tmp_path)
    assert ran.code == 2
    assert "two or more run folders" in ran.err
