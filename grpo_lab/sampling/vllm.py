"""vLLM in this process, beside the trainer. vLLM itself is imported when an engine is built, which takes many seconds."""

import os
from typing import Any

import torch

from grpo_lab.errors import RecipeError, SetupError
from grpo_lab.recipe.schema import Vllm
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.sampling.transfer import Transfer, version_name
from grpo_lab.sampling.undisturbed import undisturbed
from grpo_lab.sampling.vllm_needs import check_heads
from grpo_lab.sampling.vllm_plugin import keep_weights_loadable
from grpo_lab.sampling.vllm_words import answered, asked
from grpo_lab.sampling.vllm_worker import load_all
from grpo_lab.seeds import derive_seed
from grpo_lab.types import Completion, Example, Group, Policy

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM makes room for
REFUSALS = (ValueError, NotImplementedError, RuntimeError, AssertionError, KeyError)  # what it raises for a model


class VllmSampler:
    """Samples with vLLM's engine, which holds a copy of the policy; `sync` brings it up to date.

    `version` is the number of steps that the copy has learnt. A group's noise is a function of (seed, group).
    """

    def __init__(self, policy: Policy, decoding: Decoding, settings: Vllm, transfer: Transfer, *, version: int) -> None:
        self.policy = policy
        self.decoding = decoding
        self.settings = settings
        self.transfer = transfer
        self.version = version
        self.max_length = settings.max_model_length or policy.context_length
        self._adapter: Any = None  # vLLM's request for it, with its name and number
        self._asleep = False
        with undisturbed():
            self._engine = self._build()
            try:
                check_heads(self._engine)
                self._load(policy)
            except BaseException:
                self.close()
                raise

    def sync(self, policy: Policy) -> None:
        """Take over the weights of the policy, which has learnt one more step."""
        self.policy = policy
        self.version += 1
        with undisturbed():
            self._load(policy)

    def sample(self, examples: list[Example], *, num_generations: int, seed: int, first_group: int = 0) -> list[Group]:
        """`num_generations` completions for each example."""
        from vllm import SamplingParams

        for example in examples:
            if len(example.prompt_ids) + self.decoding.max_completion_length > self.max_length:
                raise RecipeError(
                    f"sampling.vllm.max_model_length: {self.max_length} is too short for {example.id}: "
                    f"{len(example.prompt_ids)} tokens and a completion of {self.decoding.max_completion_length}"
                )
        self._wake()
        prompts: Any = [{"prompt_token_ids": list(example.prompt_ids)} for example in examples]
        seeds = [derive_seed(seed, "noise", first_group + index) for index in range(len(examples))]
        wanted = [asked(self.decoding, self.policy, num_generations, of_group) for of_group in seeds]
        params = [SamplingParams(**each, detokenize=False) for each in wanted]
        with undisturbed():
            outputs = self._engine.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)
        if self.settings.sleep:
            self._engine.sleep(level=1)
            self._asleep = True
        groups = zip(examples, outputs, strict=True)
        return [
            Group(example, tuple(completion(self.policy, answer) for answer in output.outputs), self.version)
            for example, output in groups
        ]

    def close(self) -> None:
        """Give back the engine's memory; the sampler is of no use afterwards."""
        shut_down(self._engine)
        del self._engine

    def _build(self) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where weights are a copy away
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        keep_weights_loadable()
        transfer, settings = self.transfer, self.settings
        on_gpu = torch.cuda.is_available()
        if transfer.lora_rank is None:  # its weights come from the policy at once
            transfer.write_config(self.policy, transfer.folder)
            source: dict[str, Any] = {"model": str(transfer.folder), "load_format": "dummy"}
        else:
            rank = next(size for size in ADAPTER_RANKS if size >= transfer.lora_rank)
            source = {"model": transfer.base, "revision": transfer.revision, "enable_lora": True}
            source |= {"max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        memory: dict[str, Any] = {"kv_cache_memory_bytes": int(settings.cache_gib * 2**30), "enforce_eager": True}
        if on_gpu:
            memory = {"gpu_memory_utilization": settings.memory_share, "enable_sleep_mode": settings.sleep}
        rows = {} if self.decoding.max_rows is None else {"max_num_seqs": self.decoding.max_rows}
        try:
            return LLM(
                **source,
                **memory,
                **rows,
                dtype=transfer.dtype,
                max_model_len=self.max_length,
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                trust_remote_code=transfer.trust_remote_code,
                seed=0,
            )
        except REFUSALS as error:
            clean_up()
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise SetupError(f"sampling.backend: vllm cannot serve this model here: {reason}") from error

    def _load(self, policy: Policy) -> None:
        self._wake()
        if self.transfer.lora_rank is None:
            tensors = self.transfer.tensors(policy)
            self._engine.apply_model(lambda model: load_all(model, tensors))
        else:
            self._load_adapter(policy)
        self._engine.reset_prefix_cache()

    def _load_adapter(self, policy: Policy) -> None:
        """The adapter under a new name; the old one is dropped. What is held then is checked."""
        from vllm.lora.request import LoRARequest

        folder, engine = self.transfer.folder / version_name(self.version), self._engine.llm_engine
        self.transfer.write(policy, folder)
        request = LoRARequest(version_name(self.version), self.version + 1, str(folder))
        if self._adapter is not None:
            engine.remove_lora(self._adapter.lora_int_id)
        engine.add_lora(request)
        held = engine.list_loras()
        if held != {request.lora_int_id}:
            raise SetupError(f"vLLM holds the adapters {held}, expected {request.lora_int_id}")
        if self._adapter is not None:
            self.transfer.drop(self.transfer.folder / self._adapter.lora_name)
        self._adapter = request

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False


def shut_down(engine: Any) -> None:
    """Stop an engine and give back what it holds, so that this process may start another."""
    engine.llm_engine.engine_core.shutdown()
    clean_up()


def clean_up() -> None:
    """End what an engine, or the attempt to build one, has set up for the whole process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def completion(policy: Policy, answer: Any) -> Completion:
    """One of vLLM's answers as a completion."""
    logps = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    return answered(policy, answer.token_ids, logps)
