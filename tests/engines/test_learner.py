"""One optimiser step: numbers by hand on a model of two parameters."""

import math

import pytest
import torch
from torch import nn

from grpo_lab.engines.learner import Learner, learning_rate
from grpo_lab.engines.weights import make_optimizer
from grpo_lab.errors import NumericError, SetupError
from grpo_lab.recipe.schema import Optimizer
from grpo_lab.types import Batch, LogpsAndEntropy


def rates(total, **settings):
    optimizer = Optimizer(learning_rate=8.0, **settings)
    return pytest.approx([learning_rate(optimizer, index, total) for index in range(total)], abs=1e-9)


def test_the_learning_rate_by_hand():
    assert rates(3) == [8, 8, 8]
    assert rates(4, schedule="linear") == [8, 6, 4, 2]
    assert rates(4, schedule="cosine") == [8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]
    assert rates(4, warmup_steps=2) == [4, 8, 8, 8]
    assert rates(6, warmup_steps=2, schedule="linear") == [4, 8, 8, 6, 4, 2]
    assert rates(6, warmup_steps=2, schedule="cosine") == [4, 8, 8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]


def test_a_warm_up_below_one_is_a_share_of_all_steps():
    assert rates(8, warmup_steps=0.25, schedule="linear") == [4, 8, 8, 8 * 5 / 6, 8 * 4 / 6, 4, 8 * 2 / 6, 8 / 6]
    assert rates(5, warmup_steps=0.3) == [4, 8, 8, 8, 8]  # 1.5 steps are 2
    assert rates(100, warmup_steps=0.07) == [8 * step / 7 for step in range(1, 8)] + [8] * 93  # .07 * 100 > 7 in floats


def test_a_warm_up_longer_than_the_stage_never_peaks():
    assert rates(4, warmup_steps=8, schedule="linear") == [1, 2, 3, 4]


