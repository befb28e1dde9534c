"""Norms, rotations and gated MLPs in fewer passes: their gradients, and that nothing but rounding changes in a model."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from grpo_lab.attention import fused as module_of_fused
from grpo_lab.attention.fused import fuse, gated, rms_norm, unfuse
from grpo_lab.attention.probe import why_plain
from grpo_lab.attention.rotary import rotated
from grpo_lab.policy.load import logits_gap


def numbers(*shape):
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    return tensor.requires_grad_()


def fused(model):
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def test_values_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # mean of squares 12.5
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 2.0]), 0.0), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    quarter = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])  # cos and sin of a quarter turn
    q, k = rotated(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]]), *quarter)
    assert (q.tolist(), k.tolist()) == ([[[[0.0, 1.0]]]], [[[[-1.0, 0.0]]]])
    assert gated(torch.tensor([[0.0, 100.0, -100.0]]), torch.tensor([[7.0, 2.0, 2.0]])).tolist() == [[0.0, 200.0, 0.0]]


def test_finite_differences_agree(monkeypatch):
    monkeypatch.setattr("grpo_lab.attention.fused._AT_ONCE", 16)  # several blocks
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (numbers(2, 3, 5), numbers(5)))
    assert torch.autograd.gradcheck(gated, (numbers(2, 5, 6), numbers(2, 5, 6)))
    cos, sin = numbers(1, 3, 8).detach(), numbers(1, 3, 8).detach() ** 2
    assert torch.autograd.gradcheck(lambda q, k: rotated(q, k, cos, sin), (numbers(1, 4, 3, 8), numbers(1, 2, 3, 8)))


FAMILIES = {
    "llama": ({}, {"LlamaRMSNorm", "LlamaAttention", "LlamaMLP"}),
    "qwen3": ({"model_type": "qwen3", "head_dim": 8}, {"Qwen3RMSNorm", "Qwen3Attention", "Qwen3MLP"}),
    # this family's MLP has another activation here
    "mistral": ({"model_type": "mistral", "hidden_act": "gelu"}, {"MistralRMSNorm", "MistralAttention"}),
    "gpt2": ({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_that_are_proved_equal_are_fused_and_a_pass_with_gradients_stays_the_same(make_policy, family):
    options, expected = FAMILIES[family]
    model = make_policy(**options).model.eval()
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    for number, norm in enumerate(norms):
        nn.init.normal_(norm.weight, 1.0, 0.2, generator=torch.Generator().manual_seed(number))
    ids = torch.arange(3, 33).view(2, 15)

    def outcome(model):
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    assert fused(model) == set()
    before = outcome(model)
    fuse(model)
    assert fused(model) == expected
    torch.testing.assert_close(outcome(model), before, atol=2e-5, rtol=1e-4)
    unfuse(model)
    assert fused(model) == set()


def test_a_model_that_samples_before_it_learns_is_fused_all_the_same(make_policy):
    """Or it would compute with other sums than a reference that is first used without gradient."""
    model = make_policy().model.eval()
    with torch.inference_mode():
        assert why_plain(model) is None
    assert fused(model) == {"LlamaRMSNorm", "LlamaAttention", "LlamaMLP", "LlamaDecoderLayer"}


def test_a_copy_of_a_fused_model_computes_with_its_own_weights(make_policy):
    model = make_policy().model
    assert why_plain(model) is None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(module.forward.__self__ is module for module in twin.modules() if "forward" in vars(module))
    assert float(twin(input_ids=torch.tensor([[3, 4]])).logits.detach().abs().max()) > 0


def test_a_model_is_compared_with_what_was_written_of_it_by_the_layers_own_ways(make_policy, monkeypatch):
    """On a GPU the ways that layers are given round otherwise: no reason to say that another model was written."""
    policy = make_policy()
    written = replace(policy, model=copy.deepcopy(policy.model))
    assert why_plain(policy.model) is None
    ways = {module: vars(module)["forward"] for module in policy.model.modules() if "forward" in vars(module)}
    norm = rms_norm
    monkeypatch.setattr(module_of_fused, "rms_norm", lambda *given: 1.01 * norm(*given))
    ids = torch.arange(3, 18)[None]
    assert not torch.allclose(policy.model(input_ids=ids).logits, written.model(input_ids=ids).logits, atol=1e-3)
    assert logits_gap(policy, written) == 0.0
    assert {module: vars(module).get("forward") for module in ways} == ways
    with torch.no_grad():
        written.model.lm_head.weight[7] += 0.01
    assert logits_gap(policy, written) > 1e-5


def test_a_fused_model_can_be_sent_to_another_process_and_is_fused_there_anew(make_policy):
    model = make_policy().model.eval()
    assert why_plain(model) is None
    sent = pickle.loads(pickle.dumps(model))
    assert all(
        vars(module)["forward"].__func__ is type(module).forward
        for module in sent.modules()
        if "forward" in vars(module)
    )
    ids = torch.arange(3, 18)[None]
    torch.testing.assert_close(sent(input_ids=ids).logits, model(input_ids=ids).logits)
    assert why_plain(sent) is None
    assert fused(sent) == fused(model)
    assert torch.equal(sent(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_norm_that_adds_one_to_its_weight_keeps_its_own_way():
    class PlusOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(4)), 1e-6

        def forward(self, x):
            return nn.functional.rms_norm(x, (4,), 1 + self.weight, self.variance_epsilon)

    module = PlusOne()
    fuse(module)
    assert fused(module) == set()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_another_type_keep_what_their_layers_compute(make_policy, dtype):
    model = make_policy().model.to(dtype)
    assert why_plain(model) is None
    assert fused(model) == {"LlamaDecoderLayer"}  # the last one leaves work out, which rounds nothing
