"""The packed pass against the plain one, in float64, and how much it computes."""

import copy
from dataclasses import replace

import pytest
import torch

from grpo_lab.attention.layout import Layout, PackedBatch, spread
from grpo_lab.attention.packed import PackedAttention
from grpo_lab.attention.probe import parts, why_plain
from grpo_lab.attention.varlen import VarlenLayout
from grpo_lab.batching import pad_rows
from grpo_lab.policy.forward import PolicyForward, learn_without_dropout, packed_forward, plain_forward

AS_ON_GPU = "as on a GPU"
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
PACKED = {
    "llama": {},  # rotary positions, grouped queries, untied
    "llama, tied": {"tie_word_embeddings": True},
    "llama, one head per query": {"num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 32},
    "gpt2": GPT2,
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
}
PLAIN = {
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0, "attention": "eager"},
    "cohere": {"model_type": "cohere", "logit_scale": 0.5},
    "falcon, alibi": {"model_type": "falcon", "alibi": True},
    "mamba": {"model_type": "mamba", "state_size": 4, "max_position_embeddings": 64, "attention": "eager"},
    "llama, eager": {"attention": "eager"},
}
# Groups of several lengths, a prompt with one completion, a row without a token, rows not in order of length.
PROMPTS = [(20, 21, 22, 23, 24, 25, 26), (30,), (40, 41, 42), (43, 44), (45, 46), (47,)]
ROWS = [
    (0, (50, 51, 2)),
    (0, (52,) * 21),
    (0, ()),
    (0, (53, 54, 55, 56, 57)),
    (1, (2,)),
    (1, (58, 59, 60, 61)),
    (2, (62, 63, 64, 65, 2)),
    (3, ()),
    (3, (2,)),
    (4, ()),  # nobody answers this prompt, nor the last
]


@pytest.fixture(autouse=True)
def _place(request):
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("place") == AS_ON_GPU:
        request.getfixturevalue("as_on_gpu")


def batch_of(policy, rows=ROWS, prompts=PROMPTS):
    return pad_rows(prompts, [prompt for prompt, _ in rows], [completion for _, completion in rows], policy)


def shuffled(batch):
    order = torch.tensor([4, 0, 6, 1, 5, 9, 8, 3, 2, 7])
    names = ("prompt_index", "completion_ids", "completion_mask")
    return replace(batch, **{name: getattr(batch, name)[order] for name in names}), order


def outcome(forward, policy, batch, *, temperature=0.7):
    """Log-probs and entropy of tokens, and the gradient of a sum with a weight of its own for each of them."""
    policy.model.zero_grad()
    out = forward(policy.model, batch, temperature=temperature)
    weights = torch.linspace(-1, 1, batch.completion_mask.numel()).view_as(out.logps) * batch.completion_mask
    total = (out.logps * weights).sum()
    if out.entropy.requires_grad:
        total = total + (out.entropy * weights.flip(0) * batch.completion_mask).sum()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return out.logps * batch.completion_mask, out.entropy * batch.completion_mask, gradients


def plain(model, batch, *, temperature):
    return plain_forward(model, batch, temperature=temperature, entropy_gradient=True)


@pytest.mark.parametrize("place", ["cpu", AS_ON_GPU])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_the_packed_pass_equals_the_plain_one_with_its_gradients(make_policy, family, checkpointing, place):
    policy = make_policy(gradient_checkpointing=checkpointing, **PACKED[family])
    policy.model.double()
    learn_without_dropout(policy.model)
    batch = batch_of(policy)
    assert isinstance(PackedBatch.of(batch).layout, VarlenLayout if place == AS_ON_GPU else Layout)
    expected = outcome(plain, policy, batch)
    assert why_plain(policy.model) is None
    logps, entropy, gradients = outcome(packed_forward, policy, batch)
    torch.testing.assert_close((logps, entropy), expected[:2], atol=1e-9, rtol=1e-9)
    # transformers' RMSNorm and rotary positions compute in float32 whatever the weights' type
    tolerance = 1e-9 if family in ("gpt2", "opt") else 1e-6
    size = torch.cat([gradient.flatten() for gradient in expected[2].values()]).norm()
    assert gradients.keys() == expected[2].keys()
    for name, gradient in gradients.items():
        assert float((gradient - expected[2][name]).norm() / size) < tolerance, name


