"""Native against TRL: completions per second by phase, tokens per second, peak memory, start-up, and useful work.

Both engines train the same random model on the same prompts with the same sampling settings and reward, each in a
process of its own, taking turns. The model ends an answer at each token with the same probability, whatever came before,
so lengths are skewed as in real runs (most are short, few reach the limit) and have one distribution for both engines.

    .venv/bin/python scripts/benchmark.py                       # the reference workload
    .venv/bin/python scripts/benchmark.py --vocab 32768 --json out.json
    .venv/bin/python scripts/benchmark.py --prompt 512
    .venv/bin/python scripts/benchmark.py --generations 4 8 16 32 --engines native
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, and for both engines as `grpo-lab train` does it
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from datetime import UTC, datetime  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

from workload import end_evenly, needed_tflop, word_tokenizer  # noqa: E402

STARTED = time.perf_counter()
PHASES = ("sample", "score", "learn", "step")
# 6.9 million parameters at a vocabulary of 8192
SHAPE = {"hidden": 256, "mlp": 704, "layers": 6, "heads": 4, "kv_heads": 4}


def workload(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the model and its tokenizer: random weights, and a constant probability of ending at each token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    word_tokenizer(arguments.vocab).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["mlp"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    end_evenly(model, arguments.mean_length)
    model.save_pretrained(folder)


def work(arguments: argparse.Namespace, engine: str, folder: Path) -> None:
    """A worker: one engine, warm, that runs some steps whenever it is asked and prints what it measured."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    gc.set_threshold(50_000)  # as the command line does
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()

    from grpo_lab.data.stream import PromptStream
    from grpo_lab.policy.load import load_policy, load_tokenizer
    from grpo_lab.recipe.schema import GrpoStage, Model
    from grpo_lab.scoring import bind
    from grpo_lab.scoring.registry import discover
    from grpo_lab.types import Example

    if engine == "trl":
        import grpo_lab.engines.trl  # noqa: F401 - its import is part of the start
    model = Model(path=str(folder))
    policy = load_policy(model, load_tokenizer(model), seed=0)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(arguments.prompt - 16, arguments.prompt + 17, (512,), generator=generator).tolist()
    prompts = [torch.randint(1, arguments.vocab, (length,), generator=generator).tolist() for length in lengths]
    examples = [
        Example(str(index), " ".join(f"w{token}" for token in ids), tuple(ids), {}) for index, ids in enumerate(prompts)
    ]
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    say({"ready_seconds": time.perf_counter() - STARTED, "resident_mib": before})

    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        stage = GrpoStage.model_validate(
            {
                "kind": "grpo",
                "engine": engine,
                "data": {"source": "task", "path": "addition", "prompt": "prompt"},
                "steps": request["steps"] + 1,  # the first one makes the optimiser's state, once in a training
                "optimizer": {"learning_rate": 1e-9},
                "sampling": {
                    "num_generations": request["generations"],
                    "max_completion_length": arguments.limit,
                },
                "rewards": [{"name": "length", "options": {"target": 40}}],
                "algorithm": {"preset": "grpo", "beta": 0.0},
                "prompts_per_step": arguments.prompts,
                "micro_batch_size": arguments.trl_rows if engine == "trl" else None,
            }
        )
        stream = PromptStream(examples, arguments.prompts, seed=number)
        rewards = bind(stage.rewards, discover())
        gc.collect()  # a round's optimiser is in cycles, and would still be there at the next round's peak
        with tempfile.TemporaryDirectory() as output:
            train = partial(run, engine, stage, policy, stream, rewards, seed=number, folder=Path(output), model=model)
            steps = measured_steps(train, arguments.vocab)
        say({"steps": steps[1:], "peak_mib": resident_mib("VmHWM") - before})


def measured_steps(train: Callable[..., None], vocabulary: int) -> list[dict[str, float]]:
    """What every step of a training took, with the matrix-product rate around it."""
    steps, rates = list[dict[str, float]](), [matmul_rate()]

    def report(end: Any) -> None:
        rates.append(matmul_rate())
        steps.append(measured(end, vocabulary, rate=sum(rates[-2:]) / 2))

    train(report=report)
    return steps


def run(
    engine: str,
    stage: Any,
    policy: Any,
    stream: Any,
    rewards: Any,
    *,
    seed: int,
    folder: Path,
    model: Any,
    report: Callable[[Any], None],
) -> None:
    """Some steps of one engine, as `grpo-lab train` runs them."""
    if engine == "trl":
        from grpo_lab.engines import trl

        parts = trl.TrlParts("benchmark", stage, seed, policy, None, stream, None, rewards, folder)
        trl.train(parts, model, output=folder / "trl", resume_from=None, report=report, callbacks=[])
        return
    from grpo_lab.engines import native
    from grpo_lab.engines.learner import Learner
    from grpo_lab.policy.forward import PolicyForward
    from grpo_lab.sampling import make_sampler
    from grpo_lab.sampling.decoding import Decoding

    learner = Learner(
        PolicyForward(policy.model, temperature=1.0),
        stage.optimizer,
        total_steps=stage.steps,
        micro_batch_size=stage.micro_batch_size,
    )
    sampler = make_sampler("native", policy, Decoding.of(stage.sampling))
    parts = native.Parts("benchmark", stage, seed, policy, None, stream, sampler, rewards, learner, folder)
    native.train(parts, start=0, report=report)


