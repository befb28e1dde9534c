"""One or several vLLM servers as sampler: whole groups are spread over them, new weights reach them as files.

The servers are started by the user; `START` says how. Nothing here imports vLLM.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from grpo_lab.errors import SetupError, StaleWeightsError
from grpo_lab.recipe.schema import Vllm
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.sampling.transfer import Transfer, is_version_name, version_name
from grpo_lab.sampling.vllm_words import answered, asked
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Completion, Example, Group, Policy

T = TypeVar("T")
WEIGHTS = "model.safetensors"  # the file in a folder that `Transfer.write` fills
EXTENSION = "grpo_lab.sampling.vllm_worker.WeightLoader"
START = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server --host "
    "127.0.0.1 --model MODEL --dtype {dtype} --generation-config vllm --logprobs-mode processed_logprobs {rest}"
)
DIRECTLY = build_opener(ProxyHandler({}))  # the machine's proxy is for other things
MAX_REQUESTS = 64  # answered at the same time by each server


class Server:
    """One vLLM server, spoken to in JSON."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds

    def get(self, path: str) -> Any:
        """The answer to a GET request."""
        return self._ask(Request(self.url + path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a POST request; None where it is not JSON."""
        data = json.dumps(body).encode()
        return self._ask(Request(self.url + path, data=data, headers={"Content-Type": "application/json"}))

    def call(self, method: str, **arguments: str) -> list[Any]:
        """What a method of the worker extension returns, in each of the server's workers."""
        results: list[Any] = self.post("/collective_rpc", {"method": method, "kwargs": arguments})["results"]
        return results

    def _ask(self, request: Request) -> Any:
        """Raises SetupError: the server cannot be reached, or refuses."""
        try:
            with DIRECTLY.open(request, timeout=self.timeout_seconds) as answer:
                text = answer.read().decode()
        except HTTPError as error:
            said = error.read().decode(errors="replace").strip().partition("\n")[0][:300]
            raise SetupError(f"{request.full_url}: the vLLM server answered {error.code}: {said}") from error
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            raise SetupError(f"{request.full_url}: the vLLM server cannot be reached: {error}") from error
        try:
            return json.loads(text)
        except ValueError:
            return None


class VllmServerSampler:
    """Samples from servers that hold a copy of the policy; `sync` brings them up to date and checks that they are.

    `version` is the number of steps that the copies have learnt. A group's noise is a function of (seed, group), and
    group i is answered by server i modulo their number.
    """

    def __init__(self, policy: Policy, decoding: Decoding, settings: Vllm, transfer: Transfer, *, version: int) -> None:
        self.policy = policy
        self.decoding = decoding
        self.transfer = transfer
        self.version = version
        self.servers = [Server(url, timeout_seconds=settings.timeout_seconds) for url in settings.urls]
        self._has_adapter = transfer.lora_rank is not None
        self._models = [self._checked(server) for server in self.servers]
        self._sent: Path | None = None  # the folder of the weights that the servers should hold
        self._send(policy)

    def sync(self, policy: Policy) -> None:
        """Bring the servers up to the policy, which has learnt one more step."""
        self.policy = policy
        self.version += 1
        self._send(policy)

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example.

        Raises:
            StaleWeightsError: a server does not hold the policy's weights (any more).
        """
        self._everywhere(self._check_version)
        count = len(self.servers)

        def answer(index: int) -> Group:
            server, model = self.servers[index % count], self._models[index % count]
            name = version_name(self.version) if self._has_adapter else model
            seed_of_group = derive_seed(seed, "noise", first_group + index)
            body = request_body(self.decoding, self.policy, examples[index], num_generations, seed_of_group)
            found = server.post("/v1/completions", {"model": name, **body})
            return Group(examples[index], completions(self.policy, found, server.url), self.version)

        with ThreadPoolExecutor(MAX_REQUESTS * count) as pool:
            return list(pool.map(answer, range(len(examples))))

    def close(self) -> None:
        """Take the adapter off the servers; they themselves go on running."""
        if self._has_adapter:
            self._everywhere(self._unload)

    def _checked(self, server: Server) -> str:
        """The name of the model that a server has.

        Raises:
            SetupError: the server is not there, or was started so that its samples cannot be learnt from.
        """
        rest = "--enable-lora --max-lora-rank R" if self._has_adapter else f"--worker-extension-cls {EXTENSION}"
        hint = "start it with: " + START.format(dtype=self.transfer.dtype, rest=rest)
        models = server.get("/v1/models")
        try:
            config = server.get("/server_info?config_format=json")["vllm_config"]["model_config"]
            if not self._has_adapter:
                server.call("policy_weights_version")
        except SetupError as error:
            raise SetupError(f"{error}; {hint}") from error
        wanted = {"logprobs_mode": "processed_logprobs", "dtype": f"torch.{self.transfer.dtype}"}
        for key, value in wanted.items():
            if config[key] != value:
                raise SetupError(f"{server.url}: the vLLM server has {key} {config[key]}, expected {value}; {hint}")
        name: str = models["data"][0]["id"]
        return name

    def _send(self, policy: Policy) -> None:
        """Write the weights where the servers see them, have each take them, and drop the ones before."""
        folder = self.transfer.folder / version_name(self.version)
        self.transfer.write(policy, folder)

        def take(server: Server) -> None:
            if self._has_adapter:
                self._unload(server)  # also what an earlier start of the run has left
                server.post("/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
            else:
                server.call("load_policy_weights", path=str(folder / WEIGHTS), version=str(folder))
                server.post("/reset_prefix_cache", {})

        self._everywhere(take)
        if self._sent is not None:
            self.transfer.drop(self._sent)
        self._sent = folder
        self._everywhere(self._check_version)

    def _check_version(self, server: Server) -> None:
        assert self._sent is not None
        if self._has_adapter:
            held, wanted = adapters(server), self._sent.name
        else:
            held, wanted = server.call("policy_weights_version"), str(self._sent)
        if set(held) != {wanted}:
            raise StaleWeightsError(f"{server.url}: the vLLM server holds {', '.join(held)}, expected {wanted}")

    def _unload(self, server: Server) -> None:
        for name in adapters(server):
            server.post("/v1/unload_lora_adapter", {"lora_name": name})

    def _everywhere(self, work: Callable[[Server], T]) -> list[T]:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(work, self.servers))


def adapters(server: Server) -> list[str]:
    """The names of the adapters on a server that a trainer has put there."""
    names = [model["id"] for model in server.get("/v1/models")["data"]]
    return [name for name in names if is_version_name(name)]


def request_body(
    decoding: Decoding, policy: Policy, example: Example, num_generations: int, seed: int
) -> dict[str, Any]:
    """What is asked of a server for one group, all but the model's name."""
    return {
        **asked(decoding, policy, num_generations, seed),
        "prompt": list(example.prompt_ids),
        "return_token_ids": True,
        "add_special_tokens": False,
    }


def completions(policy: Policy, answer: Mapping[str, Any], url: str) -> tuple[Completion, ...]:
    """A server's answer as the completions of a group, in the order of their noise.

    Raises:
        SetupError: a completion was not sampled to its end.
    """
    found = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        if choice["finish_reason"] not in ("stop", "length"):
            raise SetupError(f"{url}: the vLLM server ended a completion with {choice['finish_reason']}")
        found.append(answered(policy, choice["token_ids"], choice["logprobs"]["token_logprobs"]))
    return tuple(found)
