"""Decoding with shared prompts: each is computed once, rows that end give up their slot, and others take it."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_lab.attention.decoding import DecodingAttention, Prefill, PromptTable
from grpo_lab.attention.interface import packed_arguments
from grpo_lab.attention.last_layer import predicted_states
from grpo_lab.attention.layout import packed_prompts
from grpo_lab.attention.probe import parts
from grpo_lab.sampling.decoding import Decoding, draw
from grpo_lab.types import Policy

# Rows wait until this share of the slots is free: each admission computes prompts and lays the table anew.
ADMIT_AT = 8


class Prompts:
    """Prompts that are computed when they are first asked for: their keys and values by layer, and the logits after them."""

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], *, longest: int) -> None:
        self.decoder, self.head = parts(policy.model)
        self.prompts, self.longest = prompts, longest
        self.caches: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.ends: dict[int, Tensor] = {}

    def compute(self, wanted: Iterable[int], device: torch.device) -> None:
        """Compute those that are not there, all at once."""
        new = sorted(set(wanted) - self.caches.keys())
        if new:
            packed = packed_prompts([self.prompts[prompt] for prompt in new], device)
            prefill = Prefill(packed, longest=self.longest)
            self.ends |= dict(zip(new, self.head(predicted_states(self.decoder, prefill)), strict=True))
            self.caches |= dict(zip(new, prefill.of_prompts(), strict=True))

    def forget(self, prompt: int) -> None:
        """Nobody will ask for this one again."""
        del self.caches[prompt], self.ends[prompt]


@dataclass
class Row:
    """One completion being written: tokens up to and including its end, and their log-probs."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


class SharedPromptDecoder:
    """Writes the completions of some prompts, at most `num_slots` of them at once.

    Row r answers prompt `of_prompt[r]` with noise [r]; what it writes depends on nothing else.

    Raises:
        NotPackableError: when used, if a text may become longer than the model's attention window.
    """

    def __init__(self, policy: Policy, decoding: Decoding, prompts: Sequence[Sequence[int]], num_slots: int) -> None:
        self.policy, self.decoding = policy, decoding
        self.decoder, self.head = parts(policy.model)
        self.eos = frozenset(policy.eos_ids)
        self.longest = max(map(len, prompts)) + decoding.max_completion_length
        self.num_slots = num_slots
        self.attention = DecodingAttention(num_slots, decoding.max_completion_length, longest=self.longest)
        self.computed = Prompts(policy, prompts, longest=self.longest)
        self.slots: list[int] = []  # which row is in each slot
        self.laid: list[int] = []  # which prompts are on the table

    def decode(self, of_prompt: Sequence[int], noise: Float[Tensor, "N T"]) -> Iterator[dict[int, Row]]:
        """Write all rows, from their first token to their end; after every token, those that ended with it (often none)."""
        self.rows, self.noise = [Row(prompt) for prompt in of_prompt], noise
        self.unfinished = Counter(of_prompt)
        waiting = deque(range(len(self.rows)))
        while waiting or self.slots:
            free = self.num_slots - len(self.slots)
            if waiting and (not self.slots or free * ADMIT_AT >= self.num_slots):
                yield self._admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            if self.slots:
                yield self._step()

    def _admit(self, rows: list[int]) -> dict[int, Row]:
        """Compute the prompts that are new, and draw each row's first token; the rows that it ends."""
        prompts = [self.rows[row].prompt for row in rows]
        self.computed.compute(prompts, self.noise.device)
        self._write(rows, torch.stack([self.computed.ends[prompt] for prompt in prompts]))
        ended = self._forget([row for row in rows if self._ended(row)])
        self.slots += [row for row in rows if row not in ended]
        self.attention.lengths += [0] * (len(self.slots) - len(self.attention.lengths))
        self._seat()
        return ended

    def _step(self) -> dict[int, Row]:
        """One token more for the row in every slot; the rows that it ends."""
        last = torch.tensor([[self.rows[row].tokens[-1]] for row in self.slots])
        position = [
            [len(self.computed.prompts[self.rows[row].prompt]) + len(self.rows[row].tokens) - 1] for row in self.slots
        ]
        self.attention.begin()
        hidden = self.decoder(**packed_arguments(last, torch.tensor(position), self.attention)).last_hidden_state
        self._write(self.slots, self.head(hidden[:, 0]))
        free = [slot for slot, row in enumerate(self.slots) if self._ended(row)]
        ended = self._forget([self.slots[slot] for slot in free])
        for slot in reversed(free):
            self.attention.leave(slot)
            self.slots[slot] = self.slots[-1]
            self.slots.pop()
        if free and self.slots:
            self._seat()
        return ended

    def _write(self, rows: Sequence[int], logits: Float[Tensor, "R V"]) -> None:
        at = [len(self.rows[row].tokens) for row in rows]
        tokens, logps = draw(logits, self.noise[torch.tensor(rows), torch.tensor(at)], self.decoding)
        for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            self.rows[row].tokens.append(token)
            self.rows[row].logps.append(logp)
            self.rows[row].finished = token in self.eos

    def _ended(self, row: int) -> bool:
        return self.rows[row].finished or len(self.rows[row].tokens) == self.decoding.max_completion_length

    def _forget(self, rows: list[int]) -> dict[int, Row]:
        """These rows are written; a prompt that has no other is no longer needed."""
        for row in rows:
            prompt = self.rows[row].prompt
            self.unfinished[prompt] -= 1
            if self.unfinished[prompt] == 0:
                self.computed.forget(prompt)
        return {row: self.rows[row] for row in rows}

    def _seat(self) -> None:
        """Lay the table for the prompts in use where they changed or have become half as many, and seat the rows."""
        in_use = sorted({self.rows[row].prompt for row in self.slots})
        if not in_use:
            return
        if not set(in_use) <= set(self.laid) or 2 * len(in_use) <= len(self.laid):
            self.laid = in_use
            self.attention.prompts = PromptTable([self.computed.caches[prompt] for prompt in in_use])
        assert self.attention.prompts is not None
        entry = {prompt: index for index, prompt in enumerate(self.laid)}
        self.attention.prompts.seat([entry[self.rows[row].prompt] for row in self.slots])
