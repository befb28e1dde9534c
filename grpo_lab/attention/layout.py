"""Where every token of a batch goes when nothing is computed twice: one long row without padding.

All prompts come first, each once, then all completions. Which tokens see which is said by segments (runs of tokens that
see what stands before them in the run) and crossings (tokens of completions that see a whole prompt).
In the last layer only the places whose logits are needed look at anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
    layout: Layout
    last: Layout
    predicted_at: Int[Tensor, "R"]
    logits_row: Int[Tensor, "K"]
    longest: int

    @classmethod
    def of(cls, batch: Batch) -> "PackedBatch":
        """Lay out a batch. Rows without a token are left out, and prompts that no row with tokens answers."""
        device = batch.completion_ids.device
        lengths = batch.completion_mask.sum(1).tolist()
        of_prompt = batch.prompt_index.tolist()
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(of_prompt):
            if lengths[row] > 0:
                rows_of.setdefault(prompt, []).append(row)
        answered = torch.zeros(len(batch.prompt_mask), dtype=torch.bool, device=device)
        answered[list(rows_of)] = True
        prompt_mask = batch.prompt_mask & answered[:, None]
        prompts = prompt_mask.sum(1).tolist()
        prompt_starts = _starts(prompts)
        row_starts = [prompt_starts[-1] + start for start in _starts(lengths)]

        runs: list[list[range]] = []
        shared: list[range] = []
        crossings, logits_row, predicted_at = [], [0] * sum(lengths), []
        for prompt, rows in rows_of.items():
            own = range(prompt_starts[prompt], prompt_starts[prompt + 1])
            if len(rows) == 1:  # nothing is shared: the prompt and its only completion are one run
                runs.append([own, range(row_starts[rows[0]], row_starts[rows[0] + 1])])
            else:
                shared.append(own)
                runs += [[range(row_starts[row], row_starts[row + 1])] for row in rows]
                crossings += [
                    Crossing(slice(row_starts[a], row_starts[b + 1]), slice(own.start, own.stop))
                    for a, b in _without_gaps(rows)
                ]
            predicted_at.append(own.stop - 1)
            first = len(predicted_at) - 1
            for row in rows:
                start = row_starts[row] - prompt_starts[-1]
                logits_row[start] = first
                logits_row[start + 1 : start + lengths[row]] = range(
                    len(predicted_at), len(predicted_at) + lengths[row] - 1
                )
                predicted_at += range(row_starts[row], row_starts[row + 1] - 1)
        positions = [*_ramps([0] * len(prompts), prompts), *_ramps([prompts[p] for p in of_prompt], lengths)]
        return cls(
            ids=torch.cat([batch.prompt_ids[prompt_mask], batch.completion_ids[batch.completion_mask]]),
            positions=torch.tensor(positions, device=device),
            layout=Layout.of([*runs, *([own] for own in shared)], crossings, row_starts[-1], device),
            last=_ends_only(runs, shared, crossings, row_starts[-1], device),
            predicted_at=torch.tensor(predicted_at, device=device),
            logits_row=torch.tensor(logits_row, device=device),
            longest=max((prompts[p] + n for p, n in zip(of_prompt, lengths, strict=True)), default=0),
        )


def packed_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> PackedBatch:
    """Prompts alone, one after the other; the logits that are needed are those of their ends."""
    lengths = [len(prompt) for prompt in prompts]
    starts = _starts(lengths)
    runs = [range(start, stop) for start, stop in pairwise(starts)]
    return PackedBatch(
        ids=torch.tensor([token for prompt in prompts for token in prompt], device=device),
        positions=torch.tensor(_ramps([0] * len(prompts), lengths), device=device),
        layout=Layout.of([[run] for run in runs], [], starts[-1], device),
        last=_ends_only([], runs, [], starts[-1], device),
        predicted_at=torch.tensor([stop - 1 for stop in starts[1:]], device=device),
        logits_row=torch.arange(len(prompts), device=device),
        longest=max(lengths),
    )


def spread(values: Float[Tensor, "K"], batch: Batch) -> Float[Tensor, "N T"]:
    """Values of completion tokens back in rows and columns, 0 where there is no token."""
    empty = values.new_zeros(batch.completion_mask.shape)
    return empty.masked_scatter(batch.completion_mask, values)


def _ends_only(
    runs: Sequence[Sequence[range]],
    prompts: Sequence[range],
    crossings: Sequence[Crossing],
    length: int,
    device: torch.device,
) -> Layout:
    """The layout in which of some prompts only the last token looks: at itself, and at the others as a completion does."""
    ends = [Crossing(slice(own.stop - 1, own.stop), slice(own.start, own.stop - 1)) for own in prompts if len(own) > 1]
    return Layout.of([*runs, *([own[-1:]] for own in prompts)], [*crossings, *ends], length, device)


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _ramps(starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]


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
