"""With vLLM itself, in this process and as a server on loopback. `scripts/test_vllm.sh` makes the environment for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; bash scripts/test_vllm.sh makes an environment with it")
import random

from grpo_lab.batching import pad
from grpo_lab.errors import SetupError
from grpo_lab.policy.adapter import attach
from grpo_lab.policy.forward import completion_logps
from grpo_lab.policy.load import load_policy, write_policy
from grpo_lab.recipe.schema import Lora, Model, Vllm
from grpo_lab.sampling import Decoding
from grpo_lab.sampling.vllm import VllmSampler
from grpo_lab.sampling.vllm_server import EXTENSION, VllmServerSampler
from grpo_lab.stages.sampler import transfer_of

CONFIG = {  # vLLM's attention on a CPU takes heads of 32, 64, 80, 96, 112, 128 and more
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
DECODING = Decoding(max_completion_length=8, temperature=0.8)
LORA = Lora(r=4, alpha=8)
RECIPE = """\
name: run
output_dir: {output}
model:
  path: {base}
  {lora}
stages:
  grpo:
    kind: grpo
    engine: {engine}
    data: {{source: task, path: addition, prompt: prompt, answer: {{column: answer}}, options: {{digits: 1, size: 10}}}}
    sampling: {{num_generations: 4, max_completion_length: 8, backend: {backend}, vllm: {vllm}, max_logps_gap: {limit}}}
    rewards:
      - {{name: length, options: {{target: 5, unit: characters}}}}
    algorithm: {{beta: {beta}}}
    prompts_per_step: 4
    steps: 3
    optimizer: {{learning_rate: 1.0e-2}}
    checkpoint: {{every: 1}}
"""
CACHE = "{cache_gib: 0.1}"


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory, spread) -> dict[str, Path]:
    """A model of each kind on the disk, far from uniform."""
    folders = {}
    for kind in ("tied", "untied"):
        settings = {**CONFIG, "tie_word_embeddings": kind == "tied"}
        policy = load_policy(Model(config=settings, tokenizer="built"), tokenizer, seed=0)
        spread(policy.model.parameters(), 0.15)
        folders[kind] = tmp_path_factory.mktemp("base") / kind
        write_policy(policy, folders[kind])
    return folders


@contextmanager
def server(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """A vLLM server on loopback, stopped with everything it started whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm"]
    command += ["--logprobs-mode", "processed_logprobs", "--kv-cache-memory-bytes", str(10**8), *arguments]
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "TORCH_COMPILE_DISABLE": "1"}
    switches |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**environment, **switches}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(f"the server ended:\n{log.read_text()[-3000:]}")
            with suppress(URLError, OSError):
                urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module", params=["weights, tied", "weights, untied", "adapter, untied"])
def served(request, bases, tmp_path_factory):
    """A server for each way of being sent the policy: (what it serves, its model, its url)."""
    what, kind = request.param.split(", ")
    arguments = ["--worker-extension-cls", EXTENSION]
    if what == "adapter":
        arguments = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    with server(bases[kind], tmp_path_factory.mktemp("server") / "log", *arguments) as url:
        yield what, bases[kind], url


def policy_of(base: Path, tokenizer, *, lora: Lora | None):
    """The model on the disk, to be trained whole or through an adapter."""
    policy = load_policy(Model(path=str(base)), tokenizer, seed=0)
    return policy if lora is None else replace(policy, model=attach(policy.model, lora, seed=0))


def gap(policy, groups) -> float:
    """The largest difference of the policy's log-probs and the sampler's."""
    batch = pad(groups, policy)
    return float((completion_logps(policy, batch, temperature=DECODING.temperature) - batch.sampler_logps).abs().max())


def tokens(groups) -> list[list[tuple[int, ...]]]:
    """What was drawn; log-probs differ in the last digits with what vLLM computes together."""
    return [[completion.token_ids for completion in group.completions] for group in groups]


