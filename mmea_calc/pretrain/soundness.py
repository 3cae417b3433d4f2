"""What a backbone is like beside its errors of forces: walls, separation, torsion, hydrogen bond, vibrations, dynamics.

    mmea pretrain report mmea-organic-s3 --data data/pbe --out docs/backbones/mmea-organic-s3

The references (`references`) are of the level of theory of data/pbe; for a backbone of another level they say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data import covalent_radii

from ..check.paths import pairs
from ..check.scans import Scan, evaluate, scan
from ..config import CheckConfig
from ..errors import CompilationError, DataError
from ..files import json_ready, write_text
from ..md import open_potential
from ..md.minimise import minimise
from ..md.monitor import BONDED
from ..md.stability import quick_check
from ..potential import Potential
from .dataset import read_arrays, spans
from .references import MOLECULES, read_references, wavenumbers

# Everything above the wall's beginning counts: an atom pair that is pushed together must be pushed back.
WALLS = CheckConfig(wall_from_A=0.5, max_hole_rim_eV=np.inf)
GAPS = np.round(np.arange(2.0, 6.01, 0.1), 3)  # between the nearest atoms of two molecules, A
STEP = 0.005  # of finite differences, A
CONVERGED = 1e-3  # largest force of a geometry at rest, eV/A
DRUG_LIKE = 10
WORTH_COMPILING_PS = 5.0  # machine code takes a minute or two, and makes dynamics several times as fast


@dataclass(frozen=True)
class Vibrating:
    """One molecule at rest: `bond_errors` (A) and wavenumbers (cm^-1) of the backbone and of the reference."""

    name: str
    bond_errors: list[float]
    wavenumbers: list[float]
    reference: list[float]

    @property
    def error(self) -> float:
        """Mean absolute error of the wavenumbers."""
        return float(np.abs(np.subtract(self.wavenumbers, self.reference)).mean())


@dataclass(frozen=True)
class Soundness:
    """What was found; energies in meV, relative to the first point of a torsion and to separate molecules.

    Attributes:
        backbone: its name.
        forces: set -> MAE of forces, meV/A.
        walls: scans of all pairs of elements from 0.5 A on.
        separated: molecule -> interaction energies of two of them at `GAPS`.
        beyond_cutoff: largest interaction energy beyond the cutoff.
        butane, butane_reference: energies at the references' angles.
        water_dimer, water_dimer_reference: interaction energies at the references' distances.
        vibrating: molecules at rest.
        dynamics: what `quick_check` found, None if none was run.
        references: angles and distances, for plots.
    """

    backbone: str
    forces: dict[str, float]
    walls: tuple[Scan, ...] = field(repr=False)
    separated: dict[str, list[float]] = field(repr=False)
    beyond_cutoff: float
    butane: list[float]
    butane_reference: list[float]
    water_dimer: list[float]
    water_dimer_reference: list[float]
    vibrating: tuple[Vibrating, ...]
    dynamics: dict[str, Any] | None
    references: dict[str, list[float]] = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """The figures of a model card."""
        holes = [s for s in self.walls if s.hole is not None]
        depth = min(self.water_dimer), min(self.water_dimer_reference)
        at = [
            self.references["distances"][int(np.argmin(energies))]
            for energies in (self.water_dimer, self.water_dimer_reference)
        ]
        found = {
            **{f"forces MAE, {name} (meV/Å)": value for name, value in self.forces.items()},
            "pairs of elements": len(self.walls),
            "of them with a hole beyond 0.5 Å": len(holes),
            "lowest rim of a hole (eV)": min((s.hole.rim_eV for s in holes if s.hole), default=None),
            "interaction beyond the cutoff, largest (meV)": self.beyond_cutoff,
            "interaction at 4 Å and beyond, largest (meV)": max(
                abs(e) for row in self.separated.values() for e, gap in zip(row, GAPS, strict=True) if gap >= 4.0
            ),
            "butane, energies along the torsion: MAE (meV)": _mae(self.butane, self.butane_reference),
            "butane, cis above trans (meV)": self.butane[0] - self.butane[-1],
            "the same with PBE (meV)": self.butane_reference[0] - self.butane_reference[-1],
            "water dimer, depth (meV)": -depth[0],
            "the same with PBE": -depth[1],
            "water dimer, O-O of the lowest point (Å)": at[0],
            "O-O with PBE (Å)": at[1],
            "bond lengths MAE (Å)": float(np.mean([abs(e) for v in self.vibrating for e in v.bond_errors])),
            "wavenumbers MAE (1/cm)": float(
                np.mean([abs(a - b) for v in self.vibrating for a, b in zip(v.wavenumbers, v.reference, strict=True)])
            ),
        }
        if self.dynamics is not None:
            replicas = self.dynamics["replicas"]
            found["dynamics, ps"] = self.dynamics["time_ps"]
            found["runs"] = len(replicas)
            found["runs without a break"] = sum(r["stable_ps"] >= self.dynamics["time_ps"] for r in replicas)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain, JSON-ready values."""
        return dict(
            json_ready(
                {
                    "backbone": self.backbone,
                    "figures": self.figures(),
                    "holes": [s.to_dict(curves=False) for s in self.walls if s.hole is not None],
                    "butane": self.butane,
                    "water_dimer": self.water_dimer,
                    "vibrating": [{**asdict(v), "error": v.error} for v in self.vibrating],
                    "dynamics": self.dynamics,
                }
            )
        )