def test_on_a_gpu_rows_that_are_not_in_the_order_of_their_prompts_are_computed_plainly(make_policy, as_on_gpu):
    policy = make_policy()
    batch = batch_of(policy)
    mixed, order = shuffled(batch)
    forward = PolicyForward(policy.model, temperature=1.0)
    out = forward(mixed)
    assert forward.plain_because == "rows are not in the order of their prompts"
    mask = mixed.completion_mask
    torch.testing.assert_close(out.logps[mask], forward(batch).logps[order][mask], atol=1e-5, rtol=0)
    assert forward.plain_because is None


def test_the_layout_for_a_gpu_names_each_token_once_and_each_prompt_beside_its_answers(make_policy, as_on_gpu):
    layout = PackedBatch.of(batch_of(make_policy())).layout
    lengths = [len(completion) for _, completion in ROWS]
    assert layout.own.starts.diff().tolist() == [7, 1, 3, 2, 0, 0, *lengths]  # two prompts that nobody answers
    assert layout.own.longest == 21
    assert layout.num_prompt_tokens == int(layout.prompts.starts[-1]) == 13
    assert layout.prompts.starts.diff().tolist() == [7, 1, 3, 2, 0, 0]
    assert layout.answers.starts.diff().tolist() == [29, 5, 5, 1, 0, 0]
    assert layout.answers.longest == 29