class Net(nn.Module):
    """Its log-probs are (matrix - vector + frozen) * token id, so that their gradients are sums of ids."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[2.0]]))
        self.vector = nn.Parameter(torch.tensor([2.0]))
        self.frozen = nn.Parameter(torch.tensor([[2.0]]), requires_grad=False)

    def forward(self, batch):
        logps = (self.matrix - self.vector + self.frozen) * batch.completion_ids
        return LogpsAndEntropy(logps, torch.zeros_like(logps))

    def micro_batches(self, batch, size):
        size = size or batch.num_rows
        return [(start, min(start + size, batch.num_rows)) for start in range(0, batch.num_rows, size)]


def batch_of(*ids):
    """One row for each token id."""
    count = len(ids)
    return Batch(
        prompt_ids=torch.ones(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        prompt_index=torch.zeros(count, dtype=torch.long),
        completion_ids=torch.tensor(ids)[:, None],
        completion_mask=torch.ones(count, 1, dtype=torch.bool),
    )


def total(out, _batch):
    return out.logps.sum(), {"rows": torch.tensor(len(out.logps)), "sum": out.logps.sum()}


def learner(net, *, micro_batch_size=None, total_steps=10, **settings):
    optimizer = Optimizer(**{"name": "sgd", "learning_rate": 0.5, "max_grad_norm": None, **settings})
    return Learner(net, optimizer, total_steps=total_steps, micro_batch_size=micro_batch_size)


def values(net):
    return net.matrix.item(), net.vector.item(), net.frozen.item()


@pytest.mark.parametrize("size", [None, 1, 2, 3, 50])
def test_micro_batches_add_up_to_the_whole_step(size):
    net = Net()
    out = learner(net, micro_batch_size=size).step(batch_of(1, 2, 4), total)
    assert values(net) == (2 - 0.5 * 7, 2 + 0.5 * 7, 2)
    assert out.loss == 2 * 7
    assert out.grad_norm == pytest.approx(7 * math.sqrt(2))
    assert out.sums == {"rows": 3, "sum": 14}
    assert out.learning_rate == 0.5
    assert not out.skipped


def test_gradients_do_not_pile_up_from_step_to_step():
    net = Net()
    taught = learner(net)
    taught.step(batch_of(1), total)
    taught.step(batch_of(1), total)
    assert values(net) == (1, 3, 2)
    assert net.matrix.grad is None


def test_each_step_has_the_rate_of_its_index():
    net = Net()
    taught = learner(net, learning_rate=1.0, schedule="linear", total_steps=4)
    seen = [taught.step(batch_of(1), total).learning_rate for _ in range(4)]
    assert seen == [1, 0.75, 0.5, 0.25]
    assert values(net)[0] == pytest.approx(2 - 2.5)
    assert taught.steps_done == 4


def test_the_gradient_is_clipped_to_its_largest_norm_and_reported_as_it_was():
    net = Net()
    out = learner(net, max_grad_norm=0.5).step(batch_of(3), total)
    assert out.grad_norm == pytest.approx(3 * math.sqrt(2))
    assert values(net)[:2] == pytest.approx((2 - 0.5 * 0.5 / math.sqrt(2), 2 + 0.5 * 0.5 / math.sqrt(2)), abs=1e-6)
    unclipped = Net()
    learner(unclipped, max_grad_norm=10.0).step(batch_of(3), total)
    assert values(unclipped)[:2] == (2 - 0.5 * 3, 2 + 0.5 * 3)


def test_weight_decay_pulls_matrices_and_leaves_vectors():
    net = Net()
    learner(net, weight_decay=0.1).step(batch_of(1), total)
    assert values(net) == pytest.approx((2 - 0.5 * (1 + 0.1 * 2), 2 + 0.5, 2))
    net = Net()
    learner(net, name="adamw", learning_rate=0.01, weight_decay=0.1).step(batch_of(5), total)
    assert values(net) == pytest.approx((2 * (1 - 0.01 * 0.1) - 0.01, 2 + 0.01, 2))


def test_the_optimizer_holds_every_trainable_parameter_once_with_its_decay(make_policy):
    model = make_policy(model_type="qwen2", tie_word_embeddings=True).model  # qwen2 has biases
    optimizer = make_optimizer(model, Optimizer(learning_rate=1.0, weight_decay=0.1))
    held = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
    decays = {name: held.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not held
    without = {name for name, decay in decays.items() if decay == 0.0}
    assert without == {name for name in decays if name.endswith(".bias") or "norm" in name}
    assert set(decays.values()) == {0.0, 0.1}


def test_the_optimizer_s_settings_are_the_recipe_s():
    adamw = make_optimizer(Net(), Optimizer(learning_rate=0.3, betas=(0.5, 0.6), epsilon=1e-3))
    assert type(adamw) is torch.optim.AdamW
    assert [(group["lr"], group["betas"], group["eps"]) for group in adamw.param_groups] == [
        (0.3, (0.5, 0.6), 1e-3)
    ] * 2
    net = Net()
    taught = learner(net, momentum=0.5)
    for _ in range(2):
        taught.step(batch_of(1), total)
    assert values(net)[0] == 2 - 0.5 * 1 - 0.5 * 1.5


def bad_loss(value):
    return lambda out, batch: (out.logps.sum() * value, {})


def infinite_gradient(out, batch):
    """The loss is 0, its slope is not finite."""
    return (out.logps - out.logps.detach()).abs().sqrt().sum(), {}


BAD = {"nan": bad_loss(math.nan), "inf": bad_loss(math.inf), "infinite gradient": infinite_gradient}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_bit_for_bit(kind, name):
    net = Net()
    taught = learner(net, name=name, momentum=0.9, weight_decay=0.1)
    taught.step(batch_of(3), total)
    before, state = values(net), str(taught.optimizer.state_dict()["state"])
    out = taught.step(batch_of(1, 2), BAD[kind])
    assert out.skipped
    assert values(net) == before
    assert str(taught.optimizer.state_dict()["state"]) == state
    assert (taught.steps_done, taught.skipped_in_a_row) == (2, 1)
    assert not taught.step(batch_of(3), total).skipped
    assert values(net) != before
    assert taught.skipped_in_a_row == 0


def test_one_bad_micro_batch_skips_the_whole_step():
    net = Net()

    def second_is_bad(out, batch):
        return out.logps.sum() * (math.nan if int(batch.completion_ids[0, 0]) == 2 else 1.0), {}

    out = learner(net, micro_batch_size=1).step(batch_of(1, 2, 3), second_is_bad)
    assert out.skipped
    assert values(net) == (2, 2, 2)


def test_a_nan_in_a_parameter_skips_the_step():
    net = Net()
    with torch.no_grad():
        net.frozen.fill_(math.nan)
    assert learner(net).step(batch_of(1), total).skipped
    assert values(net)[:2] == (2, 2)


def test_the_third_bad_step_in_a_row_is_an_error():
    net = Net()
    taught = learner(net)
    for loss in (BAD["nan"], BAD["nan"], total, BAD["nan"], BAD["inf"]):  # never three in a row
        taught.step(batch_of(1), loss)
    assert values(net) == (1.5, 2.5, 2)
    with pytest.raises(NumericError) as error:
        taught.step(batch_of(1), BAD["nan"])
    assert error.value.exit_code == 6
    assert str(error.value) == (
        "3 optimiser steps in a row had a loss or gradient that is not finite (the last: loss nan, gradient norm nan); "
        "the weights were left as they were. Lower optimizer.learning_rate, or look at the last rollouts."
    )
    assert values(net) == (1.5, 2.5, 2)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_gradient_of_exactly_zero_moves_nothing_not_even_by_momentum_or_decay(name):
    net = Net()
    taught = learner(net, name=name, momentum=0.9, weight_decay=0.1)
    taught.step(batch_of(3), total)
    before = values(net)
    out = taught.step(batch_of(3), lambda out, batch: (out.logps.sum() * 0.0, {}))
    assert values(net) == before
    assert (out.loss, out.grad_norm, out.skipped) == (0, 0, False)
    assert taught.steps_done == 2


class SmallMemory(Net):
    """Holds `rows` rows and fails in the backward pass with more, when half of the gradient is there."""

    def __init__(self, rows, error):
        super().__init__()
        self.rows, self.error = rows, error
        self.sizes = []

    def forward(self, batch):
        self.sizes.append(batch.num_rows)
        out = super().forward(batch)
        if batch.num_rows > self.rows:
            self.vector.grad = torch.full_like(self.vector, 1e6)  # what a failed backward pass may leave
            raise self.error
        return out


OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_micro_batches_and_gives_the_same_step(kind):
    whole, small = Net(), SmallMemory(1, OUT_OF_MEMORY[kind])
    out = [learner(net).step(batch_of(1, 2, 4, 5, 9), total) for net in (whole, small)]
    assert out[0].loss == pytest.approx(out[1].loss)
    assert out[0].grad_norm == pytest.approx(out[1].grad_norm)
    torch.testing.assert_close(small.vector, whole.vector)
    assert small.sizes[0] > 1
    assert small.sizes[-1] == 1


def test_after_one_shortage_the_smaller_size_stays():
    small = SmallMemory(2, OUT_OF_MEMORY["CPU"])
    its = learner(small)
    its.step(batch_of(1, 2, 4, 5, 9), total)
    assert its.halved_to is not None
    small.sizes.clear()
    its.step(batch_of(1, 2, 4, 5, 9), total)
    assert max(small.sizes) <= 2


def test_out_of_memory_with_a_single_row_names_its_size():
    with pytest.raises(SetupError, match=r"a single row of up to \d+ tokens"):
        learner(SmallMemory(0, OUT_OF_MEMORY["CPU"])).step(batch_of(1, 2, 4, 5, 9), total)


def test_another_runtime_error_is_not_taken_for_a_shortage():
    with pytest.raises(RuntimeError, match="shapes"):
        learner(SmallMemory(0, RuntimeError("shapes do not match"))).step(batch_of(1, 2, 4, 5, 9), total)
