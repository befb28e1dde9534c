"""DeepSpeed's ZeRO, as accelerate sets it up: two processes in pieces against one, whole runs, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_lab.commands.launching import environments
from grpo_lab.distributed.ranks import joined
from grpo_lab.engines.zero import configure
from grpo_lab.errors import SetupError
from grpo_lab.tracking.files import read_json

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: zero
num_threads: 1
distributed: {strategy: deepspeed}
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
  tokenizer: {vocab_size: 280}
stages:
  tuning:
    kind: sft
    data: {source: task, path: addition, prompt: prompt, completion: completion, options: {digits: 1, size: 9}}
    batch_size: 3
    steps: 2
    optimizer: {learning_rate: 1.0e-3, max_grad_norm: 0.3}
  grpo:
    kind: grpo
    data: {source: task, path: addition, prompt: prompt, answer: {column: answer}, options: {digits: 1, size: 10}}
    sampling: {num_generations: 4, max_completion_length: 6}
    rewards: [{name: length, options: {target: 3, unit: characters}}]
    algorithm: {beta: 0.04, num_iterations: 2}
    prompts_per_step: 3
    steps: 3
    optimizer: {learning_rate: 1.0e-2}
    checkpoint: {every: 1, keep: 9}
"""
needs_deepspeed = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True, check=False).returncode != 0
    or shutil.which("g++") is None,
    reason="DeepSpeed is not installed, or no compiler; bash scripts/test_deepspeed.sh makes an environment with it",
)


def switched_on(stage: int) -> dict[str, str]:
    """What `accelerate launch` sets for a configuration with this ZeRO stage."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request, tmp_path_factory):
    script, out = Path(__file__).with_name("deepspeed_processes.py"), tmp_path_factory.mktemp("zero") / "found.json"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out)],
            env={**environment, **switched_on(request.param), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        for environment in environments(2)
    ]
    assert [process.wait(180) for process in processes] == [0, 0]
    return json.loads(out.read_text())


@needs_deepspeed
@pytest.mark.parametrize("setting", ["sgd", "adamw", "one group"])
def test_two_processes_in_pieces_learn_what_one_does(found, setting):
    """Warm-up, momentum, clipping, four micro-batches, a group without signal, a process without rows."""
    differences = found[setting]
    assert differences["steps"] == 3
    assert differences["gradient"] < 5e-6
    assert differences["norm"] < 5e-6
    assert differences["loss"] < 5e-5  # it is a sum of gains and losses that nearly cancel
    assert differences["weights"] < (1e-5 if setting == "adamw" else 1e-6)
    assert differences["tensors"] == [20, 20]
    assert differences["state"] < 2e-5


@needs_deepspeed
def test_a_new_learner_that_loads_the_state_goes_on_with_the_same_weights(found):
    assert found["resumed"] == {"weights": 0.0, "norm": 0.0}


@needs_deepspeed
def test_a_gradient_that_is_not_finite_or_zero_moves_nothing(found):
    assert found["nan"]["untouched"] == [True, True]
    assert found["nan"]["after"] < 1e-5  # the next step is that of a run without the bad one
    assert found["silent"] == [True, True, 0.0]


@needs_deepspeed
def test_a_run_of_two_stages_samples_trains_saves_and_resumes(tmp_path, cli):
    (tmp_path / "zero.yaml").write_text(RECIPE)

    def train(name: str, *arguments: str) -> Path:
        command = [sys.executable, "-m", "grpo_lab", "train", str(tmp_path / "zero.yaml"), "--name", name, "--quiet"]
        ran = subprocess.run(
            [*command, "--output-dir", str(tmp_path), "--nproc", "2", *arguments],
            env={**os.environ, **switched_on(3), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return tmp_path / name

    whole = train("whole")
    alone = cli(
        "train",
        tmp_path / "zero.yaml",
        "--output-dir",
        tmp_path,
        "--name",
        "alone",
        "--quiet",
        "distributed.strategy=ddp",
    )
    assert alone.code == 0, alone.err
    first = "grpo/rollouts/step-000001.jsonl"
    assert (whole / first).read_text() == (tmp_path / "alone" / first).read_text()
    losses = [
        [json.loads(line)["loss"] for line in (run / "tuning" / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, tmp_path / "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    later = tmp_path / "later"
    shutil.copytree(whole, later)
    shutil.rmtree(later / "grpo" / "checkpoints" / "step-000003"), shutil.rmtree(later / "grpo" / "final")
    (later / "grpo" / "result.json").unlink()
    (later / "resolved.yaml").write_text((later / "resolved.yaml").read_text().replace("name: whole", "name: later"))
    train("later", "--resume")
    for file in ("grpo/metrics.jsonl", "grpo/rollouts/step-000003.jsonl"):
        assert (later / file).read_text() == (whole / file).read_text()
    assert read_json(later / "run.json")["status"] == "finished"


@pytest.mark.parametrize(
    "strategy, environment, message",
    [
        (
            "ddp",
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "the recipe must say so, too: distributed: {strategy: deepspeed}",
        ),
        ("deepspeed", {}, "start with `accelerate launch -m grpo_lab train ...`"),
        ("deepspeed", {"ACCELERATE_USE_DEEPSPEED": "true"}, "there is only one"),
        (
            "deepspeed",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
            "zero3_init_flag would tear apart the whole model that samples; set it to false",
        ),
    ],
)
def test_a_start_that_does_not_fit_the_recipe_is_refused(monkeypatch, strategy, environment, message):
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError) as error, joined(strategy):
        pass
    assert message in str(error.value)
    assert error.value.exit_code == 4


GIVEN = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: 0 shares nothing"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload: it was never tried here",
        ),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: the recipe decides it"),
        ({"fp16": {"enabled": True}}, "fp16: only float32 was tried here"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: here it is 0.5: the recipe decides it; leave it out"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: here it is 1"),
        ({"train_batch_size": 64}, "train_batch_size: here it is 2"),
    ],
)
def test_what_accelerates_configuration_may_not_decide_is_refused(given, message):
    with pytest.raises(SetupError) as error:
        configure({**GIVEN, **given}, world=2, dtype=torch.float32, max_grad_norm=0.5)
    assert str(error.value).startswith(f"accelerate's DeepSpeed configuration, {message}")


def test_what_it_leaves_open_is_filled_from_the_recipe():
    config = {**GIVEN, "gradient_clipping": 0.5, "bf16": {"enabled": "auto"}}
    configure(config, world=2, dtype=torch.float32, max_grad_norm=0.5)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (2, 1)
    with pytest.raises(SetupError, match=r"torch.bfloat16: only float32 was tried here, .*; set model.dtype: float32"):
        configure({**GIVEN}, world=2, dtype=torch.bfloat16, max_grad_norm=None)
