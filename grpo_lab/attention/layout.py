"""Where every token of a batch goes when nothing is computed twice: one long row without padding.

All prompts come first, each once, then all completions. Which tokens see which is said by segments (runs of tokens that
see what stands before them in the run) and crossings (tokens of completions that see a whole prompt).
In the last layer only the places whose logits are needed look at anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_lab.attention.interface import NotPackableError
from grpo_lab.attention.varlen import Runs, VarlenLayout
from grpo_lab.types import Batch

# A table takes runs down to this share of its longest one, less a few tokens: a call costs as much as some filling.
_SIMILAR, _FEW = 0.75, 4


@dataclass(frozen=True)
class Crossing:
    """The completions of one prompt, places `rows`, see all of the prompt, places `prompt`; both without gaps."""

    rows: slice
    prompt: slice


@dataclass(frozen=True)
class Layout:
    """Which tokens see which. Each that looks at something is in one segment.

    Segments of similar length are the rows of one table, filled up on the right; `shapes` holds each table's rows and
    columns. `places` [BW] says of all entries of all tables, one after the other, where each stands in the long row, 0
    for filling, and `entries` [L] where in the tables each token stands, BW if it is in none of them. Crossings are in
    bundles: in each the rows follow one another without gaps, and so do the prompts.
    """

    shapes: tuple[tuple[int, int], ...]
    places: Int[Tensor, "BW"]
    filling: Bool[Tensor, "BW"]
    entries: Int[Tensor, "L"]
    crossings: tuple[tuple[Crossing, ...], ...]

    @classmethod
    def of(
        cls, runs: Sequence[Sequence[range]], crossings: Sequence[Crossing], length: int, device: torch.device
    ) -> "Layout":
        """The layout of runs, each made of some ranges, in a long row of this length."""
        tables = _tables(runs)
        shapes = tuple((len(table), len(table[0])) for table in tables)
        places = [
            place
            for table, (_, width) in zip(tables, shapes, strict=True)
            for run in table
            for place in (*run, *[-1] * (width - len(run)))
        ]
        entries = [len(places)] * length
        for entry, place in enumerate(places):
            if place >= 0:
                entries[place] = entry
        table = torch.tensor(places, dtype=torch.long, device=device)
        return cls(shapes, table.clamp(min=0), table < 0, torch.tensor(entries, device=device), _bundles(crossings))


@dataclass(frozen=True)
class PackedBatch:
    """A batch as one row of L tokens, and which of its K completion tokens is predicted at which place.

    `predicted_at` [R] are the places whose logits are needed, each once: the end of a prompt serves the first token of
    all its completions. Completion token k (in the order of `batch.completion_ids[batch.completion_mask]`) is predicted
    by logits row `logits_row[k]`. `last` is the layout of the last layer, `layout` that of the others.
    """

    ids: Int[Tensor, "L"]
    positions: Int[Tensor, "L"]
    layout: Layout | VarlenLayout
    last: Layout | VarlenLayout
    predicted_at: Int[Tensor, "R"]
    logits_row: Int[Tensor, "K"]
    longest: int

    @classmethod
    def of(cls, batch: Batch) -> "PackedBatch":
        """Lay out a batch. Rows without a token are left out, and prompts that no row with tokens answers.

        Raises:
            NotPackableError: on a GPU, if rows are not in the order of their prompts.
        """
        mask, index = batch.completion_mask, batch.prompt_index
        lengths = mask.sum(1)
        answered = torch.zeros(len(batch.prompt_mask), dtype=torch.bool, device=mask.device)
        answered[index[lengths > 0]] = True
        prompt_mask = batch.prompt_mask & answered[:, None]
        prompts = prompt_mask.sum(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        # a completion's token is predicted where the one before it stands, its first one at the prompt's end
        place = mask.flatten().cumsum(0).view_as(mask) - 1 + prompts.sum()
        predicted_at = torch.cat([(prompts.cumsum(0) - 1)[answered], place[:, :-1][mask[:, 1:]]])
        logits_row = (mask & (columns > 0)).flatten().cumsum(0).view_as(mask) - 1 + answered.sum()
        logits_row[:, 0] = (answered.cumsum(0) - 1)[index]
        layout, last = _layouts(prompts.tolist(), index.tolist(), lengths.tolist(), mask.device)
        return cls(
            ids=torch.cat([batch.prompt_ids[prompt_mask], batch.completion_ids[mask]]),
            positions=torch.cat([(prompt_mask.cumsum(1) - 1)[prompt_mask], (prompts[index][:, None] + columns)[mask]]),
            layout=layout,
            last=last,
            predicted_at=predicted_at,
            logits_row=logits_row[mask],
            longest=int((prompts[index] + lengths).max()),
        )


def packed_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> PackedBatch:
    """Prompts alone, one after the other; the logits that are needed are those of their ends."""
    lengths = [len(prompt) for prompt in prompts]
    layout, last = _layouts(lengths, [], [], device)
    return PackedBatch(
        ids=torch.tensor([token for prompt in prompts for token in prompt], device=device),
        positions=torch.cat([torch.arange(length, device=device) for length in lengths]),
        layout=layout,
        last=last,
        predicted_at=torch.tensor(lengths, device=device).cumsum(0) - 1,
        logits_row=torch.arange(len(prompts), device=device),
        longest=max(lengths),
    )


def spread(values: Float[Tensor, "K"], batch: Batch) -> Float[Tensor, "N T"]:
    """Values of completion tokens back in rows and columns, 0 where there is no token."""
    empty = values.new_zeros(batch.completion_mask.shape)
    return empty.masked_scatter(batch.completion_mask, values)


def on_gpu(device: torch.device) -> bool:
    """Whether attention is laid out for a GPU's kernel there, and not for the CPU's."""
    return device.type == "cuda"


def _layouts(
    prompts: Sequence[int], of_prompt: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[Layout, Layout] | tuple[VarlenLayout, VarlenLayout]:
    """The layout of all layers but the last one, and that of the last one.

    `prompts`: how long each prompt is, 0 for one that is left out; `lengths`: how long each row is, which answers prompt
    `of_prompt`.
    """
    if not on_gpu(device):
        return _tabled(prompts, of_prompt, lengths, device)
    rows = [prompt for prompt, length in zip(of_prompt, lengths, strict=True) if length]
    if rows != sorted(rows):
        raise NotPackableError("rows are not in the order of their prompts")
    answers = [0] * len(prompts)
    for prompt, length in zip(of_prompt, lengths, strict=True):
        answers[prompt] += length
    varlen = VarlenLayout(
        num_prompt_tokens=sum(prompts),
        own=Runs.of([*prompts, *lengths], device),
        prompts=Runs.of(prompts, device),
        answers=Runs.of(answers, device),
    )
    return varlen, varlen  # a prompt's attention in one layer costs less than another call


def _tabled(
    prompts: Sequence[int], of_prompt: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[Layout, Layout]:
    prompt_starts = _starts(prompts)
    row_starts = [prompt_starts[-1] + start for start in _starts(lengths)]
    rows_of: dict[int, list[int]] = {}
    for row, prompt in enumerate(of_prompt):
        if lengths[row] > 0:
            rows_of.setdefault(prompt, []).append(row)
    runs: list[list[range]] = []
    shared: list[range] = []
    crossings = []
    for prompt, length in enumerate(prompts):
        rows = rows_of.get(prompt, [])
        own = range(prompt_starts[prompt], prompt_starts[prompt + 1])
        if len(rows) == 1:  # nothing is shared: the prompt and its only completion are one run
            runs.append([own, range(row_starts[rows[0]], row_starts[rows[0] + 1])])
        elif length:
            shared.append(own)
            runs += [[range(row_starts[row], row_starts[row + 1])] for row in rows]
            crossings += [
                Crossing(slice(row_starts[a], row_starts[b + 1]), slice(own.start, own.stop))
                for a, b in _without_gaps(rows)
            ]
    # in the last layer only the end of a prompt looks, at itself, and at the others as a completion does
    ends = [Crossing(slice(own.stop - 1, own.stop), slice(own.start, own.stop - 1)) for own in shared if len(own) > 1]
    length = row_starts[-1]
    return (
        Layout.of([*runs, *([own] for own in shared)], crossings, length, device),
        Layout.of([*runs, *([own[-1:]] for own in shared)], [*crossings, *ends], length, device),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _without_gaps(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring rows as (first, last): [3, 4, 5, 8] -> [(3, 5), (8, 8)]."""
    spans: list[tuple[int, int]] = []
    for row in rows:
        if spans and spans[-1][1] == row - 1:
            spans[-1] = (spans[-1][0], row)
        else:
            spans.append((row, row))
    return spans


def _bundles(crossings: Sequence[Crossing]) -> tuple[tuple[Crossing, ...], ...]:
    bundles: list[list[Crossing]] = []
    for crossing in crossings:
        last = bundles[-1][-1] if bundles else crossing
        if (last.rows.stop, last.prompt.stop) != (crossing.rows.start, crossing.prompt.start):
            bundles.append([])
        bundles[-1].append(crossing)
    return tuple(map(tuple, bundles))


def _tables(runs: Sequence[Sequence[range]]) -> list[list[list[int]]]:
    """Runs in tables of similar length, so that little is filling."""
    places = sorted(([place for part in run for place in part] for run in runs), key=len, reverse=True)
    tables: list[list[list[int]]] = []
    for run in places:
        if not tables or len(run) < _SIMILAR * len(tables[-1][0]) - _FEW:
            tables.append([])
        tables[-1].append(run)
    return tables
