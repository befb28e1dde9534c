"""How a step's rows are dealt to processes: whole groups, about as many tokens for each, and every row to exactly one."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from grpo_lab.distributed.ranks import Ranks
from grpo_lab.types import Batch


def cuts(sizes: Sequence[int], count: int) -> list[int]:
    """Where to cut a row of things into `count` runs of about equal size; a run may be empty. `count` + 1 places.

    A thing belongs to the run in which its middle lies.

    >>> cuts([1, 1, 2, 8, 4], 2), cuts([5], 2)
    ([0, 4, 5], [0, 1, 1])
    """
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    inner = [sum(middle <= sum(sizes) * run / count for middle in middles) for run in range(1, count)]
    return [0, *inner, len(sizes)]


def own_rows(batch: Batch, ranks: Ranks) -> tuple[int, int]:
    """The rows of this process, as (start, stop): whole groups, dealt by their tokens; equal for none."""
    if ranks.world == 1:
        return 0, batch.num_rows
    answers = batch.completion_mask.sum(1).tolist()
    prompts = batch.prompt_mask.sum(1)[batch.prompt_index].tolist()
    groups = batch.groups()
    places = cuts([sum(answers[start:stop]) + prompts[start] for start, stop in groups], ranks.world)
    bounds = [start for start, _ in groups] + [batch.num_rows]
    return bounds[places[ranks.rank]], bounds[places[ranks.rank + 1]]


def by_all(batch: Batch, ranks: Ranks, compute: Callable[[Batch], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `compute` makes of the batch, tensors [N, T]: each process does its own rows, and all get all of them."""
    if ranks.world == 1:
        return compute(batch)
    start, stop = own_rows(batch, ranks)
    own = [tensor.cpu() for tensor in compute(batch.rows(start, stop))] if start < stop else None
    parts = [part for part in ranks.gather(own) if part is not None]
    width, device = batch.completion_ids.shape[1], batch.completion_ids.device
    return [
        torch.cat([nn.functional.pad(rows, (0, width - rows.shape[1])) for rows in rows_of]).to(device)
        for rows_of in zip(*parts, strict=True)
    ]
