"""The loss and gradient of one batch worked out by several real processes, each with some of its groups.

What this shows is that the native engine's loss is a sum over rows whose weights come from the whole step: each process
takes its groups with those weights, and the shares are added up by torch.distributed (gloo). How training itself is
shared out is in distributed/.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

from grpo_lab.compare.native_readout import direct
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Batch, Policy

LOSS = "loss"


def over_processes(policy: Policy, batch: Batch, stage: GrpoStage, count: int) -> tuple[float, dict[str, Tensor]]:
    """The sum of what `count` new processes find on consecutive runs of whole groups, the last run taking what is left."""
    groups = batch.prompt_ids.shape[0]
    size = batch.num_rows // groups
    cuts = [groups * rank // count * size for rank in range(count + 1)]
    shares = [batch.rows(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        multiprocessing.start_processes(  # type: ignore[attr-defined]
            work, args=(policy.model, shares, stage, folder), nprocs=count, start_method="spawn"
        )
        found = load_file(folder / "sum.safetensors")
    loss = float(found.pop(LOSS))
    return loss, found


def work(rank: int, model: torch.nn.Module, shares: list[Batch], stage: GrpoStage, folder: Path) -> None:
    """One process: its own share, then the sum over all, which the first one writes down."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=len(shares)
    )
    loss, gradients = direct(model, shares[rank], stage)
    total = {LOSS: torch.tensor(loss, dtype=torch.float64), **gradients}
    for tensor in total.values():
        distributed.all_reduce(tensor)
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in total.items()}, folder / "sum.safetensors")
    distributed.destroy_process_group()
