"""Is a potential sound? Stability in a temperature ramp, short-range walls, forgetting, conservation of energy.

    report = check(potential, atoms)
    report.passed, report.failures

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import check
    from .report import CheckReport

_MODULES = {"CheckReport": "report", "check": "measure"}

__all__ = ["CheckReport", "check"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
