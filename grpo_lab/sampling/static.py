"""Decoding on a GPU: slots whose shapes never change, so that one token more for all of them is one CUDA graph.

A step of a small model is hundreds of short kernels, and Python starts them more slowly than the GPU runs them; a graph
starts them all at once. Each slot has its own copy of its prompt's keys and values: to read them again costs little
beside reading the weights. Every prompt is computed once all the same.
"""

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grpo_lab.attention.interface import packed_arguments
from grpo_lab.attention.probe import parts
from grpo_lab.attention.varlen import Runs, flash_cached
from grpo_lab.sampling.decoding import Decoding, draw
from grpo_lab.sampling.shared import ADMIT_AT, Prompts, Row
from grpo_lab.types import Policy

# Steps between two looks at which rows have ended: to look stops the GPU, not to look computes what nobody needs.
_STEPS_AT_ONCE = 8
_ROOM = 128  # prompts find room in multiples of this, so that a graph often serves the next prompts too


class StaticAttention:
    """The keys and values of R slots of S places each, and how a step's tokens see those of their slots."""

    def __init__(self, num_slots: int, places: int, device: torch.device) -> None:
        self.longest = places
        self.layers: list[tuple[Tensor, Tensor]] = []  # [R*S, H', D] each
        self.first = torch.arange(num_slots, device=device) * places
        self._queries = Runs.of([1] * num_slots, device)
        self._keys = Runs.of([places] * num_slots, device)

    def begin(self, lengths: Tensor, alive: Tensor) -> None:
        """The next calls are the layers of a step, which writes place `lengths[r]` of slot r; others see one place."""
        self._layer = 0
        self._at = self.first + lengths
        self._used = torch.where(alive, lengths + 1, 1).int()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        """One layer; query [R, H, 1, D], key and value [R, H', 1, D] to [R, 1, H, D]."""
        keys, values = self.layers[self._layer]
        self._layer += 1
        keys.index_copy_(0, self._at, key[:, :, 0])
        values.index_copy_(0, self._at, value[:, :, 0])
        return flash_cached(query[:, :, 0], keys, values, self._queries, self._keys, self._used, scaling=scaling)[
            :, None
        ]

    def fill(self, slots: Sequence[int], caches: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        """Write a prompt's keys and values [S, H', D], layer by layer, into the first places of each of these slots."""
        if not self.layers:
            rows = len(self.first) * self.longest
            self.layers = [tuple(t.new_zeros(rows, *t.shape[1:]) for t in layer) for layer in caches[0]]  # type: ignore[misc]
        device = self.first.device
        lengths = [len(cache[0][0]) for cache in caches]
        at = torch.cat([slot * self.longest + torch.arange(n) for slot, n in zip(slots, lengths, strict=True)]).to(
            device
        )
        for number, layer in enumerate(self.layers):
            for which, whole in enumerate(layer):
                whole.index_copy_(0, at, torch.cat([cache[number][which] for cache in caches]))


class Slots:
    """R completions being written at once, all of whose state is on the device: what a CUDA graph works on.

    `lengths[r]` tokens of slot r have keys and values, its last token `last[r]` has none yet; `written[r]` tokens of its
    completion stand in `ids` and `logps`. Slots that are not `alive` stay as they are.
    """

    def __init__(self, policy: Policy, decoding: Decoding, num_slots: int, places: int, device: torch.device) -> None:
        self.decoder, self.head = parts(policy.model)
        self.weights = weights_of(policy)
        self.decoding, self.num_slots, self.places = decoding, num_slots, places
        self.attention = StaticAttention(num_slots, places, device)
        self.eos = torch.tensor(policy.eos_ids, device=device)
        length = decoding.max_completion_length
        self.last, self.lengths, self.written = (
            torch.zeros(num_slots, dtype=torch.long, device=device) for _ in range(3)
        )
        self.alive = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.ids = torch.zeros(num_slots, length, dtype=torch.long, device=device)
        self.logps, self.noise = (torch.zeros(num_slots, length, device=device) for _ in range(2))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = device.type == "cuda"

    def begin(self, slots: Sequence[int], caches: Sequence[list[tuple[Tensor, Tensor]]], noise: Tensor) -> Tensor:
        """Put new rows into free slots, by their prompts' keys and values and their noise; which slots these are."""
        self.attention.fill(slots, caches)
        which = torch.tensor(slots, device=self.last.device)
        self.lengths[which] = torch.tensor([len(cache[0][0]) for cache in caches], device=which.device)
        self.noise[which] = noise
        self.written[which] = 0
        self.alive[which] = True
        return which

    def write(self, logits: Float[Tensor, "N V"], which: Tensor | None = None) -> None:
        """Draw a token from logits for every slot, or for some, and write it down where the slot is alive."""
        which = torch.arange(self.num_slots, device=logits.device) if which is None else which
        alive, written = self.alive[which], self.written[which]
        column = written.clamp(max=self.ids.shape[1] - 1)
        token, logp = draw(logits, self.noise[which, column], self.decoding)
        self.ids[which, column] = torch.where(alive, token, self.ids[which, column])
        self.logps[which, column] = torch.where(alive, logp, self.logps[which, column])
        self.last[which] = torch.where(alive, token, self.last[which])
        self.written[which] = written + alive
        goes_on = (token[:, None] != self.eos).all(1) & (written + 1 < self.ids.shape[1])
        self.alive[which] = alive & goes_on

    def advance(self) -> None:
        """One token more for every slot that is alive."""
        if self.graph is not None:
            self.graph.replay()
            return
        self._step()  # a graph is recorded of what has run once
        if self.records:
            self.graph = self._recorded()
            self.records = self.graph is not None

    def _step(self) -> None:
        self.attention.begin(self.lengths, self.alive)
        arguments = packed_arguments(self.last[:, None], self.lengths[:, None], self.attention)
        hidden = self.decoder(**arguments).last_hidden_state
        self.lengths += self.alive
        self.write(self.head(hidden[:, 0]))

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
                self._step()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"completions are decoded without a CUDA graph, several times slower: {reason}", stacklevel=2)
            return None
        return graph


