"""`check`: all measurements, adapted beside bare backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ase import Atoms

from ..config import CheckConfig
from ..data.dataset import Dataset
from ..errors import DynamicsError
from ..graph import check_elements
from ..md.simulation import check_equivariant, check_settings, check_starts
from ..potential import Potential
from . import paths
from .dynamics import Tick, constant_energy, nve_settings, ramp, ramp_settings, thermal_frames
from .forgetting import forgetting, labelled_forces
from .report import CheckReport, ModelReport
from .scans import Path, scan

# what is being done, and how much of that, from 0 to 1
Progress = Callable[[str, float], None]


def check(
    potential: Potential,
    atoms: Atoms,
    config: CheckConfig | None = None,
    *,
    labels: Dataset | None = None,
    level_of_theory: str | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done: None,
) -> CheckReport:
    """Measure stability, walls, forgetting and drift of a potential, and of its bare backbone beside it.

    Args:
        potential: a backbone with an adapter, or without; then the backbone itself is judged.
        atoms: the start structure, relaxed or nearly so; a molecule or a crystal.
        config: settings and bounds.
        labels: structures with forces at the level of theory that the adapter was trained for.
        level_of_theory: that level, such as "PBE/def2-SVP"; decides which of the package's molecules may judge.
        force: check an adapter whose method is not equivariant.
        progress: told what is being done.

    Raises:
        DataError: the structure or the labels cannot be used.
        DynamicsError: settings that make no sense, or an adapter that is not equivariant.
    """
    config = config or CheckConfig()
    check_equivariant(potential, force)
    _check(potential, atoms, config, labels)
    began = time.monotonic()
    adapted = potential.adapter is not None and potential.adapter.enabled
    squeezes, n_bonds = paths.squeezes(atoms, config)
    pairs = paths.pairs([int(z) for z in atoms.numbers], config)
    tasks = (pairs, squeezes, paths.approaches(atoms, config))

    with potential.folded():
        frames = thermal_frames(potential, atoms, config, _stage(progress, "warming up"))
        subject = _model("adapter" if adapted else "backbone", potential, atoms, frames, tasks, config, progress)
        bare, forgot = None, None
        if adapted:
            own = subject.constant_energy.frames or tuple(frames)
            tick = _stage(progress, "other molecules")
            forgot = forgetting(potential, own, labels=labels, level_of_theory=level_of_theory, tick=tick)
            with potential.adapter_disabled():
                bare = _model("backbone", potential, atoms, frames, tasks, config, progress)
    seconds = time.monotonic() - began
    return CheckReport(subject, bare, forgot, atoms.get_chemical_formula(), n_bonds, config, seconds)


def _check(potential: Potential, atoms: Atoms, config: CheckConfig, labels: Dataset | None) -> None:
    """Raise before anything is computed."""
    for name in ("ramp_ps", "nve_ps", "equilibration_ps", "pair_step_A", "scan_step_A", "wall_from_A"):
        if not getattr(config, name) > 0:
            raise DynamicsError(f"{name} must be positive, got {getattr(config, name)}")
    for name in ("ramp_replicas", "nve_replicas", "max_bonds", "max_approaches"):
        if getattr(config, name) < 1:
            raise DynamicsError(f"{name} must be at least 1, got {getattr(config, name)}")
    check_settings(ramp_settings(config))
    check_settings(nve_settings(config))
    check_starts([atoms])
    check_elements(atoms.numbers, potential.backbone.elements, "the start structure")
    if labels is not None:
        labelled_forces(labels, potential)


def _model(
    label: str,
    potential: Potential,
    atoms: Atoms,
    frames: Sequence[Atoms],
    tasks: tuple[Sequence[Path], Sequence[Path], Sequence[Path]],
    config: CheckConfig,
    progress: Progress,
) -> ModelReport:
    """All that is measured of one model; which one is the state of `potential`."""

    def stage(text: str) -> Tick:
        return _stage(progress, f"{label}: {text}")

    pairs, squeezes, approaches = tasks
    return ModelReport(
        label,
        pairs=scan(potential, pairs, config, stage("pairs of atoms")),
        squeezes=scan(potential, squeezes, config, stage("squeezed bonds")),
        approaches=scan(potential, approaches, config, stage("molecules pushed together")),
        constant_energy=constant_energy(potential, frames, config, stage("constant energy")),
        ramp=ramp(potential, atoms, config, stage("temperature ramp")),
    )


def _stage(progress: Progress, text: str) -> Tick:
    return lambda done: progress(text, min(done, 1.0))
