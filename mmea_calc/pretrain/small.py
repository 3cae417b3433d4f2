"""Geometries of very small molecules, whose labels cost seconds: hydrogen bonds and bonds that are rare.

    mmea pretrain small --out geometries

writes a packed set as `sample` does. GFN2-xTB moves them, which knows both kinds better than a young backbone:

- pairs of molecules of at most three heavy atoms, relaxed for a few steps, in motion, and pushed together or apart;
- three and four molecules, at least two of them water;
- molecules whose hydrogens were exchanged for halogens: N-F, O-Cl, F-F, S-Br, P-I and the like.

Left out are the benchmark molecules with their isomers (`choose.LEFT_OUT`), and what `references` measures by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

from ..errors import MMEAError
from .choose import composition, compositions_left_out
from .label import LARGEST_FORCE
from .references import MOLECULES
from .sample import CONTACT, nearest, write_frames

PARTNERS = (
    *("H2O", "NH3", "HF", "HCl", "SH2", "PH3", "HCN", "H2CO", "CH3OH", "H3CNH2", "CH3SH", "HCOOH"),
    *("CH4", "C2H2", "C2H4", "CO2", "CH3Cl", "HOCl", "N2H4", "H2O2"),
)
CLUSTERS = tuple(("H2O", "H2O", other) for other in ("H2O", "NH3", "HF", "H2CO", "CH3OH", "HCOOH", "HCN", "H3CNH2"))
PARENTS = (
    *("H2O", "NH3", "CH4", "SH2", "PH3", "H2O2", "N2H4", "CH3OH", "H3CNH2", "CH3SH", "H2CO", "HCN", "C2H2", "C2H4"),
    *("HF", "HCl", "HCOOH", "CH3CN"),
)
HALOGENS = (9, 17, 35, 53)
_HALOGEN_SHARES = (0.4, 0.3, 0.2, 0.1)
_STEPS = 60  # of 1 fs, at every temperature
_PUSHED = (-0.35, 2.0)  # A, how far a molecule of a pair is moved along the line between the two


def small(
    *,
    out: Path,
    pairs: int = 2,
    clusters: int = 12,
    exchanged: int = 240,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Write OUT/train-0.npz, labelled by GFN2-xTB, and OUT/order.npz; the number of structures.

    Args:
        out: folder.
        pairs: starts of every two of `PARTNERS`.
        clusters: starts of every one of `CLUSTERS`.
        exchanged: molecules with halogens in the place of hydrogens.
        seed: of orientations, velocities, exchanges and the order.
        progress: told what is done.

    Raises:
        MMEAError: tblite is not installed, or nothing is left.
    """
    rng = np.random.default_rng(seed)
    left_out = compositions_left_out()
    two = [pair for pair in combinations_with_replacement(PARTNERS, 2) if pair != ("H2O", "H2O")]
    found: list[tuple[Atoms, float, np.ndarray]] = []
    for words, starts, temperatures in (
        ("pairs", (_beside(names, rng) for names in two * pairs), (200.0, 500.0)),
        ("clusters", (_beside(names, rng) for names in CLUSTERS * clusters), (200.0, 400.0)),
        ("molecules with halogens", (_exchanged(rng) for _ in range(exchanged)), (300.0, 1000.0, 1500.0)),
    ):
        before = len(found)
        for start in starts:
            if composition(start.numbers) not in left_out:
                found += in_motion(start, temperatures, rng)
        progress(f"{words}: {len(found) - before} frames")
    kept = [found[i] for i in rng.permutation(len(found)) if np.abs(found[i][2]).max() < LARGEST_FORCE]
    measured_by = {composition(molecule(name).numbers) for name in MOLECULES}
    order = [i for i, (atoms, *_) in enumerate(kept) if composition(atoms.numbers) not in measured_by]
    if not order:
        raise MMEAError("no frame is left; ask for more of them")
    write_frames(out, kept, order)
    return len(order)


