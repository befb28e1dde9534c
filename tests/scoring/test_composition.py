"""Scale, clip, weights by schedule, ranges, what rewards write down, and state: what a RewardSet makes of its terms."""

import math

import pytest
import torch

from grpo_lab.errors import RecipeError, RewardError
from grpo_lab.recipe import load_recipe, resolved_yaml
from grpo_lab.recipe.schema import RewardTerm, WeightSchedule
from grpo_lab.scoring import BoundTerm, RewardSet, discover
from grpo_lab.scoring.mark import read_reward, reward
from grpo_lab.scoring.notes import Notes, notes_of
from grpo_lab.scoring.terms import bound_terms
from grpo_lab.types import Completion, Example, Group, Progress

INF = math.inf


def group(name: str, *texts: str) -> Group:
    return Group(Example(name, "p", (7,), {}), tuple(Completion(text, (1, 2), True) for text in texts))


def term(function, label="r", **settings) -> BoundTerm:
    return BoundTerm(read_reward(function, name=label, source="test"), label, **settings)


def number(completion):
    return float(completion.text)


@reward(range=(0, 1))
def unit(completion):
    return float(completion.text)


def test_a_value_is_scaled_then_clipped_then_weighted():
    rewards = RewardSet((term(number, weight=3.0, scale=0.5, clip=(-1.0, 1.0)),))
    scores = rewards.score([group("a", "1", "8", "-8", "0")])
    assert scores.terms["r"].tolist() == [[0.5, 1.0, -1.0, 0.0]]
    assert scores.total.tolist() == [[1.5, 3.0, -3.0, 0.0]]


def test_a_clip_keeps_what_no_clip_would_refuse_out_of_the_total_only_where_it_is_too_large():
    scores = RewardSet((term(number, clip=(None, 1.0)),)).score([group("a", "1e19", "1e17")])
    assert scores.status["r"] == (("non_finite", "ok"),)  # a value that no mean can hold is a failure, clipped or not
    assert scores.terms["r"][0, 1] == 1.0


def test_a_gate_sees_the_clipped_value():
    gated = term(unit, "b", only_if="r")
    scores = RewardSet((term(number, clip=(None, 0.0)), gated)).score([group("a", "1")])
    assert scores.status["b"] == (("gated",),)


@pytest.mark.parametrize("step, weight", [(0, 2.0), (1, 1.5), (2, 1.0), (4, 0.0), (9, 0.0)])
def test_a_weight_moves_in_a_line_and_then_stays(step, weight):
    rewards = RewardSet((term(number, weight=WeightSchedule(start=2.0, end=0.0, steps=4)),))
    scores = rewards.score([group("a", "1", "3")], Progress(step, 10))
    assert scores.weights == {"r": weight}
    assert scores.total.tolist() == [[weight, 3 * weight]]
    assert rewards.score([group("a", "1")]).weights == {"r": 0.0}  # an evaluation: as at the end


@pytest.mark.parametrize(
    "settings, gated, expected",
    [
        ({}, {}, (0.0, 1.0)),
        ({"weight": -2.0}, {}, (-2.0, 0.0)),
        ({"scale": 4.0, "clip": (1.0, 3.0)}, {}, (1.0, 3.0)),
        ({"scale": 4.0, "clip": (1.0, 3.0)}, {"only_if": "gate"}, (0.0, 3.0)),
        ({"weight": WeightSchedule(start=-1.0, end=2.0, steps=5)}, {}, (-1.0, 2.0)),
        ({"clip": (None, 0.5)}, {}, (0.0, 0.5)),
    ],
)
def test_the_range_of_a_term_follows_from_what_its_mark_says(settings, gated, expected):
    assert term(unit, **settings, **gated).weighted_range == expected


def test_without_a_range_a_clip_gives_one_and_the_sum_knows_what_it_knows():
    assert term(number).weighted_range == (-INF, INF)
    assert term(number, weight=0.0).weighted_range == (0.0, 0.0)
    assert term(number, clip=(0.0, 2.0)).weighted_range == (0.0, 2.0)
    assert RewardSet((term(unit), term(number, "s", clip=(None, 2.0), weight=0.5))).range == (-INF, 2.0)


