import dataclasses
import math

import pytest
import torch

from grpo_lab.batching import pad, pad_rows, with_advantages, with_logps
from grpo_lab.padding import length_mask, pad_left, pad_right
from grpo_lab.policy.forward import completion_logps, frozen_copy
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Batch, Completion, Example, Group, Scores

NAN = math.nan
PROMPTS = [(20, 21, 22, 23), (30,), (40, 41), (45, 46, 47)]


def stage(*, max_completion_length=8, temperature=1.0, micro_batch_size=None, **algorithm):
    return GrpoStage(
        kind="grpo",
        data={"source": "task", "path": "addition", "prompt": "prompt"},
        steps=1,
        optimizer={"learning_rate": 1e-3},
        sampling={
            "num_generations": 2,
            "max_completion_length": max_completion_length,
            "temperature": temperature,
        },
        rewards=[{"name": "length"}],
        algorithm={"beta": 0.0, **algorithm},
        prompts_per_step=4,
        micro_batch_size=micro_batch_size,
    )


def scores(*rows):
    total = torch.tensor(rows)
    return Scores(total=total, terms={"r": total}, status={"r": tuple(("ok",) * len(row) for row in rows)})


def batch_of(policy, *lengths, generations=2):
    """Completions of these lengths, `generations` to a prompt."""
    rows = [tuple(range(50, 50 + length)) for length in lengths]
    index = [row // generations for row in range(len(rows))]
    return pad_rows(PROMPTS[: index[-1] + 1], index, rows, policy)


def tensors(batch):
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    return {name: value for name, value in fields.items() if value is not None}


def test_prompts_are_padded_on_the_left_and_masks_come_from_lengths():
    ids, mask = pad_left([(7, 8, 9), (0,), (0, 5)], pad_id=0)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 0], [0, 0, 5]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert ids.dtype == torch.long


def test_completions_are_padded_on_the_right():
    assert pad_right([(7, 0), (8,), ()], 0, torch.long).tolist() == [[7, 0], [8, 0], [0, 0]]
    assert pad_right([(-0.5,), (-1.0, -2.0)], 0.0, torch.float32).tolist() == [[-0.5, 0.0], [-1.0, -2.0]]
    assert length_mask([2, 0, 1]).tolist() == [[True, True], [False, False], [True, False]]


def test_groups_become_rows_group_by_group_each_prompt_once(tiny_policy):
    def completion(*ids):
        return Completion("", ids, True, tuple(-float(token) for token in ids))

    groups = [
        Group(Example("a", "", (5, 6, 7), {}), (completion(10, 2), completion(11, 12, 2))),
        Group(Example("b", "", (8,), {}), (completion(2), completion(13, 2))),
    ]
    batch = pad(groups, tiny_policy)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1]
    assert batch.completion_ids.tolist() == [[10, 2, 0], [11, 12, 2], [2, 0, 0], [13, 2, 0]]
    assert batch.completion_mask.sum(1).tolist() == [2, 3, 1, 2]
    assert batch.sampler_logps.tolist() == [[-10, -2, 0], [-11, -12, -2], [-2, 0, 0], [-13, -2, 0]]
    assert batch.num_rows == 4
    assert set(tensors(batch)) == {
        "prompt_ids", "prompt_mask", "prompt_index", "completion_ids", "completion_mask", "sampler_logps", "finished"
    }  # fmt: skip
    assert batch.finished.tolist() == [True, True, True, True]


def test_one_completion_without_sampler_log_probs_leaves_them_out_for_all(tiny_policy):
    known, unknown = Completion("", (5,), True, (-1.0,)), Completion("", (6,), True)
    example = Example("a", "", (5,), {})
    assert pad([Group(example, (known, known))], tiny_policy).sampler_logps is not None
    assert pad([Group(example, (known, unknown))], tiny_policy).sampler_logps is None


def test_equal_prompts_of_two_groups_stay_two_prompts(tiny_policy, make_group):
    example = Example("a", "", (5, 6), {})
    groups = [make_group(example, [((7,), True), ((8,), True)])] * 2
    assert pad(groups, tiny_policy).prompt_index.tolist() == [0, 0, 1, 1]


