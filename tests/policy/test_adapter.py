"""LoRA: what learns, what the reference is in each case, and what is written."""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_lab.batching import pad_rows
from grpo_lab.engines.weights import make_optimizer
from grpo_lab.errors import CheckpointError, RecipeError
from grpo_lab.policy.forward import completion_logps, frozen_copy, plain_forward, reference_logps, refresh_reference
from grpo_lab.policy.load import load_policy, write_policy
from grpo_lab.policy.trainable import learned, parameter_count, restore, state
from grpo_lab.recipe.schema import Lora, Model, Optimizer

ADAPTER = Lora(r=4, alpha=8)


@pytest.fixture
def base(make_policy, tmp_path):
    """A folder with a whole model."""
    write_policy(make_policy(), tmp_path / "run" / "base")
    return tmp_path / "run" / "base"


@pytest.fixture
def fresh(base, tokenizer):
    """A function: a policy with a fresh adapter on the whole model."""
    return lambda lora=ADAPTER: load_policy(Model(path=str(base), lora=lora), tokenizer, seed=0)


def shift(policy):
    """Move everything that learns, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    policy.model.eval()
    return policy


@pytest.fixture
def warm(fresh, tmp_path):
    """A folder with an adapter that has learnt something."""
    write_policy(shift(fresh()), tmp_path / "run" / "warm" / "final")
    return tmp_path / "run" / "warm" / "final"


def logps(policy):
    policy.model.eval()
    return completion_logps(policy, rows(policy), temperature=1.0)


def rows(policy):
    return pad_rows([(5, 6), (7,)], [0, 1], [(7, 8, 9), (10, 2)], policy)


def flags(policy):
    return {name: parameter.requires_grad for name, parameter in policy.model.named_parameters()}


def tensors(policy):
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def equal_but_for_rounding(one, other):
    """Layers with an adapter make queries, keys and values by a product each, others by one product."""
    return torch.allclose(one, other, atol=5e-6, rtol=0)


def whole(base, tokenizer):
    return load_policy(Model(path=str(base)), tokenizer, seed=0)


@pytest.mark.parametrize("lora", [ADAPTER, Lora(r=4, rslora=True), Lora(r=4, target_modules=["q_proj"])])
def test_a_fresh_adapter_changes_nothing(fresh, base, tokenizer, lora):
    policies = fresh(lora), whole(base, tokenizer)
    one, other = (plain_forward(policy.model.eval(), rows(policy), temperature=1.0).logps for policy in policies)
    assert torch.equal(one, other)
    assert equal_but_for_rounding(*map(logps, policies))


def test_a_fresh_adapter_with_sizes_changes_only_the_rounding(fresh, base, tokenizer):
    assert torch.allclose(logps(fresh(Lora(r=4, dora=True))), logps(whole(base, tokenizer)), atol=1e-5)


@pytest.mark.parametrize(
    "lora, scale",
    [
        (Lora(r=4, alpha=8), 2.0),  # 8 / 4
        (Lora(r=4, alpha=8, rslora=True), 4.0),  # 8 / sqrt(4)
    ],
)
def test_an_update_is_its_two_factors_times_the_scale(fresh, lora, scale):
    policy = shift(fresh(lora))
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    assert torch.allclose(layer(x), layer.base_layer(x) + scale * update, atol=1e-5)


def test_new_adapters_are_a_function_of_the_seed_and_leave_the_global_generator_alone(fresh, base, tokenizer):
    before = torch.get_rng_state()
    first = fresh()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(tensors(first), tensors(fresh()))
    other = load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=1)
    assert not same(tensors(first), tensors(other))


@pytest.mark.parametrize(
    "lora, names",
    [
        (Lora(r=4), ("lora_",)),
        (Lora(r=4, dora=True), ("lora_",)),
        (Lora(r=4, bias="all"), ("lora_", ".bias")),
    ],
)
def test_only_the_adapter_learns(make_policy, tokenizer, tmp_path, lora, names):
    write_policy(make_policy(model_type="qwen2"), tmp_path)  # it has biases
    policy = load_policy(Model(path=str(tmp_path), lora=lora), tokenizer, seed=0)
    learning = [name for name, flag in flags(policy).items() if flag]
    assert learning
    assert all(any(part in name for part in names) for name in learning)
    assert any(".bias" in name for name in learning) == (lora.bias == "all")
    before = tensors(policy)
    optimizer = make_optimizer(policy.model, Optimizer(learning_rate=0.1))
    for _ in range(2):  # B is 0 at first, so A moves from the second step on
        out = policy.model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]]))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tensors(policy)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(learning)


def test_the_count_and_share_of_what_learns_by_hand(make_policy, fresh):
    # per layer with r 4: q 4*(32+32), k and v 4*(32+16) each, o 4*(32+32), gate, up and down 4*(32+64) each = 2048
    layer = 4 * (64 + 48 + 48 + 64) + 3 * 4 * 96
    total = sum(p.numel() for p in make_policy().model.parameters())
    share = 100 * 2 * layer / (total + 2 * layer)
    assert parameter_count(fresh().model) == f"{2 * layer:,} of {total + 2 * layer:,} parameters learn ({share:.3g} %)"
    assert parameter_count(make_policy().model) == f"{total:,} of {total:,} parameters learn (100 %)"


def test_the_reference_of_a_fresh_adapter_is_the_model_without_it(fresh, base, tokenizer):
    policy = fresh()
    reference = frozen_copy(policy)
    shift(policy)
    expected = logps(whole(base, tokenizer))
    assert equal_but_for_rounding(reference_logps(reference, rows(policy), temperature=1.0), expected)
    assert not torch.allclose(logps(policy), expected, atol=1e-2)


def test_the_reference_of_a_warm_adapter_is_that_adapter_not_the_model_without_it(warm, base, tokenizer):
    policy = load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=0, folder=warm)
    began = logps(policy)
    assert not torch.allclose(began, logps(whole(base, tokenizer)), atol=1e-2)
    reference = frozen_copy(policy)
    shift(policy)
    assert torch.equal(reference_logps(reference, rows(policy), temperature=1.0), began)
    assert not torch.allclose(logps(policy), began, atol=1e-2)


def test_the_reference_of_full_fine_tuning_shares_nothing_with_the_policy(make_policy):
    policy = make_policy()
    began = logps(policy)
    reference = frozen_copy(policy)
    shift(policy)
    assert torch.equal(reference_logps(reference, rows(policy), temperature=1.0), began)
    assert {p.data_ptr() for p in reference.model.parameters()}.isdisjoint(
        p.data_ptr() for p in policy.model.parameters()
    )


@pytest.mark.parametrize("lora", [ADAPTER, Lora(r=4, bias="all"), Lora(r=4, dora=True)])
def test_a_reference_beside_an_adapter_costs_no_more_than_what_learns(make_policy, tokenizer, tmp_path, lora):
    write_policy(make_policy(model_type="qwen2"), tmp_path)
    policy = load_policy(Model(path=str(tmp_path), lora=lora), tokenizer, seed=0)
    mine = {id(parameter): name for name, parameter in policy.model.named_parameters()}
    own = [name for name, parameter in frozen_copy(policy).model.named_parameters() if id(parameter) not in mine]
    assert set(own) == learned(policy.model)


@pytest.mark.parametrize("case", ["fresh", "warm", "full", "dora", "biases"])
def test_a_reference_pass_leaves_policy_optimiser_and_count_as_they_are(make_policy, tokenizer, tmp_path, case):
    write_policy(make_policy(model_type="qwen2"), tmp_path / "base")
    loras = {"full": None, "dora": Lora(r=4, dora=True), "biases": Lora(r=4, bias="all")}
    model = Model(path=str(tmp_path / "base"), lora=loras.get(case, ADAPTER))
    policy = load_policy(model, tokenizer, seed=0)
    if case == "warm":
        write_policy(shift(policy), tmp_path / "warm")
        policy = load_policy(model, tokenizer, seed=0, folder=tmp_path / "warm")
    before, count = flags(policy), parameter_count(policy.model)
    reference = frozen_copy(policy)
    kept = tensors(policy)
    reference_logps(reference, rows(policy), temperature=1.0)
    assert flags(policy) == before
    assert parameter_count(policy.model) == count
    assert same(tensors(policy), kept)
    stepped = {
        id(p)
        for group in make_optimizer(policy.model, Optimizer(learning_rate=1)).param_groups
        for p in group["params"]
    }
    assert stepped == {id(p) for name, p in policy.model.named_parameters() if before[name]}
    assert stepped.isdisjoint(id(p) for p in reference.model.parameters())
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_a_moving_reference_moves_its_adapter_and_never_the_shared_weights(fresh):
    policy = fresh()
    reference = frozen_copy(policy)
    began, base_before = tensors(reference), tensors(policy)
    shift(policy)
    refresh_reference(reference, policy, alpha=0.25)
    names = learned(policy.model)
    assert names is not None
    for name, value in reference.model.state_dict().items():
        if name in names:
            expected = 0.25 * policy.model.state_dict()[name] + 0.75 * began[name]
            assert torch.allclose(value, expected, atol=1e-7)
            assert not torch.equal(value, began[name])
        else:
            assert torch.equal(value, base_before[name])


def test_what_is_written_is_the_adapter_alone_and_loads_with_transformers_and_with_peft(warm, base, tokenizer):
    assert not (warm / "model.safetensors").exists()
    assert not (warm / "README.md").exists()
    assert all("lora_" in name and "reference" not in name for name in load_file(warm / "adapter_model.safetensors"))
    policy = load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=0, folder=warm)
    ids = torch.tensor([[5, 6, 7]])
    expected = policy.model.eval()(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(warm)(ids).logits, expected)
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), warm).eval()
    assert torch.equal(on_base(ids).logits, expected)


def test_the_same_adapter_is_written_as_the_same_bytes(warm, base, tokenizer, tmp_path):
    policy = load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=0, folder=warm)
    write_policy(policy, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (warm / name).read_bytes()


def test_a_warm_adapter_can_be_merged_and_all_weights_trained(warm, base, tokenizer):
    adapted = load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=0, folder=warm)
    merged = load_policy(Model(path=str(base)), tokenizer, seed=0, folder=warm)
    assert learned(merged.model) is None
    assert torch.allclose(logps(merged), logps(adapted), atol=1e-5)


@pytest.mark.parametrize(
    "lora, message",
    [
        (Lora(r=8, alpha=8), "model.lora.r: 8, but the adapter in FOLDER has 4; "),
        (Lora(r=4, alpha=16), "model.lora.alpha: 16, but the adapter in FOLDER has 8; "),
        (
            Lora(r=4, alpha=8, target_modules=["q_proj"]),
            "model.lora.target_modules: the adapter in FOLDER has other lay",
        ),
    ],
)
def test_an_adapter_with_other_settings_is_not_gone_on_with(warm, base, tokenizer, lora, message):
    with pytest.raises(RecipeError) as error:
        load_policy(Model(path=str(base), lora=lora), tokenizer, seed=0, folder=warm)
    assert str(error.value).replace(str(warm), "FOLDER").startswith(message)


def test_an_adapter_follows_its_moved_run(warm, base, tokenizer, tmp_path):
    before = logps(load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=0, folder=warm))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    warm = tmp_path / "elsewhere" / "warm" / "final"
    assert torch.equal(logps(load_policy(Model(path=str(warm), lora=ADAPTER), tokenizer, seed=0)), before)
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    with pytest.raises(RecipeError, match="as the adapter's base, which is not there"):
        load_policy(Model(path=str(warm), lora=ADAPTER), tokenizer, seed=0)


def test_pickled_adapters_are_not_read(warm, base, tokenizer):
    (warm / "adapter_model.safetensors").rename(warm / "adapter_model.bin")
    with pytest.raises(RecipeError, match="adapter_model.safetensors is missing"):
        load_policy(Model(path=str(warm), lora=ADAPTER), tokenizer, seed=0)


def test_a_layer_that_does_not_exist_is_a_recipe_error(fresh):
    with pytest.raises(RecipeError, match="^model.lora: Target modules .*'q_prj'.* not found"):
        fresh(Lora(target_modules=["q_prj"]))


def test_a_checkpoint_holds_what_learns_and_brings_it_back(fresh):
    policy = shift(fresh())
    saved = copy.deepcopy(state(policy.model, learned(policy.model)))
    assert saved.keys() == learned(policy.model)
    expected = tensors(policy)
    other = fresh()
    restore(other.model, saved)
    assert same(tensors(other), expected)
    with pytest.raises(CheckpointError, match="has 1 tensors that the model lacks, the first odd"):
        restore(other.model, {**saved, "odd": torch.zeros(1)})


def test_an_adapter_on_bfloat16_weights_is_float32(base, tokenizer):
    policy = load_policy(Model(path=str(base), lora=ADAPTER, dtype="bfloat16"), tokenizer, seed=0)
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_damaged_adapter_weights_are_refused(warm, base, tokenizer):
    weights = load_file(warm / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, warm / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match="has other layers, the first that differs is "):
        load_policy(Model(path=str(base), lora=ADAPTER), tokenizer, seed=0, folder=warm)
    assert json.loads((warm / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
