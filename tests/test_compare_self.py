"""The native loss and gradient do not depend on how a batch is cut, padded or ordered; and the check notices where they do."""

import json

import pytest
import torch

from grpo_lab.engines.update import GrpoLoss


def checks(ran):
    return {check["quantity"]: check for check in json.loads(ran.out)["checks"]}


@pytest.mark.parametrize(
    "override",
    ["preset=grpo", "preset=dapo", "preset=gspo", "preset=gdpo", "top_entropy_quantile=0.5", "entropy_bonus=0.1"],
)
def test_cutting_padding_and_order_change_nothing(cli, toy_recipe, override):
    ran = cli("compare", toy_recipe, f"stages.grpo.algorithm.{override}", "--self", "--json")
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
    ran = cli("compare", toy_recipe, "--self", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["first_failure"] == "micro-batches of 1: loss"


def test_a_loss_that_counts_padding_is_caught(cli, toy_recipe, monkeypatch):
    original = GrpoLoss.__call__

    def by_width(self, out, batch):
        loss, sums = original(self, out, batch)
        return loss / batch.completion_mask.shape[1], sums

    monkeypatch.setattr(GrpoLoss, "__call__", by_width)
    ran = cli("compare", toy_recipe, "--self", "--json")
    assert ran.code == 1
    failed = [name for name, check in checks(ran).items() if not check["passed"]]
    assert "padding: loss" in failed


def test_the_table_is_for_people(cli, toy_recipe):
    ran = cli("compare", toy_recipe, "--self")
    assert ran.code == 0
    assert "native against itself" in ran.out
    assert ran.out.rstrip().endswith("all gates passed")
    assert torch.is_grad_enabled()
