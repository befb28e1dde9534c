"""The native loss and gradient do not depend on how a batch is cut, padded or ordered; and the check notices where they do."""

import dataclasses
import json

import pytest
import torch

from grpo_lab.compare import self_check
from grpo_lab.engines.update import GrpoLoss


def checks(ran):
    return {check["quantity"]: check for check in json.loads(ran.out)["checks"]}


@pytest.mark.parametrize(
    "override",
    ["preset=grpo", "preset=dapo", "preset=gspo", "preset=gdpo", "top_entropy_quantile=0.5", "entropy_bonus=0.1"],
)
def test_cutting_padding_and_order_change_nothing(cli, toy_recipe, override):
    ran = cli("compare", toy_recipe, f"stages.grpo.algorithm.{override}", "--self", "--processes", 1, "--json")
    assert ran.code == 0, ran.err
    found = checks(ran)
    assert all(check["passed"] for check in found.values())
    for name in ("micro-batches of 1", "micro-batches of 3", "padding", "groups in another order"):
        assert f"{name}: loss" in found
        assert f"{name}: gradient" in found


def test_a_loss_that_is_a_mean_over_micro_batches_is_caught(cli, toy_recipe, monkeypatch):
    original = GrpoLoss.__call__

    def per_micro_batch(self, out, batch):
        loss, sums = original(self, out, batch)
        return loss / batch.num_rows, sums

    monkeypatch.setattr(GrpoLoss, "__call__", per_micro_batch)
    ran = cli("compare", toy_recipe, "--self", "--processes", 1, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["first_failure"] == "micro-batches of 1: loss"


def test_a_loss_that_counts_padding_is_caught(cli, toy_recipe, monkeypatch):
    original = GrpoLoss.__call__

    def by_width(self, out, batch):
        loss, sums = original(self, out, batch)
        return loss / batch.completion_mask.shape[1], sums

    monkeypatch.setattr(GrpoLoss, "__call__", by_width)
    ran = cli("compare", toy_recipe, "--self", "--processes", 1, "--json")
    assert ran.code == 1
    failed = [name for name, check in checks(ran).items() if not check["passed"]]
    assert "padding: loss" in failed


def test_the_table_is_for_people(cli, toy_recipe):
    ran = cli("compare", toy_recipe, "--self", "--processes", 1)
    assert ran.code == 0
    assert "native against itself" in ran.out
    assert ran.out.rstrip().endswith("all gates passed")
    assert torch.is_grad_enabled()


def test_real_processes_that_share_a_step_add_up_to_it(cli, toy_recipe):
    fits = "stages.grpo.algorithm.num_minibatches=1"
    ran = cli("compare", toy_recipe, fits, "--self", "--prompts", 3, "--processes", 2, "--json")  # 1 group and 2
    assert ran.code == 0, ran.err
    found = checks(ran)
    assert {"2 processes: loss", "2 processes: gradient"} <= found.keys()
    assert all(check["passed"] for check in found.values())


def test_processes_that_each_count_their_own_rows_are_caught(cli, toy_recipe, monkeypatch):
    original = self_check.over_processes

    def own_counts(policy, batch, stage, count):
        return original(policy, dataclasses.replace(batch, loss_weights=batch.loss_weights * count), stage, count)

    monkeypatch.setattr(self_check, "over_processes", own_counts)
    ran = cli("compare", toy_recipe, "--self", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["first_failure"] == "2 processes: loss"
