"""What 4-bit weights change, against float32: the weights themselves, what the model says, and memory.

python scripts/quantization_error.py runs/quickstart                   # the model that the last GRPO stage began with
python scripts/quantization_error.py path/to/model --recipe quickstart # any model, with a recipe's prompts

Completions are sampled from the float32 model at temperature 1, on the stage's own prompts; the KL is the mean of
log p(float32) - log p(4 bits) over their tokens, in nats.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from grpo_lab.assemble import assemble
from grpo_lab.batching import pad_rows
from grpo_lab.bundled import find_recipe
from grpo_lab.estimate.stages import packed_weights
from grpo_lab.finished import finished_stage
from grpo_lab.pipeline import quiet_libraries
from grpo_lab.policy.forward import completion_logps
from grpo_lab.policy.load import load_policy, load_tokenizer
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import Lora, Model, Quantization
from grpo_lab.sampling.decoding import Decoding
from grpo_lab.sampling.native import NativeSampler
from grpo_lab.stages.plan import GrpoPlan
from grpo_lab.tracking.run_folder import RESOLVED, RUN
from grpo_lab.types import Policy

PROMPTS, GENERATIONS = 32, 4
KINDS = {
    "nf4, double quantization": Quantization(),
    "nf4": Quantization(double_quant=False),
    "fp4, double quantization": Quantization(type="fp4"),
}


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Every weight that quantization packs, in float32, by its name in the model without an adapter."""
    import bitsandbytes

    found = {}
    for name, module in policy.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[plain] = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
    return found


def packed_bytes(policy: Policy) -> int:
    """What the packed weights take, their scales included."""
    total = 0
    for parameter in policy.model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += parameter.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def compared(exact: Policy, packed: Policy, batch: Any) -> list[str]:
    """One row of the table."""
    whole = dict(exact.model.named_modules())
    pairs = [(whole[name].weight.detach().float(), weight) for name, weight in weights_of(packed).items()]
    error = sum(float((one - other).square().sum()) for one, other in pairs)
    relative = (error / sum(float(one.square().sum()) for one, _ in pairs)) ** 0.5
    logps = [completion_logps(policy, batch, temperature=1.0)[batch.completion_mask] for policy in (exact, packed)]
    gaps = logps[0] - logps[1]
    before = sum(one.numel() * 4 for one, _ in pairs)
    size = f"{before / 2**20:.2f} -> {packed_bytes(packed) / 2**20:.2f}"
    return [f"{relative:.3f}", f"{float(gaps.abs().mean()):.4f}", f"{float(gaps.mean()):.4f}", size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's folder, or a model's")
    parser.add_argument("--recipe", help="whose prompts; a run knows its own")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.model
    if (folder / RUN).is_file():
        plan = assemble(load(folder / RESOLVED))
        name = [each.name for each in plan.stages if isinstance(each, GrpoPlan)][-1]
        folder = finished_stage(folder, name).start or Path(plan.recipe.model.path or "")
    else:
        plan = assemble(load(find_recipe(arguments.recipe)))
    stage = [each for each in plan.stages if isinstance(each, GrpoPlan)][-1]
    tokenizer = load_tokenizer(Model(path=str(folder)))
    exact = load_policy(Model(path=str(folder)), tokenizer, seed=0)
    exact.model.eval()
    examples = [stage.prompts.items[index] for index in range(min(PROMPTS, len(stage.prompts.items)))]
    sampler = NativeSampler(exact, Decoding.of(stage.stage.sampling))
    groups = sampler.sample(examples, num_generations=GENERATIONS, seed=0)
    rows = [completion.token_ids for group in groups for completion in group.completions]
    owners = [index for index in range(len(groups)) for _ in range(GENERATIONS)]
    batch = pad_rows([example.prompt_ids for example in examples], owners, rows, exact)
    say(f"{len(packed_weights(exact.model))} layers, {sum(map(len, rows))} sampled tokens")
    say(
        "| weights | error of weights | of log-probs, mean | KL per token | MiB of packed layers |\n|---|---|---|---|---|"
    )
    for kind, quantization in KINDS.items():
        packed = load_policy(Model(path=str(folder), lora=Lora(r=1), quantization=quantization), tokenizer, seed=0)
        packed.model.eval()
        say(f"| {kind} | {' | '.join(compared(exact, packed, batch))} |")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
