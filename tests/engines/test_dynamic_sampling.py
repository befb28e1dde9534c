"""Dynamic sampling: groups without signal give way to others, within a budget, as a function of (seed, step, attempt)."""

import dataclasses
import math

import pytest
import torch

from grpo_lab.data.stream import PromptStream, Stream
from grpo_lab.engines.learner import Learner
from grpo_lab.engines.native import Parts, collect, replaced, train
from grpo_lab.policy.forward import PolicyForward
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.sampling import make_sampler
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.scoring import BoundTerm, RewardSet
from grpo_lab.scoring.mark import read_reward
from grpo_lab.stages.advice import ADVICE, Advice
from grpo_lab.tracking.sinks import Sinks
from grpo_lab.tracking.stopwatch import Stopwatch
from grpo_lab.types import Attempts, Scores, StepEnd

NAN = math.nan


def taught(group):
    """Prompts that begin with 1 have a signal; the others are all right."""
    if group.example.prompt.startswith("1"):
        return [float(place % 2) for place in range(len(group.completions))]
    return [1.0] * len(group.completions)


@pytest.fixture
def parts_of(make_policy, make_examples, tmp_path):
    def build(*, attempts, prompts, reward=taught, prompts_per_step=4, steps=6, **algorithm):
        stage = GrpoStage(
            kind="grpo",
            data={"source": "task", "path": "addition", "prompt": "prompt"},
            steps=steps,
            optimizer={"learning_rate": 0.01},
            sampling={"num_generations": 4, "max_completion_length": 3},
            rewards=[{"name": "taught"}],
            algorithm={"beta": 0.0, "sampling_attempts": attempts, **algorithm},
            prompts_per_step=prompts_per_step,
        )
        policy = make_policy(hidden_size=16, num_hidden_layers=1)
        return Parts(
            name="toy",
            stage=stage,
            seed=0,
            policy=policy,
            reference=None,
            prompts=PromptStream(make_examples(prompts), prompts_per_step, seed=0),
            sampler=make_sampler("native", policy, Decoding.of(stage.sampling)),
            rewards=RewardSet((BoundTerm(read_reward(reward, name="taught", source="test"), "taught"),)),
            learner=Learner(
                PolicyForward(policy.model, temperature=1.0), stage.optimizer, total_steps=steps, micro_batch_size=None
            ),
            folder=tmp_path,
        )

    return build


HALF = [f"{first}+{second}=" for first in (1, 2) for second in range(8)]
RARE = ["1+1=", *[f"2+{second}=" for second in range(9)]]


def test_groups_without_signal_give_way_to_groups_that_have_one(parts_of):
    once = [collect(parts_of(attempts=1, prompts=HALF), step, Stopwatch()) for step in range(4)]
    often = [collect(parts_of(attempts=20, prompts=HALF), step, Stopwatch()) for step in range(4)]
    for first, found in zip(once, often, strict=True):
        assert len(found.groups) == 4
        assert all(group.example.prompt.startswith("1") for group in found.groups)
        assert found.scores.total.tolist() == [[0.0, 1.0, 0.0, 1.0]] * 4
        assert found.attempts.num_without_signal == 0
        for place, group in enumerate(first.groups):  # what had a signal at once stays, with its answers, in its place
            if group.example.prompt.startswith("1"):
                assert found.groups[place] == group
    assert any(found.attempts.used > 2 for found in often)


def test_only_what_is_missing_is_drawn_again_and_counted(parts_of):
    parts = parts_of(attempts=20, prompts=HALF)
    drawn = []
    sample = parts.sampler.sample

    def counting(examples, **options):
        drawn.append(len(examples))
        return sample(examples, **options)

    parts.sampler.sample = counting
    found = collect(parts, 1, Stopwatch())
    assert drawn[0] == 4
    assert drawn == sorted(drawn, reverse=True)
    assert found.attempts == Attempts(limit=20, used=len(drawn), num_drawn=sum(drawn), num_without_signal=0)


