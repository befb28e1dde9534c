"""Both engines compute the same of an adapter that has learnt something, its reference being another adapter."""

import pytest

from grpo_lab.assemble import assemble
from grpo_lab.compare import report
from grpo_lab.compare.parity import CASES, compare
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import Algorithm
from grpo_lab.scoring import bind

AGAINST = {"rloo": "RLOOTrainer", "reinforce_pp": "float64 sheet", "reinforce_pp_baseline": "float64 sheet"}


@pytest.fixture(
    scope="module",
    params=["r: 4, alpha: 8", "r: 4, rslora: true, target_modules: [q_proj, up_proj]", "r: 4, dora: true"],
)
def adapted(request, tmp_path_factory, toy_text, spread):
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(toy_text)
    of = report.subject(
        assemble(
            load(path, [f"stages.grpo.model={{lora: {{{request.param}}}}}", "stages.grpo.algorithm.num_minibatches=1"])
        ),
        None,
        4,
    )
    spread((parameter for parameter in of.policy.model.parameters() if not parameter.requires_grad), 0.15)
    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_equals_trl_under_lora(adapted, case):
    found = compare(adapted.policy, adapted.examples, adapted.rewards, adapted.stage, case, seed=adapted.seed)
    assert [(check.quantity, check.difference, check.gate) for check in found.checks if not check.passed] == []
    compared = {check.quantity for check in found.checks}
    assert {"reference log-probs", "KL", "loss", "weights"} <= compared
    kl = next(check.detail for check in found.checks if check.quantity == "KL")
    assert float(kl.removeprefix("KL ")) > 5e-5  # not the policy's own log-probs


@pytest.mark.parametrize("preset", ["dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo"])
def test_every_partner_equals_the_native_engine_under_lora(adapted, preset):
    algorithm = Algorithm(preset=preset, num_iterations=2)
    stage = adapted.stage.model_copy(update={"algorithm": algorithm})
    rewards = bind(stage.reward_terms, adapted.plan.registry)
    found = compare(adapted.policy, adapted.examples, rewards, stage, CASES[1], seed=adapted.seed)
    assert found.first_failure is None
    assert found.against == AGAINST.get(preset, "GRPOTrainer")


def test_only_the_adapter_is_compared_and_its_second_factor_is_not_0(adapted):
    learning = {name: p for name, p in adapted.policy.model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert all(float(p.abs().max()) > 0.01 for p in learning.values())


def test_a_reference_that_is_not_given_to_trl_is_found(adapted, monkeypatch):
    """TRL would compare with a copy of the adapter as it is: a KL of 0 at the first step."""
    from grpo_lab.engines import trl_probe

    monkeypatch.setattr(trl_probe, "learned", lambda model: set())
    case = CASES[0]
    found = compare(adapted.policy, adapted.examples, adapted.rewards, adapted.stage, case, seed=adapted.seed)
    assert found.first_failure is not None
    assert "reference log-probs" in found.first_failure


def test_the_native_engine_equals_itself_under_lora(adapted):
    assert report.self_report(adapted, processes=1)["passed"]