def measure_soundness(
    backbone: str | Path,
    *,
    data: Path,
    references: Path | None = None,
    md_ps: float = 0.0,
    device: str = "auto",
    progress: Callable[[str], None] = lambda line: None,
) -> Soundness:
    """Measure all of it.

    Args:
        backbone: name or path.
        data: folder of the packed PBE set: its validation sets, and molecules for dynamics.
        references: file of `make_references`; DATA/references.json if not given.
        md_ps: length of Langevin dynamics of ten larger molecules at 300 and 600 K; 0 runs none. Long ones are
            compiled first.
        device: where to.
        progress: told of every part.

    Raises:
        BackboneError: it cannot be opened. DataError: the data cannot be read, or hold an element that it lacks.
    """
    file = references or data / "references.json"
    known = read_references(file)
    if lacking := [name for name in ("butane", "water dimer", "H2O") if name not in known]:
        raise DataError(f"{file} lacks {', '.join(lacking)}: go on with `mmea pretrain references --out {file}`")
    starts = drug_like(data) if md_ps > 0 else []
    potential = open_potential(backbone, device=device, dtype="float64")
    progress("forces of the validation sets")
    forces = {file.stem: _forces_error(potential, file) for file in sorted(data.glob("valid*.npz"))}
    if not forces:
        raise DataError(f"{data} has no valid*.npz")
    progress("walls")
    walls = scan(potential, pairs(potential.backbone.elements, WALLS), WALLS)
    progress("separation of dimers")
    separated = {name: _separation(potential, molecule(name)) for name in MOLECULES}
    progress("torsion and hydrogen bond")
    butane, water = known["butane"], known["water dimer"]
    torsion, torsion_reference = _along(potential, butane["scan"])
    progress("geometries and vibrations")
    names = [name for name in MOLECULES if name in known]
    at_rest, messages = minimise(potential, [_atoms(known[name]) for name in names], fmax=CONVERGED)
    for message in messages:
        progress(message)
    vibrating = tuple(
        _vibrating(potential, name, atoms, known[name]) for name, atoms in zip(names, at_rest, strict=True)
    )
    monomer = 1e3 * float(evaluate(potential, [at_rest[names.index("H2O")]])[0][0])
    hydrogen_bond = _along(potential, water["scan"])[0] - 2 * monomer
    dynamics = None
    if md_ps > 0:
        progress("dynamics")
        single = open_potential(backbone, device=device)
        if md_ps >= WORTH_COMPILING_PS:
            try:
                single.compile()
            except CompilationError as problem:
                progress(f"without machine code: {problem}")
        told = 0

        def tell(done_ps: float) -> None:
            nonlocal told
            if (tenths := int(10 * done_ps / md_ps)) > told:
                told = tenths
                progress(f"dynamics: {done_ps:.3g} of {md_ps:g} ps")

        dynamics = quick_check(
            single, starts, temperatures_K=(300.0, 600.0), time_ps=md_ps, seconds=np.inf, seed=0, progress=tell
        )
    beyond = potential.backbone.r_max < GAPS
    return Soundness(
        backbone=potential.backbone.name,
        forces=forces,
        walls=walls,
        separated={name: list(energies) for name, energies in separated.items()},
        beyond_cutoff=float(max(np.abs(energies[beyond]).max() for energies in separated.values())),
        butane=list(torsion - torsion[-1]),
        butane_reference=list(torsion_reference - torsion_reference[-1]),
        water_dimer=list(hydrogen_bond),
        water_dimer_reference=[1e3 * point["interaction"] for point in water["scan"]],
        vibrating=vibrating,
        dynamics=dynamics,
        references={"dihedrals": butane["dihedrals"], "distances": water["distances"]},
    )


