"""Native against TRL on one GPU: completions per second by phase, model FLOPs utilisation, sampled tokens, peak memory.

Models of Qwen2.5's shapes with random weights in bfloat16, all weights learning or an adapter, transformers' models and
generation in TRL, the native sampler in native; no vLLM. As in `benchmark.py`, each token ends an answer with the same
probability, so that lengths are skewed as in real runs and have one distribution for both engines.

    .venv/bin/python scripts/benchmark_gpu.py --json out.json
    .venv/bin/python scripts/benchmark_gpu.py --models 0.5B --kinds full --engines native
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import PHASES, run, say, spread
from workload import end_evenly, needed_tflop, word_tokenizer

# https://huggingface.co/Qwen/Qwen2.5-0.5B and -1.5B, config.json; `tiny` is for trying this script without a GPU
SHAPES = {
    "0.5B": {"hidden": 896, "mlp": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocab": 151936},
    "1.5B": {"hidden": 1536, "mlp": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "vocab": 151936},
    "tiny": {"hidden": 64, "mlp": 128, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 512},
}
KINDS = ("full", "lora")
RANK = 16
H100_TFLOPS = 989.4  # dense bfloat16 of an H100 or H200 SXM by NVIDIA's datasheets: what utilisation is a share of


def network(shape: dict[str, int], mean_length: float, device: str) -> Any:
    """Random weights and a constant probability of ending at each token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    end_evenly(model, mean_length)
    return model


