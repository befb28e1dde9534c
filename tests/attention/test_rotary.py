"""Queries, keys and values by one product: the same values and gradients as by three, and only where nothing else runs."""

import pytest
import torch
from torch import nn

from grpo_lab.attention.layout import PackedBatch
from grpo_lab.attention.packed import PackedAttention, PackedLayers
from grpo_lab.attention.probe import why_plain
from grpo_lab.attention.rotary import one_product, rotated
from grpo_lab.batching import pad_rows
from grpo_lab.policy.forward import packed_forward, plain_forward

FROM_ONE_PRODUCT = {
    "llama": {},  # grouped queries
    "llama, one head per query": {"num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},  # has biases
    "mistral": {"model_type": "mistral", "sliding_window": 64},
}
OTHERWISE = {
    "qwen3": {"model_type": "qwen3", "head_dim": 8},  # has norms in between
    "olmo": {"model_type": "olmo", "clip_qkv": 8.0},  # cuts off what is large
}
ROWS = [(0, (50, 51, 2)), (0, (52,) * 9), (1, (53, 54)), (2, (55, 56, 2)), (2, (57,))]
PROMPTS = [(20, 21, 22, 23, 24), (30, 31), (40, 41, 42)]


def batch_of(policy):
    return pad_rows(PROMPTS, [prompt for prompt, _ in ROWS], [completion for _, completion in ROWS], policy)


def ways(model):
    return {
        vars(module)["forward"].__func__.__qualname__.partition(".")[0]
        for module in model.modules()
        if "Attention" in type(module).__name__ and "forward" in vars(module)
    }


def outcome(forward, policy, batch):
    policy.model.zero_grad()
    logps = forward(policy.model, batch, temperature=1.0).logps[batch.completion_mask]
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FROM_ONE_PRODUCT)
def test_one_product_changes_nothing_but_rounding_in_a_pass_with_its_gradients(make_policy, family):
    policy = make_policy(**FROM_ONE_PRODUCT[family])
    policy.model.eval()
    for number, (name, parameter) in enumerate(policy.model.named_parameters()):
        if name.endswith("_proj.bias"):  # new ones are 0
            nn.init.normal_(parameter, 0.0, 0.2, generator=torch.Generator().manual_seed(number))
    batch = batch_of(policy)
    expected = outcome(plain_forward, policy, batch)
    assert why_plain(policy.model) is None
    assert ways(policy.model) == {"_from_one_product"}
    for one, other in zip(outcome(packed_forward, policy, batch), expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("family", OTHERWISE)
def test_layers_that_do_more_in_between_keep_their_three_products(make_policy, family):
    policy = make_policy(**OTHERWISE[family])
    policy.model.eval()
    assert why_plain(policy.model) is None
    assert ways(policy.model) <= {type(policy.model.model.layers[0].self_attn).__name__}


@pytest.mark.parametrize("heads, fewer, bias", [(4, 2, True), (2, 2, False)])
@pytest.mark.parametrize("is_last", [False, True])
def test_attention_of_states_equals_attention_of_what_is_made_of_them(make_policy, heads, fewer, bias, is_last):
    packed = PackedBatch.of(batch_of(make_policy()))
    size, width, length = 8, 12, len(packed.ids)
    layer = nn.Module()
    layer.head_dim = size
    for name, num in (("q_proj", heads), ("k_proj", fewer), ("v_proj", fewer)):
        layer.add_module(name, nn.Linear(width, num * size, bias=bias, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, length, width, generator=generator, dtype=torch.float64)
    angle = torch.rand(1, length, size // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    leaves = [states.requires_grad_(), *layer.parameters()]

    def of_states(attending):
        return attending.attend_states(layer, states, one_product(layer, cos, sin), scaling=0.3)

    def of_three(attending):
        q, k, v = (linear(states).unflatten(-1, (-1, size)).transpose(1, 2) for linear in layer.children())
        return attending.attend(layer, *rotated(q, k, cos, sin), v, scaling=0.3)

    results = []
    for attend, attending in ((of_states, PackedLayers(packed)), (of_three, PackedAttention(packed))):
        out = attend(attending.in_last_layer() if is_last else attending)[0]
        if is_last:
            out = out[packed.predicted_at]
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-10)


def test_a_projection_that_somebody_listens_to_is_called(make_policy):
    """As by who fetches weights just before they are needed, or by an adapter put in its place."""
    policy = make_policy()
    policy.model.eval()
    batch = batch_of(policy)
    expected = packed_forward(policy.model, batch, temperature=1.0).logps
    heard = []
    for layer in policy.model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, _: heard.append(module))
    torch.testing.assert_close(packed_forward(policy.model, batch, temperature=1.0).logps, expected, atol=1e-5, rtol=0)
    assert heard == [layer.self_attn.k_proj for layer in policy.model.model.layers]


def test_pairs_that_are_turned_by_two_angles_keep_their_own_way(make_policy):
    policy = make_policy()
    layer = policy.model.model.layers[0].self_attn
    half = torch.rand(1, 3, layer.head_dim // 2)
    same, other = half.repeat(1, 1, 2), torch.rand(1, 3, layer.head_dim)
    assert one_product(layer, same, same) is not None
    assert one_product(layer, same, other) is None
    assert one_product(layer, other, same) is None