def test_out_of_attempts_the_step_goes_on_with_what_it_has(parts_of):
    parts = parts_of(attempts=2, prompts=["2+2=", "3+3=", "4+4=", "5+5="])
    found = collect(parts, 0, Stopwatch())
    assert (
        found.groups == collect(parts_of(attempts=1, prompts=["2+2=", "3+3=", "4+4=", "5+5="]), 0, Stopwatch()).groups
    )
    assert found.attempts == Attempts(limit=2, used=2, num_drawn=8, num_without_signal=4)
    ends = []
    train(parts, start=0, report=ends.append)
    assert [end.metrics["lab/sampling_exhausted"] for end in ends] == [1] * 6
    assert [end.metrics["grad_norm"] for end in ends] == [0] * 6


def test_every_attempt_has_prompts_and_noise_of_its_own(parts_of):
    parts = parts_of(attempts=3, prompts=[f"2+{i}=" for i in range(9)])  # nothing ever teaches
    seen = []
    sample = parts.sampler.sample
    parts.sampler.sample = lambda examples, **options: (
        seen.append((tuple(e.id for e in examples), options["seed"])) or sample(examples, **options)
    )
    for step in (0, 1):
        collect(parts, step, Stopwatch())
    assert len({seed for _, seed in seen}) == len({ids for ids, _ in seen}) == 6
    again = list(seen)
    seen.clear()
    collect(parts, 1, Stopwatch())  # without what came before
    assert seen == again[3:]


def test_a_loop_that_goes_on_from_a_step_draws_the_same_again(parts_of):
    whole, rest = [], []
    train(parts_of(attempts=5, prompts=RARE), start=0, report=whole.append)
    parts = parts_of(attempts=5, prompts=RARE)
    train(dataclasses.replace(parts, stage=parts.stage.model_copy(update={"steps": 3})), start=0, report=rest.append)
    train(parts, start=3, report=rest.append)
    assert [(end.metrics, end.groups) for end in whole] == [(end.metrics, end.groups) for end in rest]
    assert any(end.metrics["lab/sampling_attempts"] > 1 for end in whole)


def test_normalised_rewards_have_a_signal_where_any_of_them_has(parts_of):
    parts = parts_of(attempts=3, prompts=HALF, preset="gdpo", beta=0.0)
    assert collect(parts, 0, Stopwatch()).attempts.used > 1


def test_replaced_scores_keep_the_others_as_they_were():
    def scores(total, status):
        return Scores(torch.tensor(total), {"r": torch.tensor(total)}, {"r": status}, {"r": f"about {total[0][0]}"})

    mine = scores([[1.0, 1.0], [0.0, 1.0], [NAN, 2.0]], (("ok", "ok"), ("ok", "ok"), ("error", "ok")))
    others = scores([[5.0, 5.0], [3.0, 4.0]], (("ok", "ok"), ("ok", "gated")))
    versions = mine.total._version, others.total._version
    both = replaced(mine, others, {2: 1})
    assert both.total.tolist() == [[1, 1], [0, 1], [3, 4]]
    assert both.terms["r"].tolist() == [[1, 1], [0, 1], [3, 4]]
    assert both.status["r"] == (("ok", "ok"), ("ok", "ok"), ("ok", "gated"))
    assert replaced(mine, others, {}) is mine
    assert (mine.total._version, others.total._version) == versions


def test_a_stream_cannot_be_asked_for_other_items():
    with pytest.raises(TypeError, match="file order"):
        PromptStream(Stream(lambda: iter("abc")), 2, seed=0).others(0, 1)


def test_running_out_is_said_at_once_and_again_only_after_it_sufficed():
    events = []

    class Recorder(Sinks):
        def __init__(self):
            pass

        def event(self, stage, step, kind, message, details):
            events.append((step, kind, message))

    advice = Advice(Recorder())
    for step, exhausted in enumerate([0, 1, 1, 0, 1], start=1):
        advice(StepEnd("s", step, 9, {"lab/sampling_exhausted": float(exhausted)}, {}))
    assert events == [(2, "advice", ADVICE["lab/sampling_exhausted"]), (5, "advice", ADVICE["lab/sampling_exhausted"])]
