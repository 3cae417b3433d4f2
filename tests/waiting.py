"""What makes a host wait for its device, and so cannot be part of a CUDA graph; seen on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmea_calc.fast.recorded import Recording


class Watching(TorchDispatchMode):
    """Which operations wait for the device, or bring something from the host; and the names of all."""

    WAIT = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "bincount",
        "lift_fresh",
        "is_nonzero",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.names.append(name)
        if any(name.startswith((word, "_" + word)) for word in self.WAIT):
            self.found.add(name)
        if name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            self.found.add(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


def watched_recording() -> tuple[type[Recording[Any]], list[set[str]]]:
    """A class to stand for `Recording`, and what its calls find, one entry each."""
    found: list[set[str]] = []

    class Watched(Recording[Any]):
        def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
            super().__init__(function, device)
            function()  # as before a recording: what is made once is made here

        def __call__(self) -> Any:
            with Watching() as watching:
                result = super().__call__()
            found.append(watching.found)
            return result

    return Watched, found


class Nothing(Recording[Any]):
    """What is recorded where nothing is: its results are there, and no call writes them again."""

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        super().__init__(function, device)
        self.result = function()

    def __call__(self) -> Any:
        return self.result
