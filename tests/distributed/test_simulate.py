"""scripts/simulate.py against numbers worked by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate.py"


@pytest.fixture(scope="module")
def simulate():
    spec = importlib.util.spec_from_file_location("simulate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["simulate"]


@pytest.fixture
def measured(simulate):
    return simulate.Measured(sample=24.0, score=2.0, learn=12.0, prompts=8)


@pytest.mark.parametrize(
    "trainers, samplers, step, bottleneck",
    [
        (1, 0, 38.0, "sample"),  # 24 + 2 + 12
        (2, 0, 19.0, "sample"),  # half of everything
        (3, 0, 14.25, "sample"),  # the busiest has 3 of 8 groups: 9 + .75 + 4.5
        (1, 4, 20.0, "learn"),  # 6 + 2 + 12
        (2, 4, 13.0, "sample"),  # 6 + 1 + 6; sample and learn tie, the first is named
    ],
)
def test_a_step_in_turn_is_the_sum_of_its_phases(simulate, measured, trainers, samplers, step, bottleneck):
    found = simulate.in_turn(measured, trainers, samplers)
    assert found.step == pytest.approx(step)
    assert found.bottleneck == bottleneck


@pytest.mark.parametrize(
    "trainers, samplers, step, bottleneck",
    [
        (1, 1, 26.0, "sample"),  # 24 + 2 against 12
        (1, 2, 14.0, "sample"),  # 12 + 2 against 12
        (1, 4, 12.0, "learn"),  # 6 + 2 against 12
        (4, 8, 3.5, "sample"),  # 3 + .5 against 3
    ],
)
def test_one_step_off_the_slower_side_decides(simulate, measured, trainers, samplers, step, bottleneck):
    found = simulate.one_step_off(measured, trainers, samplers)
    assert found.step == pytest.approx(step)
    assert found.bottleneck == bottleneck


def test_what_does_not_shrink_is_counted(simulate):
    measured = simulate.Measured(
        sample=24.0, score=0.0, learn=12.0, prompts=8, longest=4.0, sync=1.0, gradient_mib=600.0, mib_per_second=300.0
    )
    found = simulate.phases(measured, 2, 4)
    assert found["sample"] == pytest.approx(9.0)  # 4 + 20 / 4
    assert found["learn"] == pytest.approx(8.0)  # 6 + 2 * 1/2 * 600 / 300
    assert found["sync"] == 1.0
    assert simulate.one_step_off(measured, 2, 4).step == pytest.approx(10.0)  # 9 against 8, and the weights
    assert simulate.phases(measured, 2, 0)["sync"] == 0.0  # the trainers sample with their own weights


def test_enough_samplers_are_the_fewest_with_which_learning_never_waits(simulate, measured):
    assert simulate.balanced(measured, 1) == 3  # 24 * 3/8 + 2 = 11 against 12; with two it is 14
    assert simulate.balanced(measured, 4) is None  # 3 + .5 against 3, even with one sampler per group


def test_the_medians_of_a_run_are_taken_without_its_first_step(simulate, tmp_path, capsys, monkeypatch):
    rows = [(9.0, 9.0, 9.0), (1.0, 0.5, 2.0), (3.0, 0.5, 4.0), (2.0, 0.5, 3.0)]
    lines = [
        {"step": step, "sample_seconds": a, "score_seconds": b, "learn_seconds": c, "step_seconds": a + b + c}
        for step, (a, b, c) in enumerate(rows, start=1)
    ]
    (tmp_path / "timing.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert simulate.measured_medians(tmp_path) == {"sample": 2.0, "score": 0.5, "learn": 3.0}
    arguments = ["--run", str(tmp_path), "--prompts", "4", "--trainers", "1", "2", "--samplers", "0", "2"]
    monkeypatch.setattr(sys, "argv", ["simulate.py", *arguments])
    simulate.main()
    rows = capsys.readouterr().out.splitlines()
    assert "| 1 | - | in turn | 5.5 | 2 | 0.5 | 3 | 0 | learn |" in rows
    assert "| 2 | - | in turn | 2.75 | 1 | 0.25 | 1.5 | 0 | learn |" in rows
    assert "| 1 | 2 | one step off | 3 | 1 | 0.5 | 3 | 0 | learn |" in rows
