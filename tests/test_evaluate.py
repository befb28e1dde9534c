import math

import pytest
import torch

from grpo_lab.algorithm.intervals import bootstrap_interval
from grpo_lab.evaluate import evaluate, mean_and_interval
from grpo_lab.sampling import Decoding, NativeSampler
from grpo_lab.scoring import BoundTerm, RewardSet
from grpo_lab.scoring.mark import read_reward
from grpo_lab.types import Completion, Example, Group

NAN = math.nan
EXAMPLES = [Example(f"e{i}", f"{i}?", (5, 6), {"answer": str(i)}) for i in range(4)]


class Script:
    """A sampler that answers from a list: texts[p][g]. A text with "..." was cut off."""

    def __init__(self, texts):
        self.texts = texts
        self.calls = []

    def sync(self, policy):
        pass

    def sample(self, examples, *, num_generations, seed):
        self.calls.append((num_generations, seed))
        rows = zip(examples, self.texts, strict=True)
        return [Group(example, tuple(map(self.completion, texts[:num_generations]))) for example, texts in rows]

    @staticmethod
    def completion(text):
        return Completion(text, tuple(range(len(text))), not text.endswith("..."))


def accuracy_strict(completion, *, answer):
    return completion.text == answer


def size(completion):
    return None if completion.text == "skip" else len(completion.text) / 2


def rewards(*functions):
    return RewardSet(tuple(BoundTerm(read_reward(f, name=f.__name__, source="test"), f.__name__) for f in functions))


GREEDY = Script([["0"], ["1"], ["two..."], ["3"]])
SAMPLED = Script([["0", "0", "x"], ["y", "y", "y"], ["2", "z", "z..."], ["3", "3", "3"]])


def run(functions=(accuracy_strict,), **settings):
    given = {"greedy": GREEDY, "sampled": SAMPLED, "num_samples": 3, "seed": 7, **settings}
    return evaluate(EXAMPLES, rewards(*functions), **given)


def test_greedy_accuracy_is_a_share_with_its_wilson_interval():
    metrics = run().metrics
    assert metrics["greedy/accuracy_strict/mean"] == 0.75
    assert metrics["greedy/accuracy_strict/low"] == pytest.approx(0.3006, abs=1e-4)  # Wilson, 3 of 4
    assert metrics["greedy/accuracy_strict/high"] == pytest.approx(0.9544, abs=1e-4)
    assert metrics["greedy/mean_length"] == (1 + 1 + 6 + 1) / 4
    assert metrics["greedy/clipped_ratio"] == 0.25


def test_sampled_accuracy_is_a_mean_over_prompts_with_its_bootstrap_interval():
    metrics = run().metrics
    assert metrics["sampled/accuracy_strict/mean"] == pytest.approx((2 / 3 + 0 + 1 / 3 + 1) / 4)
    expected = bootstrap_interval(torch.tensor([2 / 3, 0, 1 / 3, 1]))
    assert (metrics["sampled/accuracy_strict/low"], metrics["sampled/accuracy_strict/high"]) == pytest.approx(expected)
    assert metrics["sampled/clipped_ratio"] == pytest.approx(1 / 12)


def test_pass_at_k_is_of_the_strict_accuracy_of_the_samples():
    metrics = run(pass_at=(1, 2, 3)).metrics
    # right: 2, 0, 1, 3 of 3. pass@2 = 1 - C(wrong, 2) / C(3, 2)
    assert metrics["pass@1"] == pytest.approx((2 / 3 + 0 + 1 / 3 + 1) / 4)
    assert metrics["pass@2"] == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)
    assert metrics["pass@3"] == pytest.approx((1 + 0 + 1 + 1) / 4)


def test_the_metrics_names_are_these():
    names = set(run((accuracy_strict, size), pass_at=(1,)).metrics)
    terms = ("accuracy_strict", "size", "reward")
    arm = {f"{term}/{part}" for term in terms for part in ("mean", "low", "high")} | {"mean_length", "clipped_ratio"}
    assert names == {"num_prompts", "pass@1"} | {f"{name}/{each}" for name in ("greedy", "sampled") for each in arm}


