"""The batched forward pass against one row at a time, written out slowly."""

import math
from dataclasses import replace

import pytest
import torch

from grpo_lab.batching import pad_rows
from grpo_lab.policy.forward import (
    PolicyForward,
    completion_logps,
    frozen_copy,
    learn_without_dropout,
    plain_forward,
    reference_logps,
)
from grpo_lab.types import Batch

FAMILIES = {
    "llama": {},  # rotary positions, grouped queries, untied
    "llama, tied": {"tie_word_embeddings": True},
    "llama, one head per query": {"num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},  # biases
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},  # absolute positions
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},  # absolute positions with an offset
    "gemma2": {
        "model_type": "gemma2",
        "attention": "eager",
        "head_dim": 8,
        "sliding_window": 4,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
}
PROMPTS = [(20, 21, 22, 23, 24, 25, 26), (30,), (40, 41, 42)]
ROWS = [  # (prompt, completion)
    (0, (50, 51, 2)),
    (0, (52, 53, 54, 55, 56, 57)),
    (1, (2,)),
    (1, (58, 59, 60, 61)),
    (2, (62, 2)),
    (2, (63, 64, 65, 66, 2)),
]


def batch_of(policy, rows=ROWS, prompts=PROMPTS) -> Batch:
    return pad_rows(prompts, [prompt for prompt, _ in rows], [completion for _, completion in rows], policy)


