"""A function without arguments, recorded: on a GPU all of its kernels start as one, as a CUDA graph.

A small molecule keeps a GPU busy for some microseconds per operation, and starting the operation takes longer. A graph
is started once for all of them. It holds addresses: what the function reads and writes must stay where it is, and
nothing in it may depend on values (no `.item()`, no mask as an index, no tensor made on the host).

On other devices a recording runs the function, so that all that stands on it is the same program everywhere.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Runs before the recording: libraries make their handles in the first one, TorchScript its code in the second.
_WARM_UP = 3
_ONE_AT_A_TIME = threading.Lock()  # torch allows no two recordings at once in a process
# Streams, by device and handle, of the recordings there are. torch hands out 32 in turns, and closing a recording takes
# the workspace of matrix products from all that were made on its stream: each has one of its own.
_STREAMS, _TAKEN = 32, set[tuple[int, int]]()

# Of `Recordings`: a recording takes as long as some five calls, and is not made before shapes have come so often ...
_SIGHTINGS = 3
# ... nor in the place of another one while those that were made have been called less often than this, each.
_WORTH = 10
_REMEMBERED = 1000  # shapes
# Largest difference of a recording's result from the function's own, over its norm.
_TOLERANCE = 1e-3


class Recording(Generic[T]):
    """A recorded function.

    Args:
        function: reads and writes tensors that stay; its result, made of tensors, is written anew by every call.
        device: where its tensors are.

    Raises:
        RuntimeError: it cannot be recorded: it waits for the device, or has too little memory.
    """

    def __init__(self, function: Callable[[], T], device: torch.device) -> None:
        self._function: Callable[[], T] | None = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T | None = None
        if device.type == "cuda":
            stream = _free_stream(device)
            self._give_back = weakref.finalize(self, _TAKEN.discard, _key(stream))
            try:
                self._graph, self._result = _record(function, device, stream)
            except BaseException:
                self._give_back()
                raise

    def __call__(self) -> T:
        """The function's result; with a graph, the same tensors every time."""
        assert self._function is not None  # not closed
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result  # type: ignore[return-value]  # T may be None

    def close(self) -> None:
        """Give all memory back: what a graph holds stands in circles of references, which would keep it for long."""
        if self._graph is not None:
            self._graph.reset()
            self._give_back()
        self._function = self._graph = self._result = None


class Recordings:
    """A function of tensors, recorded for every set of shapes that comes again and again.

    Args:
        function: of tensors whose values alone differ between calls of one recording.
        device: where they are.
        most: recordings that are kept, those used last; each holds all memory that its function takes.
    """

    def __init__(
        self, function: Callable[[list[Tensor]], Sequence[Tensor]], device: torch.device, *, most: int = 8
    ) -> None:
        self._function, self._device, self._most = function, device, most
        self._seen: dict[tuple[object, ...], int] = {}
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self._n_made, self._n_calls = 0, 0

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """The function's results, in tensors of their own.

        Raises:
            RuntimeError: see `Recording`; or the first results of a recording are not those of the function.
        """
        key = tuple((t.shape, t.dtype) for t in inputs)
        kept = self._kept.pop(key, None)
        if kept is None:
            found = list(self._function(inputs))
            if self._is_worth_it(key):
                self._make(key, inputs)
            return found
        self._kept[key] = kept  # the latest last
        _copy(inputs, kept.inputs)
        results = kept.recording()
        if not kept.proven:
            # By other values than those that it was recorded with: with those, doing nothing agrees as well.
            _compare(results, self._function(inputs))
            kept.proven = True
        self._n_calls += 1
        own = [torch.empty_like(t) for t in results]
        _copy(results, own)
        return own

    def _is_worth_it(self, key: tuple[object, ...]) -> bool:
        times = self._seen.pop(key, 0) + 1
        self._seen[key] = times
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if times < _SIGHTINGS:
            return False
        return len(self._kept) < self._most or self._n_calls >= _WORTH * self._n_made

    def _make(self, key: tuple[object, ...], inputs: list[Tensor]) -> None:
        while len(self._kept) >= self._most:
            self._kept.pop(next(iter(self._kept))).recording.close()
        mine = [t.clone() for t in inputs]
        self._kept[key] = _Kept(mine, Recording(lambda: self._function(mine), self._device))
        self._n_made += 1

    def close(self) -> None:
        """Give the memory of all recordings back."""
        while self._kept:
            self._kept.popitem()[1].recording.close()

    @property
    def n_kept(self) -> int:
        """How many recordings there are."""
        return len(self._kept)


class _Kept:
    """A recording, the tensors that it reads, and whether its results were compared."""

    def __init__(self, inputs: list[Tensor], recording: Recording[Sequence[Tensor]]) -> None:
        self.inputs, self.recording, self.proven = inputs, recording, False


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless these are the same, tensor by tensor, as far as rounding allows."""
    sizes = [float(t.double().norm()) for t in expected]
    rounding = 0.01 * max(sizes, default=0.0)  # small ones carry that of the large ones
    for one, other, size in zip(found, expected, sizes, strict=True):
        apart = float((one.double() - other.double()).norm())
        if not apart <= _TOLERANCE * max(size, rounding):
            raise RuntimeError(f"what is recorded gives other results, by {apart:.2g} where they are {size:.2g}")


def _copy(of: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    """All at once for each dtype: hundreds of small copies take longer to start than what they are for."""
    for dtype in {t.dtype for t in of}:
        which = [i for i, t in enumerate(of) if t.dtype == dtype]
        torch._foreach_copy_([to[i] for i in which], [of[i] for i in which])


def _free_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other recording has, from now on taken. Raises RuntimeError where there is none."""
    for forgotten in (False, True):
        if forgotten:
            gc.collect()  # recordings that nobody can reach any more
        with _ONE_AT_A_TIME:
            for _ in range(_STREAMS):
                stream = torch.cuda.Stream(device)
                if _key(stream) not in _TAKEN:
                    _TAKEN.add(_key(stream))
                    return stream
    raise RuntimeError(f"{_STREAMS} recordings are kept already, as many as torch has streams")


def _key(stream: torch.cuda.Stream) -> tuple[int, int]:
    return stream.device_index, stream.cuda_stream


def _record(
    function: Callable[[], T], device: torch.device, aside: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, T]:
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        aside.wait_stream(before)
        # A graph's own context does not leave its stream where ending the recording fails; this one does.
        try:
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP - 1):
                    function()
                _run_without_waiting(function)
                graph = torch.cuda.CUDAGraph()
                # The stream that torch takes by itself is one of the first device that anything was recorded on.
                with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                    result = function()
        finally:
            before.wait_stream(aside)  # where it failed too: what it wrote may still be on its way
    return graph, result


def _run_without_waiting(function: Callable[[], object]) -> None:
    """Run it once; RuntimeError where it waits for the device, which within a recording would leave that half made."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype, once; an error it must not become
            torch.cuda.set_sync_debug_mode("error")
        function()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


__all__ = ["Recording", "Recordings"]
