"""Both engines compute the same, for every variant that TRL has; and a broken one is caught, by the right name."""

import dataclasses
import json

import pytest
import torch

from grpo_lab.algorithm.kl import KL_ESTIMATORS, k3
from grpo_lab.algorithm.weights import token_weights
from grpo_lab.assemble import assemble
from grpo_lab.compare import native_readout, parity, report
from grpo_lab.compare.gates import first_failure
from grpo_lab.compare.parity import CASES, Case, compare
from grpo_lab.engines import trl_probe
from grpo_lab.engines.trl_config import unsupported
from grpo_lab.engines.update import GrpoLoss
from grpo_lab.errors import SetupError
from grpo_lab.policy.forward import completion_logps
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import Algorithm
from grpo_lab.scoring import bind
from grpo_lab.types import Batch, LogpsAndEntropy

AGAINST = {"rloo": "RLOOTrainer", "reinforce_pp": "float64 sheet", "reinforce_pp_baseline": "float64 sheet"}
VARIANTS = dict(report.variants(Algorithm()))
PASSES = [(2, 1, 1), (1, 2, 4), (2, 2, 1), (2, 2, 4)]  # iterations, mini-batches, micro-batches


@pytest.fixture(scope="module")
def toy(tmp_path_factory, toy_text, tokenizer, spread):
    """The toy recipe's GRPO stage with a model whose distributions are far from uniform."""
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(toy_text)
    of = report.subject(assemble(load(path)), None, 4)
    spread(of.policy.model.parameters(), 0.15)
    return of


def with_algorithm(of, **algorithm):
    return with_variant(of, Algorithm(**algorithm))


def with_variant(of, algorithm):
    stage = of.stage.model_copy(update={"algorithm": algorithm})
    return dataclasses.replace(of, stage=stage, rewards=bind(stage.reward_terms, of.plan.registry))


def run(of, case):
    return compare(of.policy, of.examples, of.rewards, of.stage, case, seed=of.seed)


def failures(found):
    return [(check.quantity, check.difference, check.gate) for check in found.checks if not check.passed]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_equals_trl(toy, variant, case):
    algorithm = VARIANTS[variant]
    found = run(with_variant(toy, algorithm), case)
    assert failures(found) == []
    assert found.against == AGAINST.get(algorithm.preset, "GRPOTrainer")
    assert found.case == case.name
    expected = {"rewards", "advantages", "log-probs", "loss", "gradient", "weights"}
    expected |= {"reference log-probs"} if algorithm.beta > 0 else set()
    expected |= {"KL"} if algorithm.beta > 0 and algorithm.kl_placement == "loss" else set()
    assert expected <= {check.quantity for check in found.checks}


@pytest.mark.parametrize("passes", PASSES, ids=str)
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_native_equals_trl_where_a_batch_is_used_more_than_once(toy, preset, passes):
    iterations, minibatches, accumulation = passes
    of = with_algorithm(toy, preset=preset, beta=0.04, num_iterations=iterations, num_minibatches=minibatches)
    found = run(of, Case(off_policy=False, accumulation=accumulation))
    assert failures(found) == []
    assert [check.quantity for check in found.in_order].count("gradient") == 2 * iterations * minibatches


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.3},
        {"kl_bias_correction": True},
        {"ratio_level": "sequence", "reduction": "token"},
        {"advantage_scale": "batch"},
        {"mask_truncated_completions": True},
        {"entropy_bonus": 0.01},
        {"top_entropy_quantile": 0.2},
        {"top_entropy_quantile": 0.37, "preset": "dapo"},
        {"preset": "rloo", "surrogate": "clipped"},
    ],
    ids=lambda options: " ".join(options),
)
def test_native_equals_trl_with_options(toy, options):
    assert failures(run(with_algorithm(toy, **options), Case(off_policy=True, accumulation=1))) == []


def test_what_trl_s_grpo_trainer_lacks_goes_against_another_partner(toy):
    missing = set()
    for _, algorithm in report.variants(Algorithm()):
        of = with_variant(toy, algorithm)
        if unsupported(parity.for_parity(of.stage, num_prompts=4, accumulation=1)):
            missing.add(algorithm.preset)
    assert missing == AGAINST.keys()


@pytest.mark.parametrize("options", [{"top_entropy_quantile": 0.3}, {"entropy_bonus": 0.01}], ids=str)
def test_what_trl_takes_per_micro_batch_is_compared_with_one_and_said_so(toy, options):
    found = run(with_algorithm(toy, num_iterations=2, **options), Case(off_policy=True, accumulation=4))
    assert failures(found) == []
    assert found.case.endswith(", 1 micro-batch")
    assert any(note.startswith(next(iter(options))) for note in found.notes)