def test_the_recipes_words_reach_the_term_and_a_clip_without_room_is_refused():
    (bound,) = bound_terms([RewardTerm(name="length", scale=2, clip=(None, 0.5), weight=3)], discover())
    assert (bound.scale, bound.clip, bound.weight) == (2.0, (None, 0.5), 3.0)
    for clip in ((1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="lowest below highest"):
            RewardTerm(name="length", clip=clip)


def test_a_schedule_in_a_recipe_is_written_out_and_read_again_and_a_wrong_key_is_named(toy_recipe):
    terms = "stages.grpo.rewards=[{name: length, clip: [null, 0.5], weight: {start: 1, end: 0, steps: 5}}]"
    recipe = load_recipe(toy_recipe, [terms])
    assert recipe.stages["grpo"].rewards[0].weight == WeightSchedule(start=1.0, end=0.0, steps=5)
    toy_recipe.write_text(resolved_yaml(recipe))
    assert load_recipe(toy_recipe).stages == recipe.stages
    with pytest.raises(RecipeError, match=r"weight.stop: unknown key"):
        load_recipe(toy_recipe, ["stages.grpo.rewards=[{name: length, weight: {start: 1, stop: 0, steps: 5}}]"])


# what TRL hands to rewards


def logging(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("size", [len(text) for text in completions])
    log_metric("done", trainer_state.global_step / trainer_state.max_steps)
    return [1.0] * len(completions)


def test_what_a_reward_writes_down_is_kept_by_group_and_by_call():
    async def later(completions, log_extra, log_metric):
        log_extra("size", [object] * len(completions))
        log_metric("done", 1)
        return [0.0] * len(completions)

    scores = RewardSet((term(logging, "one"), term(later, "two"))).score(
        [group("a", "x", "yy"), group("b", "", "z")], Progress(2, 8, updates=3)
    )
    assert scores.extra == {"size": ((1, 2), (0, 1)), "two.size": ((f"{object}",) * 2,) * 2}
    assert scores.logged == {"done": (0.25, 1.0)}


def test_the_trainers_state_counts_optimiser_steps_and_an_evaluation_is_at_the_end():
    seen = []

    def state(completions, trainer_state=None):
        seen.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
        return [0.0] * len(completions)

    rewards = RewardSet((term(state),))
    rewards.score([group("a", "x")], Progress(2, 8, updates=3))
    rewards.score([group("a", "x")])
    assert seen == [(6, 24, 0.25), (1, 1, 1.0)]


def test_a_column_of_the_wrong_length_is_the_rewards_failure():
    def short(completions, log_extra):
        log_extra("size", [1])
        return [0.0] * len(completions)

    scores = RewardSet((term(short),)).score([group("a", "x", "y")])
    assert scores.status["r"] == (("error", "error"),)
    assert 'ValueError: log_extra: "size" has 1 values for 2 completions' in scores.reasons["r"]


def test_a_copy_of_the_notes_in_another_process_can_be_taken_over():
    mine, copy = Notes(2), Notes(2)
    copy.log_extra("size", [1, 2])
    copy.log_metric("done", 0.5)
    arguments = mine.arguments(Progress(0, 1))
    found = notes_of(arguments)
    assert found is mine
    found.add(copy.plain())
    assert mine == copy
    assert notes_of({"completions": []}) is None


# state


class Counter:
    """Pays a little more for every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completion):
        self.calls += 1
        return float(self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Forgetful:
    def __call__(self, completion):
        return 0.0


def test_a_stateful_reward_goes_on_from_its_state():
    first, second = RewardSet((term(Counter()), term(unit, "u"))), RewardSet((term(Counter()), term(unit, "u")))
    first.score([group("a", "0", "0")])
    state = first.state_dict()
    assert state == {"r": {"calls": 2}}
    second.load_state_dict(state)
    assert torch.equal(second.score([group("a", "0")]).terms["r"], torch.tensor([[3.0]]))
    assert first.inexact_because() == []


def test_an_object_without_a_state_to_keep_makes_the_run_inexact_and_a_function_does_not():
    assert RewardSet((term(unit, "u"), term(Forgetful(), "f"))).inexact_because() == [
        'reward "f" is an object without state_dict and load_state_dict: what it remembers is lost on resume'
    ]


def test_a_state_that_is_no_json_names_its_reward():
    counter = Counter()
    counter.calls = {1, 2}
    with pytest.raises(RewardError, match='reward "r": state_dict\\(\\) must give JSON values: .*set'):
        RewardSet((term(counter),)).state_dict()
