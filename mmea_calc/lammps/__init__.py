"""LAMMPS with the potentials of this package, on two ways.

| | for | needs |
|---|---|---|
| `export_mliap`, `read_mliap` | many GPUs: `pair_style mliap unified` | LAMMPS with ML-IAP, Python and Kokkos |
| `start_lammps`, `LammpsRun` | the rest of LAMMPS in one process: `fix external` | LAMMPS of the package index |

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import ExportedPotential, allow_loading, export_mliap, read_mliap
    from .external import LammpsRun, start_lammps
    from .library import lammps_module
    from .mliap import MLIAPPotential

_MODULES = {
    "ExportedPotential": "export",
    "LammpsRun": "external",
    "MLIAPPotential": "mliap",
    "allow_loading": "export",
    "export_mliap": "export",
    "lammps_module": "library",
    "read_mliap": "export",
    "start_lammps": "external",
}

__all__ = [
    "ExportedPotential",
    "LammpsRun",
    "MLIAPPotential",
    "allow_loading",
    "export_mliap",
    "lammps_module",
    "read_mliap",
    "start_lammps",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
