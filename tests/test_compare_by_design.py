"""Where the engines differ on purpose, `compare --parity` shows it: each difference is tried out, not only said."""

import dataclasses
import re

import pytest
import torch

from grpo_lab.assemble import assemble
from grpo_lab.compare import by_design, native_readout, report
from grpo_lab.compare.parity import CASES, LOGP_GATE, compare, for_parity, position_gap
from grpo_lab.compare.recording import record
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import Algorithm

SIZES = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: 128"
MODELS = {
    "llama": f"{{model_type: llama, {SIZES}, intermediate_size: 64, attention_dropout: 0.3}}",
    "gpt2": f"{{model_type: gpt2, {SIZES}, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}",  # absolute positions
}


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory, toy_text, spread):
    """The toy recipe's GRPO stage with G = 8, on one of the models above; weights far from 0."""
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(toy_text)

    def build(model="llama"):
        keys = [f"model.config={MODELS[model]}", "stages.grpo.sampling.num_generations=8"]
        of = report.subject(assemble(load(path, [*keys, "stages.grpo.algorithm.num_minibatches=1"])), None, 4)
        spread(of.policy.model.parameters(), 0.15)
        return of

    return build


@pytest.fixture(scope="module")
def recorded(subject_of):
    """What the parts of `by_design` are given: a policy, its reference, rollouts and a stage, without a KL."""
    of = subject_of()
    stage = of.stage.model_copy(update={"algorithm": Algorithm(beta=0.0)})
    stage = for_parity(stage, num_prompts=4, accumulation=1)
    recording = record(of.policy, of.examples, of.rewards, stage, seed=0, off_policy=False)
    return of.policy, None, recording.rollouts, stage


def test_an_empty_completion_stops_trl_and_in_ours_is_as_if_it_were_not_there(recorded):
    line = by_design.with_an_empty_completion(*recorded)
    assert "TRL stops with an IndexError (list index out of range)" in line
    assert "the step is made of 31 of 32 completions" in line
    policy, _, rollouts, stage = recorded
    first, *others = rollouts.groups
    nothing = dataclasses.replace(first.completions[0], token_ids=())
    emptied = dataclasses.replace(first, completions=(nothing, *first.completions[1:]))
    batch = native_readout.prepared(policy, None, dataclasses.replace(rollouts, groups=(emptied, *others)), stage)
    assert float(batch.loss_weights.sum()) == pytest.approx(1.0)
    assert float(batch.loss_weights[0].sum()) == 0.0


def test_an_unscored_completion_stays_in_trl_s_denominator(recorded):
    line = by_design.with_an_unscored_completion(*recorded)
    assert float(re.search(r"gradient is ([\d.]+) times ours", line)[1]) == pytest.approx(31 / 32, abs=1e-4)


def test_equal_rewards_have_an_advantage_in_trl_and_none_in_ours(recorded):
    line = by_design.with_equal_rewards(*recorded)
    trl, ours = re.search(r"advantages up to (\S+) in TRL \(rounding\), and (\S+) in ours", line).groups()
    assert float(trl) > 1e-4
    assert float(ours) == 0.0


def test_dropout_moves_log_probs_where_there_is_any_and_the_model_stays_as_it_was(subject_of):
    of = subject_of()
    flags = [module.training for module in of.policy.model.modules()]
    state = torch.get_rng_state()
    assert by_design.dropout_gap(of.policy, of.examples) > 1e-3
    assert [module.training for module in of.policy.model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert by_design.dropout_gap(subject_of("gpt2").policy, of.examples) == 0.0


def test_the_engines_are_equal_on_a_model_that_has_dropout(subject_of):
    """In TRL's training mode, where its own switch leaves attention's dropout on."""
    of = subject_of()
    assert compare(of.policy, of.examples, of.rewards, of.stage, CASES[0], seed=0).first_failure is None


def test_a_model_with_absolute_positions_is_off_by_what_trl_leaves_out_and_equal_without_padding(subject_of):
    of = subject_of("gpt2")
    assert position_gap(of.policy, of.examples) > 1e-2
    assert position_gap(subject_of().policy, of.examples) < LOGP_GATE
    found = compare(of.policy, of.examples, of.rewards, of.stage, CASES[1], seed=0)
    assert found.first_failure is None
    assert any("this model needs position ids" in note for note in found.notes)


def test_every_difference_is_one_line(subject_of, monkeypatch):
    for name in ("with_an_empty_completion", "with_an_unscored_completion", "with_equal_rewards"):
        monkeypatch.setattr(by_design, name, lambda *_, name=name: name)
    of = subject_of()
    lines = by_design.by_design(of.policy, of.examples, of.rewards, of.stage, seed=0)
    assert lines[-3:] == ["with_an_empty_completion", "with_an_unscored_completion", "with_equal_rewards"]
    assert [line.partition(":")[0] for line in lines[-5:-3]] == ["position ids", "dropout"]
    rloo = of.stage.model_copy(update={"algorithm": Algorithm(preset="rloo")})
    assert "with_equal_rewards" not in by_design.by_design(of.policy, of.examples, of.rewards, rloo, seed=0)