def alone(policy, prompt, completion, *, temperature=1.0):
    """Log-probs and entropies of one unpadded row by itself; the softmax is written out in float64."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
    logps, entropies = [], []
    for t, token in enumerate(completion):
        weights = torch.exp(logits[len(prompt) - 1 + t] - logits[len(prompt) - 1 + t].max())
        probs = weights / weights.sum()
        logps.append(math.log(probs[token]))
        entropies.append(-sum(p * math.log(p) for p in probs.tolist() if p > 0))
    return logps, entropies


def gradients(policy, batch, *, temperature=1.0):
    """Of a weighted sum of log-probs, every row with a weight of its own."""
    policy.model.zero_grad()
    weights = batch.completion_mask * torch.arange(1.0, batch.num_rows + 1)[:, None]
    logps = PolicyForward(policy.model, temperature=temperature)(batch).logps
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_entropy_equal_those_of_each_row_alone(make_policy, family):
    policy = make_policy(**FAMILIES[family])
    policy.model.eval()
    batch = batch_of(policy)
    with torch.no_grad():
        out = PolicyForward(policy.model, temperature=0.7)(batch)
    for row, (prompt, completion) in enumerate(ROWS):
        logps, entropies = alone(policy, PROMPTS[prompt], completion, temperature=0.7)
        size = len(completion)
        torch.testing.assert_close(out.logps[row, :size].tolist(), logps, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.entropy[row, :size].tolist(), entropies, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_micro_batches_change_nothing(make_policy, family, size):
    policy = make_policy(**FAMILIES[family])
    policy.model.eval()
    batch = batch_of(policy)
    whole = completion_logps(policy, batch, temperature=1.0)
    parts = completion_logps(policy, batch, temperature=1.0, micro_batch_size=size)
    assert parts.shape == (6, 6)
    torch.testing.assert_close(parts, whole, atol=5e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_more_padding_changes_nothing(make_policy, family):
    policy = make_policy(**FAMILIES[family])
    policy.model.eval()
    batch = batch_of(policy, rows=ROWS[2:])  # without the longest prompt and completion ...
    wide = batch_of(policy)  # ... and with them: four more columns on the left, one more on the right
    logps = completion_logps(policy, batch, temperature=1.0)
    padded = completion_logps(policy, wide, temperature=1.0)[2:, : logps.shape[1]]
    torch.testing.assert_close(padded, logps, atol=5e-6, rtol=0)


def test_what_fills_the_padding_changes_neither_log_probs_nor_gradients(make_policy):
    policy = make_policy()
    policy.model.eval()
    one = batch_of(replace(policy, pad_id=200))
    other = batch_of(replace(policy, pad_id=20))  # a token that prompts use
    assert not torch.equal(one.completion_ids, other.completion_ids)
    torch.testing.assert_close(
        completion_logps(policy, one, temperature=1.0), completion_logps(policy, other, temperature=1.0)
    )
    torch.testing.assert_close(gradients(policy, one), gradients(policy, other))


def test_masked_positions_get_no_gradient(make_policy):
    policy = make_policy()
    policy.model.eval()
    grads = gradients(policy, batch_of(replace(policy, pad_id=200)))  # token 200 stands nowhere but in the padding
    embedding = grads["model.embed_tokens.weight"]
    assert embedding[200].eq(0).all()
    assert embedding[[20, 26, 30, 42, 50, 66]].ne(0).any(1).all()


def test_columns_beyond_a_row_are_zero_and_hold_no_gradient(make_policy):
    policy = make_policy()
    policy.model.eval()
    batch = batch_of(policy)
    logps = completion_logps(policy, batch, temperature=1.0, micro_batch_size=2)
    assert not logps.requires_grad
    assert logps[~batch.completion_mask].eq(0).all()
    assert logps[batch.completion_mask].ne(0).all()


def test_a_temperature_of_two_halves_the_logits(make_policy):
    policy = make_policy(tie_word_embeddings=False)
    policy.model.eval()
    batch = batch_of(policy)
    at_two = completion_logps(policy, batch, temperature=2.0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.5)
    torch.testing.assert_close(completion_logps(policy, batch, temperature=1.0), at_two)


def test_the_temperature_divides_in_float32_whatever_the_model_s_dtype(make_policy):
    policy = make_policy(dtype="bfloat16")
    policy.model.eval()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(8)  # logits of a trained model's size, where bfloat16 is coarse
        batch = pad_rows([PROMPTS[0]], [0], [ROWS[1][1]], policy)
        logits = policy.model(input_ids=torch.tensor([[*PROMPTS[0], *ROWS[1][1]]])).logits
        assert logits.dtype == torch.bfloat16
        expected = (logits.float() / 0.7).log_softmax(-1)[0, 6:-1].gather(1, batch.completion_ids.T).squeeze(1)
        out = PolicyForward(policy.model, temperature=0.7)(batch)
    assert out.logps.dtype == out.entropy.dtype == torch.float32
    torch.testing.assert_close(out.logps[0], expected, atol=1e-4, rtol=0)


def test_eos_that_is_also_padding_is_trained_once_and_attended_in_the_prompt(make_policy):
    policy = make_policy()
    policy.model.eval()
    eos = policy.eos_ids[0]
    policy = replace(policy, pad_id=eos)
    prompts = [(20, eos, 21, 22), (23,)]  # a chat prompt closes its turns with EOS
    rows = [(0, (30, eos)), (0, (31, 32, 33, eos)), (1, (34,))]
    batch = batch_of(policy, rows, prompts)
    assert batch.prompt_mask.tolist() == [[True] * 4, [False, False, False, True]]
    assert (batch.completion_ids.eq(eos) & batch.completion_mask).sum(1).tolist() == [1, 1, 0]
    logps = completion_logps(policy, batch, temperature=1.0)
    for row, (prompt, completion) in enumerate(rows):
        expected, _ = alone(policy, prompts[prompt], completion)
        torch.testing.assert_close(logps[row, : len(completion)].tolist(), expected, atol=1e-5, rtol=0)
    bias = torch.zeros_like(batch.completion_mask, dtype=torch.float32)
    bias[0] = 1.0  # the first row alone, padding columns included
    policy.model.zero_grad()
    out = PolicyForward(policy.model, temperature=1.0)(batch).logps.masked_fill(~batch.completion_mask, 0.0)
    (out * bias).sum().backward()
    trained = policy.model.lm_head.weight.grad[eos].clone()
    policy.model.zero_grad()
    PolicyForward(policy.model, temperature=1.0)(batch.rows(0, 1)).logps.sum().backward()
    torch.testing.assert_close(trained, policy.model.lm_head.weight.grad[eos])


CHECKPOINTED = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {**FAMILIES["gpt2"], "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {**FAMILIES["opt"], "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
}


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_changes_neither_log_probs_nor_gradients_and_dropout_is_off(make_policy, family):
    plain = make_policy(**CHECKPOINTED[family])
    batch = batch_of(plain)
    plain.model.train()
    with_dropout = [completion_logps(plain, batch, temperature=1.0) for _ in range(2)]
    assert not torch.equal(*with_dropout)  # else this test shows nothing
    plain.model.eval()
    expected = completion_logps(plain, batch, temperature=1.0), gradients(plain, batch)

    policy = make_policy(gradient_checkpointing=True, **CHECKPOINTED[family])
    learn_without_dropout(policy.model)
    torch.testing.assert_close(completion_logps(policy, batch, temperature=1.0), expected[0])
    calls = []
    layers = next(module for module in policy.model.modules() if isinstance(module, torch.nn.ModuleList))
    next(layers[0].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(completion_logps(policy, batch, temperature=1.0), expected[0])
    assert len(calls) == 1
    torch.testing.assert_close(gradients(policy, batch), expected[1])
    assert len(calls) == 3  # forward, and once more in the backward pass: checkpointing was really on


def test_the_reference_is_frozen_and_later_updates_do_not_reach_it(make_policy):
    policy = make_policy()
    batch = batch_of(policy)
    policy.model.train()
    reference = frozen_copy(policy)
    before = reference_logps(reference, batch, temperature=1.0)
    torch.testing.assert_close(before, completion_logps(policy, batch, temperature=1.0), atol=0, rtol=0)
    assert not reference.model.training
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert policy.model.training
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(reference_logps(reference, batch, temperature=1.0), before, atol=0, rtol=0)
    assert not torch.allclose(completion_logps(policy, batch, temperature=1.0), before, atol=1e-2)
    assert (reference.eos_ids, reference.pad_id, reference.context_length) == (
        policy.eos_ids,
        policy.pad_id,
        policy.context_length,
    )


def test_the_plain_head_runs_on_completion_positions_only(make_policy):
    policy = make_policy()
    shapes = []
    policy.model.lm_head.register_forward_hook(lambda _module, inputs, _out: shapes.append(tuple(inputs[0].shape)))
    plain_forward(policy.model, batch_of(policy), temperature=1.0)
    assert shapes == [(6, 7, 32)]  # 6 rows, 6 completion columns and the prompt's last, of 13 columns


def test_a_prompt_counts_for_the_bound_on_tokens_where_it_has_one_completion_only(make_policy, monkeypatch):
    policy = make_policy()
    monkeypatch.setattr("grpo_lab.policy.forward.TOKENS_HELD", 20)
    forward = PolicyForward(policy.model, temperature=1.0)
    prompts, completion = [[5] * 8, [6] * 2, [7] * 2], [9, 9, 9]
    alone = pad_rows(prompts, [0, 1, 2], [completion] * 3, policy)
    assert forward.micro_batches(alone, None) == [(0, 2), (2, 3)]  # 11 + 5, then 5
    shared = pad_rows(prompts, [0] * 4 + [1] * 4, [completion] * 8, policy)
    assert forward.micro_batches(shared, None) == [(0, 4), (4, 8)]  # 12 each, whatever the prompt