def measured(end: Any, vocabulary: int, *, rate: float) -> dict[str, float]:
    """A step's seconds by phase, and what it had to do; `rate` is the matrix-product rate around it."""
    prompts = [len(group.example.prompt_ids) for group in end.groups]
    lengths = [[len(completion.token_ids) for completion in group.completions] for group in end.groups]
    gflop = 1e3 * needed_tflop({**SHAPE, "vocab": vocabulary}, prompts, lengths)
    return {
        **{phase: end.timing[f"{phase}_seconds"] for phase in PHASES},
        "completions": float(sum(map(len, lengths))),
        "tokens": float(sum(map(sum, lengths))),
        "prompt_tokens": float(sum(prompts)),
        "matmul_gflops": rate,
        "useful_share": gflop / end.timing["learn_seconds"] / rate,
    }


def matmul_rate() -> float:
    """What torch sustains here and now in a large float32 matrix product, in billion operations per second.

    Taken before and after every step, for the speed of shared machines changes from second to second.
    """
    import torch

    rows, inner, columns = 2048, 512, 2048
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.25:
        a @ b
        count += 1
    return 2e-9 * rows * inner * columns * count / (time.perf_counter() - start)


def resident_mib(which: str) -> float:
    """This process's resident memory (VmRSS) or its peak since it was last cleared (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Worker:
    """One engine in its own process."""

    def __init__(self, engine: str, folder: Path, argv: list[str]) -> None:
        command = [sys.executable, __file__, *argv, "--worker", engine, "--folder", str(folder)]
        started = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.answer()
        self.facts["start_seconds"] = time.perf_counter() - started

    def ask(self, steps: int, generations: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"steps": steps, "generations": generations}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit("a worker ended; its error stands above")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def benchmark(arguments: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Rounds in turns: what each engine took in every round, and what it is."""
    results: dict[str, Any] = {"settings": {**vars(arguments), "json": None}, "machine": machine(), "engines": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload(arguments, folder)
        workers = {engine: Worker(engine, folder, argv) for engine in arguments.engines}
        for engine, worker in workers.items():
            results["engines"][engine] = {**worker.facts, "rounds": []}
            worker.ask(1, arguments.generations[0])  # warm
        for number in range(arguments.rounds):
            for generations in arguments.generations:
                for engine, worker in workers.items():
                    answer = worker.ask(arguments.steps, generations)
                    sums = {
                        key: sum(step[key] for step in answer["steps"]) for key in (*PHASES, "completions", "tokens")
                    }
                    results["engines"][engine]["rounds"].append(
                        {"generations": generations, **sums, "steps": answer["steps"]}
                    )
                    results["engines"][engine]["peak_mib"] = answer["peak_mib"]
                    print(f"round {number + 1}, G {generations}, {engine}: {sums['step']:.1f} s", file=sys.stderr)  # noqa: T201
        for worker in workers.values():
            worker.end()
    return results


def machine() -> dict[str, str]:
    """Where and when."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
    }


def per_second(rounds: list[dict[str, float]], phase: str, what: str = "completions") -> list[float]:
    return [each[what] / each[phase] for each in rounds]


def spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines of a markdown table: medians, with the least and the most of the rounds."""
    engines = results["engines"]
    names = list(engines)
    both = names == ["native", "trl"]
    lines = [
        "| | " + " | ".join(names) + (" | ratio |" if both else " |"),
        "|---|" + "---|" * (len(names) + both),
    ]

    def add(label: str, values: dict[str, list[float]], *, less_is_better: bool = False) -> None:
        cells = [spread(values[name]) for name in names]
        if both:
            one, other = (median(values[name]) for name in names)
            cells.append(f"{other / one if less_is_better else one / other:.1f}x")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    for generations in results["settings"]["generations"]:
        rounds = {
            name: [each for each in engines[name]["rounds"] if each["generations"] == generations] for name in names
        }
        prefix = f"G = {generations}: " if len(results["settings"]["generations"]) > 1 else ""
        for phase in PHASES:
            unit = "completions/s, whole step" if phase == "step" else f"completions/s, {phase}"
            add(prefix + unit, {name: per_second(rounds[name], phase) for name in names})
        add(f"{prefix}tokens/s, whole step", {name: per_second(rounds[name], "step", "tokens") for name in names})
        add(
            f"{prefix}mean length (tokens)", {name: per_second(rounds[name], "completions", "tokens") for name in names}
        )
        add(
            f"{prefix}ms of learning per completion token",
            {name: [1e3 * each["learn"] / each["tokens"] for each in rounds[name]] for name in names},
            less_is_better=True,
        )
        add(
            f"{prefix}useful work in learning, share of the matrix-product rate",
            {name: [step["useful_share"] for each in rounds[name] for step in each["steps"]] for name in names},
        )
    add(
        "matrix-product rate (GFLOP/s)",
        {name: [step["matmul_gflops"] for each in engines[name]["rounds"] for step in each["steps"]] for name in names},
    )
    add("peak memory above start (MiB)", {name: [engines[name]["peak_mib"]] for name in names}, less_is_better=True)
    add("start: imports and model (s)", {name: [engines[name]["start_seconds"]] for name in names}, less_is_better=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["native", "trl"], choices=["native", "trl"])
    parser.add_argument("--vocab", type=int, default=8192, help="V, the vocabulary's size")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt, give or take 16")
    parser.add_argument("--limit", type=int, default=128, help="the most tokens of a completion")
    parser.add_argument(
        "--mean-length", type=float, default=45.0, help="what completions would average without a limit"
    )
    parser.add_argument("--prompts", type=int, default=8, help="P, prompts per step")
    parser.add_argument("--generations", type=int, nargs="+", default=[8], help="G, completions per prompt")
    parser.add_argument("--steps", type=int, default=2, help="steps in a round, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-rows", type=int, default=16, help="TRL's per_device_train_batch_size")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments, arguments.worker, arguments.folder)
        return
    results = benchmark(arguments, sys.argv[1:])
    print("\n".join(table(results)))  # noqa: T201
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