def check_following(sampled_by, policy, examples) -> None:
    """What the sampler draws is the policy's before a step and after it, and not in between."""
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    first = sampled_by.sample(examples, num_generations=4, seed=3)
    assert gap(policy, first) < 1e-4
    assert tokens(sampled_by.sample(examples, num_generations=4, seed=3)) == tokens(
        first
    )  # a function of (seed, group)
    assert len({completion.token_ids for completion in first[0].completions}) > 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    for step in (1, 2):
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        stale = sampled_by.sample(examples, num_generations=4, seed=3)
        assert gap(policy, stale) > 0.01
        sampled_by.sync(policy)
        fresh = sampled_by.sample(examples, num_generations=4, seed=3)
        assert tokens(fresh) != tokens(stale)
        assert gap(policy, fresh) < 1e-4
        assert {group.policy_version for group in fresh} == {step}


@pytest.mark.parametrize("what, kind", [("weights", "tied"), ("adapter", "untied")])
def test_the_engine_in_this_process_follows_the_policy(bases, tokenizer, make_examples, tmp_path, what, kind):
    lora = LORA if what == "adapter" else None
    policy = policy_of(bases[kind], tokenizer, lora=lora)
    state, threads = (random.getstate(), torch.random.get_rng_state()), torch.set_num_threads
    transfer = transfer_of(Model(path=str(bases[kind]), lora=lora), policy, tmp_path / "sampler")
    sampled_by = VllmSampler(policy, DECODING, Vllm(cache_gib=0.1), transfer, version=0)
    try:
        assert random.getstate() == state[0]
        assert torch.equal(torch.random.get_rng_state(), state[1])
        assert torch.set_num_threads is threads
        check_following(sampled_by, policy, make_examples())
        if what == "adapter":  # only the newest is kept
            assert [path.name for path in (tmp_path / "sampler").iterdir()] == ["policy-000002"]
    finally:
        sampled_by.close()


def test_a_server_follows_the_policy(served, tokenizer, make_examples, tmp_path):
    what, base, url = served
    lora = LORA if what == "adapter" else None
    policy = policy_of(base, tokenizer, lora=lora)
    transfer = transfer_of(Model(path=str(base), lora=lora), policy, tmp_path / "sampler")
    sampled_by = VllmServerSampler(policy, DECODING, Vllm(urls=[url]), transfer, version=0)
    check_following(sampled_by, policy, make_examples())
    sampled_by.close()


def test_a_model_that_vllm_cannot_serve_is_refused_in_one_line(make_policy, tmp_path):
    policy = make_policy()  # heads of 8
    transfer = transfer_of(Model(path="x"), policy, tmp_path / "sampler")
    message = (
        "sampling.backend: vllm cannot serve this model here: its heads are of 8, and on a CPU vLLM takes 32, 64, "
    )
    with pytest.raises(SetupError, match=message) as error:
        VllmSampler(policy, DECODING, Vllm(cache_gib=0.1), transfer, version=0)
    assert "\n" not in str(error.value)


def run(cli, folder: Path, name: str, processes: int = 1, **settings) -> list[dict[str, float]]:
    """Three steps of a recipe: the metrics of each, with its seconds. A line of the table for people."""
    defaults = {"lora": "lora: null", "engine": "native", "beta": 0.04, "limit": 1e-4, "output": folder}
    (folder / "run.yaml").write_text(RECIPE.format(**{**defaults, **settings}))
    if processes > 1:
        command = [sys.executable, "-m", "grpo_lab", "train", folder / "run.yaml", "--quiet", "--nproc", str(processes)]
        together = subprocess.run(command, capture_output=True, text=True)
        assert together.returncode == 0, together.stderr
    else:
        ran = cli("train", folder / "run.yaml", "--quiet")
        assert ran.code == 0, ran.err
    stage = folder / "run" / "grpo"
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    seconds = [json.loads(line)["step_seconds"] for line in (stage / "timing.jsonl").read_text().splitlines()]
    gaps = ", ".join(f"{step['lab/sampler_gap']:.1e}" for step in steps)
    row = f"| {name} | {gaps} | {', '.join(f'{each:.2f}' for each in seconds)} |\n"
    if "GRPO_LAB_TABLE" in os.environ:
        with open(os.environ["GRPO_LAB_TABLE"], "a") as table:
            table.write(row)
    info = json.loads((folder / "run" / "run.json").read_text())
    assert info["exact"] is False
    because = "engine: trl" if settings.get("engine") == "trl" else "vLLM"
    assert any(because in reason for reason in info["inexact_because"])
    return steps


