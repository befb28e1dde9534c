"""On a GPU itself: torch's kernels keep the contract that the rest is tested with, and a model is computed and decoded."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU with CUDA", allow_module_level=True)

from grpo_lab.attention import varlen
from grpo_lab.attention.probe import why_plain
from grpo_lab.attention.varlen import Runs
from grpo_lab.batching import pad
from grpo_lab.policy.adapter import attach
from grpo_lab.policy.forward import (
    PolicyForward,
    completion_logps,
    learn_without_dropout,
    packed_forward,
    plain_forward,
)
from grpo_lab.policy.load import as_policy, load_policy
from grpo_lab.recipe.schema import Lora, Model
from grpo_lab.sampling import Decoding, NativeSampler

pytestmark = pytest.mark.gpu
SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def stand_in():
    spec = importlib.util.spec_from_file_location("gpu_stand_in", Path(__file__).parents[1] / "gpu_stand_in.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def policy(tokenizer, spread):
    policy = load_policy(Model(config=SHAPE, tokenizer="built", dtype="bfloat16"), tokenizer, seed=0)
    with torch.no_grad():
        spread(policy.model.parameters(), 0.06)
    return policy


def some(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def gap(ours, expected):
    return float((ours.double().cpu() - expected).norm() / expected.norm())


def runs(lengths, device):
    return Runs.of(lengths, torch.device(device))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [64, 128])
def test_the_flash_kernel_is_what_the_stand_in_says(stand_in, causal, size):
    queries, keys = [5, 0, 130, 1, 64], [5, 0, 130, 1, 64] if causal else [33, 0, 7, 150, 1]
    q, grad = (some(sum(queries), 6, size, seed=seed) for seed in (0, 1))
    k, v = (some(sum(keys), 2, size, seed=seed) for seed in (2, 3))
    wide = [tensor.double() for tensor in (q, k, v)]
    options = {"causal": causal, "scaling": size**-0.5}
    there, here = (runs(queries, "cpu"), runs(keys, "cpu")), (runs(queries, "cuda"), runs(keys, "cuda"))
    out, lse = stand_in.flash(*wide, *there, **options)
    q_, k_, v_, grad_ = (tensor.cuda() for tensor in (q, k, v, grad))
    out_, lse_ = varlen.flash(q_, k_, v_, *here, **options)
    assert gap(out_, out) < 0.01
    torch.testing.assert_close(lse_.cpu(), lse.float(), atol=2e-3, rtol=2e-3)
    # joined with something else: a larger lse and another output, as the backward pass is used
    more, other = lse + 0.3, (0.7 * out + 0.1).contiguous()
    expected = stand_in.flash_backward(grad.double(), *wide, other, more, *there, **options)
    found = varlen.flash_backward(grad_, q_, k_, v_, other.bfloat16().cuda(), more.float().cuda(), *here, **options)
    assert all(gap(ours, theirs) < 0.02 for ours, theirs in zip(found, expected, strict=True))


def test_a_query_sees_as_many_of_its_cached_keys_as_it_is_told(stand_in):
    used = [3, 16, 1, 9]
    q, k, v = (some(n, heads, 64, seed=heads) for n, heads in ((4, 6), (64, 2), (64, 2)))
    there, here = (([runs([1] * 4, p), runs([16] * 4, p)], torch.tensor(used, device=p).int()) for p in ("cpu", "cuda"))
    expected = stand_in.flash_cached(q.double(), k.double(), v.double(), *there[0], there[1], scaling=0.2)
    out = varlen.flash_cached(q.cuda(), k.cuda(), v.cuda(), *here[0], here[1], scaling=0.2)
    assert gap(out, expected) < 0.01


@pytest.mark.parametrize("lora", [False, True])
def test_a_packed_pass_rounds_no_worse_than_twice_the_plain_one(policy, make_examples, lora):
    """Both in bfloat16 against the plain pass in float32, log-probs and the whole gradient."""
    if lora:
        policy = as_policy(attach(policy.model, Lora(r=4), seed=0), policy.tokenizer)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
    batch = pad(NativeSampler(policy, Decoding(60)).sample(make_examples(), num_generations=4, seed=0), policy)
    learn_without_dropout(policy.model)
    assert why_plain(policy.model) is None
    weights = torch.linspace(-1, 1, batch.completion_mask.numel(), device="cuda").view_as(batch.completion_mask)

    def outcome(forward):
        policy.model.zero_grad()
        logps = forward(policy.model, batch, temperature=0.9).logps.float() * batch.completion_mask
        (logps * weights).sum().backward()
        grads = [p.grad.double().flatten() for p in policy.model.parameters() if p.grad is not None]
        return logps.detach().double().cpu(), torch.cat(grads).cpu()

    ours, plain = outcome(packed_forward), outcome(plain_forward)
    policy.model.float()
    exact = outcome(plain_forward)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert gap(mine, true) <= 2 * gap(theirs, true)


def test_decoding_by_graph_gives_the_trainer_s_log_probs_and_is_used_again(policy, make_examples):
    sampler = NativeSampler(policy, Decoding(40, max_rows=7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no graph: a warning
        first = sampler.sample(make_examples(), num_generations=8, seed=0)
    assert sampler._slots.graph is not None
    graph = sampler._slots.graph
    assert sampler.sample(make_examples(), num_generations=8, seed=0) == first
    assert sampler._slots.graph is graph
    batch = pad(first, policy)
    trainer = completion_logps(policy, batch, temperature=1.0)
    gaps = (batch.sampler_logps - trainer).abs()[batch.completion_mask]
    assert gaps.mean() < 0.02
    assert len({len(c.token_ids) for group in first for c in group.completions}) > 1
    with torch.no_grad():  # a graph computes with what the weights are now
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    batch = pad(sampler.sample(make_examples(), num_generations=8, seed=0), policy)
    assert sampler._slots.graph is graph
    trainer = completion_logps(policy, batch, temperature=1.0)
    assert (batch.sampler_logps - trainer).abs()[batch.completion_mask].mean() < 0.02


def test_float32_is_computed_plainly_and_says_why(tokenizer, make_examples):
    policy = load_policy(Model(config=SHAPE, tokenizer="built"), tokenizer, seed=0)
    batch = pad(NativeSampler(policy, Decoding(10)).sample(make_examples(), num_generations=2, seed=0), policy)
    forward = PolicyForward(policy.model, temperature=1.0)
    out = forward(batch)
    assert "needs model.dtype: bfloat16" in forward.plain_because
    gaps = (batch.sampler_logps - out.logps).abs()[batch.completion_mask]
    assert gaps.max() < 1e-3
