"""Two processes against one, on the same recorded rollouts: losses, gradients, weights, faults, sampling, scoring.

The work is done once, by two_processes.py under the launcher of `train --nproc`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_lab.commands.launching import environments

PLUGIN = Path(__file__).with_name("plugin.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script, out = Path(__file__).with_name("two_processes.py"), folder / "found.json"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out), str(PLUGIN)],
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
        )
        for environment in environments(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return json.loads(out.read_text())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("setting", ["float64", "two iterations", "one group"])
def test_two_processes_learn_what_one_does(found, setting, strategy):
    """Warm-up, four micro-batches, SGD, a group without signal; with one group the second process has no rows."""
    differences = found[f"{setting}: {strategy}"]
    assert differences["steps"] == (12 if setting == "two iterations" else 3)
    assert {name: size for name, size in differences.items() if name != "steps" and size > 1e-9} == {}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_in_float32_two_processes_differ_by_rounding(found, strategy):
    differences = found[f"float32: {strategy}"]
    assert differences["gradient"] < 5e-6
    assert differences["norm"] < 5e-6
    assert differences["loss"] < 5e-5  # it is a sum of gains and losses that nearly cancel
    assert differences["weights"] < 1e-6


def test_an_optimiser_in_pieces_has_the_state_of_a_whole_one_and_goes_on_from_it(found):
    assert found["adam"]["tensors"][0] == found["adam"]["tensors"][1] > 0
    assert found["adam"]["largest"] < 1e-4  # squares of gradients, as a share of each tensor's largest
    assert found["resumed"] == {"state": True, "weights": True}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_gradient_that_is_not_finite_in_one_process_is_left_out_in_all(found, strategy):
    assert found[f"nan: {strategy}"] == [[True, 2], [True, 2]]


def test_memory_that_falls_short_in_one_process_changes_nothing_but_the_size_of_micro_batches(found):
    assert found["halved"]["rows"] == [[3, 3], [3, 3]]
    assert found["halved"]["gradient"] < 5e-6
    assert found["halved"]["weights"] < 1e-6


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_the_rollouts_of_two_processes_are_those_of_one(found, backend):
    sampled = found[f"sampled: {backend}"]
    assert sampled["tokens"]
    assert sampled["examples"]
    assert sampled["lengths"][0] <= 2  # very unequal
    assert sampled["lengths"][1] >= 30
    assert found["one prompt"] == 2


def test_what_the_first_process_asks_a_server_for_all_get(found):
    assert found["asked"]


@pytest.mark.parametrize("name", ["accuracy", "remembers", "whole_batch"])
def test_the_scores_of_two_processes_are_those_of_one(found, name):
    scored = found[f"scored: {name}"]
    assert scored["total"]
    assert scored["status"]
    assert scored["reasons"]
    assert scored["logged"]


def test_a_reward_with_a_state_sees_everything_in_the_first_process(found):
    assert found["scored: remembers"]["calls"] == [15, 0]
    assert found["scored: remembers"]["state"] == {"remembers": 15}


def test_processes_know_their_place(found):
    assert found["numbers"] == {
        "gathered": [0, 1],
        "share": ["slice(0, 2, None)", "slice(2, 5, None)"],
        "added": [[2.0, 2.0, 2.0], [4, 4], [2.0, 2.0]],
    }
    assert found["refused"] == "process 1 has another thing than process 0; all must have the same"
