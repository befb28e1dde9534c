"""How completions are drawn."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from grpo_lab.recipe.schema.block import Block, Fraction, PositiveInt

OWN_WEIGHTS = ("vllm", "vllm-server")  # backends that keep a copy of the policy
OF_ENGINE = ("memory_share", "cache_gib", "max_model_length", "sleep")
OF_SERVERS = ("urls", "exchange", "timeout_seconds", "one_step_off")
# Mean |log pi - log sampler| in nats per token: far above what other kernels round differently, far below a policy that
# has learnt something.
MAX_LOGPS_GAP = {"float32": 1e-3, "bfloat16": 0.1}


class Vllm(Block):
    """Where vLLM samples, and what it may take."""

    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """backend vllm, on a GPU: the share of its memory for vLLM's weights and KV cache."""
    cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """backend vllm, on a CPU: GiB of main memory for the KV cache."""
    max_model_length: PositiveInt | None = None
    """backend vllm: the most tokens of a prompt with its completion; null = as many as the model can attend to."""
    sleep: bool = False
    """backend vllm, on a GPU: whether vLLM gives its memory back while the policy learns."""
    urls: list[str] = []
    """backend vllm-server: where the servers answer, for example http://127.0.0.1:8000; groups are spread over them."""
    exchange: str | None = None
    """backend vllm-server: a folder that trainer and servers both see, for new weights; null = in the run's folder."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """backend vllm-server: the most seconds that a server may take for an answer."""
    one_step_off: bool = False
    """backend vllm-server: whether the next step's completions are drawn while this step is learnt, by the policy as it
    was before this step; algorithm.sampler_correction weights for that."""

    @model_validator(mode="after")
    def _addresses(self) -> "Vllm":
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
                raise ValueError(f'urls: "{url}" is no address of a server; write http://HOST:PORT')
        return self


class Sampling(Block):
    """How completions are drawn."""

    backend: Literal["auto", "native", "hf", "vllm", "vllm-server"] = "auto"
    """`native` is this project's decoding loop, `hf` is transformers' generate, `vllm` runs in this process,
    `vllm-server` elsewhere; auto = the engine's own."""
    num_generations: Annotated[int, Field(ge=2)]
    """G: completions per prompt."""
    max_completion_length: PositiveInt
    """The most tokens of a completion, EOS included."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it, in sampling and in every log-prob of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability mass; 1 = off."""
    top_k: PositiveInt | None = None
    """Sample from the k likeliest tokens; null = off."""
    min_p: Fraction = 0.0
    """Leave out tokens less likely than this share of the likeliest one; 0 = off."""
    max_rows: PositiveInt | None = None
    """The most completions decoded at once (bounds the KV cache); null = all of a step."""
    max_logps_gap: Annotated[float, Field(gt=0)] | None = None
    """The run stops where trainer and sampler differ by more (lab/sampler_gap, nats); null = never. Not written: 0.001
    in float32, 0.1 in bfloat16 (and wherever TRL starts vLLM, or with vllm.one_step_off), and null under top_p, top_k or min_p, whose left-out mass is part of the gap."""
    vllm: Vllm | None = None
    """Where vLLM samples, and what it may take; backends vllm and vllm-server only."""

    @property
    def truncates(self) -> bool:
        """Whether the sampled distribution is not the policy's own."""
        return self.top_p < 1 or self.top_k is not None or self.min_p > 0

    @property
    def has_own_weights(self) -> bool:
        """Whether the sampler keeps a copy of the policy, which must follow it."""
        return self.backend in OWN_WEIGHTS

    @property
    def one_step_off(self) -> bool:
        """Whether completions are drawn by the policy of one update earlier."""
        return self.vllm is not None and self.vllm.one_step_off

    @model_validator(mode="before")
    @classmethod
    def _fill_block_of_backend(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("backend") in OWN_WEIGHTS:
            return {"vllm": {}, **values}
        return values

    @model_validator(mode="after")
    def _no_key_without_effect(self) -> "Sampling":
        if not self.has_own_weights:
            if self.vllm is not None:
                raise ValueError(f"vllm has no effect with backend: {self.backend}; leave it out")
            return self
        problems = []
        if self.vllm is None:
            problems.append(f"backend: {self.backend} needs the block vllm; leave it out, or say what differs")
        else:
            unused = OF_SERVERS if self.backend == "vllm" else OF_ENGINE
            for key in unused:
                if getattr(self.vllm, key) != Vllm.model_fields[key].default:
                    problems.append(f"vllm.{key} has no effect with backend: {self.backend}; leave it out")
            if self.backend == "vllm-server" and not self.vllm.urls:
                problems.append("backend: vllm-server needs vllm.urls, for example [http://127.0.0.1:8000]")
        if self.backend == "vllm-server" and self.max_rows is not None:
            problems.append("max_rows has no effect with backend: vllm-server; start the server with --max-num-seqs")
        if problems:
            raise ValueError("\n".join(problems))
        return self
