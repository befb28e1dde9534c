"""A sampler that does not follow the policy stops the run within two steps, with exit code 6."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from grpo_lab.errors import StaleWeightsError
from grpo_lab.policy.forward import frozen_copy
from grpo_lab.recipe.schema import Sampling
from grpo_lab.sampling import NativeSampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.stages import grpo
from grpo_lab.stages.sampler import refusing_stale
from grpo_lab.types import Example, Group, StepEnd


class NeverSynced(NativeSampler):
    """Samples from the policy as it was in the beginning. `counts`: whether it says how old its weights are."""

    def __init__(self, policy, decoding, *, counts: bool) -> None:
        super().__init__(frozen_copy(policy), decoding)
        self.counts = counts

    def sync(self, policy) -> None: ...

    def sample(self, examples, *, num_generations, seed):
        groups = super().sample(examples, num_generations=num_generations, seed=seed)
        return [replace(group, policy_version=0) for group in groups] if self.counts else groups


@pytest.fixture
def short_recipe(toy_recipe):
    """The toy recipe's GRPO stage alone, from new weights, with a reward that differs from the first step on."""
    text = toy_recipe.read_text()
    start, end = text.index("  warm_start:"), text.index("  grpo:")
    text = (text[:start] + text[end:]).replace("target: 8", "target: 5")
    toy_recipe.write_text(text)
    return toy_recipe


@pytest.mark.parametrize(
    "counts, limit, expected",
    [
        (False, None, "nats per token, more than sampling.max_logps_gap (0.001): the sampler's weights are not"),
        (True, "null", "was sampled by the policy of step 0, expected 1: the sampler has missed an update"),
    ],
    ids=["it does not say so", "it says so"],
)
def test_a_skipped_synchronisation_is_caught_within_two_steps(monkeypatch, cli, short_recipe, counts, limit, expected):
    @contextmanager
    def never_synced(context, plan, policy, *, version):
        yield NeverSynced(policy, Decoding.of(plan.stage.sampling), counts=counts)

    monkeypatch.setattr(grpo, "stage_sampler", never_synced)
    overrides = [f"output_dir={short_recipe.parent}"]
    overrides += [] if limit is None else [f"stages.grpo.sampling.max_logps_gap={limit}"]
    ran = cli("train", short_recipe, "--quiet", *overrides)
    assert ran.code == 6
    assert "step 2 of grpo: " in ran.err
    assert expected in " ".join(ran.err.split())
    stage = short_recipe.parent / "toy" / "grpo"
    assert len((stage / "metrics.jsonl").read_text().splitlines()) == 3  # the first evaluation, and both steps
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["step-000001"]  # not what step 2 has learnt


def end(*, gap: float | None, version: int | None = None) -> StepEnd:
    group = Group(Example("e", "", (1,), {}), (), version)
    return StepEnd("s", 4, 9, {} if gap is None else {"lab/sampler_gap": gap}, {}, [group])


@pytest.mark.parametrize("gap", [0.5, 0.31, float("nan")])
def test_a_gap_past_the_limit_stops(gap):
    check = refusing_stale(Sampling(num_generations=2, max_completion_length=3, max_logps_gap=0.3))
    with pytest.raises(StaleWeightsError):
        check(end(gap=gap))


@pytest.mark.parametrize("gap, limit", [(0.3, 0.3), (None, 0.3), (9.0, None)])
def test_a_gap_within_the_limit_or_without_one_goes_on(gap, limit):
    refusing_stale(Sampling(num_generations=2, max_completion_length=3, max_logps_gap=limit))(end(gap=gap))


def test_the_version_must_be_that_of_the_step_before():
    check = refusing_stale(Sampling(num_generations=2, max_completion_length=3))
    check(end(gap=None, version=3))
    for other in (2, 4):
        with pytest.raises(StaleWeightsError, match=f"e was sampled by the policy of step {other}, expected 3"):
            check(end(gap=None, version=other))


def test_one_step_off_the_version_may_also_be_the_one_before():
    sampling = {"backend": "vllm-server", "vllm": {"urls": ["http://127.0.0.1:8000"], "one_step_off": True}}
    check = refusing_stale(Sampling(num_generations=2, max_completion_length=3, **sampling))
    for version in (2, 3):
        check(end(gap=None, version=version))
    for other in (1, 4):
        with pytest.raises(StaleWeightsError, match=f"by the policy of step {other}, expected 2 or 3: "):
            check(end(gap=None, version=other))
