"""Who this process is among those that train together, and the few things that they tell each other."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from grpo_lab.errors import GrpoLabError, SetupError, StopRequested

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # one process may sample or score for long; one that ends closes its connections at once
LARGEST_BUCKET = 2**25  # elements that are added up over processes in one message


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`. Alone, every method gives back what it got and costs nothing.

    What says "all processes" must be called by all of them, in the same order.
    """

    rank: int = 0
    world: int = 1
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things are this process's.

        >>> [Ranks(rank, 3).share(4) for rank in range(3)]
        [slice(0, 1, None), slice(1, 2, None), slice(2, 4, None)]
        """
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def gather(self, value: T) -> list[T]:
        """All processes' values, in the order of their ranks, for all processes."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all processes; the others only wait for it."""
        made = [make() if self.is_first else None]
        if self.world > 1:
            distributed.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over all processes, in place. Tensors of one type travel together."""
        if self.world == 1:
            return
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def refuse_differences(self, what: str, fingerprint: Any) -> None:
        """All processes must have come to the same.

        Raises:
            SetupError: they have not.
        """
        everyone = self.gather(fingerprint)
        differ = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if differ:
            raise SetupError(f"process {differ[0]} has another {what} than process 0; all must have the same")


ALONE = Ranks()


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type and device, each small enough for one message."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        same = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (same and sum(each.numel() for each in bucket) + tensor.numel() <= LARGEST_BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def joined(strategy: str = "ddp") -> Iterator[Ranks]:
    """This process's place among those that torchrun, `accelerate launch` or `--nproc` started; alone without them.

    When one process fails all end, with its exit code, and only the first to fail says why: in the others the error that
    follows from it (a closed connection, or the same mistake found again) becomes a SystemExit.
    """
    _refuse_settings(strategy)
    ranks = _join()
    try:
        yield ranks
    except BaseException as error:
        if isinstance(error, StopRequested):  # all stop here; nobody ends the others before the run's folder is closed
            with suppress(RuntimeError):
                ranks.wait()
        code = _failed_before(ranks, error)
        if code is not None:
            raise SystemExit(code) from None
        if _lost_a_process(error):
            raise SetupError(
                "another process of this run ended without saying why (killed, out of memory?); --resume goes on from the "
                "newest checkpoint"
            ) from error
        raise
    finally:
        if ranks.world > 1:
            distributed.destroy_process_group()


def _refuse_settings(strategy: str) -> None:
    """What `accelerate launch` sets of its own would change a run behind the recipe's back."""

    def is_set(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true")

    if is_set("ACCELERATE_USE_FSDP"):
        raise SetupError(
            "ACCELERATE_USE_FSDP is set: accelerate's own FSDP (which it leaves out on a CPU without a word) is not used; "
            "set distributed: {strategy: fsdp2} in the recipe instead"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise SetupError("accelerate's mixed_precision would not reach the model; set model.dtype in the recipe")
    if is_set("ACCELERATE_USE_DEEPSPEED") != (strategy == "deepspeed"):
        if strategy != "deepspeed":
            raise SetupError(
                "ACCELERATE_USE_DEEPSPEED is set; the recipe must say so, too: distributed: {strategy: deepspeed}"
            )
        raise SetupError(
            "distributed.strategy: deepspeed takes its settings from accelerate; choose DeepSpeed in `accelerate config` and "
            "start with `accelerate launch -m grpo_lab train ...`"
        )
    if is_set("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
        raise SetupError("accelerate's zero3_init_flag would tear apart the whole model that samples; set it to false")
    if strategy == "deepspeed":
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"  # not set, it is true where the stage is 3
    if strategy == "deepspeed" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise SetupError("distributed.strategy: deepspeed shares weights over processes, and there is only one")


def _join() -> Ranks:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world = next(distributed.rendezvous("env://", timeout=PATIENCE))
    except ValueError as error:
        raise SetupError(f"WORLD_SIZE is set, as by torchrun, but: {error}") from error
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    return Ranks(rank, world, store)


def _failed_before(ranks: Ranks, error: BaseException) -> int | None:
    """The exit code of the process that failed before this one, None if this is the first to fail."""
    if ranks.world == 1 or isinstance(error, SystemExit):
        return None
    code = error.exit_code if isinstance(error, GrpoLabError) else 130 if isinstance(error, KeyboardInterrupt) else 70
    mine = f"{ranks.rank}:{code}"
    try:
        first = ranks.store.compare_set("failed", "", mine).decode()
    except (RuntimeError, OSError):  # whoever kept the store has ended, and has said why
        return SetupError.exit_code
    return None if first == mine else int(first.partition(":")[2])


def _lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because a peer is gone; torch has no error of its own for that."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("closed by peer" in text or "connection reset" in text)
