"""4-bit weights with an adapter: right gradients also after sampling, small errors, 8-bit optimisers, and their state."""

import copy
import sys

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")

import bitsandbytes as bnb

from grpo_lab.batching import pad_rows
from grpo_lab.engines.weights import make_optimizer
from grpo_lab.errors import SetupError
from grpo_lab.policy.forward import PolicyForward, completion_logps, frozen_copy
from grpo_lab.policy.load import load_policy, write_policy
from grpo_lab.policy.trainable import learned, parameter_count
from grpo_lab.recipe.schema import Lora, Model, Optimizer, Quantization
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.sampling.native import NativeSampler
from grpo_lab.tracking.checkpoints import load_latest, optimizer_state, optimizer_tensors, save_checkpoint

WIDE = {"hidden_size": 64, "intermediate_size": 192}


@pytest.fixture
def base(make_policy, tmp_path):
    write_policy(make_policy(**WIDE), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def quantized(base, tokenizer):
    """A policy in 4 bits with an adapter that is not 0."""
    model = Model(path=str(base), lora=Lora(r=4, alpha=8), quantization=Quantization())
    policy = load_policy(model, tokenizer, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return policy


def linears(policy):
    return {name: module for name, module in policy.model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def plain(policy):
    """The same policy whose 4-bit layers are ordinary ones with the values that the codes stand for."""
    model = copy.deepcopy(policy.model)
    for name, layer in linears(policy).items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        ordinary = torch.nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
        ordinary.weight.data = weight.clone()
        model.set_submodule(name, ordinary)
    return type(policy)(model, policy.tokenizer, policy.eos_ids, policy.pad_id, policy.context_length)


def gradients(policy):
    policy.model.zero_grad()
    policy.model.eval()
    batch = pad_rows([(5, 6), (7,)], [0, 1], [(7, 8, 9), (10, 2)], policy)
    out = PolicyForward(policy.model, temperature=1.0)(batch)
    (out.logps * batch.completion_mask).sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_dequantized_model_before_and_after_sampling(quantized, make_examples):
    """Without the cure, a machine with avx512_bf16 repacks the weights while it samples."""
    ordinary = plain(quantized)
    expected = gradients(ordinary)
    assert expected.keys() == learned(quantized.model)
    for moment in ("fresh", "after sampling"):
        found = gradients(quantized)
        for name in expected:
            assert torch.allclose(found[name], expected[name], atol=1e-5 * float(expected[name].abs().max())), (
                moment,
                name,
            )
        sampler = NativeSampler(quantized, Decoding(temperature=1.0, max_completion_length=4))
        sampler.sample(make_examples(), num_generations=2, seed=0)
        completion_logps(quantized, pad_rows([(5, 6)], [0], [(7, 8)], quantized), temperature=1.0)


def test_sampling_leaves_every_code_as_it_was_loaded(quantized, make_examples):
    before = {name: layer.weight.data.clone() for name, layer in linears(quantized).items()}
    assert len(before) == 14
    quantized.model.eval()
    sampler = NativeSampler(quantized, Decoding(temperature=1.0, max_completion_length=4))
    sampler.sample(make_examples(), num_generations=2, seed=0)
    assert all(torch.equal(layer.weight.data, before[name]) for name, layer in linears(quantized).items())
    assert not any(layer.support_avx512bf16_for_cpu for layer in linears(quantized).values())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind, most", [("nf4", 0.1), ("fp4", 0.13)])
def test_the_error_of_a_weight_is_a_tenth_of_its_spread(base, tokenizer, kind, most, double_quant):
    settings = Quantization(type=kind, double_quant=double_quant)
    policy = load_policy(Model(path=str(base), lora=Lora(r=2), quantization=settings), tokenizer, seed=0)
    whole = dict(load_policy(Model(path=str(base)), tokenizer, seed=0).model.named_parameters())
    for name, layer in linears(policy).items():
        weight = whole[name.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight"]
        error = (bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) - weight).detach()
        assert 0.05 < float(error.std() / weight.detach().std()) < most
        assert layer.weight.quant_state.nested == double_quant


def test_a_weight_takes_half_a_byte_and_counts_as_one_parameter(quantized, make_policy):
    layer = next(iter(linears(quantized).values()))
    assert layer.weight.numel() * layer.weight.element_size() == layer.in_features * layer.out_features / 2
    own = sum(p.numel() for p in quantized.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in make_policy(**WIDE).model.parameters())
    assert f"of {whole + own:,} parameters" in parameter_count(quantized.model)


def test_the_reference_shares_the_4_bit_weights(quantized):
    reference = frozen_copy(quantized)
    mine = {id(layer.weight) for layer in linears(quantized).values()}
    assert {id(layer.weight) for layer in linears(reference).values()} == mine


def test_an_adapter_learnt_beside_4_bits_is_merged_into_the_values_of_those(quantized, base, tokenizer, tmp_path):
    write_policy(quantized, tmp_path / "final", Quantization())
    merged = load_policy(Model(path=str(base)), tokenizer, seed=0, folder=tmp_path / "final")
    assert linears(merged) == {}
    batch = pad_rows([(5, 6), (7,)], [0, 1], [(7, 8, 9), (10, 2)], quantized)
    quantized.model.eval()
    merged.model.eval()
    expected = completion_logps(quantized, batch, temperature=1.0)
    assert torch.allclose(completion_logps(merged, batch, temperature=1.0), expected, atol=1e-4)
    (tmp_path / "final" / "quantization.json").unlink()  # beside other weights the same adapter is another policy
    other = load_policy(Model(path=str(base)), tokenizer, seed=0, folder=tmp_path / "final")
    assert not torch.allclose(completion_logps(other, batch, temperature=1.0), expected, atol=1e-2)


def test_the_compute_type_is_the_recipe_s(base, tokenizer):
    for compute, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        settings = Quantization(compute_dtype=compute)
        policy = load_policy(Model(path=str(base), lora=Lora(r=2), quantization=settings), tokenizer, seed=0)
        assert {layer.compute_dtype for layer in linears(policy).values()} == {expected}


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimiser_moves_weights_nearly_as_adamw_and_its_state_comes_back(name, tmp_path):
    torch.manual_seed(0)
    gradient = torch.randn(4, 128, 64)

    def trained(name, steps, optimizer=None, layer=None):
        layer = layer or torch.nn.Linear(64, 128)
        if optimizer is None:
            torch.nn.init.constant_(layer.weight, 1.0)
            optimizer = make_optimizer(layer, Optimizer(name=name, learning_rate=1e-2, weight_decay=0.1))
        for step in steps:
            layer.weight.grad, layer.bias.grad = gradient[step].clone(), gradient[step, :, 0].clone()
            optimizer.step()
        return layer, optimizer

    exact, _ = trained("adamw", range(4))
    layer, optimizer = trained(name, range(2))
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8
    tensors, values = optimizer_tensors(optimizer.state_dict())
    save_checkpoint(tmp_path, step=1, tensors={"optimizer": tensors}, state={"optimizer": values})
    resumed = copy.deepcopy(layer)
    trained(name, range(2, 4), optimizer, layer)
    assert float((layer.weight - exact.weight).abs().mean()) < 2e-3  # it moved by up to 4e-2
    loaded = load_latest(tmp_path)
    assert loaded is not None
    again = make_optimizer(resumed, Optimizer(name=name, learning_rate=1e-2, weight_decay=0.1))
    again.load_state_dict(optimizer_state(loaded.tensors["optimizer"], loaded.state["optimizer"]))
    trained(name, range(2, 4), again, resumed)
    assert torch.equal(resumed.weight, layer.weight)
    assert torch.equal(resumed.bias, layer.bias)


@pytest.mark.parametrize("sizes", [{"hidden_size": 64, "intermediate_size": 144}, {"hidden_size": 96}])
def test_sizes_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused(make_policy, tokenizer, tmp_path, sizes):
    write_policy(make_policy(**sizes), tmp_path)
    model = Model(path=str(tmp_path), lora=Lora(r=2), quantization=Quantization())
    with pytest.raises(
        SetupError, match="^model.quantization: model.layers.0.* inputs, no multiple of 64; bitsandbytes"
    ):
        load_policy(model, tokenizer, seed=0)


def test_an_8_bit_optimiser_that_the_device_lacks_is_said_with_exit_code_4(monkeypatch):
    def step(self):
        raise NotImplementedError("no kernel for this device\nmore")

    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", step)
    with pytest.raises(SetupError) as error:
        make_optimizer(torch.nn.Linear(64, 128), Optimizer(name="adamw_8bit", learning_rate=1e-2))
    assert str(error.value) == "optimizer.name: adamw_8bit does not run on cpu (no kernel for this device); set adamw"
    assert error.value.exit_code == 4


def test_without_bitsandbytes_both_say_what_to_install(monkeypatch, base, tokenizer):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        SetupError, match=r'^optimizer.name: adamw_8bit needs .*pip install "grpo-lab\[quantization\]"$'
    ):
        make_optimizer(torch.nn.Linear(64, 128), Optimizer(name="adamw_8bit", learning_rate=1e-2))
    with pytest.raises(SetupError, match=r"^model.quantization needs bitsandbytes"):
        load_policy(Model(path=str(base), lora=Lora(r=2), quantization=Quantization()), tokenizer, seed=0)