def write_soundness(found: Soundness, out: Path) -> tuple[Path, Path]:
    """OUT.json and OUT.png, the page of plots."""
    from .soundness_plots import soundness_page

    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_name(f"{out.name}.json"), json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return out.with_name(f"{out.name}.json"), soundness_page(found, out.with_name(f"{out.name}.png"))


def drug_like(data: Path) -> list[Atoms]:
    """The largest single molecules of the packed set, of different compositions."""
    structures = [s for file in sorted(data.glob("*-1.npz")) for s, _ in _structures(file)]
    largest = sorted(structures, key=lambda atoms: -int((atoms.numbers > 1).sum()))
    found: dict[str, Atoms] = {}
    for atoms in largest:
        if _is_one_molecule(atoms) and len(found) < DRUG_LIKE:
            found.setdefault(atoms.get_chemical_formula(), atoms)
    if not found:
        raise DataError(f"{data} has no larger molecules (train-1.npz, valid-1.npz)")
    return list(found.values())


def _is_one_molecule(atoms: Atoms) -> bool:
    from scipy.sparse.csgraph import connected_components

    return bool(connected_components(_bonded(atoms))[0] == 1)


def _bonded(atoms: Atoms) -> np.ndarray:
    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances() < BONDED * (radii[:, None] + radii[None, :])
    return near & ~np.eye(len(atoms), dtype=bool)


def _structures(file: Path) -> list[tuple[Atoms, np.ndarray]]:
    arrays = read_arrays([file])
    return [
        (Atoms(arrays["numbers"][at].astype(int), arrays["positions"][at].astype(float)), arrays["forces"][at])
        for at in spans(arrays)
    ]


def _forces_error(potential: Potential, file: Path) -> float:
    structures = _structures(file)
    found = evaluate(potential, [atoms for atoms, _ in structures])[1]
    errors = [np.abs(f - reference).ravel() for f, (_, reference) in zip(found, structures, strict=True)]
    return 1e3 * float(np.concatenate(errors).mean())


def _separation(potential: Potential, one: Atoms) -> np.ndarray:
    """Interaction energies of the molecule and its mirror image at `GAPS`, meV."""
    structures = [one]
    for gap in GAPS:
        other = one.copy()
        other.positions[:, 0] = 2 * one.positions[:, 0].max() - one.positions[:, 0] + gap
        structures.append(one + other)
    energies = 1e3 * evaluate(potential, structures)[0]
    return energies[1:] - 2 * energies[0]


def _atoms(item: dict[str, Any]) -> Atoms:
    return Atoms(item["numbers"], item["positions"])


def _along(potential: Potential, points: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Energies of the backbone and of the reference, meV."""
    return 1e3 * evaluate(potential, [_atoms(p) for p in points])[0], 1e3 * np.array([p["energy"] for p in points])


def _vibrating(potential: Potential, name: str, atoms: Atoms, item: dict[str, Any]) -> Vibrating:
    """Of a molecule at rest."""
    reference = _atoms(item)
    first, second = np.nonzero(np.triu(_bonded(reference)))
    errors = (atoms.get_all_distances() - reference.get_all_distances())[first, second]
    displaced = []
    for i in range(len(atoms)):
        for axis in range(3):
            for sign in (1, -1):
                one = Atoms(atoms.numbers, atoms.positions)
                one.positions[i, axis] += sign * STEP
                displaced.append(one)
    forces = np.array(evaluate(potential, displaced)[1]).reshape(len(atoms), 3, 2, len(atoms), 3)
    hessian = (forces[:, :, 1] - forces[:, :, 0]) / (2 * STEP)
    return Vibrating(name, errors.tolist(), wavenumbers(atoms, hessian).tolist(), item["wavenumbers"])


def _mae(one: list[float], other: list[float]) -> float:
    return float(np.abs(np.subtract(one, other)).mean())


__all__ = ["Soundness", "Vibrating", "drug_like", "measure_soundness", "write_soundness"]
