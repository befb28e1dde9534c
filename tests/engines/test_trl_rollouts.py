"""The rewards TRL gets: one function per term, one scoring call per batch, None in every term of a failed completion."""

import pytest

from grpo_lab.data.stream import PromptStream
from grpo_lab.engines.trl_dataset import LazyRows
from grpo_lab.engines.trl_rollouts import Rollouts, TrlParts
from grpo_lab.errors import RewardError
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.scoring import BoundTerm, RewardSet
from grpo_lab.scoring.mark import read_reward


@pytest.fixture
def rollouts_of(tiny_policy, make_examples, tmp_path):
    def build(*functions, max_failed=0.5, weights=None, control=None):
        weights = weights or [1.0] * len(functions)
        stage = GrpoStage(
            kind="grpo",
            engine="trl",
            data={"source": "task", "path": "addition", "prompt": "prompt"},
            steps=3,
            optimizer={"learning_rate": 0.01},
            sampling={"num_generations": 2, "max_completion_length": 4},
            rewards=[{"name": f.__name__, "weight": weight} for f, weight in zip(functions, weights, strict=True)],
            prompts_per_step=2,
            max_failed_rewards=max_failed,
            reward_control=control,
        )
        terms = [
            BoundTerm(read_reward(f, name=f.__name__, source="test"), f.__name__, term.weight)
            for f, term in zip(functions, stage.rewards, strict=True)
        ]
        prompts = PromptStream(make_examples(["1+2=", "3+4=", "5+6="]), 2, seed=0)
        return Rollouts(TrlParts("toy", stage, 0, tiny_policy, None, prompts, None, RewardSet(tuple(terms)), tmp_path))

    return build


def first_id(completion):
    """Fails on 7, abstains on nothing."""
    if completion.token_ids[0] == 7:
        raise ValueError("seven")
    return float(completion.token_ids[0])


def length(completion):
    length.calls += 1
    return float(len(completion.token_ids))


length.calls = 0


def test_a_failed_completion_is_none_in_every_term_and_every_term_is_scored_once(rollouts_of):
    rollouts, length.calls = rollouts_of(first_id, length), 0
    one, two = rollouts.reward_functions()
    ids = [[3], [4, 4], [7], [5, 5, 5]]
    assert one(completion_ids=ids, position=[2, 2, 3, 3], prompts=[], log_metric=None) == [3, 4, None, 5]
    assert two(completion_ids=ids, position=[2, 2, 3, 3]) == [1, 2, None, 3]
    assert length.calls == 4
    assert (one.__name__, two.__name__) == ("first_id", "length")


def test_a_scheduled_weight_is_in_the_values_and_the_logged_terms_are_not_weighted(rollouts_of):
    rollouts = rollouts_of(length, weights=[{"start": 1.0, "end": 0.0, "steps": 2}])
    (reward,) = rollouts.reward_functions()
    for step, factor in enumerate((1.0, 0.5, 0.0)):
        rollouts.begin()
        position = [2 * step, 2 * step, 2 * step + 1, 2 * step + 1]
        assert reward(completion_ids=[[1], [1, 2], [3], [4]], position=position) == [factor * n for n in (1, 2, 1, 1)]
        assert rollouts.scores.terms["length"].tolist() == [[1, 2], [1, 1]]
        assert rollouts.scores.total.tolist() == [[factor, 2 * factor], [factor, factor]]


def test_a_control_acts_on_totals_that_have_their_scheduled_weights(rollouts_of):
    rollouts = rollouts_of(length, first_id, weights=[{"start": 1.0, "end": 0.0, "steps": 2}, 1.0], control="shuffled")
    (total,) = rollouts.reward_functions()
    for step, factor in enumerate((1.0, 0.5, 0.0)):
        rollouts.begin()
        position = [2 * step, 2 * step, 2 * step + 1, 2 * step + 1]
        dealt = total(completion_ids=[[1], [2, 2], [3], [4, 4, 4]], position=position)
        real = [1 + factor, 2 + 2 * factor, 3 + factor, 4 + 3 * factor]
        assert rollouts.scores.real_total.flatten().tolist() == real
        assert sorted(dealt) == real


def test_the_next_batch_is_scored_anew_even_where_its_ids_are_the_same(rollouts_of):
    rollouts, length.calls = rollouts_of(length), 0
    (reward,) = rollouts.reward_functions()
    for _ in range(2):
        rollouts.begin()
        reward(completion_ids=[[1], [1], [1], [1]], position=[0, 0, 1, 1])
    assert length.calls == 8


def test_groups_are_the_stream_s_prompts_and_an_end_token_says_finished(rollouts_of):
    rollouts = rollouts_of(length)
    eos = rollouts.parts.policy.eos_ids[0]
    rollouts.reward_functions()[0](completion_ids=[[3, eos], [eos], [5, 6, 7, 8], [5]], position=[4, 4, 5, 5])
    assert [group.example for group in rollouts.groups] == rollouts.parts.prompts.at(2)
    finished = [[completion.finished for completion in group.completions] for group in rollouts.groups]
    assert finished == [[True, True], [False, False]]
    assert rollouts.groups[0].completions[0].token_ids == (3, eos)


@pytest.mark.parametrize("position", [[0, 1, 0, 1], [1, 1, 2, 2], [0, 0, 0, 0]])
def test_rows_that_are_not_whole_groups_of_one_step_are_an_error(rollouts_of, position):
    with pytest.raises(AssertionError, match="TRL gave the completions of prompts"):
        rollouts_of(length).reward_functions()[0](completion_ids=[[1]] * 4, position=position)


def test_more_failures_than_the_budget_end_the_run(rollouts_of):
    with pytest.raises(RewardError, match='reward "first_id": 2 of 4 completions'):
        rollouts_of(first_id, max_failed=0.25).reward_functions()[0](
            completion_ids=[[7], [1], [7], [2]], position=[0, 0, 1, 1]
        )


def test_prompts_are_made_when_they_are_asked_for():
    asked = []
    rows = LazyRows.of(1000, lambda position: asked.append(position) or {"position": position})
    assert len(rows) == 1000
    assert rows[3] == {"position": 3}
    assert rows.__getitems__([5, 5, 6]) == [{"position": 5}, {"position": 5}, {"position": 6}]
    assert asked == [3, 5, 5, 6]
