import pytest

from grpo_lab.assemble import assemble
from grpo_lab.errors import RewardError
from grpo_lab.policy.load import load_policy
from grpo_lab.recipe import load
from grpo_lab.stages.grpo import measure_policy


@pytest.fixture
def policy_and_plan(toy_recipe):
    plan = assemble(load(toy_recipe))
    return load_policy(plan.recipe.model, plan.tokenizer, seed=0), plan.stages[1]


def test_the_same_policy_measures_the_same_each_time(policy_and_plan):
    policy, plan = policy_and_plan
    assert measure_policy(policy, plan, seed=0) == measure_policy(policy, plan, seed=0)
    assert measure_policy(policy, plan, seed=0).rows != measure_policy(policy, plan, seed=1).rows


def test_each_held_out_prompt_is_answered_once_greedily_and_as_often_as_asked_by_sampling(policy_and_plan):
    policy, plan = policy_and_plan
    for num_samples, expected in ((None, 2), (0, 0), (3, 3)):  # None: the recipe's
        rows = measure_policy(policy, plan, seed=0, num_samples=num_samples).rows
        for example in plan.held_out:
            arms = [row["arm"] for row in rows if row["id"] == example.id]
            assert arms == ["greedy"] + ["sampled"] * expected


def test_the_greedy_answers_do_not_depend_on_the_seed(policy_and_plan):
    policy, plan = policy_and_plan
    first, second = (measure_policy(policy, plan, seed=seed, num_samples=0).rows for seed in (0, 1))
    assert first == second


def test_rewards_that_fail_on_held_out_answers_are_an_error(toy_recipe):
    (toy_recipe.parent / "p.py").write_text(
        "from grpo_lab.scoring import reward\n\n@reward\ndef broken(completion):\n    raise KeyError('x')\n"
    )
    text = toy_recipe.read_text().replace("model:\n", "plugins: [./p.py]\nmodel:\n", 1)
    toy_recipe.write_text(text.replace("{name: accuracy}", "{name: broken}"))
    plan = assemble(load(toy_recipe))
    policy = load_policy(plan.recipe.model, plan.tokenizer, seed=0)
    with pytest.raises(RewardError) as error:
        measure_policy(policy, plan.stages[1], seed=0)
    assert str(error.value).startswith(
        'reward "broken": 10 of 10 completions could not be scored (max_failed_rewards: 0.25); the first: '
        "reward \"broken\" raised KeyError: 'x' (p.py:5) for example addition-test-0, completion 0"
    )
