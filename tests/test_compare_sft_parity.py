"""The native engine and TRL's SFTTrainer on the same rows: padded and packed, part and whole, in one piece and in four."""

import json
from dataclasses import replace

import pytest
import torch

from grpo_lab.assemble import assemble
from grpo_lab.compare import sft_parity
from grpo_lab.compare.sft_parity import CASES, SftCase, compare_sft, sft_subject, supervised, whole
from grpo_lab.data.examples import TrainingRow
from grpo_lab.engines import sft, trl_sft
from grpo_lab.errors import RecipeError, UsageError
from grpo_lab.recipe import load


@pytest.fixture(scope="module")
def subject(toy_text, tmp_path_factory, spread):
    """The toy's warm start, with weights far from uniform, so that a token more or less in sight would be seen."""
    file = tmp_path_factory.mktemp("toy") / "toy.yaml"
    file.write_text(toy_text)
    plan = assemble(load(file, ["model.config.attention_dropout=0.3"]))
    made = sft_subject(plan, supervised(plan, "warm_start"), 4)
    spread(made.policy.model.parameters(), 0.15)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_engines_agree_within_the_gates(subject, case):
    found = compare_sft(subject, case)
    assert found.first_failure is None, found.checks
    checks = {check.quantity: check for check in found.checks}
    assert checks["log-probs"].difference < 1e-5
    assert checks["gradient"].difference < 1e-6
    assert checks["weights"].difference < 1e-6
    assert "moved by" in checks["weights"].detail
    assert checks["loss"].difference <= checks["loss"].gate


@pytest.mark.parametrize(
    "change",
    ["model.lora={r: 4}", "model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 128}"],
)
def test_adapters_and_absolute_positions_agree_too(toy_recipe, change):
    plan = assemble(load(toy_recipe, [change]))
    made = sft_subject(plan, supervised(plan, "warm_start"), 4)
    found = compare_sft(made, SftCase(whole=False, packing=True, accumulation=4))
    assert found.first_failure is None, found.checks


def test_the_cases_are_all_of_them():
    assert len({case.name for case in CASES}) == len(CASES) == 8
    assert {case.accumulation for case in CASES} == {1, 4}


@pytest.mark.parametrize(
    "what, first",
    [
        ("one token more is learnt", "log-probs"),
        ("a mean of means", "loss"),
        ("rows see each other", "log-probs"),
    ],
)
def test_a_difference_is_seen(subject, monkeypatch, what, first):
    case = SftCase(whole=False, packing=True, accumulation=4)
    if what == "one token more is learnt":

        def longer(row):
            found = labelled(row)
            return {**found, "labels": [*found["labels"][:-1], -100]}

        labelled = trl_sft.labelled
        monkeypatch.setattr("grpo_lab.engines.trl_sft_probe.labelled", longer)
    elif what == "a mean of means":
        original = sft.negative_log_likelihood

        def mean(out, batch):
            return original(out, replace(batch, loss_weights=batch.loss_weights / batch.loss_weights.sum() / 4))

        monkeypatch.setattr(sft_parity, "negative_log_likelihood", mean)
    else:
        from grpo_lab.engines import trl_sft_probe

        compute = trl_sft_probe.SftProbe.compute_loss

        def blind(self, model, inputs, **options):
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
            return compute(self, model, inputs, **options)

        monkeypatch.setattr(trl_sft_probe.SftProbe, "compute_loss", blind)
    assert compare_sft(subject, case).first_failure == first


def test_all_tokens_means_all_but_the_first():
    row = whole(TrainingRow((1, 2), (3, 4), (True, False)))
    assert row == TrainingRow((1,), (2, 3, 4), (True, True, True))


def test_what_trl_lacks_is_said(subject):
    stage = subject.stage.model_copy(update={"key_tokens": "something"})
    with pytest.raises(RecipeError, match="SFTTrainer counts every token the same"):
        compare_sft(replace(subject, stage=stage), CASES[0])


def test_the_last_supervised_stage_is_meant_where_there_is_no_other_kind(subject):
    plan = subject.plan
    assert supervised(plan, None) is None
    assert supervised(plan, "grpo") is None
    assert supervised(replace(plan, stages=plan.stages[:1]), None).name == "warm_start"
    with pytest.raises(UsageError, match="twice as many rows are cut into 4 parts; give an even number"):
        sft_subject(plan, plan.stages[0], 3)


def test_the_command_compares_a_supervised_stage(cli, toy_recipe, monkeypatch):
    monkeypatch.setattr("grpo_lab.compare.report.SFT_CASES", CASES[3:4])
    ran = cli("compare", toy_recipe, "--parity", "--stage", "warm_start", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["stage"], found["passed"]) == (0, "warm_start", True)
    assert [each["case"] for each in found["cases"]] == ["as the recipe learns, packed, 4 micro-batches"]
    assert found["cases"][0]["against"] == "SFTTrainer"
    shown = cli("compare", toy_recipe, "--parity", "--stage", "warm_start")
    assert "native against SFTTrainer: as the recipe learns, packed, 4 micro-batches" in shown.out
    assert shown.out.rstrip().endswith("all gates passed")