class StaticDecoder:
    """Writes the completions of some prompts, at most `num_slots` of them at once, as SharedPromptDecoder does.

    `slots`: those of the last call, used again if they fit.

    Raises:
        NotPackableError: when used, if a text may become longer than the model's attention window.
    """

    def __init__(
        self,
        policy: Policy,
        decoding: Decoding,
        prompts: Sequence[Sequence[int]],
        num_slots: int,
        slots: Slots | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.eos = frozenset(policy.eos_ids)
        self.longest = max(map(len, prompts)) + decoding.max_completion_length
        self.device = next(policy.model.parameters()).device
        fits = slots is not None and slots.num_slots == num_slots and slots.places >= self.longest
        if slots is None or not fits or slots.weights != weights_of(policy):
            room = -(-max(map(len, prompts)) // _ROOM) * _ROOM
            slots = Slots(policy, decoding, num_slots, room + decoding.max_completion_length, self.device)
        self.slots = slots
        self.computed = Prompts(policy, prompts, longest=self.longest)

    def decode(self, of_prompt: Sequence[int], noise: Float[Tensor, "N T"]) -> Iterator[dict[int, Row]]:
        """Write all rows, from their first token to their end; now and then, those that have ended since (often none)."""
        self.of_prompt, noise = of_prompt, noise.to(self.device)
        self.unwritten = Counter(of_prompt)
        self.row_of: dict[int, int] = {}  # which row is in each slot that is in use
        self.slots.alive.zero_()  # what an earlier call left when it was given up
        waiting = deque(range(len(of_prompt)))
        while waiting or self.row_of:
            free = [slot for slot in range(self.num_slots) if slot not in self.row_of]
            if waiting and (not self.row_of or len(free) * ADMIT_AT >= self.num_slots):
                self._admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))], free, noise)
            else:
                for _ in range(_STEPS_AT_ONCE):
                    self.slots.advance()
            yield self._ended()

    def _admit(self, rows: list[int], free: list[int], noise: Tensor) -> None:
        """Compute the prompts that are new, and draw each row's first token."""
        prompts = [self.of_prompt[row] for row in rows]
        self.computed.compute(prompts, self.device)
        slots = free[: len(rows)]
        self.row_of |= dict(zip(slots, rows, strict=True))
        which = self.slots.begin(slots, [self.computed.caches[prompt] for prompt in prompts], noise[rows])
        self.slots.write(torch.stack([self.computed.ends[prompt] for prompt in prompts]), which)
        self.unwritten -= Counter(prompts)
        for prompt in set(prompts) - self.unwritten.keys():  # no other row will ask for it
            self.computed.forget(prompt)

    def _ended(self) -> dict[int, Row]:
        """The rows that are written; their slots are free again."""
        alive = self.slots.alive.tolist()
        done = [slot for slot in self.row_of if not alive[slot]]
        if not done:
            return {}
        which = torch.tensor(done, device=self.device)
        made = zip(*(t[which].tolist() for t in (self.slots.ids, self.slots.logps, self.slots.written)), strict=True)
        ended = {}
        for slot, (ids, logps, length) in zip(done, made, strict=True):
            row = self.row_of.pop(slot)
            ended[row] = Row(self.of_prompt[row], ids[:length], logps[:length], ids[length - 1] in self.eos)
        return ended


def weights_of(policy: Policy) -> list[int]:
    """Where a model's weights lie; a graph computes with what is there."""
    return [parameter.data_ptr() for parameter in policy.model.parameters()]