def case(arguments: argparse.Namespace, engine: str, name: str, kind: str) -> dict[str, Any]:
    """Some steps of one engine with one model: what each of them took, and the most memory allocated."""
    import torch

    from grpo_lab.data.stream import PromptStream
    from grpo_lab.policy.adapter import attach
    from grpo_lab.policy.load import as_policy
    from grpo_lab.recipe.schema import GrpoStage, Lora, Model
    from grpo_lab.scoring import bind
    from grpo_lab.scoring.registry import discover
    from grpo_lab.types import Example

    on_gpu = torch.cuda.is_available()
    shape, lora = SHAPES[name], Lora(r=RANK) if kind == "lora" else None
    model = network(shape, arguments.mean_length, "cuda" if on_gpu else "cpu")
    model = model if lora is None else attach(model, lora, seed=0)
    policy = as_policy(model, word_tokenizer(shape["vocab"]))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, shape["vocab"], (256, arguments.prompt), generator=generator).tolist()
    examples = [
        Example(str(index), " ".join(f"w{token}" for token in ids), tuple(ids), {}) for index, ids in enumerate(prompts)
    ]
    stream = PromptStream(examples, arguments.prompts, seed=0)
    steps: list[dict[str, float]] = []

    def report(end: Any) -> None:
        lengths = [[len(c.token_ids) for c in group.completions] for group in end.groups]
        needed = needed_tflop(shape, [arguments.prompt] * len(lengths), lengths, adapter=lora is not None)
        steps.append(
            {
                **{phase: end.timing[f"{phase}_seconds"] for phase in PHASES},
                "completions": float(sum(map(len, lengths))),
                "tokens": float(sum(map(sum, lengths))),
                "mfu": needed / end.timing["learn_seconds"] / H100_TFLOPS,
            }
        )
        print(f"{engine} {name} {kind}: " + json.dumps(steps[-1]), file=sys.stderr)  # noqa: T201

    stage = GrpoStage.model_validate(
        {
            "kind": "grpo",
            "engine": engine,
            "data": {"source": "task", "path": "addition", "prompt": "prompt"},
            # the first one compiles kernels and finds memory, which takes longer than the step itself
            "steps": 1 + (arguments.trl_steps if engine == "trl" else arguments.steps),
            "optimizer": {"learning_rate": 1e-9},
            "sampling": {"num_generations": arguments.generations, "max_completion_length": arguments.limit},
            "rewards": [{"name": "length", "options": {"target": 40}}],
            "algorithm": {"preset": "grpo", "beta": 0.0},
            "prompts_per_step": arguments.prompts,
            "micro_batch_size": arguments.trl_rows if engine == "trl" else None,
        }
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rewards = bind(stage.rewards, discover())
    with tempfile.TemporaryDirectory() as output:
        settings = Model(path=output, dtype="bfloat16", lora=lora)
        run(engine, stage, policy, stream, rewards, seed=0, folder=Path(output), model=settings, report=report)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else math.nan
    return {"engine": engine, "model": name, "kind": kind, "steps": steps[1:], "peak_gib": peak}


def matmul_tflops() -> float:
    """What torch sustains in a bfloat16 product of 8192 x 8192 matrices, in trillion operations per second."""
    import torch

    if not torch.cuda.is_available():
        return math.nan
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2e-12 * 8192**3 / (time.perf_counter() - start)


def work(arguments: argparse.Namespace, engine: str) -> None:
    """One engine in a process of its own, all cases one after the other."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "CPU"
    say({"machine": name, "torch": torch.__version__, "matmul_tflops": matmul_tflops()})
    for model in arguments.models:
        for kind in arguments.kinds:
            say(case(arguments, engine, model, kind))
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()


def table(cases: list[dict[str, Any]], engines: list[str]) -> list[str]:
    """Medians over steps, with the least and the most; one block of lines for each model."""
    lines = []
    for model, kind in dict.fromkeys((each["model"], each["kind"]) for each in cases):
        found = {each["engine"]: each for each in cases if (each["model"], each["kind"]) == (model, kind)}
        lines += [
            f"| {model}, {kind} | " + " | ".join(engines) + (" | ratio |" if len(engines) == 2 else " |"),
            "|---" * (len(engines) + 1 + (len(engines) == 2)) + "|",
        ]

        def add(label: str, values: dict[str, list[float]], *, less_is_better: bool = False) -> None:
            cells = [spread(values[engine]) for engine in engines]
            if len(engines) == 2:
                one, other = (median(values[engine]) for engine in engines)
                cells.append(f"{other / one if less_is_better else one / other:.1f}x")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")  # noqa: B023

        for phase in PHASES:
            if phase != "score":
                add(
                    f"completions/s, {phase}",
                    {e: [step["completions"] / step[phase] for step in c["steps"]] for e, c in found.items()},
                )
        add("sampled tokens/s", {e: [step["tokens"] / step["sample"] for step in c["steps"]] for e, c in found.items()})
        add("mean length", {e: [s["tokens"] / s["completions"] for s in c["steps"]] for e, c in found.items()})
        add("learning, model FLOPs utilisation", {e: [s["mfu"] for s in c["steps"]] for e, c in found.items()})
        add("peak memory (GiB)", {e: [c["peak_gib"]] for e, c in found.items()}, less_is_better=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["native", "trl"], choices=["native", "trl"])
    parser.add_argument("--models", nargs="+", default=["0.5B", "1.5B"], choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="what learns")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--limit", type=int, default=512, help="the most tokens of a completion")
    parser.add_argument("--mean-length", type=float, default=200.0, help="what completions would average unlimited")
    parser.add_argument("--prompts", type=int, default=8, help="P, prompts per step")
    parser.add_argument("--generations", type=int, default=8, help="G, completions per prompt")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of each case, after a short one that is not counted"
    )
    parser.add_argument("--trl-steps", type=int, default=2, help="the same of TRL, whose steps take longer")
    parser.add_argument("--trl-rows", type=int, default=16, help="TRL's per_device_train_batch_size")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments, arguments.worker)
        return
    results: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "cases": []}
    for engine in arguments.engines:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", engine]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for message in (json.loads(line) for line in process.stdout if line.startswith("{")):
                if "engine" in message:
                    results["cases"].append(message)
                else:
                    results |= message
                if arguments.json:  # after every case: device time may end before the rest
                    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        if process.returncode:
            raise SystemExit(f"{engine} ended with {process.returncode}; its error stands above")
    print(f"{results['machine']}, torch {results['torch']}, products {results['matmul_tflops']:.0f} TFLOP/s")  # noqa: T201
    print("\n".join(table(results["cases"], arguments.engines)))  # noqa: T201


if __name__ == "__main__":
    main()
