"""How much memory a call needs, and how much there is: on a CPU as Linux tells, on a GPU as torch does."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]

_UNTIL_RECORDED = 6  # calls


def peak_memory(make: Callable[..., tuple[Call, torch.device]], *args: Any) -> float | None:
    """MB that a call needs beyond what is in use before it, measured in a process of its own.

    Args:
        make: a function of a module, called with `args` in that process; gives the call, made ready, and its device.

    Returns:
        None where the system does not tell: on a CPU only Linux does.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, make, args, torch.get_num_threads()).result()


def _peak(make: Callable[..., tuple[Call, torch.device]], args: tuple[Any, ...], threads: int) -> float | None:
    torch.set_num_threads(threads)
    call, device = make(*args)
    if device.type == "cuda":
        # Reserved, not allocated: a recorded call uses memory that its recording set aside, and allocates nothing.
        before = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(_UNTIL_RECORDED):
            call()
        return (torch.cuda.max_memory_reserved(device) - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        resident = _kilobytes("/proc/self/status", "VmRSS")
        call()
        return (_kilobytes("/proc/self/status", "VmHWM") - resident) / 1e3
    except OSError:
        return None


def free_memory(device: torch.device) -> float | None:
    """MB that a process may still take, without swapping on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, for later
        return (torch.cuda.mem_get_info(device)[0] + kept) / 1e6
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable") / 1e3
    except OSError:
        return None


def _kilobytes(file: str, key: str) -> float:
    lines = Path(file).read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


__all__ = ["free_memory", "peak_memory"]
