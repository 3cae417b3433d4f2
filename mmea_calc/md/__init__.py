"""Molecular dynamics: many replicas as one batch, restartable, watched.

    run_md(potential, atoms, "RUN", MDConfig(temperatures_K=(300, 600, 1200), replicas=4))

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import MDProgress, run_md
    from .simulation import Simulation
    from .stability import open_potential, quick_check

_MODULES = {
    "MDProgress": "run",
    "Simulation": "simulation",
    "open_potential": "stability",
    "quick_check": "stability",
    "run_md": "run",
}

__all__ = ["MDProgress", "Simulation", "open_potential", "quick_check", "run_md"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
