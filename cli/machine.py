"""The machine that a command runs on: its threads, and what else keeps it busy."""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads in this process; its own choice if None."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def warn_if_busy(device: str) -> None:
    """Say so where other programs leave too few cores: threads that wait for each other take many times longer."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return
    threads, cores, busy = torch.get_num_threads(), n_cores(), load()
    free = max(1, int(cores - busy + 0.5))
    if busy >= 0.5 and threads > free:
        typer.echo(
            f"note: other programs keep {busy:.1f} of {cores} cores busy, and this one uses {threads} threads, which "
            f"will wait for each other and may take many times longer: mmea --threads {free} ... avoids it",
            err=True,
        )


def n_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def load() -> float:
    """How many cores others keep busy at present, while this process sleeps for a moment; 0 where none can tell."""
    try:
        before = _ticks()
        time.sleep(_MOMENT)
        after = _ticks()
    except (OSError, ValueError, IndexError):  # only Linux tells
        return 0.0
    spent = [b - a for a, b in zip(before, after, strict=True)]
    idle, total = sum(spent[_IDLE]), sum(spent)
    return n_cores() * (1 - idle / total) if total > 0 else 0.0


_MOMENT = 0.25  # s
_IDLE = slice(3, 5)  # idle, and waiting for disks


def _ticks() -> list[int]:
    """Time that all cores together have spent in each state since the start: user, nice, system, idle, iowait, ..."""
    return [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
