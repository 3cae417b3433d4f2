"""A function without arguments, recorded: on a GPU all of its kernels start as one, as a CUDA graph.

A small molecule keeps a GPU busy for some microseconds per operation, and starting the operation takes longer. A graph
is started once for all of them. It holds addresses: what the function reads and writes must stay where it is, and
nothing in it may depend on values (no `.item()`, no mask as an index, no tensor made on the host).

On other devices a recording runs the function, so that all that stands on it is the same program everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Runs before the recording: libraries make their handles in the first one, TorchScript its code in the second.
_WARM_UP = 3


class Recording(Generic[T]):
    """A recorded function.

    Args:
        function: reads and writes tensors that stay; its result, made of tensors, is written anew by every call.
        device: where its tensors are.

    Raises:
        RuntimeError: it cannot be recorded: it waits for the device, or has too little memory.
    """

    def __init__(self, function: Callable[[], T], device: torch.device) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._graph, self._result = _record(function, device)

    def __call__(self) -> T:
        """The function's result; with a graph, the same tensors every time."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


class Recordings:
    """A function of tensors, recorded for every set of shapes that comes again.

    Args:
        function: of tensors whose values alone differ between calls of one recording.
        device: where they are.
        most: recordings that are kept, those used last; each holds all memory that its function takes.
    """

    def __init__(
        self, function: Callable[[list[Tensor]], Sequence[Tensor]], device: torch.device, *, most: int = 8
    ) -> None:
        self._function, self._device, self._most = function, device, most
        self._seen: set[tuple[object, ...]] = set()
        self._kept: dict[tuple[object, ...], tuple[list[Tensor], Recording[Sequence[Tensor]]]] = {}

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """The function's results, in tensors of their own.

        Raises:
            RuntimeError: see `Recording`.
        """
        key = tuple((t.shape, t.dtype) for t in inputs)
        kept = self._kept.pop(key, None)
        if kept is None:
            if key not in self._seen:  # shapes that do not come again are not worth a recording
                self._seen.add(key)
                return list(self._function(inputs))
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            mine = [t.clone() for t in inputs]
            kept = mine, Recording(lambda: self._function(mine), self._device)
        self._kept[key] = kept  # the latest last
        _copy(inputs, kept[0])
        results = kept[1]()
        own = [torch.empty_like(t) for t in results]
        _copy(results, own)
        return own

    @property
    def n_kept(self) -> int:
        """How many recordings there are."""
        return len(self._kept)


def _copy(of: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    """All at once for each dtype: hundreds of small copies take longer to start than what they are for."""
    for dtype in {t.dtype for t in of}:
        which = [i for i, t in enumerate(of) if t.dtype == dtype]
        torch._foreach_copy_([to[i] for i in which], [of[i] for i in which])


def _record(function: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


__all__ = ["Recording", "Recordings"]