def test_a_pass_in_parts_that_cut_groups_is_the_same(make_policy):
    policy = make_policy()
    policy.model.double().eval()
    batch = batch_of(policy)
    whole = packed_forward(policy.model, batch, temperature=1.0).logps
    for start in range(0, batch.num_rows, 4):
        part = packed_forward(policy.model, batch.rows(start, start + 4), temperature=1.0).logps
        torch.testing.assert_close(part, whole[start : start + 4, : part.shape[1]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_that_cannot_be_proved_equal_is_computed_plainly_and_says_why(make_policy, family):
    policy = make_policy(**PLAIN[family])
    policy.model.eval()
    forward = PolicyForward(policy.model, temperature=1.0)
    batch = batch_of(policy, [row for row in ROWS if row[1]])
    out = forward(batch)
    assert forward.plain_because
    assert policy.model.config.get_text_config()._attn_implementation != "grpo_lab"
    expected = plain_forward(policy.model, batch, temperature=1.0)
    assert torch.equal(out.logps, expected.logps)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_in_bfloat16_rounding_is_told_from_another_attention(make_policy, monkeypatch, family):
    """Measured by what the model's own eager attention changes."""
    assert why_plain(make_policy(dtype="bfloat16", **PACKED[family]).model) is None
    attend = PackedAttention.attend

    def wrong(self, *tensors, scaling):
        return attend(self, *tensors, scaling=1.2 * scaling)

    monkeypatch.setattr(PackedAttention, "attend", wrong)
    reason = why_plain(make_policy(dtype="bfloat16", **PACKED[family]).model)
    assert "a packed pass gives other logits" in reason
    assert "where eager attention's differ by 0.0" in reason


def test_a_text_longer_than_the_window_is_computed_plainly_and_a_shorter_one_is_not(make_policy):
    policy = make_policy(model_type="mistral", sliding_window=16)
    policy.model.eval()
    forward = PolicyForward(policy.model, temperature=1.0)
    batch = batch_of(policy)
    out = forward(batch)
    assert "28 tokens is longer than its attention window of 16" in forward.plain_because
    assert torch.equal(out.logps, plain_forward(policy.model, batch, temperature=1.0).logps)
    short = batch.rows(3, 7)
    forward(short)
    assert forward.plain_because is None


def test_attention_dropout_in_training_is_not_lost(make_policy):
    policy = make_policy(attention_dropout=0.5)
    batch = batch_of(policy)
    forward = PolicyForward(policy.model, temperature=1.0)
    policy.model.train()
    out = forward(batch)
    assert forward.plain_because == "its attention has dropout"
    policy.model.eval()
    assert not torch.allclose(out.logps, forward(batch).logps, atol=1e-3)
    assert forward.plain_because is None


def test_the_probe_leaves_every_module_in_its_mode_and_draws_nothing(make_policy):
    policy = make_policy()
    policy.model.train()
    policy.model.model.layers[0].eval()
    before, state = [module.training for module in policy.model.modules()], torch.get_rng_state()
    assert why_plain(policy.model) is None
    assert [module.training for module in policy.model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_each_token_is_computed_once_and_each_needed_logit_once(make_policy):
    """Counted, not timed: prompts once, real tokens once; one row of logits for all first tokens of a group.

    The last layer's MLP sees the places whose logits are needed, and the plain pass all of them.
    """
    policy = make_policy()
    batch = batch_of(policy)
    completion_logps = PolicyForward(policy.model, temperature=1.0)
    completion_logps(batch)
    seen = []
    decoder, head = parts(policy.model)
    for layer in decoder.layers:
        layer.mlp.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape[:-1].numel()))
    packed = completion_logps(batch)
    prompt_tokens = sum(len(prompt) for prompt in PROMPTS[:4])
    completion_tokens = sum(len(completion) for _, completion in ROWS)
    needed = sum(len(completion) - 1 for _, completion in ROWS if completion) + 4
    assert seen == [prompt_tokens + completion_tokens, needed]
    seen.clear()
    plain = plain_forward(policy.model, batch, temperature=1.0)
    assert seen == [batch.num_rows * (batch.prompt_ids.shape[1] + batch.completion_ids.shape[1])] * 2
    mask = batch.completion_mask
    torch.testing.assert_close(packed.logps[mask], plain.logps[mask], atol=1e-5, rtol=1e-5)
    assert len(PackedBatch.of(batch).predicted_at) == needed
    assert type(head) is torch.nn.Linear


def test_the_work_of_attention_does_not_grow_with_padding_or_with_prompts_that_are_shared(make_policy):
    """The products of queries and keys that are formed, against those that causal attention needs."""
    policy = make_policy()
    rows = [(0, (50,) * length) for length in (40, 39, 6, 5, 5, 4, 3, 3)]
    packed = PackedBatch.of(batch_of(policy, rows))
    tokens = int((~packed.layout.filling).sum())
    assert tokens == len(PROMPTS[0]) + 105
    assert len(packed.layout.places) <= 1.25 * tokens
    ((crossing,),) = packed.layout.crossings  # all completions against the one prompt, which is not copied
    assert (crossing.prompt.stop - crossing.prompt.start, crossing.rows.stop - crossing.rows.start) == (7, 105)


def test_values_of_tokens_come_back_to_their_rows_and_columns(make_policy):
    batch = batch_of(make_policy())
    values = torch.arange(1.0, 1 + float(batch.completion_mask.sum()))
    table = spread(values, batch)
    assert torch.equal(table[batch.completion_mask], values)
    assert not table[~batch.completion_mask].any()


def test_rows_of_one_prompt_that_do_not_stand_together_are_still_its_rows(make_policy):
    policy = make_policy()
    policy.model.double().eval()
    batch = batch_of(policy)
    mixed, order = shuffled(batch)
    expected = packed_forward(policy.model, batch, temperature=1.0).logps[order]
    torch.testing.assert_close(packed_forward(policy.model, mixed, temperature=1.0).logps, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_rounding_costs_the_packed_gradient_no_more_than_twice_what_it_costs_the_plain_one(make_policy, family):
    """Both in float32, against the plain pass in float64; mean over several sets of rows."""
    policy = make_policy(hidden_size=64, num_hidden_layers=3, **PACKED[family])
    as_it_was = replace(policy, model=copy.deepcopy(policy.model))  # the packed pass fuses layers
    exact = replace(policy, model=copy.deepcopy(policy.model).double())
    for each in (policy, as_it_was, exact):
        each.model.eval()
    errors = {"plain": [], "packed": []}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (6,), generator=generator).tolist()
        tokens = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]
        batch = batch_of(policy, [(place // 2, row) for place, row in enumerate(tokens)])
        truth = outcome(plain, exact, batch)[2]
        size = torch.cat([gradient.flatten() for gradient in truth.values()]).norm()
        for name, forward, each in (("plain", plain, as_it_was), ("packed", packed_forward, policy)):
            found = outcome(forward, each, batch)[2]
            differences = torch.cat([(found[key].double() - truth[key]).flatten() for key in truth])
            errors[name].append(float(differences.norm() / size))
    assert 0 < sum(errors["packed"]) <= 2 * sum(errors["plain"])
    assert max(errors["packed"]) < 1e-5
