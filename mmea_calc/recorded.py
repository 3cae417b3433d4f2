"""A function without arguments, recorded: on a GPU all of its kernels start as one, as a CUDA graph.

A small molecule keeps a GPU busy for some microseconds per operation, and starting the operation takes longer. A graph
is started once for all of them. It holds addresses: what the function reads and writes must stay where it is, and
nothing in it may depend on values (no `.item()`, no mask as an index, no tensor made on the host).

On other devices a recording runs the function, so that all that stands on it is the same program everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

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


__all__ = ["Recording"]
