"""The client of vLLM servers, against small servers on loopback that keep a policy of their own and really sample."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_lab.batching import pad
from grpo_lab.errors import SetupError, StaleWeightsError
from grpo_lab.policy.adapter import attach_saved
from grpo_lab.policy.forward import completion_logps, frozen_copy
from grpo_lab.policy.load import write_policy
from grpo_lab.recipe.schema import Lora, Model, Vllm
from grpo_lab.sampling import Decoding, NativeSampler
from grpo_lab.sampling.ahead import AheadSampler, Draw
from grpo_lab.sampling.vllm_server import VllmServerSampler
from grpo_lab.seeds import derive_seed
from grpo_lab.stages.sampler import transfer_of
from grpo_lab.types import Example, Policy

DECODING = Decoding(max_completion_length=6, temperature=0.8)
CONFIG = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"}

RUN = """\
name: run
model: {{path: base}}
stages:
  grpo:
    kind: grpo
    data: {{source: task, path: addition, prompt: prompt, answer: {{column: answer}}, options: {{digits: 1, size: 10}}}}
    sampling:
      {{num_generations: 4, max_completion_length: 6, backend: vllm-server, vllm: {{urls: {urls}, one_step_off: {ahead}}}}}
    rewards: [{{name: length, options: {{target: 5, unit: characters}}}}]
    prompts_per_step: 4
    steps: 4
    optimizer: {{learning_rate: 1.0e-3}}
