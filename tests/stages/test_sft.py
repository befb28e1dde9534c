import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo_lab.batching import pad_rows
from grpo_lab.data.examples import TrainingRow
from grpo_lab.engines.sft import measure_rows, negative_log_likelihood, training_batch
from grpo_lab.pipeline import train_recipe
from grpo_lab.policy.forward import completion_logps
from grpo_lab.recipe import load
from grpo_lab.tracking.files import read_jsonl
from grpo_lab.types import LogpsAndEntropy

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
