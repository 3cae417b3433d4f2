"""Geometries that a broad set lacks: small molecules in motion, and pairs of them that touch.

    mmea pretrain sample --by mmea-organic-s2 --out geometries

writes a packed set that `label --data geometries --order geometries/order.npz --first-index 10000000` takes: frames of
short Langevin dynamics with the potential itself.
Left out are the benchmark molecules with their isomers (`choose.LEFT_OUT`), and what `references` measures by: its
molecules alone and the water dimer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from scipy.spatial.transform import Rotation

from ..config import MDConfig
from ..errors import MMEAError
from ..md.record import record
from ..potential import Potential
from .choose import composition, compositions_left_out
from .dataset import write_arrays
from .label import LARGEST_FORCE, UNPAIRED
from .references import MOLECULES

# What touches: donors and acceptors of hydrogen bonds, and some that have neither.
PARTNERS = (
    *("H2O", "NH3", "CH3OH", "HCOOH", "H2CO", "H3CNH2", "CH3CN", "HCN", "CH3CONH2", "CH3COOH"),
    *("CH4", "C2H4", "C2H2", "CH3SH", "CH3Cl", "CO2"),
)
_CARBENES = ("CH2_s1A1d", "CH2_s3B1d")
CONTACT = (1.8, 2.6)  # between the nearest atoms of two molecules, A
_SINGLE = MDConfig(
    temperatures_K=(300.0, 600.0, 1000.0), timestep_fs=1.0, time_ps=0.24, stats_every=40, traj_every=40, drift_every=0
)
_PAIRS = MDConfig(
    temperatures_K=(200.0, 500.0), timestep_fs=1.0, time_ps=0.24, stats_every=60, traj_every=60, drift_every=0
)


def sample(
    potential: Potential, *, out: Path, seed: int = 0, progress: Callable[[str], None] = lambda line: None
) -> int:
    """Write OUT/train-0.npz, labelled by `potential`, and OUT/order.npz; the number of structures.

    Args:
        potential: that moves them.
        out: folder.
        seed: of orientations, velocities and the order.
        progress: told what is done.

    Raises:
        MMEAError: the dynamics left nothing.
    """
    rng = np.random.default_rng(seed)
    found: list[Atoms] = []
    for words, starts, config in (
        ("molecules", single_molecules(), _SINGLE),
        ("pairs of molecules", touching_pairs(rng), _PAIRS),
    ):
        run = record(potential, starts, config, frames_every=2)
        frames = [Atoms(run.replicas[i].atoms.numbers, positions) for i, positions in run.frames]
        found += frames
        progress(f"{len(starts)} {words}: {len(frames)} frames")
    energies, forces = potential.predict_graphs([potential.graph(atoms) for atoms in found])
    kept = [i for i in rng.permutation(len(found)) if float(forces[i].abs().max()) < LARGEST_FORCE]
    if not kept:
        raise MMEAError("no frame is left: the potential does not hold these molecules together")
    write_frames(out, [(found[i], float(energies[i]), forces[i].numpy()) for i in kept])
    return len(kept)


def write_frames(
    out: Path, frames: Sequence[tuple[Atoms, float, np.ndarray]], order: Sequence[int] | None = None
) -> None:
    """Structures with energies (eV) and forces (eV/A) as OUT/train-0.npz, and which of them are for labels, all if not
    given, as OUT/order.npz.
    """
    structures, energies, forces = zip(*frames, strict=True)
    out.mkdir(parents=True, exist_ok=True)
    write_arrays(
        out / "train-0.npz",
        numbers=np.concatenate([atoms.numbers for atoms in structures]).astype(np.uint8),
        n_atoms=np.array([len(atoms) for atoms in structures], np.uint8),
        positions=np.concatenate([atoms.positions for atoms in structures]).astype("f4"),
        forces=np.concatenate(forces).astype("f4"),
        energy=np.array(energies),
    )
    write_arrays(out / "order.npz", index=np.arange(len(frames)) if order is None else np.array(order))


def single_molecules() -> list[Atoms]:
    """Closed-shell molecules of ASE's g2 collection with elements that labels know."""
    left_out = compositions_left_out()
    found = []
    for name in g2.names:
        atoms = molecule(name)
        closed = not atoms.get_initial_magnetic_moments().any() and int(atoms.numbers.sum()) % 2 == 0
        if not closed or len(atoms) < 2 or name in (*MOLECULES, *_CARBENES):
            continue
        if set(atoms.numbers.tolist()) <= set(UNPAIRED) and composition(atoms.numbers) not in left_out:
            found.append(Atoms(atoms.numbers, atoms.positions))
    return found


def touching_pairs(rng: np.random.Generator) -> list[Atoms]:
    """Every two of `PARTNERS` in a random orientation at contact; not two waters."""
    left_out = compositions_left_out()
    found = []
    for one, other in combinations_with_replacement(PARTNERS, 2):
        first, second = molecule(one), molecule(other)
        if (one, other) == ("H2O", "H2O") or composition((first + second).numbers) in left_out:
            continue
        for part in (first, second):
            part.positions = Rotation.random(random_state=rng).apply(part.positions - part.get_center_of_mass())
        gap = rng.uniform(*CONTACT)
        second.positions[:, 0] += 20.0
        while nearest(first, second) > gap:
            second.positions[:, 0] -= 0.05
        both = first + second
        found.append(Atoms(both.numbers, both.positions))
    return found


def nearest(one: Atoms, other: Atoms) -> float:
    """Smallest distance between an atom of each, A."""
    return float(np.linalg.norm(one.positions[:, None] - other.positions[None], axis=-1).min())


__all__ = ["CONTACT", "PARTNERS", "nearest", "sample", "single_molecules", "touching_pairs", "write_frames"]