"""


class StandIn(ThreadingHTTPServer):
    """A vLLM server as far as our client goes: it takes weights from files and samples from what it holds."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.policy = frozen_copy(policy)
        self.adapters: dict[str, Policy] = {}
        self.one_at_a_time = threading.Lock()
        self.config = dict(CONFIG)
        self.version = "none"
        self.is_deaf = False  # takes no new weights, and does not say so
        self.finish_reason: str | None = None
        self.asked: list[tuple[str, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def load(self, path: str, version: str) -> None:
        if not self.is_deaf:
            self.policy.model.load_state_dict(load_file(path), strict=False)  # tied weights are in the file once
        self.version = version

    def load_adapter(self, lora_name: str, lora_path: str) -> None:
        model = attach_saved(frozen_copy(self.policy).model, Path(lora_path), Lora(r=2), seed=0)
        self.adapters[lora_name] = replace(self.policy, model=model.eval())

    def complete(self, body: dict) -> dict:
        policy = self.adapters[body["model"]] if body["model"] != "base" else self.policy
        decoding = Decoding(body["max_tokens"], temperature=body["temperature"])
        example = Example("x", "", tuple(body["prompt"]), {})
        with self.one_at_a_time:  # adapters share the model's layers, which remember how a pass attends
            (group,) = NativeSampler(policy, decoding).sample([example], num_generations=body["n"], seed=body["seed"])
        choices = [
            {
                "index": index,
                "token_ids": answer.token_ids,
                "finish_reason": self.finish_reason or ("stop" if answer.finished else "length"),
                "logprobs": {"token_logprobs": answer.sampler_logps},
            }
            for index, answer in enumerate(group.completions)
        ]
        return {"choices": choices[::-1]}


class Answers(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        answers = {
            "/v1/models": {"data": [{"id": name} for name in ("base", *self.server.adapters)]},
            "/server_info": {"vllm_config": {"model_config": self.server.config}},
        }
        self._answer(answers[self.path.partition("?")[0]])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.asked.append((self.path, body))
        match self.path, body:
            case "/collective_rpc", {"method": "load_policy_weights", "kwargs": kwargs}:
                server.load(**kwargs)
                self._answer({"results": [server.version]})
            case "/collective_rpc", {"method": "policy_weights_version"}:
                self._answer({"results": [server.version]})
            case "/reset_prefix_cache", _:
                self._answer({"success": True})
            case "/v1/load_lora_adapter", _:
                server.load_adapter(**body)
                self._answer("Success: added")
            case "/v1/unload_lora_adapter", {"lora_name": name}:
                del server.adapters[name]
                self._answer("Success: removed")
            case "/v1/completions", {"model": model} if model == "base" or model in server.adapters:
                self._answer(server.complete(body))
            case _:
                self.send_error(404, "no such thing")

    def _answer(self, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def serve():
    """Starts stand-ins that hold a copy of a policy; all are stopped in the end."""
    started = []

    def start(policy: Policy, count: int = 1) -> list[StandIn]:
        for _ in range(count):
            server = StandIn(policy)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            started.append(server)
        return started

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def sampler(policy: Policy, servers: list[StandIn], folder: Path, *, lora: Lora | None = None, version: int = 0):
    model = Model(path="x", lora=lora)
    settings = Vllm(urls=[f"{server.url}/" for server in servers], timeout_seconds=30)
    return VllmServerSampler(policy, DECODING, settings, transfer_of(model, policy, folder), version=version)


def gap(policy: Policy, groups) -> float:
    """The largest difference of the policy's log-probs and the sampler's."""
    batch = pad(groups, policy)
    return float((completion_logps(policy, batch, temperature=0.8) - batch.sampler_logps).abs().max())


def move(policy: Policy, by: float = 0.2) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


@pytest.fixture(params=["tied", "untied", "adapter"])
def followed(request, make_policy, serve, tmp_path):
    """A policy of each kind, with two servers that follow it."""
    policy = make_policy(tie_word_embeddings=request.param == "tied")
    servers, lora = serve(policy, 2), None
    if request.param == "adapter":
        from grpo_lab.policy.adapter import attach

        lora = Lora(r=2)
        policy = replace(policy, model=attach(policy.model, lora, seed=0))
    return policy, servers, sampler(policy, servers, tmp_path / "sampler", lora=lora, version=5)


def test_the_servers_follow_the_policy_and_groups_are_spread_over_them(followed, make_examples, tmp_path):
    policy, servers, sampled_by = followed
    examples = make_examples()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    groups = sampled_by.sample(examples, num_generations=3, seed=7)
    assert gap(policy, groups) < 1e-4
    assert [group.policy_version for group in groups] == [5, 5, 5]
    prompts = [[body["prompt"] for path, body in server.asked if path == "/v1/completions"] for server in servers]
    ids = [list(example.prompt_ids) for example in examples]
    assert sorted(prompts[0]) == sorted([ids[0], ids[2]])
    assert prompts[1] == [ids[1]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())

    move(policy)
    stale = sampled_by.sample(examples, num_generations=3, seed=7)
    assert stale == groups
    assert gap(policy, stale) > 0.01
    sampled_by.sync(policy)
    fresh = sampled_by.sample(examples, num_generations=3, seed=7)
    assert fresh != groups
    assert gap(policy, fresh) < 1e-4
    assert {group.policy_version for group in fresh} == {6}
    assert [path.name for path in (tmp_path / "sampler").iterdir()] == ["policy-000006"]  # older ones are dropped
    sampled_by.close()
    assert all(server.adapters == {} for server in servers)


def test_a_run_that_goes_on_replaces_what_its_earlier_start_has_left(followed, make_examples, tmp_path):
    policy, servers, first = followed
    move(policy)
    lora = Lora(r=2) if servers[0].adapters else None
    again = sampler(policy, servers, tmp_path / "sampler", lora=lora, version=first.version)
    assert gap(policy, again.sample(make_examples(), num_generations=2, seed=1)) < 1e-4


def test_a_groups_noise_is_a_function_of_seed_and_group(make_policy, make_examples, serve, tmp_path):
    policy = make_policy()
    sampled_by = sampler(policy, serve(policy), tmp_path / "s")
    examples = make_examples()
    first = sampled_by.sample(examples, num_generations=2, seed=1)
    assert sampled_by.sample(examples[:1], num_generations=2, seed=1) == first[:1]
    assert sampled_by.sample(examples, num_generations=2, seed=2) != first


def test_a_server_that_lost_the_weights_stops_the_run(make_policy, make_examples, serve, tmp_path):
    policy = make_policy()
    (server,) = serve(policy)
    sampled_by = sampler(policy, [server], tmp_path / "s", version=3)
    server.version = "none"  # as after a restart
    with pytest.raises(StaleWeightsError, match=r"the vLLM server holds none, expected /\S+/policy-000003") as error:
        sampled_by.sample(make_examples(), num_generations=2, seed=1)
    assert error.value.exit_code == 6


def test_a_server_that_keeps_its_old_weights_and_does_not_say_so_shows_in_the_log_probs(
    make_policy, make_examples, serve, tmp_path
):
    policy = make_policy()
    (server,) = serve(policy)
    sampled_by = sampler(policy, [server], tmp_path / "s")
    server.is_deaf = True
    move(policy)
    sampled_by.sync(policy)
    assert gap(policy, sampled_by.sample(make_examples(), num_generations=2, seed=1)) > 0.01


@pytest.mark.parametrize(
    "key, value", [("logprobs_mode", "raw_logprobs"), ("dtype", "torch.bfloat16")], ids=["logprobs", "dtype"]
)
def test_a_server_whose_samples_cannot_be_learnt_from_is_refused_with_its_command(
    make_policy, serve, tmp_path, key, value
):
    policy = make_policy()
    (server,) = serve(policy)
    server.config[key] = value
    message = f"{server.url}: the vLLM server has {key} {value}, expected {CONFIG[key]}; start it with: VLLM_SERVER_DEV"
    with pytest.raises(SetupError) as error:
        sampler(policy, [server], tmp_path / "s")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 4


def test_no_server_and_one_that_refuses_are_said_in_a_line(make_policy, make_examples, serve, tmp_path):
    policy = make_policy()
    (server,) = serve(policy)
    sampled_by = sampler(policy, [server], tmp_path / "s")
    server.finish_reason = "abort"
    with pytest.raises(SetupError, match="the vLLM server ended a completion with abort"):
        sampled_by.sample(make_examples(), num_generations=2, seed=1)
    sampled_by._models = ["another"]
    with pytest.raises(SetupError, match=r"/v1/completions: the vLLM server answered 404: "):
        sampled_by.sample(make_examples(), num_generations=2, seed=1)
    sampled_by.servers[0].url = "http://127.0.0.1:9"
    with pytest.raises(SetupError, match=r"http://127.0.0.1:9/\S+: the vLLM server cannot be reached: ") as error:
        sampled_by.sample(make_examples(), num_generations=2, seed=1)
    assert error.value.exit_code == 4


def draws(examples: list[Example], steps: int):
    """What each of `steps` steps asks for."""
    return lambda step: Draw(examples, 2, 100 + step) if step < steps else None


def asked_of(server: StandIn, seed: int) -> bool:
    """Whether the completions of a step whose draw has this seed have been asked for."""
    seeds = [body["seed"] for path, body in server.asked if path == "/v1/completions"]
    return derive_seed(seed, "noise", 0) in seeds


def wait_for(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


def test_one_step_off_completions_are_drawn_while_the_policy_learns_by_what_it_was(
    make_policy, make_examples, serve, tmp_path
):
    policy, examples = make_policy(), make_examples()
    (server,) = serve(policy)
    ahead = AheadSampler(sampler(policy, [server], tmp_path / "s", version=3), draws(examples, 6), step=3)
    found, before = [], []
    for step in (3, 4, 5):
        before.append(frozen_copy(policy))
        found.append(ahead.sample(examples, num_generations=2, seed=100 + step))
        if step < 5:
            wait_for(lambda: asked_of(server, 100 + step + 1))  # noqa: B023 - called now. Not learnt yet, asked already
        others = ahead.sample(examples[:1], num_generations=2, seed=7)
        assert ([group.policy_version for group in others], gap(policy, others) < 1e-4) == ([step], True)
        move(policy)
        ahead.sync(policy)
    ahead.close()
    assert not asked_of(server, 106)  # nothing past the last step
    assert [group.policy_version for groups in found for group in groups] == [3, 3, 3, 3, 3, 3, 4, 4, 4]
    drawn_by = [before[0], before[0], before[1]]
    assert all(gap(drawer, groups) < 1e-4 for drawer, groups in zip(drawn_by, found, strict=True))
    assert gap(before[2], found[2]) > 0.01


def test_one_step_off_a_server_that_fails_is_said_by_the_step_that_asks(make_policy, make_examples, serve, tmp_path):
    policy, examples = make_policy(), make_examples()
    (server,) = serve(policy)
    ahead = AheadSampler(sampler(policy, [server], tmp_path / "s"), draws(examples, 3), step=0)
    ahead.sample(examples, num_generations=2, seed=100)
    wait_for(lambda: asked_of(server, 101))
    ahead.close()
    server.finish_reason = "abort"
    ahead = AheadSampler(sampler(policy, [server], tmp_path / "s"), draws(examples, 3), step=0)
    with pytest.raises(SetupError, match="ended a completion with abort"):
        ahead.sample(examples, num_generations=2, seed=100)


@pytest.mark.parametrize("ahead, versions", [("false", [0, 1, 2, 3]), ("true", [0, 0, 1, 2])], ids=["in turn", "ahead"])
def test_a_run_in_turn_and_one_step_off(make_policy, serve, cli, tmp_path, ahead, versions):
    policy = make_policy()
    write_policy(policy, tmp_path / "base")
    servers = serve(policy, 2)
    (tmp_path / "run.yaml").write_text(RUN.format(urls=json.dumps([server.url for server in servers]), ahead=ahead))
    ran = cli("train", tmp_path / "run.yaml", "--quiet", f"output_dir={tmp_path}", f"model.path={tmp_path / 'base'}")
    assert (ran.code, ran.err) == (0, "")
    steps = sorted((tmp_path / "run" / "grpo" / "rollouts").iterdir())
    drawn_by = [{json.loads(row)["policy_version"] for row in step.read_text().splitlines()} for step in steps]
    assert drawn_by == [{version} for version in versions]
    rows = [json.loads(row) for row in (tmp_path / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["lab/sampler_gap"] for row in rows]
    assert [size < 1e-5 for size in gaps] == [version == step for step, version in enumerate(versions)]
    assert max(gaps) < 0.1
    assert not (tmp_path / "run" / "grpo" / "sampler").exists()
