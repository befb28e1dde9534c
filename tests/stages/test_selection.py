"""The best model on held-out data: which one it is, when the search ends, and that a resumed run agrees."""

import io
import math
import shutil

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from grpo_lab.errors import StopRequested
from grpo_lab.pipeline import train_recipe
from grpo_lab.policy.trainable import state
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import Selection, SftStage
from grpo_lab.recipe.schema.sft import is_test_split
from grpo_lab.stages import running
from grpo_lab.stages.selection import Best
from grpo_lab.summary import summarise
from grpo_lab.tracking.files import read_json, read_jsonl


def move(policy, amount: float) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += amount


def run_through(policy, values, **settings) -> Best:
    """Measurements after steps 0, 1, ..., the policy a little further on at each."""
    best = Best(Selection(**settings), policy)
    for step, value in enumerate(values):
        best.measured(step, {"loss": value, "mean_token_accuracy": -value})
        move(policy, 1.0)
    return best


@pytest.mark.parametrize("metric", ["loss", "mean_token_accuracy"])
def test_the_best_measurement_is_kept_and_put_back(tiny_policy, metric):
    weight = next(tiny_policy.model.parameters())
    before = weight.detach().clone()
    best = run_through(tiny_policy, [3.0, 2.0, 1.0, 1.5, 1.2], metric=metric)
    assert (best.step, abs(best.value), best.since) == (2, 1.0, 2)
    best.put_back()
    torch.testing.assert_close(weight.detach(), before + 2.0)


@pytest.mark.parametrize(
    "values, patience, is_final",
    [
        ([3.0, 2.0, 2.5, 2.4], 2, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 1.9, 2.0], 2, False),
        ([3.0, 3.0, 3.0], 2, True),  # equal is not better
        ([3.0, 2.0, 2.5, 2.4, 2.3], None, False),
        ([3.0, math.nan, math.inf], 2, True),
    ],
)
def test_the_search_ends_after_so_many_evaluations_that_are_no_better(tiny_policy, values, patience, is_final):
    assert run_through(tiny_policy, values, patience=patience).is_final is is_final


def test_less_than_the_least_improvement_is_none(tiny_policy):
    best = run_through(tiny_policy, [3.0, 2.95, 2.92, 2.7], min_improvement=0.1, patience=9)
    assert (best.step, best.since) == (3, 0)
    assert run_through(tiny_policy, [3.0, 2.95, 2.92], min_improvement=0.1).step == 0


def test_a_measurement_that_is_not_a_number_is_never_the_best(tiny_policy):
    best = run_through(tiny_policy, [math.nan, 5.0, math.nan])
    assert (best.step, best.value) == (1, 5.0)


def test_its_state_comes_back(make_policy):
    policy = make_policy(tie_word_embeddings=True)
    best = run_through(policy, [3.0, 2.0, 2.5], patience=5)
    again = Best(Selection(patience=5), policy)
    again.load(best.state_dict(), best.tensors)
    assert again.state_dict() == best.state_dict() == {"step": 1, "value": 2.0, "since": 1}
    again.put_back()
    assert all(torch.equal(tensor, best.tensors[name]) for name, tensor in state(policy.model, None).items())


STAGE = {
    "kind": "sft",
    "data": {"source": "file", "path": "a.jsonl", "text": "t"},
    "batch_size": 2,
    "steps": 2,
    "optimizer": {"learning_rate": 1e-3},
}


@pytest.mark.parametrize(
    "source, path, split, is_test",
    [
        ("hub", "imdb", "test", True),
        ("hub", "imdb", "test[:200]", True),
        ("hub", "imdb", "validation", False),
        ("hub", "test/data", "train", False),
        ("file", "wnut/emerging.test.conll", "train", True),
        ("file", "test.jsonl", "train", True),
        ("file", "test/dev.jsonl", "train", False),
        ("file", "latest.jsonl", "test", False),  # the split of a file means nothing
        ("task", "addition", "test", True),
    ],
)
def test_what_is_a_test_split(source, path, split, is_test):
    assert is_test_split(source, path, split) is is_test


