"""One optimiser step, exact under micro-batching and over processes: whoever learns (GRPO or SFT) brings only a loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lab.distributed.dealing import own_rows
from grpo_lab.distributed.ranks import ALONE, Ranks
from grpo_lab.engines.weights import Strategy, hold
from grpo_lab.errors import NumericError, SetupError
from grpo_lab.recipe.schema import Optimizer
from grpo_lab.types import Batch, LogpsAndEntropy

MAX_SKIPPED_IN_A_ROW = 3

# From a forward pass over some rows to their share of the loss, and to sums worth logging.
Loss = Callable[[LogpsAndEntropy, Batch], tuple[Tensor, Mapping[str, Tensor]]]


def learning_rate(settings: Optimizer, index: int, total: int) -> float:
    """The rate of optimiser step `index` (from 0) of `total`: linear warm-up, then the schedule down to 0.

    A function of the index, so there is no scheduler state to save.
    """
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else settings.warmup_steps * total
    warmup = math.ceil(round(warmup, 6))  # 0.07 * 100 is 7.000000000000001
    if index < warmup:
        return settings.learning_rate * (index + 1) / warmup
    progress = (index - warmup) / max(1.0, total - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[settings.schedule]
    return settings.learning_rate * factor


@dataclass
class StepSums:
    """What one optimiser step saw: sums over its rows, and whether the weights moved."""

    loss: float = 0.0
    grad_norm: float = math.nan
    learning_rate: float = 0.0
    skipped: bool = False
    sums: dict[str, float] = field(default_factory=dict)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. On the CPU torch raises a RuntimeError that only its words tell apart."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


class Learner:
    """The policy's forward pass with its optimiser. Its state outlives a step.

    `forward` is a PolicyForward: a module from a batch to log-probs that also says where to cut a batch.

    With several processes each finds the gradient of its own groups, and the gradients are added up. Loss weights come
    from the whole step, so the sum is what one process would find. `strategy` says how the weights that learn are held
    (weights.py); where they lie in pieces, the model of `forward` gets them whole after every step.
    """

    def __init__(
        self,
        forward: nn.Module,
        settings: Optimizer,
        *,
        total_steps: int,
        micro_batch_size: int | None,
        ranks: Ranks = ALONE,
        strategy: Strategy = "ddp",
    ) -> None:
        self.settings = settings
        self.total_steps = total_steps
        self.micro_batch_size = micro_batch_size
        self.ranks = ranks
        self.micro_batches: Any = forward.micro_batches
        self.weights = hold(forward, settings, ranks, strategy)
        self.steps_done = 0
        self.skipped_in_a_row = 0
        self.halved_to: int | None = None  # rows at once since memory last fell short

    def step(self, batch: Batch, loss: Loss) -> StepSums:
        """One optimiser step on the batch's rows, in micro-batches whose shares add up to the whole loss.

        Where the loss or the gradient is not finite the weights stay as they are, bit for bit; the third time in a
        row is an error.
        """
        out = StepSums(learning_rate=learning_rate(self.settings, self.steps_done, self.total_steps))
        self.weights.begin(batch, out.learning_rate)
        out.loss, out.sums = self._gradient(batch, loss)
        out.grad_norm = self.weights.clipped()
        out.skipped = not (math.isfinite(out.loss) and math.isfinite(out.grad_norm))
        # a step without signal makes no update: momentum alone may not move
        self.weights.step(moves=not out.skipped and out.grad_norm > 0)
        self._count(out)
        return out

    @property
    def forward(self) -> Any:
        """The forward pass that learns; of weights in pieces, that of their copy."""
        return self.weights.forward

    @property
    def optimizer(self) -> Any:
        """The optimiser, as accelerate has prepared it."""
        return self.weights.optimizer

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, whole; of weights in pieces only the first process gets it."""
        return self.weights.state()

    def resume(self, optimizer_state: dict[str, Any], *, steps_done: int, skipped_in_a_row: int) -> None:
        """Go on with this state, and with the weights that the model of `forward` now has."""
        self.weights.load(optimizer_state)
        self.steps_done, self.skipped_in_a_row = steps_done, skipped_in_a_row

    def _gradient(self, batch: Batch, loss: Loss) -> tuple[float, dict[str, float]]:
        """Add up the gradient of the whole batch over all processes; the loss and its sums."""
        start, stop = own_rows(batch, self.ranks)
        own = batch if self.ranks.world == 1 else batch.rows(start, stop) if start < stop else None
        total, sums = 0.0, dict[str, float]()
        for share, values, halved_to in self.ranks.gather((*self._own_gradient(own, loss, batch), self.halved_to)):
            total += share
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            if halved_to is not None:
                self.micro_batch_size = self.halved_to = min(halved_to, self.halved_to or halved_to)
        self.weights.add_up()
        return total, sums

    def _own_gradient(self, own: Batch | None, loss: Loss, batch: Batch) -> tuple[float, dict[str, float]]:
        """Add up the gradient of this process's rows, micro-batch by micro-batch; their loss and its sums.

        Where memory does not suffice everything is done again in halves, from then on.

        Raises:
            SetupError: it does not suffice for a single row, or weights lie in pieces, for which all processes would
                have to begin again.
        """
        parts = self.micro_batches(own, self.micro_batch_size) if own is not None else []
        while True:
            try:
                return self._added_up(own, loss, parts, batch)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                largest = max((stop - start for start, stop in parts), default=1)
                if largest == 1 or self.weights.in_lockstep:
                    tokens = int(batch.prompt_mask.sum(1).max() + batch.completion_mask.sum(1).max())
                    rows = "a single row" if largest == 1 else f"{largest} rows at once (set micro_batch_size)"
                    raise SetupError(
                        f"out of memory with {rows} of up to {tokens} tokens; shorten prompts or completions, set "
                        f"model.gradient_checkpointing: true, or take a smaller model. {error}"
                    ) from error
            assert own is not None
            self.weights.begin(batch, self.optimizer.param_groups[0]["lr"])  # what the failed pass has left goes
            self.micro_batch_size = self.halved_to = (largest + 1) // 2
            parts = self.micro_batches(own, self.micro_batch_size)

    def _added_up(
        self, own: Batch | None, loss: Loss, parts: Sequence[tuple[int, int]], batch: Batch
    ) -> tuple[float, dict[str, float]]:
        total, sums = 0.0, dict[str, float]()
        passes = max(self.ranks.gather(len(parts))) if self.weights.in_lockstep else len(parts)
        for number, (start, stop) in enumerate(parts, 1):
            assert own is not None
            rows = own.rows(start, stop)
            share, values = loss(self.weights.passed(rows), rows)
            self.weights.backward(share, last=number == passes)
            total += float(share.detach())
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        for number in range(len(parts) + 1, passes + 1):  # the others need this process's pieces
            idle = 0.0 * self.weights.passed(batch.rows(0, 1)).logps.sum()
            self.weights.backward(idle, last=number == passes)
        return total, sums

    def _count(self, out: StepSums) -> None:
        self.steps_done += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if out.skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NumericError(
                f"{self.skipped_in_a_row} optimiser steps in a row had a loss or gradient that is not finite "
                f"(the last: loss {out.loss}, gradient norm {out.grad_norm}); the weights were left as they were. "
                "Lower optimizer.learning_rate, or look at the last rollouts."
            )
