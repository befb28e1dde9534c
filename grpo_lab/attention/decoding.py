"""Attention while completions are written: each prompt's keys and values stand once, each row adds its own tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grpo_lab.attention.layout import PackedBatch
from grpo_lab.attention.packed import PackedAttention, flash


class Prefill(PackedAttention):
    """Computes prompts and keeps each layer's keys and values [L, H', D]."""

    def __init__(self, packed: PackedBatch, *, longest: int) -> None:
        super().__init__(packed)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self._longest = longest

    @property
    def longest(self) -> int:
        """The most tokens that one token will see, completions included."""
        return self._longest

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        """One layer over all prompts, or the last layer for their ends."""
        self.layers.append((key[0].transpose(0, 1), value[0].transpose(0, 1)))
        return super().attend(module, query, key, value, scaling=scaling)

    def of_prompts(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values [S, H', D] of each prompt, layer by layer."""
        ends = [int(end) + 1 for end in self.packed.predicted_at]
        spans = zip([0, *ends[:-1]], ends, strict=True)
        return [[(k[start:stop], v[start:stop]) for k, v in self.layers] for start, stop in spans]


class PromptTable:
    """The prompts of some rows, side by side: keys and values [A, H', S, D] of each layer, and who reads which.

    Row r reads table entry `entry[r]`. The rows of an entry stand together in a padded layout [A, G]: `gather` [A*G]
    holds a row for each of its cells (filling reads row 0), `place` [R] the cell of each row.
    """

    def __init__(self, caches: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        lengths = [len(cache[0][0]) for cache in caches]
        self.num_entries, self.width = len(caches), max(lengths)
        self.layers = [
            tuple(_side_by_side([cache[layer][which] for cache in caches], self.width) for which in (0, 1))
            for layer in range(len(caches[0]))
        ]
        key = self.layers[0][0]
        columns = torch.arange(self.width, device=key.device)
        filling = columns >= torch.tensor(lengths, device=key.device)[:, None]
        mask = torch.zeros(filling.shape, dtype=key.dtype, device=key.device).masked_fill_(filling, -torch.inf)
        self.mask = mask[:, None, None] if min(lengths) < self.width else None
        self.seat([0])

    def seat(self, entries: Sequence[int]) -> None:
        """Say which entry each row reads."""
        members: list[list[int]] = [[] for _ in range(self.num_entries)]
        for row, entry in enumerate(entries):
            members[entry].append(row)
        self.per_entry = max(map(len, members))
        place = [0] * len(entries)
        gather = []
        for entry, rows in enumerate(members):
            for seat, row in enumerate(rows):
                place[row] = entry * self.per_entry + seat
            gather += [*rows, *[0] * (self.per_entry - len(rows))]
        device = self.layers[0][0].device
        self.gather, self.place = torch.tensor(gather, device=device), torch.tensor(place, device=device)

    def attend(self, query: Tensor, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Every row [R, H', rep, D] against its whole prompt: output [R, H', rep, D] and log-sum-exp [R, H', rep]."""
        key, value = self.layers[layer]
        heads, repeats, size = query.shape[1:]
        shape = (self.num_entries, self.per_entry, heads, repeats)
        # the queries of all rows of an entry are one matrix, so that a prompt's keys are read once for all of them
        queries = query.index_select(0, self.gather).view(*shape, size).transpose(1, 2).flatten(2, 3)
        mask = None if self.mask is None else self.mask.expand(-1, heads, queries.shape[2], -1)
        out, lse = flash(queries, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(shape[0], heads, shape[1], repeats, size).transpose(1, 2).flatten(0, 1)
        lse = lse.reshape(shape[0], heads, shape[1], repeats).transpose(1, 2).flatten(0, 1)
        return out.index_select(0, self.place), lse.index_select(0, self.place)


class DecodingAttention:
    """The attention of one decoding step after another: rows in slots, each with its prompt and its own tokens.

    The own keys and values of all slots are allocated once. `lengths[r]` is how many own tokens slot r holds.
    """

    def __init__(self, num_slots: int, max_own: int, *, longest: int) -> None:
        self.num_slots, self.max_own = num_slots, max_own
        self.longest = longest
        self.lengths: list[int] = []
        self.prompts: PromptTable | None = None
        self._own: list[tuple[Tensor, Tensor]] = []
        self._layer = 0

    def begin(self) -> None:
        """One more token for every slot: the next calls are the layers of one step."""
        self._layer = 0
        self._width = max(self.lengths) + 1
        self._uniform = min(self.lengths) + 1 == self._width
        if not self._uniform:
            self._rows = torch.arange(len(self.lengths))
            self._at = torch.tensor(self.lengths)
            beyond = torch.arange(self._width) > self._at[:, None]
            self._mask = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None]
        self.lengths = [length + 1 for length in self.lengths]

    def leave(self, slot: int) -> None:
        """A slot is free; the last one moves into its place."""
        length = self.lengths.pop()
        if slot < len(self.lengths):
            for whole in (tensor for layer in self._own for tensor in layer):
                whole[slot, :, :length] = whole[len(self.lengths), :, :length]
            self.lengths[slot] = length

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
        """One layer; query [R, H, 1, D], key and value [R, H', 1, D] to [R, 1, H, D]."""
        assert self.prompts is not None
        layer, self._layer = self._layer, self._layer + 1
        rows, heads, size = key.shape[0], key.shape[1], key.shape[3]
        if layer == len(self._own):
            shape = (self.num_slots, heads, self.max_own, size)
            self._own.append((key.new_zeros(shape), value.new_zeros(shape)))
        queries = query.reshape(rows, heads, -1, size)
        own_key, own_value = (whole[:rows] for whole in self._own[layer])
        if self._uniform:
            own_key[:, :, self._width - 1], own_value[:, :, self._width - 1] = key[:, :, 0], value[:, :, 0]
            mask = None
        else:
            own_key[self._rows, :, self._at], own_value[self._rows, :, self._at] = key[:, :, 0], value[:, :, 0]
            mask = self._mask.to(key.dtype).expand(-1, heads, queries.shape[2], -1)
        seen = slice(self._width)
        out, lse = flash(queries, own_key[:, :, seen], own_value[:, :, seen], attn_mask=mask, scale=scaling)
        of_prompt, prompt_lse = self.prompts.attend(queries, layer, scaling)
        share = torch.sigmoid(prompt_lse - lse)[..., None]  # exp(lse_1) / (exp(lse_1) + exp(lse_2))
        return torch.lerp(out, of_prompt, share.to(out.dtype)).reshape(rows, 1, -1, size)


def _side_by_side(tensors: Sequence[Tensor], width: int) -> Tensor:
    """[S, H', D] each, as [A, H', width, D] filled up on the right."""
    table = tensors[0].new_zeros(len(tensors), tensors[0].shape[1], width, tensors[0].shape[2])
    for entry, tensor in enumerate(tensors):
        table[entry, :, : len(tensor)] = tensor.transpose(0, 1)
    return table
