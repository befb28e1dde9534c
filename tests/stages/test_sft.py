import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo_lab.batching import pad_rows
from grpo_lab.data.examples import TrainingRow
from grpo_lab.engines.sft import loss_weights, measure_rows, negative_log_likelihood, training_batch
from grpo_lab.pipeline import train_recipe
from grpo_lab.policy.forward import PolicyForward, completion_logps
from grpo_lab.recipe import load
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.types import Batch, LogpsAndEntropy

ROWS = [
    TrainingRow((5, 6), (7, 8, 9, 2), (True, True, True, True)),
    TrainingRow((5,), (10, 2), (True, True)),
    TrainingRow((11, 12, 13), (7, 5, 6, 8, 2), (True, False, False, True, True)),  # a turn that is not its own between
]


def test_every_learnt_token_weighs_the_same_and_no_other_weighs_anything(tiny_policy):
    batch = training_batch(ROWS, tiny_policy)
    ninth = 1 / 9
    assert batch.loss_weights.tolist() == [
        pytest.approx([ninth, ninth, ninth, ninth, 0]),
        pytest.approx([ninth, ninth, 0, 0, 0]),
        pytest.approx([ninth, 0, 0, ninth, ninth]),
    ]


def test_what_is_not_learnt_is_still_read(tiny_policy):
    """The tokens of another's turn are part of the context: other tokens there, another loss."""
    other = TrainingRow((11, 12, 13), (7, 15, 16, 8, 2), (True, False, False, True, True))
    assert measure_rows(tiny_policy, [ROWS[2]], 9) != measure_rows(tiny_policy, [other], 9)


def test_the_loss_is_the_mean_negative_log_probability_by_hand(tiny_policy):
    logps = torch.log(torch.tensor([[0.5, 0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0, 1.0], [0.25, 0.1, 0.1, 0.5, 1.0]]))
    batch = training_batch(ROWS, tiny_policy)
    loss, sums = negative_log_likelihood(LogpsAndEntropy(logps, torch.zeros_like(logps)), batch)
    # halvings of learnt tokens: 1+2+1+1, 1+1, 2+1+0
    assert float(loss) == pytest.approx(10 / 9 * math.log(2))
    assert (int(sums["tokens"]), float(sums["entropy"])) == (9, 0.0)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 64])
def test_the_held_out_loss_counts_tokens_not_rows_or_batches(tiny_policy, rows_at_once):
    total = 0.0
    for row in ROWS:  # one by one, without weights
        batch = pad_rows([row.prompt_ids], [0], [row.completion_ids], tiny_policy)
        logps = completion_logps(tiny_policy, batch, temperature=1.0)
        total -= float(logps[0][torch.tensor(row.learn)].double().sum())
    found = measure_rows(tiny_policy, ROWS, rows_at_once)
    assert found["loss"] == pytest.approx(total / 9, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / 9), rel=1e-6)


def test_measuring_switches_dropout_off(make_policy):
    policy = make_policy(attention_dropout=0.5)
    policy.model.train()
    assert measure_rows(policy, ROWS, 2) == measure_rows(policy, ROWS, 2)


def test_key_tokens_weigh_more_and_the_weights_sum_to_1_by_hand(tiny_policy):
    key = TrainingRow((5,), (10, 2), (True, True), (3.0, 1.0))
    weights = training_batch([ROWS[0], key], tiny_policy).loss_weights
    # four tokens of 1, then 3 and 1: eighths
    assert weights.tolist() == [[0.125, 0.125, 0.125, 0.125], [0.375, 0.125, 0, 0]]


def test_the_loss_with_key_tokens_is_the_weighted_mean_by_hand():
    logps = torch.log(torch.tensor([[0.5, 0.25], [0.125, 0.5]]))
    rows = [TrainingRow((5,), (7, 2), (True, True)), TrainingRow((5,), (8, 2), (True, False), (2.0, 2.0))]
    batch = Batch(**empty_batch(2, 2), loss_weights=loss_weights(rows))
    loss, _ = negative_log_likelihood(LogpsAndEntropy(logps, torch.zeros_like(logps)), batch)
    # halvings: (1*1 + 1*2 + 2*3) / (1 + 1 + 2); what is not learnt does not count, whatever it weighs
    assert float(loss) == pytest.approx(9 / 4 * math.log(2))


def empty_batch(rows, tokens):
    return {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.bool),
        "prompt_index": torch.arange(rows),
        "completion_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "completion_mask": torch.ones(rows, tokens, dtype=torch.bool),
    }


def test_a_weight_of_1_everywhere_is_no_weight(tiny_policy):
    same = [replace(row, weights=(1.0,) * len(row.learn)) for row in ROWS]
    plain, weighted = (training_batch(rows, tiny_policy).loss_weights for rows in (ROWS, same))
    assert torch.equal(plain, weighted)


