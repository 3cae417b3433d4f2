"""A short run at several temperatures, for a verdict; and opening what dynamics runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ..adapter_file import is_adapter, read_adapter
from ..backbone import load_backbone
from ..config import Kernels, MDConfig, Precision
from ..errors import BackboneError
from ..potential import Potential
from .monitor import stable_ps
from .record import record
from .simulation import check_equivariant

CHECK_TEMPERATURES_K = (300.0, 600.0, 1200.0)


def open_potential(
    adapter: str | Path,
    *,
    backbone: str | Path | None = None,
    head: str | None = None,
    device: str = "auto",
    dtype: Precision = "float32",
    kernels: Kernels = "own",
) -> Potential:
    """An `.adapter` file on its backbone, or a backbone alone.

    Args:
        adapter: path of an adapter, or name or path of a backbone.
        backbone: of the adapter, if it is not found by the name that the file gives.
        head: of a backbone with several; the adapter's if there is one.
        device, dtype, kernels: of the network, see `load_backbone`.

    Raises:
        AdapterFileError, AdapterError, BackboneError: one of them cannot be used; two backbones.
    """
    if not is_adapter(adapter):
        if backbone is not None:
            raise BackboneError(
                f"{adapter} is not an adapter, so there is nothing to put on the backbone {backbone}; give one of them"
            )
        return Potential(load_backbone(adapter, head=head, device=device, dtype=dtype, kernels=kernels))
    file = read_adapter(adapter)
    loaded = file.load_backbone(backbone, head=head, device=device, dtype=dtype, kernels=kernels)
    potential = Potential(loaded)
    potential.use(file)
    return potential


def quick_check(
    potential: Potential,
    starts: Atoms | Sequence[Atoms],
    *,
    temperatures_K: tuple[float, ...] = CHECK_TEMPERATURES_K,
    replicas: int = 1,
    time_ps: float = 5.0,
    seconds: float = 120.0,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[float], None] = lambda done_ps: None,
) -> dict[str, Any]:
    """Run Langevin dynamics in memory and say whether it was stable.

    Args:
        potential: backbone, with or without an adapter.
        starts: start structures.
        temperatures_K, replicas, time_ps, seed: see `MDConfig`.
        seconds: after this time the check ends, however far it is.
        force: run an adapter whose method is not equivariant.
        progress: told at every sample how much is done, ps.

    Returns:
        plain values: `passed` (no replica failed or changed its bonds), `time_ps` reached, `asked_ps`, the settings,
        and per replica `temperature_K` (mean), `stable_ps`, `gate_excess` (largest), `adapted_minus_bare_eV_per_A`
        (mean) and `events`.

    Raises:
        DataError, DynamicsError: structures or settings that cannot be used, or an adapter that is not equivariant.
    """
    check_equivariant(potential, force)
    structures = [starts] if isinstance(starts, Atoms) else list(starts)
    config = MDConfig(temperatures_K=temperatures_K, replicas=replicas, time_ps=time_ps, seed=seed)
    end = time.monotonic() + seconds

    def go_on(step: int) -> bool:
        progress(1e-3 * step * config.timestep_fs)
        return time.monotonic() < end

    run = record(potential, structures, config, go_on=go_on)
    rows = []
    for i, replica in enumerate(run.replicas):
        series = {name: v[:, i][np.isfinite(v[:, i])] for name, v in run.values.items()}
        gates, shift = series["gate_excess"], series["adapted_minus_bare"]
        rows.append(
            {
                "replica": replica.name,
                "target_K": replica.temperature_K,
                "temperature_K": float(series["temperature"].mean()) if len(series["temperature"]) else None,
                "stable_ps": stable_ps(run.events, replica.name, run.length_ps),
                "gate_excess": float(gates.max()) if len(gates) else None,
                "adapted_minus_bare_eV_per_A": float(shift.mean()) if len(shift) else None,
                "events": [str(e) for e in run.events if e.replica == replica.name],
            }
        )
    return {
        "passed": all(e.kind == "gate out of range" for e in run.events),
        "time_ps": run.length_ps,
        "asked_ps": time_ps,
        "temperatures_K": list(temperatures_K),
        "replicas_per_temperature": replicas,
        "timestep_fs": config.timestep_fs,
        "friction_per_fs": config.friction_per_fs,
        "seed": seed,
        "replicas": rows,
    }