def test_the_quantile_of_every_micro_batch_is_another_loss(toy):
    """Why it is compared with one: with more, TRL keeps other tokens."""
    of = with_algorithm(toy, top_entropy_quantile=0.3)
    stage = parity.for_parity(of.stage, num_prompts=4, accumulation=4)
    recording = parity.record(of.policy, of.examples, of.rewards, stage, seed=0, off_policy=True)
    sides = (native_readout, trl_probe)
    ours, theirs = (
        side.read_out(of.policy, recording.reference, recording.rollouts, stage, rounds=1).steps[0] for side in sides
    )
    names = [check.quantity for check in parity.step_checks(ours, theirs, 1.0) if not check.passed]
    assert "gradient" in names
    assert "log-probs" not in names


# What a broken engine looks like. Each fault is put into the native side only.


def wrong_denominator(monkeypatch, of):
    """Padded positions are counted: every completion is divided by the longest one's length."""

    def weights(mask, **options):
        return token_weights(mask, **options) * mask.sum(1, keepdim=True) / mask.shape[1]

    monkeypatch.setattr("grpo_lab.batching.token_weights", weights)


def wrong_kl_direction(monkeypatch, of):
    monkeypatch.setitem(KL_ESTIMATORS, "k3", lambda logps, ref_logps: k3(ref_logps, logps))


def stale_reference(monkeypatch, of):
    """The reference is taken from the policy again instead of staying what it was."""
    monkeypatch.setattr(
        "grpo_lab.batching.reference_logps",
        lambda reference, batch, **options: completion_logps(of.policy, batch, **options),
    )


def wrong_std(monkeypatch, of):
    original = native_readout.with_advantages

    def population(batch, scores, stage):
        count = scores.total.shape[1]
        batch = original(batch, scores, stage)
        return dataclasses.replace(batch, advantages=batch.advantages * (count / (count - 1)) ** 0.5)

    monkeypatch.setattr(native_readout, "with_advantages", population)


def forgotten_temperature(monkeypatch, of):
    original = native_readout.PolicyForward
    monkeypatch.setattr(
        native_readout,
        "PolicyForward",
        lambda model, *, temperature, **options: original(model, temperature=1.0, **options),
    )


def unclipped(monkeypatch, of):
    monkeypatch.setattr(
        "grpo_lab.engines.update.clipped_surrogate", lambda ratio, advantages, **_: ratio * advantages[:, None]
    )


def penalty_upside_down(monkeypatch, of):
    monkeypatch.setitem(KL_ESTIMATORS, "k1", lambda logps, ref_logps: ref_logps - logps)


@pytest.mark.parametrize("preset", ["rloo", "reinforce_pp"])
@pytest.mark.parametrize(
    "fault, first",
    [
        (penalty_upside_down, "advantages"),
        (stale_reference, "advantages"),  # the penalty is in the reward, which comes before the log-probs
        (wrong_denominator, "loss"),
        (wrong_std, "advantages"),
    ],
)
def test_the_other_partners_catch_a_broken_engine_too(toy, monkeypatch, preset, fault, first):
    of = with_algorithm(toy, preset=preset)
    case = Case(off_policy=True, accumulation=1)
    assert run(of, case).first_failure is None
    fault(monkeypatch, of)
    assert run(of, case).first_failure == first


@pytest.mark.parametrize(
    "fault, first",
    [
        (wrong_denominator, "loss"),
        (wrong_kl_direction, "KL"),
        (stale_reference, "reference log-probs"),
        (wrong_std, "advantages"),
        (forgotten_temperature, "log-probs"),
        (unclipped, "loss"),
    ],
)
def test_a_broken_engine_fails_at_the_quantity_that_is_broken(toy, monkeypatch, fault, first):
    of = with_algorithm(toy, beta=0.04)
    stage = of.stage.model_copy(update={"sampling": of.stage.sampling.model_copy(update={"temperature": 0.8})})
    of = dataclasses.replace(of, stage=stage)
    case = Case(off_policy=True, accumulation=1)
    assert run(of, case).first_failure is None
    fault(monkeypatch, of)
    assert run(of, case).first_failure == first


def test_another_version_of_trl_is_refused():
    with pytest.raises(SetupError, match=r"private parts of trl 1\.16\.0, found 1\.17\.0; pip install trl==1\.16\.0"):
        trl_probe.check_version("1.17.0")


def test_a_difference_that_is_not_a_number_fails():
    assert first_failure([parity.Check("loss", float("nan"), 1.0)]) == "loss"


def test_recorded_batches_are_uneven_and_have_signal(toy):
    rows = parity.for_parity(toy.stage, num_prompts=4, accumulation=1)
    recording = parity.record(toy.policy, toy.examples, toy.rewards, rows, seed=0, off_policy=True)
    lengths = [[len(c.token_ids) for c in group.completions] for group in recording.rollouts.groups]
    assert sorted(lengths[0]) == [1, 5, 8, 12]
    assert all(sorted(each) == sorted(lengths[0]) for each in lengths)
    assert len({tuple(each) for each in lengths}) == 4
    total = recording.rollouts.scores.total
    assert (total.amax(1) > total.amin(1)).all()
    for group in recording.rollouts.groups:
        for completion in group.completions:
            assert completion.finished == (completion.token_ids[-1] in toy.policy.eos_ids)


