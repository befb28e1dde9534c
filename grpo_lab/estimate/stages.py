"""What each stage of a recipe takes: what lies in memory all the time, the peak of every phase, and sizes that fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from grpo_lab.algorithm.linear_logps import LOGITS_HELD
from grpo_lab.assemble import Plan
from grpo_lab.estimate.passes import learning_bytes, prefill_bytes, shapes_of
from grpo_lab.policy.forward import TOKENS_HELD
from grpo_lab.policy.load import model_config
from grpo_lab.policy.quantization import BLOCK
from grpo_lab.recipe.schema import GrpoStage, Optimizer, Quantization
from grpo_lab.stages.plan import GrpoPlan, SftPlan

MAX_ROWS_READ = 1000  # of the data, for the longest prompt
SCALES = 256  # scales that share a scale, in double quantization and in 8-bit optimisers
PROCESS = (
    56 << 20
)  # beside tensors, once a process trains: tokenizer, data, kernels' buffers; 52 to 65 MiB were measured
SMALL = 4096  # 8-bit optimisers keep tensors below this in 32 bits


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a prompt, and of a completion."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Shape:
    """A stage's model without values, the bytes of what lies in memory while the stage runs, and what loading takes."""

    network: Any
    held: dict[str, int]
    loading: int

    @property
    def resident(self) -> int:
        """All of it but the gradients, which come and go."""
        return sum(self.held.values()) - self.held["gradients"]


def shape_of(plan: Plan, stage: SftPlan | GrpoPlan) -> Shape:
    """The stage's model on the meta device, with its adapter."""
    model = plan.recipe.model_of(stage.stage)
    network = shapes_of(model_config(model, plan.tokenizer), model)
    whole, weights = weight_bytes(network, None), weight_bytes(network, model.quantization)
    largest = 0 if model.quantization is None else max(weight.nbytes for weight in packed_weights(network))
    if model.lora is not None:
        from grpo_lab.policy.adapter import attach  # a second of import

        network = attach(network, model.lora, seed=0)
    learns = [parameter for parameter in network.parameters() if parameter.requires_grad]
    size = sum(parameter.nbytes for parameter in learns)
    beta = stage.stage.algorithm.beta if isinstance(stage.stage, GrpoStage) else 0.0
    return Shape(
        network,
        {
            "process": PROCESS,
            "weights": weights,
            "unpacked": largest,
            "adapter": size if model.lora is not None else 0,
            "reference": size if beta > 0 else 0,
            "gradients": size,
            "optimizer": sum(optimizer_bytes(parameter, stage.stage.optimizer) for parameter in learns),
        },
        # of a file in full precision the parts are read as they are used; packing them reads all of it
        loading=weights if model.quantization is None else whole + weights,
    )


def weight_bytes(network: Any, quantization: Quantization | None) -> int:
    """All weights and buffers; in 4 bits the linear layers but the head, with a scale for every block of weights."""
    total: int = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    if quantization is None:
        return total
    scale = 1 + 4 / SCALES if quantization.double_quant else 4
    return total - sum(w.nbytes - round(w.numel() * (0.5 + scale / BLOCK)) for w in packed_weights(network))


def packed_weights(network: Any) -> list[Tensor]:
    """The weights that quantization packs; each is unpacked again, one at a time, wherever it is used."""
    head = network.get_output_embeddings()
    return [module.weight for module in network.modules() if isinstance(module, nn.Linear) and module is not head]


def optimizer_bytes(parameter: Tensor, settings: Optimizer) -> int:
    """What an optimiser keeps for a parameter once it has made a step."""
    if settings.name == "sgd":
        return parameter.nbytes if settings.momentum > 0 else 0
    if settings.name == "adamw":
        return 2 * parameter.nbytes
    wide = parameter.numel() < SMALL
    return 2 * parameter.numel() * 4 if wide else round(2 * parameter.numel() * (1 + 4 / SCALES))


def longest(stage: SftPlan | GrpoPlan) -> Lengths:
    """From the stage's first thousand rows; completions of GRPO may be as long as the recipe allows."""
    if isinstance(stage, GrpoPlan):
        prompts = [len(example.prompt_ids) for example in islice(each(stage.prompts.items), MAX_ROWS_READ)]
        return Lengths(max(prompts), stage.stage.sampling.max_completion_length)
    rows = list(islice(each(stage.rows.items), MAX_ROWS_READ))
    most = max(rows, key=lambda row: len(row.prompt_ids) + len(row.completion_ids))
    return Lengths(len(most.prompt_ids), len(most.completion_ids))


def each(items: Any) -> Any:
    """Items one by one; a stream is asked for them until it ends."""
    index = 0
    while True:
        try:
            yield items[index]
        except IndexError:
            return
        index += 1