def test_rows_are_cut_to_their_longest_prompt_and_completion(tiny_policy):
    batch = batch_of(tiny_policy, 5, 4, 1, 2, 3, 2)
    every = torch.arange(30.0).reshape(6, 5)
    batch = dataclasses.replace(
        batch,
        advantages=torch.arange(6.0),
        **dict.fromkeys(["sampler_logps", "old_logps", "ref_logps", "loss_weights"], every),
    )
    part = batch.rows(3, 5)  # the second row of prompt 1, the first of prompt 2
    assert part.prompt_ids.tolist() == [[0, 30], [40, 41]]
    assert part.prompt_mask.tolist() == [[False, True], [True, True]]
    assert part.prompt_index.tolist() == [0, 1]
    assert part.completion_ids.tolist() == [[50, 51, 0], [50, 51, 52]]
    assert part.completion_mask.tolist() == [[True, True, False], [True, True, True]]
    assert part.advantages.tolist() == [3, 4]
    for name in ("sampler_logps", "old_logps", "ref_logps", "loss_weights"):
        assert getattr(part, name).tolist() == [[15, 16, 17], [20, 21, 22]]
    one = batch.rows(2, 3)
    assert (one.prompt_ids.tolist(), one.completion_ids.tolist()) == ([[30]], [[50]])
    bare = dataclasses.replace(
        batch, sampler_logps=None, old_logps=None, ref_logps=None, advantages=None, loss_weights=None
    )
    assert set(tensors(bare.rows(0, 2))) == {
        "prompt_ids", "prompt_mask", "prompt_index", "completion_ids", "completion_mask"
    }  # fmt: skip


def test_cutting_and_cutting_again_is_cutting_once(tiny_policy):
    batch = batch_of(tiny_policy, 5, 4, 1, 2, 3, 2)
    twice, once = tensors(batch.rows(2, 6).rows(1, 3)), tensors(batch.rows(3, 5))
    assert all(torch.equal(twice[name], once[name]) for name in once)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_weights_of_each_mini_batch_sum_to_one(tiny_policy, reduction, minibatches):
    batch = batch_of(tiny_policy, 5, 4, 1, 2, 3, 2, 6, 1)
    setting = stage(reduction=reduction, num_minibatches=minibatches)
    out = with_advantages(batch, scores((1.0, 0.0), (1.0, 0.0), (1.0, NAN), (0.0, 1.0)), setting)
    parts = out.loss_weights.chunk(minibatches)
    torch.testing.assert_close([float(part.sum()) for part in parts], [1.0] * minibatches)
    assert out.loss_weights[~batch.completion_mask].eq(0).all()
    assert out.loss_weights[5].eq(0).all()


def test_weights_by_hand(tiny_policy):
    batch = batch_of(tiny_policy, 2, 1, 4, 4, 1, 1, 3, 1)
    totals = scores((1.0, 0.0), (1.0, NAN), (NAN, NAN), (0.0, 1.0))

    def row_sums(reduction, minibatches):
        setting = stage(reduction=reduction, num_minibatches=minibatches, max_completion_length=10)
        return with_advantages(batch, totals, setting).loss_weights.sum(1).tolist()

    # scored rows: 0, 1, 2 and 6, 7, with 2 + 1 + 4 and 3 + 1 tokens
    assert row_sums("sequence", 1) == pytest.approx([1 / 5, 1 / 5, 1 / 5, 0, 0, 0, 1 / 5, 1 / 5])
    assert row_sums("sequence", 2) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 1 / 2, 1 / 2])
    assert row_sums("token", 1) == pytest.approx([2 / 11, 1 / 11, 4 / 11, 0, 0, 0, 3 / 11, 1 / 11])
    assert row_sums("token", 2) == pytest.approx([2 / 7, 1 / 7, 4 / 7, 0, 0, 0, 3 / 4, 1 / 4])
    assert row_sums("constant", 1) == pytest.approx([2 / 50, 1 / 50, 4 / 50, 0, 0, 0, 3 / 50, 1 / 50])
    assert row_sums("constant", 2) == pytest.approx([2 / 30, 1 / 30, 4 / 30, 0, 0, 0, 3 / 20, 1 / 20])
    assert row_sums("token", 4) == pytest.approx([2 / 3, 1 / 3, 1, 0, 0, 0, 3 / 4, 1 / 4])


