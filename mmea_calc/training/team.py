"""Several processes that train one adapter together, or one process alone, behind the same few calls.

torchrun (or `mmea finetune --devices`) starts the processes and tells each its place through the variables of
torch's own `env://` rendezvous; `joined` takes them up. Between processes go sums of gradients, and small objects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import MMEAError, TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
# A process that waits longer than this for another takes it for dead. Between two exchanges lies one step of training,
# a validation, or the reading of data by the first process.
PATIENCE = timedelta(hours=1)


class TeamEndedError(MMEAError):
    """Another process of this training has ended; it has said why, if it could."""


class Team:
    """One process alone: sums are what they are, and it is the first of one.

    Attributes:
        rank: number of this process; 0 is the first, which alone writes files and reports.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`: every `size`-th one, so that shares differ by one item at most."""
        return list(items[self.rank :: self.size])

    def sum(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all processes; the same bits everywhere."""

    def lowest(self, tensor: Tensor) -> None:
        """Replace every entry by the lowest of all processes."""

    def highest(self, tensor: Tensor) -> None:
        """Replace every entry by the highest of all processes."""

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order, everywhere."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, everywhere; the others do not call it."""
        return make()

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` with those of the first process."""

    def claim(self) -> bool:
        """Whether this process is the first to ask: the one that tells the user why all of them end."""
        return True


SOLO = Team()


class Processes(Team):
    """The processes of torch.distributed's default group.

    Args:
        rank, size: place of this process.
        store: shared by all, and alive as long as whoever started them.

    Raises:
        TeamEndedError: by every exchange, when another process has ended.
    """

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank, self.size, self._store = rank, size, store

    def sum(self, tensor: Tensor) -> None:
        self._reduce(tensor, torch.distributed.ReduceOp.SUM)

    def lowest(self, tensor: Tensor) -> None:
        self._reduce(tensor, torch.distributed.ReduceOp.MIN)

    def highest(self, tensor: Tensor) -> None:
        self._reduce(tensor, torch.distributed.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _exchange():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        value = [make() if self.leads else None]
        with _exchange():
            torch.distributed.broadcast_object_list(value, src=0)
        return value[0]  # type: ignore[return-value]

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        with _exchange(), torch.no_grad():
            for tensor in tensors:
                values = tensor.detach().contiguous()
                torch.distributed.broadcast(values, src=0)
                tensor.copy_(values)

    def claim(self) -> bool:
        try:
            return self._store.add("explained", 1) == 1
        except RuntimeError:
            return False  # whoever kept the store has ended

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        with _exchange():
            torch.distributed.all_reduce(tensor, op=operation)


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:  # what gloo and nccl raise for a connection that is gone, with many texts
        reason = " ".join(str(problem).split())
        raise TeamEndedError(f"another process of this training has ended ({reason})") from problem


def launched() -> bool:
    """Whether torchrun, or something that acts as it does, started this process."""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


@contextmanager
def joined(device: str) -> Iterator[tuple[Team, str]]:
    """Within this context: this process among those that torchrun started, and the device it is to use.

    Args:
        device: "auto", "cpu" or "cuda"; with CUDA every process takes the GPU of its number on its machine. Gradients
            are exchanged by gloo on CPUs and by nccl on GPUs.

    Raises:
        TrainingError: a machine has fewer GPUs than processes, or one GPU was named for all.
    """
    import torch.distributed as dist

    store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    own = own_device(device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    store = dist.PrefixStore("mmea", store)
    if size == 1:
        yield SOLO, own
        return
    backend = "gloo"
    if own.startswith("cuda"):
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        team = Processes(rank, size, store)
        # A process may be connected while another still waits for it, where its end would be an error of torch's own.
        team.gather(rank)
        yield team, own
    finally:
        dist.destroy_process_group()


def own_device(device: str, local_rank: int, local_size: int) -> str:
    """The device of the process `local_rank` out of `local_size` on a machine. Raises TrainingError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or local_size == 1:
        return "cuda:0" if device == "cuda" else device  # torch wants a number
    if device != "cuda":
        raise TrainingError(f"{local_size} processes cannot share the device {device!r}: expected cpu, cuda or auto")
    if (found := torch.cuda.device_count()) < local_size:
        raise TrainingError(
            f"{local_size} processes need as many GPUs on this machine, found {found}: start fewer, or give "
            "--device cpu"
        )
    return f"cuda:{local_rank}"


__all__ = ["SOLO", "Processes", "Team", "TeamEndedError", "joined", "launched", "own_device"]