# The formulas alone, in float64. Lengths are such that every weight is a power of two, so float32 weights are exact.

LENGTHS = (8, 4, 2, 2)
FORMULAS = {name: a for name, a in VARIANTS.items() if a.reward_aggregation == "sum" and a.preset not in AGAINST}
FORMULAS |= {
    "two-sided clip": Algorithm(delta=1.3),
    "two-sided clip, token reduction": Algorithm(delta=1.3, reduction="token", beta=0.0),
    "sequence ratio, token reduction": Algorithm(ratio_level="sequence", reduction="token"),
    "bias correction": Algorithm(kl_bias_correction=True),
    "bias correction, sequence ratio": Algorithm(kl_bias_correction=True, ratio_level="sequence"),
}


@pytest.mark.parametrize("variant", FORMULAS)
def test_the_loss_formula_and_its_gradient_equal_trls_in_float64(toy, variant):
    algorithm = FORMULAS[variant].model_copy(update={"sampling_attempts": 1})
    sampling = toy.stage.sampling.model_copy(update={"max_completion_length": 8})
    stage = toy.stage.model_copy(
        update={"algorithm": algorithm, "sampling": sampling, "micro_batch_size": None, "prompts_per_step": 1}
    )
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(4, 8, generator=generator, dtype=torch.float64)
    old = logps + 0.3 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    ref = logps + 0.3 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    weights = token_weights(mask, reduction=algorithm.reduction, max_completion_length=8).double()
    gradients, losses = [], []
    ours, theirs = (logps.clone().requires_grad_(True) for _ in range(2))
    none = torch.zeros(1, 1)
    batch = Batch(
        none.long(), none.bool(), torch.zeros(4).long(), mask.long(), mask,
        old_logps=old, ref_logps=ref, advantages=advantages, loss_weights=weights,
    )  # fmt: skip
    losses.append(GrpoLoss(algorithm)(LogpsAndEntropy(ours, torch.zeros_like(ours)), batch)[0])
    losses.append(
        trl_probe.formula_loss(stage, logps=theirs, old_logps=old, ref_logps=ref, advantages=advantages, mask=mask)
    )
    for loss, values in zip(losses, (ours, theirs), strict=True):
        gradients.append(torch.autograd.grad(loss, values)[0])
    gate = 1e-6 if algorithm.surrogate == "sapo" else 1e-9  # TRL builds SAPO's temperatures in float32
    assert abs(losses[0].item() - losses[1].item()) <= gate
    assert float((gradients[0] - gradients[1]).abs().max()) <= gate
    assert float(gradients[0].abs().max()) > 1e-3


# The command line


def test_parity_prints_what_it_did_and_passes(cli, toy_recipe):
    ran = cli("compare", toy_recipe, "--parity", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["passed"] is True
    assert found["versions"]["trl"] == "1.16.0"
    assert [case["first_failure"] for case in found["cases"]] == [None, None]
    for tried in ("position ids", "dropout", "an empty completion", "could not be scored", "equal rewards"):
        assert sum(tried in each for each in found["by_design"]) == 1, tried


def test_a_failed_gate_exits_with_1_and_names_the_quantity(cli, toy_recipe, monkeypatch):
    wrong_kl_direction(monkeypatch, None)
    ran = cli("compare", toy_recipe, "--parity")
    assert ran.code == 1
    assert "FAILED; first quantity that differs: KL" in ran.out


def test_a_key_that_trl_lacks_is_named(cli, toy_recipe):
    ran = cli("compare", toy_recipe, "stages.grpo.algorithm.kl_estimator=k1", "--parity")
    assert ran.code == 3
    assert "algorithm.kl_estimator" in ran.err


def test_prompts_that_do_not_fit_the_mini_batches_are_refused(cli, toy_recipe):
    ran = cli("compare", toy_recipe, "--parity", "--prompts", 3)
    assert ran.code == 2
    assert "--prompts 3: must be a multiple of algorithm.num_minibatches (2)" in ran.err


def test_the_table_of_presets_says_what_was_not_compared(cli, toy_recipe, monkeypatch):
    monkeypatch.setattr(report, "PRESETS", {"grpo": {}, "rloo": {}, "reinforce_pp": {}})
    monkeypatch.setattr("grpo_lab.compare.sheet.covers", lambda algorithm: False)
    ran = cli("compare", toy_recipe, "--parity", "--presets")
    assert ran.code == 0
    assert ran.out.count("pass") == 1 + 4 + 4  # both cases with a KL and without, and the verdict
    assert "RLOOTrainer" in ran.out
    for beta in ("0.01", "0"):
        assert f"reinforce_pp (beta {beta}): not compared. algorithm.advantage_baseline" in ran.out