def exchange(atoms: Atoms, sites: Sequence[int], halogens: Sequence[int]) -> Atoms:
    """Halogens in the place of hydrogens, each as far from its neighbour as the sum of their covalent radii.

    Args:
        atoms: a molecule.
        sites: hydrogens, by number.
        halogens: atomic numbers, one for each.
    """
    changed = Atoms(atoms.numbers, atoms.positions)
    distances = atoms.get_all_distances() + 100.0 * np.eye(len(atoms))
    for site, halogen in zip(sites, halogens, strict=True):
        neighbour = int(distances[site].argmin())
        bond = atoms.positions[site] - atoms.positions[neighbour]
        length = covalent_radii[halogen] + covalent_radii[changed.numbers[neighbour]]
        changed.numbers[site] = halogen
        changed.positions[site] = changed.positions[neighbour] + bond * (length / np.linalg.norm(bond))
    return changed


def touching(names: Sequence[str], rng: np.random.Generator, contact: tuple[float, float]) -> tuple[Atoms, np.ndarray]:
    """Molecules of ASE in random orientations, each brought to the others from a random direction.

    Args:
        names: of the molecules.
        rng: of orientations, directions and gaps.
        contact: smallest and largest gap between the nearest atoms of a molecule and those before it, A.

    Returns:
        the molecules, and which of them every atom belongs to, (n_atoms,).
    """
    together, belongs = Atoms(), []
    for turn, name in enumerate(names):
        part = molecule(name)
        part = Atoms(part.numbers, part.positions - part.get_center_of_mass())
        part.positions = Rotation.random(random_state=rng).apply(part.positions)
        if turn:
            direction, gap = rng.normal(size=3), rng.uniform(*contact)
            direction /= np.linalg.norm(direction)
            part.positions += 20.0 * direction
            while nearest(part, together) > gap:
                part.positions -= 0.05 * direction
                if part.positions.mean(axis=0) @ direction < -20.0:
                    raise MMEAError(f"{', '.join(names)}: they do not meet")
        together += part
        belongs += [turn] * len(part)
    return together, np.array(belongs)


def _beside(names: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms, belongs = touching(names, rng, CONTACT)
    atoms.set_tags(belongs)
    return atoms


def _exchanged(rng: np.random.Generator) -> Atoms:
    parent = molecule(str(rng.choice(PARENTS)))
    hydrogens = np.flatnonzero(parent.numbers == 1)
    sites = rng.choice(hydrogens, size=rng.integers(1, min(len(hydrogens), 3) + 1), replace=False)
    return exchange(parent, sites.tolist(), rng.choice(HALOGENS, size=len(sites), p=_HALOGEN_SHARES).tolist())


def in_motion(
    start: Atoms, temperatures_K: Sequence[float], rng: np.random.Generator
) -> Iterator[tuple[Atoms, float, np.ndarray]]:
    """Relaxed for some steps, then a frame at every temperature; of several molecules also one pushed out of place."""
    atoms = start.copy()
    atoms.calc = xtb()
    try:
        BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.1, steps=25)
        for temperature in temperatures_K:
            spread = np.sqrt(units.kB * temperature * atoms.get_masses())[:, None]
            atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * spread)
            Langevin(
                atoms, 1.0 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, fixcm=False, rng=rng
            ).run(_STEPS)
            yield labelled(atoms)
        if (tags := atoms.get_tags()).any():
            last = tags == tags.max()
            line = atoms.positions[last].mean(axis=0) - atoms.positions[~last].mean(axis=0)
            atoms.positions[last] += line / np.linalg.norm(line) * rng.uniform(*_PUSHED)
            yield labelled(atoms)
    except (RuntimeError, ValueError, ArithmeticError):  # xTB did not converge: this one is not for learning
        return


def labelled(atoms: Atoms) -> tuple[Atoms, float, np.ndarray]:
    return Atoms(atoms.numbers, atoms.positions), atoms.get_potential_energy(), atoms.get_forces()


def xtb() -> Any:
    try:
        from tblite.ase import TBLite
    except ImportError as problem:
        raise MMEAError("GFN2-xTB needs tblite, which is not installed: pip install 'mmea[label]'") from problem
    return TBLite(method="GFN2-xTB", verbosity=0)


__all__ = ["CLUSTERS", "PARENTS", "PARTNERS", "exchange", "small", "touching"]