def test_the_test_split_selects_no_model():
    evaluation = {"data": {"source": "task", "path": "addition", "split": "test", "text": "prompt"}, "every": 1}
    with pytest.raises(ValidationError, match="is the test split, which selects no model"):
        SftStage(**STAGE, selection={}, evaluation=evaluation)
    assert SftStage(**STAGE, evaluation=evaluation).selection is None


@pytest.mark.parametrize("evaluation", [None, {"data": STAGE["data"]}])
def test_without_evaluations_along_the_way_there_is_nothing_to_select(evaluation):
    with pytest.raises(ValidationError, match="selection needs evaluation with every"):
        SftStage(**STAGE, selection={}, evaluation=evaluation)


RECIPE = """\
name: sft
num_threads: 1
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 290}
stages:
  learn:
    kind: sft
    data: {source: file, path: rows.jsonl, text: t, limit: 6}
    batch_size: 3
    steps: 40
    group_by_length: true
    optimizer: {learning_rate: 3.0e-2}
    checkpoint: {every: 3, keep: 3}
    evaluation: {data: {source: file, path: rows.jsonl, text: t, skip: 6}, every: 2}
    selection: {patience: 2}
"""
# the held-out rows begin like the others and end otherwise, so that learning by heart is soon punished
ROWS = [f"row {n} is {word}" for n, word in enumerate(["one", "two", "three", "four", "five", "six", "none", "nil"])]


@pytest.fixture
def train(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"t": "{text}"}}\n' for text in ROWS))
    (tmp_path / "r.yaml").write_text(RECIPE)

    def run(name, *overrides, go_on=False):
        loaded = load(tmp_path / "r.yaml", [f"output_dir={tmp_path}/runs", f"name={name}", *overrides])
        return train_recipe(loaded, RECIPE, go_on=go_on, console=Console(file=io.StringIO()), quiet=True)

    return run


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_a_stage_stops_early_and_ends_with_its_best_model(train, engine):
    run = train("whole", f"stages.learn.engine={engine}")
    measured = {line["step"]: line for line in read_jsonl(run / "learn/metrics.jsonl") if "eval_loss" in line}
    losses = {step: line["eval_loss"] for step, line in measured.items()}
    result = read_json(run / "learn/result.json")
    assert result == {"steps": max(losses), "selected": min(losses, key=losses.__getitem__)}
    assert result["steps"] == result["selected"] + 4 < 40
    after = summarise(run)["stages"]["learn"]["eval_loss"]["after"]
    assert after == losses[result["selected"]]
    # final/ measures as the best did: the same recipe, started from it
    again = train(
        "again", f"model.path={run}/learn/final", "model.config=null", "model.tokenizer=null", "stages.learn.steps=1"
    )
    first = read_jsonl(again / "learn/metrics.jsonl")[0]
    assert first["eval_loss"] == pytest.approx(after, rel=1e-6)
    assert set(measured[0]) >= {"eval_loss", "eval_perplexity", "eval_mean_token_accuracy"}


@pytest.mark.parametrize("engine", ["native", "trl"])
def test_stopped_at_any_checkpoint_it_selects_the_same_model(train, monkeypatch, engine):
    whole = train("whole", f"stages.learn.engine={engine}")
    result = read_json(whole / "learn/result.json")
    stops = range(1, result["steps"] + 1, 2) if engine == "native" else (3, result["steps"])
    check = running.StopSignal.check
    for stop in stops:

        def at_stop(self, where, stop=stop):
            if f"after step {stop} " in where:
                raise StopRequested(where, 75)
            check(self, where)

        monkeypatch.setattr(running.StopSignal, "check", at_stop)
        every = "stages.learn.checkpoint.every=1"
        with pytest.raises(StopRequested):
            train(f"at-{stop}", f"stages.learn.engine={engine}", every)
        monkeypatch.setattr(running.StopSignal, "check", check)
        run = train(f"at-{stop}", f"stages.learn.engine={engine}", every, go_on=True)
        assert read_json(run / "learn/result.json") == result
        if engine == "native":
            for file in ("metrics.jsonl", "final/model.safetensors"):
                assert (run / "learn" / file).read_bytes() == (whole / "learn" / file).read_bytes()
        shutil.rmtree(run)
