"""What `grpo-lab estimate` says against what a run really takes: peaks of its phases on the CPU, random weights of 100M parameters.

python scripts/measure_memory.py                       # all cases, a table
python scripts/measure_memory.py --cases full 4bit     # some of them

Every run is a process of its own. Its peak is what Linux counts as resident (VmHWM, cleared before each phase), less
what it held when everything was imported.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
CASES = {
    "full": {},
    "full, beta 0": {"stages.learn.algorithm.beta": 0},
    "full, SGD, 4 rows at once": {"stages.learn.optimizer.name": "sgd", "stages.learn.micro_batch_size": 4},
    "full, bfloat16": {"model.dtype": "bfloat16"},
    "LoRA": {"model.lora": "{r: 16}"},
    "LoRA, long answers": {"model.lora": "{r: 16}", "stages.learn.sampling.max_completion_length": 160},
    "LoRA, checkpointing": {"model.lora": "{r: 16}", "model.gradient_checkpointing": "true"},
    "4-bit": {"model.lora": "{r: 16}", "model.quantization": "{type: nf4}"},
}
MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 34000,
}
SMALL = {**MODEL, "hidden_size": 240, "intermediate_size": 640, "num_hidden_layers": 4, "vocab_size": 8000}
RECIPE = """\
name: measured
num_threads: 1
model: {{path: {folder}/model}}
stages:
  learn:
    kind: grpo
    data: {{source: file, path: {folder}/prompts.jsonl, prompt: prompt, chat: false}}
    sampling: {{num_generations: 4, max_completion_length: 48}}
    rewards: [{{name: length, options: {{target: 10}}}}]
    reward_control: random  # equal rewards would move nothing, and the optimiser would hold nothing
    prompts_per_step: 4
    steps: 2
    optimizer: {{learning_rate: 1.0e-6}}
"""


def world(folder: Path, model: dict[str, int], *, prompt_tokens: int = 64) -> None:
    """Write a model with random weights, a tokenizer of that many words, prompts, and a recipe.

    Random weights hardly ever end an answer, so that every one is as long as it may be, as the estimate has it.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<eos>": 0, **{f"w{index}": index for index in range(1, model["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "model"
    )
    config = LlamaConfig(**model, **ids, max_position_embeddings=2048, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    prompts = torch.randint(1, model["vocab_size"], (32, prompt_tokens)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"w{token}" for token in ids)}) for ids in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))


def resident_mib(which: str) -> float:
    """This process's resident memory (VmRSS) or its peak since it was last cleared (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def measured(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Train in this process; the peak of each phase above what the process held at first, in bytes."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    from rich.console import Console
    from transformers import LlamaForCausalLM  # noqa: F401

    from grpo_lab import pipeline
    from grpo_lab.engines.learner import Learner
    from grpo_lab.recipe import load
    from grpo_lab.sampling.native import NativeSampler
    from grpo_lab.stages import grpo, running

    peaks: dict[str, float] = {}

    def phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")
            try:
                return function(*arguments, **options)
            finally:
                peaks[name] = max(peaks.get(name, 0.0), (resident_mib("VmHWM") - before) * MIB)

        return timed

    grpo.load_policy = phase("load", grpo.load_policy)
    NativeSampler.sample = phase("sample", NativeSampler.sample)
    Learner.step = phase("learn", Learner.step)
    running.save_checkpoint = phase("checkpoint", running.save_checkpoint)
    running.write_checked = phase("save", running.write_checked)
    torch.randn(64, 64) @ torch.randn(64, 64)
    loaded = load(folder / "recipe.yaml", overrides)
    pipeline.quiet_libraries()
    before = resident_mib("VmRSS")
    whole = phase("whole", pipeline.train_recipe)
    whole(loaded, "", go_on=False, console=Console(stderr=True), quiet=True)
    return {**peaks, "whole": max(peaks.values())}


def estimated(folder: Path, overrides: list[str]) -> dict[str, float]:
    """What `grpo-lab estimate` says of the same phases, in bytes."""
    from grpo_lab.assemble import assemble
    from grpo_lab.estimate.stages import estimate_stage
    from grpo_lab.recipe import load

    plan = assemble(load(folder / "recipe.yaml", overrides))
    found = estimate_stage(plan, plan.stages[0], memory=None)
    return {**found["phases"], "whole": found["peak"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--small", action="store_true", help="a model of 5M parameters, for the tests")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        found = {"measured": measured(arguments.folder, arguments.child)}
        say(json.dumps({**found, "estimated": estimated(arguments.folder, arguments.child)}))
        return
    say("| case | phase | estimated, MiB | measured, MiB | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world(folder, SMALL if arguments.small else MODEL)
        for case in arguments.cases:
            found = in_child(folder, case)
            for phase, peak in found["measured"].items():
                said = found["estimated"].get(phase)
                if said is not None and phase != "load":  # a file is read as it is used
                    label = "**all**" if phase == "whole" else phase
                    ratio = f"{said / peak:.2f}"
                    say(f"| {case} | {label} | {said / MIB:,.0f} | {peak / MIB:,.0f} | {ratio} |")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def in_child(folder: Path, case: str) -> dict[str, dict[str, float]]:
    """The measured and estimated peaks of one case, from a process of its own."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = [f"{key}={value}" for key, value in CASES[case].items()] + [f"output_dir={runs}"]
        command = [sys.executable, __file__, "--folder", str(folder), "--child", *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