def test_without_samples_there_is_only_the_greedy_arm():
    for settings in ({"sampled": None}, {"num_samples": 0}):
        result = run(pass_at=(1,), **settings)
        assert {name.partition("/")[0] for name in result.metrics} == {"num_prompts", "greedy"}
        assert {row["arm"] for row in result.rows} == {"greedy"}


def test_without_strict_accuracy_there_is_no_pass_at_k():
    assert "pass@1" not in run((size,), pass_at=(1,)).metrics


def test_every_completion_has_a_row():
    rows = run().rows
    assert [(row["arm"], row["id"], row["sample"]) for row in rows] == [
        *[("greedy", f"e{p}", 0) for p in range(4)],
        *[("sampled", f"e{p}", g) for p in range(4) for g in range(3)],
    ]
    assert rows[2] == {
        "arm": "greedy",
        "id": "e2",
        "unit": "e2",
        "sample": 0,
        "prompt": "2?",
        "completion": "two...",
        "answer": "2",
        "num_tokens": 6,
        "finished": False,
        "terms": {"accuracy_strict": 0.0},
        "reward": 0.0,
    }
    assert [row["reward"] for row in rows if row["id"] == "e0"] == [1, 1, 1, 0]


def test_each_arm_has_noise_of_its_own_that_the_seed_decides():
    greedy, sampled = Script(GREEDY.texts), Script(SAMPLED.texts)
    for seed in (7, 7, 8):
        run(greedy=greedy, sampled=sampled, seed=seed)
    assert [count for count, _ in greedy.calls + sampled.calls] == [1] * 3 + [3] * 3
    seeds = [seed for _, seed in greedy.calls + sampled.calls]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[3] == seeds[4] != seeds[5]
    assert len(set(seeds)) == 4


def test_a_term_that_does_not_apply_is_out_of_its_mean():
    script = Script([["skip"], ["ab"], ["abcd"], ["skip"]])
    metrics = run((size,), greedy=script, sampled=None).metrics
    assert metrics["greedy/size/mean"] == (1 + 2) / 2
    nothing = run((size,), greedy=Script([["skip"]] * 4), sampled=None).metrics
    assert set(nothing) == {"num_prompts", "greedy/mean_length", "greedy/clipped_ratio"}


def test_an_interval_is_over_prompts_and_not_over_samples():
    values = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, NAN, 0.0], [NAN, NAN, NAN]])
    mean, low, high = mean_and_interval(values)
    assert mean == 0.5
    assert (low, high) == pytest.approx(bootstrap_interval(torch.tensor([1.0, 0.0, 0.5])))


def test_prompts_that_are_right_in_every_sample_have_an_interval_with_a_width():
    assert mean_and_interval(torch.ones(200, 2)) == pytest.approx((1.0, 0.981154, 1.0), abs=1e-6)  # Wilson, 200 of 200
    mixed = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, NAN]])
    assert mean_and_interval(mixed) == mean_and_interval(mixed[:, :1])


@pytest.mark.parametrize("values", [[[0.0], [0.5], [1.0]], [[0.0], [2.0], [2.0]], [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
def test_prompts_that_are_not_wholly_0_or_1_have_a_bootstrap_interval(values):
    per_prompt = torch.tensor(values).mean(1)
    assert mean_and_interval(torch.tensor(values))[1:] == pytest.approx(bootstrap_interval(per_prompt))


def test_measuring_twice_gives_the_same_and_leaves_the_policy_as_it_was(tiny_policy, make_examples):
    def measure():
        greedy = NativeSampler(tiny_policy, Decoding(6, temperature=0.0))
        sampled = NativeSampler(tiny_policy, Decoding(6))
        return evaluate(
            make_examples(), rewards(size), greedy=greedy, sampled=sampled, num_samples=2, seed=0, pass_at=()
        )

    before = {name: tensor.clone() for name, tensor in tiny_policy.model.state_dict().items()}
    first, second = measure(), measure()
    assert first == second
    assert len(first.rows) == 3 + 6
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_policy.model.state_dict().items())