@dataclass(frozen=True)
class Learning:
    """One optimiser step: rows in all, how many answer one prompt, and the most tokens of each."""

    rows: int
    per_prompt: int
    lengths: Lengths
    vocabulary: int

    @classmethod
    def of(cls, stage: SftPlan | GrpoPlan, lengths: Lengths, vocabulary: int) -> "Learning":
        """The step of a stage."""
        settings = stage.stage
        if isinstance(settings, GrpoStage):
            generations = settings.sampling.num_generations
            rows = settings.prompts_per_step * generations // settings.algorithm.num_minibatches
            return cls(rows, generations, lengths, vocabulary)
        return cls(settings.batch_size, 1, lengths, vocabulary)

    @property
    def default_rows(self) -> int:
        """Rows at once where no micro-batch size is given: whole groups within the bounds on tokens and logits."""
        own = self.per_prompt * self.lengths.completion
        read = self.lengths.prompt if self.per_prompt == 1 else 0
        groups = max(1, min(TOKENS_HELD // (own + read), LOGITS_HELD // self.vocabulary // own))
        return min(self.rows, groups * self.per_prompt)

    def bytes_with(self, network: Any, micro_batch_size: int | None, *, dropout: bool) -> int:
        """The most that the step holds beside weights and optimiser."""
        rows = min(micro_batch_size or self.default_rows, self.rows)
        prompts = math.ceil(rows / self.per_prompt)
        return learning_bytes(
            network,
            num_tokens=prompts * self.lengths.prompt + rows * self.lengths.completion,
            num_logits=prompts + rows * (self.lengths.completion - 1),
            num_parts=math.ceil(self.rows / rows),
            dropout=dropout,
        )


@dataclass(frozen=True)
class Decoding:
    """Completions that are written: of how many prompts, how many for each, and the most tokens of each."""

    prompts: int
    per_prompt: int
    lengths: Lengths
    vocabulary: int

    def parts(self, network: Any, max_rows: int | None) -> dict[str, int]:
        """KV cache (each prompt in use twice: as computed, and laid side by side; each slot at full length), logits, and
        what computing the prompts takes beside their cache."""
        slots = min(self.prompts * self.per_prompt, max_rows or self.prompts * self.per_prompt)
        in_use = min(self.prompts, math.ceil(slots / self.per_prompt))
        prefill = prefill_bytes(network, in_use * self.lengths.prompt)
        per_token = prefill.cache // (in_use * self.lengths.prompt)
        own = slots * self.lengths.completion * per_token
        # as the head gives them, divided by the temperature, as masses, and as masses in whole blocks; in float32
        logits = (4 * slots + in_use) * self.vocabulary * 4
        return {"kv_cache": 2 * prefill.cache + own, "sampling_logits": logits, "prefill": prefill.peak - prefill.cache}

    def bytes_with(self, network: Any, max_rows: int | None) -> int:
        """The most that is held beside what is always there: while the prompts are computed, or while rows are written."""
        found = self.parts(network, max_rows)
        return found["kv_cache"] + max(found["sampling_logits"], found["prefill"])


def decodings(stage: GrpoPlan, lengths: Lengths, vocabulary: int) -> dict[str, Decoding]:
    """What a GRPO stage writes: its own samples, and held-out ones."""
    settings = stage.stage
    sampling = settings.sampling
    found = {"sample": Decoding(settings.prompts_per_step, sampling.num_generations, lengths, vocabulary)}
    if settings.evaluation is not None and len(stage.held_out) > 0:
        prompt = max(len(example.prompt_ids) for example in stage.held_out)
        held_out = Lengths(prompt, sampling.max_completion_length)
        count = max(1, settings.evaluation.num_samples)
        found["evaluate"] = Decoding(len(stage.held_out), count, held_out, vocabulary)
    return found


def most_that_fits(fits: Callable[[int], bool], sizes: Sequence[int]) -> int | None:
    """The largest of ascending sizes that fits, if a smaller one fits wherever a larger does.

    >>> most_that_fits(lambda size: size * size < 50, range(1, 100))
    7
    """
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def estimate_stage(plan: Plan, stage: SftPlan | GrpoPlan, *, memory: int | None) -> dict[str, Any]:
    """Bytes of one stage: what is held, the peak of each phase, their maximum, and with `memory` sizes that fit in it."""
    shape, lengths = shape_of(plan, stage), longest(stage)
    network, resident = shape.network, shape.resident
    vocabulary = network.get_output_embeddings().weight.shape[0]
    learning = Learning.of(stage, lengths, vocabulary)
    supervised = isinstance(stage, SftPlan)
    writing = decodings(stage, lengths, vocabulary) if isinstance(stage, GrpoPlan) else {}
    max_rows = stage.stage.sampling.max_rows if isinstance(stage.stage, GrpoStage) else None

    def learn(size: int | None) -> int:
        return resident + learning.bytes_with(network, size, dropout=supervised)

    def write(rows: int | None) -> dict[str, int]:
        return {name: resident + each.bytes_with(network, rows) for name, each in writing.items()}

    step = learn(stage.stage.micro_batch_size)
    logits = min(learning.default_rows, stage.stage.micro_batch_size or learning.rows) * lengths.completion * vocabulary
    held = {
        **shape.held,
        "logits": 4 * logits if logits <= LOGITS_HELD else 0,
        "kv_cache": max((each.parts(network, max_rows)["kv_cache"] for each in writing.values()), default=0),
    }
    held["activations"] = max(0, step - resident - held["gradients"] - held["logits"])
    phases = {
        "load": PROCESS + shape.loading,
        **write(max_rows),
        "learn": step,
        "save": resident + shape.loading + shape.held["adapter"],  # final/ is loaded again beside the model
    }
    found: dict[str, Any] = {"lengths": vars(lengths), "parts": held, "phases": phases, "peak": max(phases.values())}
    if memory is not None:
        found["suggested"] = {"micro_batch_size": suggested(learn, memory, learning.rows)}
        if writing:
            rows = max(each.prompts * each.per_prompt for each in writing.values())
            found["suggested"]["max_rows"] = suggested(lambda size: max(write(size).values()), memory, rows)
        found["fits"] = phases["save"] <= memory and 0 not in found["suggested"].values()
    return found


def suggested(needed: Callable[[int | None], int], memory: int, most: int) -> int | None:
    """The largest size whose need is within memory; None where no limit is needed, 0 where even 1 is too much."""
    if needed(None) <= memory:
        return None
    return most_that_fits(lambda size: needed(size) <= memory, range(1, most + 1)) or 0