def gradient(policy, rows, *, packed, micro_batch_size):
    """Loss and gradient of one step as the stage computes it."""
    policy.model.zero_grad()
    forward = PolicyForward(policy.model, temperature=1.0, packed=packed)
    batch, total = training_batch(rows, policy), 0.0
    for start, stop in forward.micro_batches(batch, micro_batch_size):
        part = batch.rows(start, stop)
        loss, _ = negative_log_likelihood(forward(part), part)
        loss.backward()
        total += float(loss.detach())
    assert forward.plain_because is None
    return total, {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}


LONGER = [
    *ROWS,
    TrainingRow(tuple(range(20, 60)), tuple(range(60, 71)), (True,) * 11, (1.0, 4.0) + (1.0,) * 9),
    TrainingRow((9,), tuple(range(30, 55)), (True,) * 25),
]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 5])
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(tiny_policy, micro_batch_size):
    loss, expected = gradient(tiny_policy, LONGER, packed=False, micro_batch_size=5)
    found, gradients = gradient(tiny_policy, LONGER, packed=True, micro_batch_size=micro_batch_size)
    assert found == pytest.approx(loss, rel=1e-6)
    norm = math.sqrt(sum(float(each.square().sum()) for each in expected.values()))
    for name, each in expected.items():
        assert float((gradients[name] - each).norm()) < 1e-5 * norm, name


def test_a_packed_row_sees_nothing_of_its_neighbours(tiny_policy):
    forward = PolicyForward(tiny_policy.model, temperature=1.0)
    alone = forward(training_batch([LONGER[3]], tiny_policy)).logps[0]
    for others in ([LONGER[0]], [LONGER[4], LONGER[1]]):
        beside = forward(training_batch([*others, LONGER[3]], tiny_policy)).logps[-1]
        torch.testing.assert_close(beside[:11], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_accuracy_is_the_share_of_first_choices_among_learnt_tokens(tiny_policy, packed):
    right = learnt = 0
    tiny_policy.model.eval()
    for row in LONGER:
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        with torch.no_grad():
            choices = tiny_policy.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].argmax(-1).tolist()
        hits = [a == b for a, b, learn in zip(choices, row.completion_ids, row.learn, strict=True) if learn]
        right, learnt = right + sum(hits), learnt + len(hits)
    rows = [*LONGER, chosen_by(tiny_policy)]
    found = measure_rows(tiny_policy, rows, 4, packed=packed)
    assert found["mean_token_accuracy"] == pytest.approx((right + 3) / (learnt + 3))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def chosen_by(policy):
    """A row that the model writes itself, so that there is something to get right."""
    ids = [5, 6]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return TrainingRow(tuple(ids[:2]), tuple(ids[2:]), (True,) * 3)


def test_held_out_tokens_count_once_whatever_they_weigh(tiny_policy):
    heavy = [replace(row, weights=tuple(1.0 + place for place in range(len(row.learn)))) for row in ROWS]
    assert measure_rows(tiny_policy, heavy, 2) == measure_rows(tiny_policy, ROWS, 2)


RECIPE = """\
name: sft
model:
  config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2,
           num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 290}
stages:
  learn:
    kind: sft
    data: {source: file, path: rows.jsonl, %s}
    batch_size: 2
    steps: 60
    optimizer: {learning_rate: 1.0e-2, schedule: linear, warmup_steps: 5}
    evaluation: {data: {source: file, path: rows.jsonl, %s}, every: 30}
"""
FORMS = {
    "prompt: q, completion: a": '{"q": "one", "a": "un"}\n{"q": "two", "a": "deux"}\n',
    "messages: m": (
        '{"m": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "un"}]}\n'
        '{"m": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "deux"}]}\n'
    ),
    "text: t": '{"t": "one is un"}\n{"t": "two is deux"}\n',
}


@pytest.mark.parametrize("form", list(FORMS))
def test_two_rows_are_learnt_by_heart_and_end_where_they_end(tmp_path, form):
    (tmp_path / "rows.jsonl").write_text(FORMS[form])
    (tmp_path / "r.yaml").write_text(RECIPE % (form, form))
    loaded = load(tmp_path / "r.yaml", [f"output_dir={tmp_path}/runs"])
    run = train_recipe(loaded, RECIPE, go_on=False, console=Console(file=io.StringIO()), quiet=True)
    lines = read_jsonl(run / "learn" / "metrics.jsonl")
    measured = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(measured) == [0, 30, 60]
    assert measured[0] > 4.0
    assert measured[60] < 0.1 if form != "text: t" else measured[60] < 0.4  # its first letters cannot be known
    assert [line["step"] for line in lines if "eval_loss" not in line] == list(range(1, 61))
    text, finished = answer(run / "learn" / "final", "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", form)
    assert (text, finished) == ("un", True)


def answer(folder: Path, prompt: str, form: str) -> tuple[str, bool]:
    """What transformers, which knows nothing of us, generates from the written folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("one is" if form == "text: t" else prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0][ids["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).strip(), bool(out[-1] == tokenizer.eos_token_id)
