"""The whole loop on a toy task: write tokens from one eighth of the vocabulary."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from grpo_lab.data.stream import PromptStream
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.native import Parts, train
from grpo_lab.errors import RewardError
from grpo_lab.policy.forward import PolicyForward, frozen_copy
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.scoring import BoundTerm, RewardSet
from grpo_lab.scoring.mark import read_reward


def share_of_fives(completion):
    return sum(token % 8 == 5 for token in completion.token_ids) / len(completion.token_ids)


@pytest.fixture
def parts_of(make_policy, make_examples, tmp_path):
    """The loop's parts for a stage, with a new policy each time."""

    def build(*, reward=share_of_fives, steps=12, backend="native", optimizer=None, model=None, **algorithm):
        stage = GrpoStage(
            kind="grpo",
            data={"source": "task", "path": "addition", "prompt": "prompt"},
            steps=steps,
            optimizer={"learning_rate": 0.01, **(optimizer or {})},
            sampling={"num_generations": 8, "max_completion_length": 5, "backend": backend},
            rewards=[{"name": "share"}],
            algorithm={"beta": 0.0, **algorithm},
            prompts_per_step=4,
            micro_batch_size=16,
        )
        policy = make_policy(hidden_size=16, num_hidden_layers=1, **(model or {}))
        return Parts(
            name="toy",
            stage=stage,
            seed=0,
            policy=policy,
            reference=frozen_copy(policy) if stage.algorithm.beta > 0 else None,
            prompts=PromptStream(make_examples([f"{a}+{b}=" for a in range(3) for b in range(3)]), 4, seed=0),
            sampler=make_sampler(backend, policy, Decoding.of(stage.sampling)),
            rewards=RewardSet((BoundTerm(read_reward(reward, name="share", source="test"), "share"),)),
            learner=Learner(
                PolicyForward(policy.model, temperature=stage.sampling.temperature),
                stage.optimizer,
                total_steps=steps * stage.algorithm.num_iterations * stage.algorithm.num_minibatches,
                micro_batch_size=stage.micro_batch_size,
            ),
            folder=tmp_path,
        )

    return build


def run(parts, *, start=0):
    ends = []
    train(parts, start=start, report=ends.append)
    return ends


def weights(parts):
    return {name: tensor.clone() for name, tensor in parts.policy.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backend": "hf"},
        {"beta": 0.01, "num_iterations": 2, "num_minibatches": 2},
        {"preset": "dr_grpo", "optimizer": {"name": "sgd", "learning_rate": 3.0, "momentum": 0.9}},
    ],
    ids=["native", "hf", "two iterations with KL", "dr_grpo with sgd"],
)
def test_reward_rises_on_a_toy_task(parts_of, settings):
    rewards = [end.metrics["reward"] for end in run(parts_of(**settings, steps=25))]
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-3:]) / 3 > 0.7


def test_the_same_parts_train_the_same_policy_bit_for_bit(parts_of):
    first, second = parts_of(steps=4, beta=0.04, num_iterations=2), parts_of(steps=4, beta=0.04, num_iterations=2)
    ends = run(first), run(second)
    assert [end.metrics for end in ends[0]] == [end.metrics for end in ends[1]]
    assert [end.groups for end in ends[0]] == [end.groups for end in ends[1]]
    assert same(weights(first), weights(second))


def test_every_step_is_reported_once_with_its_groups_and_scores(parts_of):
    parts = parts_of(steps=3)
    ends = run(parts)
    assert [(end.stage, end.step, end.num_steps) for end in ends] == [("toy", 1, 3), ("toy", 2, 3), ("toy", 3, 3)]
    for step, end in enumerate(ends):
        assert [group.example for group in end.groups] == parts.prompts.at(step)
        assert [len(group.completions) for group in end.groups] == [8] * 4
        expected = [[share_of_fives(completion) for completion in group.completions] for group in end.groups]
        torch.testing.assert_close(end.scores.total, torch.tensor(expected))
        assert end.metrics["reward"] == pytest.approx(float(end.scores.total.double().mean()))


def test_the_loop_goes_on_from_the_step_that_it_is_given(parts_of):
    whole, halves = parts_of(steps=4), parts_of(steps=4)
    expected = run(whole)

    class Stop(Exception):
        pass

    def stop_after_two(end):
        if end.step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(halves, start=0, report=stop_after_two)
    rest = run(halves, start=2)
    assert [end.step for end in rest] == [3, 4]
    assert [end.metrics for end in rest] == [end.metrics for end in expected[2:]]
    assert same(weights(halves), weights(whole))


def test_at_the_first_step_the_policy_is_its_own_reference(parts_of):
    first, second, *_ = run(parts_of(steps=2, beta=0.04))
    assert first.metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert first.metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert second.metrics["kl"] > 1e-4
    assert first.metrics["lab/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert first.metrics["clip_ratio/region_mean"] == 0


def test_every_step_has_noise_of_its_own(parts_of, make_examples):
    parts = parts_of(reward=lambda completion: 1.0, steps=2)  # the policy stays the same, and so do the prompts
    prompts = PromptStream(make_examples(("1+2=", "3+4=", "5+6=", "7+8=")), 4, seed=0, shuffle=False)
    first, second = run(replace(parts, prompts=prompts))
    for one, other in zip(first.groups, second.groups, strict=True):
        assert one.example == other.example
        assert not set(one.completions) & set(other.completions)


def test_gradient_checkpointing_is_really_on_and_changes_nothing_with_dropout_configured(parts_of):
    runs = []
    for model in ({}, {"gradient_checkpointing": True, "attention_dropout": 0.5}):
        parts = parts_of(steps=2, num_iterations=2, model=model)
        calls = []
        attention = parts.policy.model.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        ends = run(parts)
        runs.append(([end.metrics for end in ends], [end.groups for end in ends], sum(calls)))
    (metrics, groups, calls), (checkpointed_metrics, checkpointed_groups, checkpointed_calls) = runs
    assert checkpointed_groups == groups
    for one, other in zip(checkpointed_metrics, metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert (calls, checkpointed_calls) == (8, 16)  # 2 steps, 2 iterations, 2 micro-batches; and all once more


def test_a_constant_reward_moves_nothing(parts_of):
    parts = parts_of(reward=lambda completion: 1.2, steps=2, optimizer={"weight_decay": 0.1})
    before = weights(parts)
    ends = run(parts)
    assert same(weights(parts), before)
    assert [end.metrics["frac_reward_zero_std"] for end in ends] == [1, 1]
    assert [end.metrics["grad_norm"] for end in ends] == [0, 0]


def test_a_reward_that_fails_now_and_then_does_not_stop_the_loop(parts_of):
    calls = count()

    def sometimes(completion):
        if next(calls) % 8 == 3:
            raise ValueError("no")
        return share_of_fives(completion)

    ends = run(parts_of(reward=sometimes, steps=2))
    assert [end.metrics["lab/unscored"] for end in ends] == [1 / 8, 1 / 8]
    assert all(end.scores.total[:, 3].isnan().all() for end in ends)


def test_a_reward_that_always_fails_stops_it_before_anything_is_learnt(parts_of):
    def broken(completion):
        raise ValueError("no")

    parts = parts_of(reward=broken)
    before = weights(parts)
    with pytest.raises(RewardError) as error:
        run(parts)
    assert error.value.exit_code == 5
    assert same(weights(parts), before)