def test_advantages_are_those_of_the_groups_row_by_row(tiny_policy):
    batch = batch_of(tiny_policy, *[1] * 8, generations=4)
    totals = scores((1.0, 0.0, 0.0, 1.0), (0.7, 0.7, 0.7, 0.7))
    out = with_advantages(batch, totals, stage())
    assert out.advantages.tolist() == pytest.approx([0.8658754, -0.8658754, -0.8658754, 0.8658754, 0, 0, 0, 0])
    assert out.advantages[4:].eq(0).all()  # exactly, although .7 has no exact mean
    plain = with_advantages(batch, totals, stage(preset="dr_grpo"))
    assert plain.advantages.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])


def test_a_row_that_was_not_scored_has_neither_advantage_nor_weight_and_its_siblings_are_compared_without_it(
    tiny_policy,
):
    batch = batch_of(tiny_policy, *[2] * 8, generations=4)
    out = with_advantages(batch, scores((1.0, NAN, 0.0, 1.0), (NAN, NAN, NAN, 1.0)), stage())
    a, b = (1 / 3) / (math.sqrt(1 / 3) + 1e-4), (-2 / 3) / (math.sqrt(1 / 3) + 1e-4)  # mean 2/3, std sqrt(1/3)
    assert out.advantages.tolist() == pytest.approx([a, 0, b, a, 0, 0, 0, 0])
    assert out.loss_weights.ne(0).any(1).tolist() == [True, False, True, True, False, False, False, True]


def test_a_step_in_which_nothing_could_be_scored_weighs_nothing(tiny_policy):
    out = with_advantages(batch_of(tiny_policy, 2, 3, 1, 1), scores((NAN, NAN), (NAN, NAN)), stage(num_minibatches=2))
    assert out.advantages.eq(0).all()
    assert out.loss_weights.eq(0).all()


@pytest.mark.parametrize(
    "iterations, minibatches, beta, has_reference, expected",
    [
        (1, 1, 0.0, True, set()),  # the policy of the update is the one that sampled, and there is no KL
        (2, 1, 0.0, True, {"old_logps"}),
        (1, 2, 0.0, False, {"old_logps"}),
        (1, 1, 0.04, True, {"ref_logps"}),
        (2, 2, 0.04, True, {"old_logps", "ref_logps"}),
    ],
)
def test_log_probs_are_computed_only_where_they_are_needed(
    tiny_policy, make_policy, iterations, minibatches, beta, has_reference, expected
):
    batch = batch_of(tiny_policy, 5, 4, 1, 2)
    reference = make_policy(seed=1)
    setting = stage(
        num_iterations=iterations, num_minibatches=minibatches, beta=beta, temperature=0.7, micro_batch_size=3
    )
    out = with_logps(batch, tiny_policy, reference if has_reference else None, setting)
    assert {name for name in ("old_logps", "ref_logps") if getattr(out, name) is not None} == expected
    if out.old_logps is not None:
        assert torch.equal(out.old_logps, completion_logps(tiny_policy, batch, temperature=0.7, micro_batch_size=3))
    if out.ref_logps is not None:
        assert torch.equal(out.ref_logps, completion_logps(reference, batch, temperature=0.7, micro_batch_size=3))


def test_nothing_writes_into_a_batch(tiny_policy):
    setting = stage(num_iterations=2, beta=0.04, micro_batch_size=3)
    batch = batch_of(tiny_policy, 5, 4, 1, 2, 3, 2, 6, 1)
    totals = scores((1.0, 0.0), (1.0, NAN), (NAN, NAN), (0.0, 1.0))
    steps = [batch, with_logps(batch, tiny_policy, frozen_copy(tiny_policy), setting)]
    steps.append(with_advantages(steps[-1], totals, setting))
    before = [(tensor._version, tensor.clone()) for step in steps for tensor in tensors(step).values()]
    versions = totals.total._version
    with_advantages(with_logps(batch, tiny_policy, frozen_copy(tiny_policy), setting), totals, setting)
    steps[-1].rows(1, 5)
    after = [(tensor._version, tensor) for step in steps for tensor in tensors(step).values()]
    assert all(old[0] == new[0] and torch.equal(old[1], new[1]) for old, new in zip(before, after, strict=True))
    assert totals.total._version == versions