def check_steps(steps: list[dict[str, float]], stage: Path) -> None:
    assert len(steps) == 3
    assert all(step["lab/sampler_gap"] < 1e-4 for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)
    assert steps[-1]["kl"] > 1e-6  # it has moved, and the gap is still small
    for step in (1, 2, 3):
        rows = (stage / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
        assert {json.loads(row)["policy_version"] for row in rows} == {step - 1}


@pytest.mark.parametrize("what", ["weights", "adapter"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_three_steps_in_this_process(cli, bases, tmp_path, what, kind):
    lora = "lora: {r: 4, alpha: 8}" if what == "adapter" else "lora: null"
    name = f"native, in-process, {what}, {kind}"
    steps = run(cli, tmp_path, name, base=bases[kind], backend="vllm", vllm=CACHE, lora=lora)
    check_steps(steps, tmp_path / "run" / "grpo")


def test_three_steps_against_a_server(cli, served, tmp_path):
    what, base, url = served
    lora = "lora: {r: 4, alpha: 8}" if what == "adapter" else "lora: null"
    name = f"native, server, {what}, {base.name}"
    steps = run(cli, tmp_path, name, base=base, backend="vllm-server", vllm=f"{{urls: ['{url}']}}", lora=lora)
    check_steps(steps, tmp_path / "run" / "grpo")


def test_two_trainer_processes_ask_one_server(cli, served, tmp_path):
    what, base, url = served
    lora = "lora: {r: 4, alpha: 8}" if what == "adapter" else "lora: null"
    name = f"native, two trainers and a server, {what}, {base.name}"
    vllm = f"{{urls: ['{url}']}}"
    steps = run(cli, tmp_path, name, processes=2, base=base, backend="vllm-server", vllm=vllm, lora=lora)
    check_steps(steps, tmp_path / "run" / "grpo")


def test_three_steps_one_step_off(cli, served, tmp_path):
    """The server draws for step k + 1 while step k is learnt: from the second step on its policy is one update older."""
    what, base, url = served
    lora = "lora: {r: 4, alpha: 8}" if what == "adapter" else "lora: null"
    name = f"native, server, one step off, {what}, {base.name}"
    vllm = f"{{urls: ['{url}'], one_step_off: true}}"
    steps = run(cli, tmp_path, name, base=base, backend="vllm-server", vllm=vllm, lora=lora, limit=9)
    assert steps[0]["lab/sampler_gap"] < 1e-4
    assert all(step["lab/sampler_gap"] > 1e-3 for step in steps[1:])  # what an update at this rate changes
    for step, version in ((1, 0), (2, 0), (3, 1)):
        rows = (tmp_path / "run" / "grpo" / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
        assert {json.loads(row)["policy_version"] for row in rows} == {version}


def test_three_steps_against_two_servers(cli, bases, tmp_path):
    arguments = ["--worker-extension-cls", EXTENSION]
    with (
        server(bases["tied"], tmp_path / "one.log", *arguments) as one,
        server(bases["tied"], tmp_path / "two.log", *arguments) as two,
    ):
        name, vllm = "native, two servers, weights, tied", f"{{urls: ['{one}', '{two}']}}"
        steps = run(cli, tmp_path, name, base=bases["tied"], backend="vllm-server", vllm=vllm, lora="lora: null")
    check_steps(steps, tmp_path / "run" / "grpo")
    for log in ("one.log", "two.log"):
        assert (tmp_path / log).read_text().count("POST /v1/completions") == 6  # two of four groups, in three steps


def test_three_steps_of_trl_with_its_own_engine(cli, bases, tmp_path):
    """TRL gives vLLM no dtype, which serves a float32 model in bfloat16."""
    name = "trl, in-process, weights, tied"
    steps = run(
        cli, tmp_path, name, base=bases["tied"], backend="vllm", vllm="{cache_gib: 1}", engine="trl", beta=0, limit=0.1
    )
    assert len(steps) == 3
    assert all(0 < step["lab/sampler_gap"] < 0.05 for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)
