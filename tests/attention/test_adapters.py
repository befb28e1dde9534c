"""Adapted layers in fewer passes, as on a GPU, against peft's own."""

import copy

import pytest
import torch

from grpo_lab.attention import adapters
from grpo_lab.attention.adapters import adapt, adapted_linear
from grpo_lab.attention.fused import unfuse
from grpo_lab.attention.probe import parts
from grpo_lab.policy.adapter import attach
from grpo_lab.recipe.schema import Lora


@pytest.fixture
def adapted(make_policy):
    """A model with an adapter that changes something, in float64 but for the adapter's weights."""

    def make(family="llama", **options):
        model = attach(make_policy(model_type=family).model.double(), Lora(r=3, **options), seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.2, generator=generator)
        return model.eval()

    return make


def given(model):
    return sum("forward" in vars(module) for module in model.modules() if hasattr(module, "lora_A"))


def outcome(model):
    model.zero_grad()
    logits = model(input_ids=torch.arange(5, 17).view(2, 6)).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, options", [("llama", {}), ("qwen2", {"rslora": True}), ("qwen2", {"alpha": 7})])
def test_logits_and_gradients_are_peft_s(adapted, monkeypatch, family, options):
    model = adapted(family, **options)
    for module in model.modules():  # the update in float64 too, where peft and we round alike
        if hasattr(module, "lora_A"):
            module.lora_A.double(), module.lora_B.double()
    logits, gradients = outcome(model)
    adapt(model, parts(model).decoder)
    assert given(model) == 14
    calls = []
    monkeypatch.setattr(adapters, "adapted_linear", lambda *given: (calls.append(given[-1]), adapted_linear(*given))[1])
    ours, our_gradients = outcome(model)
    assert [low.b.dtype for low in calls] == [torch.float64] * 14
    torch.testing.assert_close(ours, logits, atol=1e-10, rtol=1e-10)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-9, rtol=1e-9)
    unfuse(model)
    assert given(model) == 0


def test_the_gradient_of_a_layer_is_that_of_finite_differences():
    x, weight, bias, a, b = (torch.randn(*shape).double() for shape in [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)])
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, weight, bias, a, b, 0.7), (x, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, weight, None, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("options", [{"dora": True}, {"bias": "lora_only"}, {"bias": "all"}])
def test_an_adapter_of_another_kind_is_left_to_peft(adapted, options):
    model = adapted("qwen2", **options)  # the query, key and value layers have biases, which learn here
    adapt(model, parts(model).decoder)
    assert given(model) == (0 if options.get("dora") else 8)


def test_dropout_a_disabled_adapter_and_a_merged_one_are_as_in_peft(adapted):
    model = adapted(dropout=0.5)
    theirs = copy.deepcopy(model)
    adapt(model, parts(model).decoder)
    ids = torch.arange(5, 11)[None]

    def both():
        results = []
        for each in (model, theirs):
            torch.manual_seed(3)
            with torch.no_grad():
                results.append(each(input_ids=ids).logits)
        return results

    plain = both()
    torch.testing.assert_close(*plain, atol=1e-6, rtol=1e-6)
    for each in (model, theirs):
        each.train()
    dropped = both()
    assert torch.equal(*dropped)
    assert not torch.allclose(dropped[0], plain[0], atol=1e-3)
    for each in (model, theirs):
        each.eval()
    with model.disable_adapter(), theirs.disable_adapter():
        without = both()
        assert torch.equal(*without)
        assert not torch.allclose(without[0], plain[0], atol=1e-3)
    for each in (model, theirs):
        each.merge_adapter()
    assert torch.equal(*both())


def test_after_a_step_the_adapter_is_the_new_one(adapted):
    model = adapted()
    adapt(model, parts(model).decoder)
    before = outcome(model)[0]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    after = outcome(model)[0]
    unfuse(model)
    torch.testing.assert_close(outcome(model)[0], after, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before, after, atol=1e-4)


def test_weights_that_were_put_in_another_s_place_are_used(adapted):
    model = adapted()
    adapt(model, parts(model).decoder)
    outcome(model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_B["default"].weight = torch.nn.Parameter(torch.zeros_like(module.lora_B["default"].weight))
    ours = outcome(model)[0]
    with model.disable_adapter():
        torch.testing.assert_close(ours, model(input_ids=torch.arange(5, 17).view(2, 6)).logits, atol=1e-9, rtol=1e-9)


def test_a_copy_goes_its_own_way_with_its_own_weights(adapted):
    model = adapted()
    adapt(model, parts(model).decoder)
    outcome(model)
    other = copy.deepcopy(model)
    adapt(other, parts(other).decoder)  # again, as where a copy is tried
    assert len(parts(other).decoder._forward_pre_hooks) == 1
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    ids = torch.arange(5, 11)[None]
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, expected, atol=1e-9, rtol=1e-9)
