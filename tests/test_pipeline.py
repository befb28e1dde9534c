import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo_lab import pipeline
from grpo_lab.pipeline import train_recipe
from grpo_lab.recipe import load
from grpo_lab.tracking.environment import environment
from grpo_lab.tracking.files import read_json, read_jsonl
from grpo_lab.tracking.metrics import TIMING, description

SHORT = ("stages.warm_start.steps=2", "stages.grpo.steps=2")


def train(recipe: Path, *overrides: str) -> Path:
    loaded = load(recipe, [f"output_dir={recipe.parent}/runs", *SHORT, *overrides])
    return train_recipe(loaded, recipe.read_text(), go_on=False, console=Console(file=io.StringIO()), quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_text) -> Path:
    """A finished run of two short stages. It is only read."""
    recipe = tmp_path_factory.mktemp("run") / "toy.yaml"
    recipe.write_text(toy_text)
    return train(recipe)


MODEL = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}


def test_a_finished_run_holds_these_files_and_no_others(run):
    logs = {"metrics.jsonl", "timing.jsonl", "events.jsonl", "result.json"}
    expected = {".lock", "run.json", "recipe.yaml", "resolved.yaml"}
    expected |= {f"base/{name}" for name in MODEL}
    for stage in ("warm_start", "grpo"):
        expected |= {f"{stage}/{name}" for name in logs}
        expected |= {f"{stage}/final/{name}" for name in MODEL}
        expected |= {f"{stage}/checkpoints/step-00000{step}/{name}" for step in (1, 2) for name in CHECKPOINT}
        expected |= {f"{stage}/evaluations/step-00000{step}.jsonl" for step in (0, 2)}
    expected |= {f"grpo/rollouts/step-00000{step}.jsonl" for step in (1, 2)}
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == expected


def test_nothing_in_a_run_is_pickled(run):
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle")]


def test_metrics_are_functions_of_the_recipe_and_times_are_apart_from_them(run):
    timed = set(TIMING) | {"sample_seconds", "score_seconds", "learn_seconds"}
    for stage in ("warm_start", "grpo"):
        assert not [line for line in read_jsonl(run / stage / "metrics.jsonl") if timed & line.keys()]
        for line in read_jsonl(run / stage / "timing.jsonl"):
            assert line.keys() - {"step"} <= timed
            assert all(value > 0 for value in line.values())


@pytest.mark.parametrize("stage", ["warm_start", "grpo"])
def test_every_number_of_a_step_is_explained(run, stage):
    for log in ("metrics.jsonl", "timing.jsonl"):
        for line in read_jsonl(run / stage / log):
            for name in line.keys() - {"step"}:
                assert name.startswith("eval_") or description(name)


def test_rollouts_hold_every_completion_of_a_step(run):
    rows = read_jsonl(run / "grpo" / "rollouts" / "step-000001.jsonl")
    assert len(rows) == 16
    assert [rows[i]["example"] for i in (0, 4, 8, 12)] == [rows[i]["example"] for i in (3, 7, 11, 15)]
    assert len({row["example"] for row in rows}) == 4
    assert rows[0].keys() == {"example", "prompt", "completion", "num_tokens", "finished", "total", "terms", "status"}


def test_rollouts_can_be_left_out(toy_recipe):
    run = train(toy_recipe, "tracking.rollouts=false")
    assert list((run / "grpo" / "rollouts").iterdir()) == []


def model_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def still(recipe: Path) -> None:
    """Give the recipe's GRPO stage a reward that teaches nothing, so that it leaves its model as it finds it."""
    (recipe.parent / "p.py").write_text(
        "from grpo_lab.scoring import reward\n\n@reward\ndef still(completion):\n    return 1\n"
    )
    text = recipe.read_text().replace("model:\n", "plugins: [./p.py]\nmodel:\n", 1)
    terms = "      - {name: accuracy}\n      - {name: length, weight: 0.1, options: {target: 8}}\n"
    assert text.count(terms) == 1
    recipe.write_text(text.replace(terms, "      - {name: still}\n").replace("beta: 0.04", "beta: 0.0"))


def test_a_stage_starts_from_the_model_of_the_stage_before(toy_recipe):
    still(toy_recipe)
    run = train(toy_recipe)
    assert model_of(run / "warm_start" / "final") != model_of(run / "base")
    assert model_of(run / "grpo" / "final") == model_of(run / "warm_start" / "final")
    assert (run / "plugins" / "p.py").read_bytes() == (toy_recipe.parent / "p.py").read_bytes()


def test_the_reference_of_a_stage_is_the_model_it_began_with(toy_recipe):
    text = toy_recipe.read_text().replace(
        "num_iterations: 2, num_minibatches: 2", "num_iterations: 1, num_minibatches: 1"
    )
    stage = text[text.index("  grpo:\n") :]
    toy_recipe.write_text(text + stage.replace("  grpo:\n", "  second:\n"))
    run = train(toy_recipe, "stages.second.steps=2", "stages.grpo.optimizer.learning_rate=0.05")
    for name in ("grpo", "second"):
        (first, *_) = [line for line in read_jsonl(run / name / "metrics.jsonl") if "kl" in line]
        assert (first["step"], first["kl"]) == (1, 0.0)
    assert model_of(run / "second" / "final") != model_of(run / "warm_start" / "final")


def test_a_run_may_begin_with_a_model_from_a_folder(toy_recipe, run):
    still(toy_recipe)
    text = toy_recipe.read_text()
    start = text.index("  config: {")
    rest = text.index("stages:\n")
    toy_recipe.write_text(f"{text[:start]}  path: {run}/grpo/final\n{text[rest:]}")
    again = train(toy_recipe, "stages.warm_start.optimizer.learning_rate=1.0e-30")
    assert not (again / "base").exists()
    assert model_of(again / "grpo" / "final") == model_of(run / "grpo" / "final")


def test_the_number_of_threads_is_the_recipes_and_is_written_down(toy_recipe):
    before = torch.get_num_threads()
    try:
        run = train(toy_recipe, "num_threads=2")
        assert torch.get_num_threads() == 2
        assert read_json(run / "run.json")["environment"]["num_threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_on_a_gpu_says_that_it_is_not_exact(toy_recipe, monkeypatch):
    def elsewhere(*given):
        found = environment(*given)
        return {**found, "hardware": {**found["hardware"], "accelerators": ["a GPU"]}}

    monkeypatch.setattr(pipeline, "environment", elsewhere)
    info = read_json(train(toy_recipe) / "run.json")
    assert (info["exact"], info["inexact_because"]) == (False, [pipeline.INEXACT_ON_GPU])


def test_a_run_laid_out_and_decoded_as_on_a_gpu_is_the_same_run_up_to_rounding(toy_recipe, run, as_on_gpu):
    ours = train(toy_recipe)
    lines = [read_jsonl(folder / "warm_start" / "metrics.jsonl") for folder in (ours, run)]
    losses, expected = ([line["loss"] for line in each if "loss" in line] for each in lines)
    assert len(losses) == 2
    assert losses == pytest.approx(expected, rel=1e-5)
    rollouts = [read_jsonl(folder / "grpo" / "rollouts" / "step-000001.jsonl") for folder in (ours, run)]
    answers, others = ([row["completion"] for row in rows] for rows in rollouts)
    same = sum(one == other for one, other in zip(answers, others, strict=True))
    assert same >= len(answers) / 2  # the untrained model's tokens are about equally likely: some draws are at an edge
    events = read_jsonl(ours / "grpo" / "events.jsonl")
    assert not [event for event in events if "computed for every row" in event["message"]]
