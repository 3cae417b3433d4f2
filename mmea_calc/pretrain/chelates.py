"""Geometries of molecules that hold a hydrogen bond within themselves, which few molecules of a broad set do.

    mmea pretrain chelates --out geometries

writes a packed set as `sample` does. Molecules are written as SMILES; RDKit embeds them with donor and acceptor
together, and of its conformers the one with the shortest hydrogen bond is taken. GFN2-xTB moves them. For every
molecule there are frames at three temperatures, and one with the hydrogen on its way from the donor to the acceptor.

- vinylogous acids, amides and their like, D-CR=CR-CR=A with D and A out of O, N and S, closed to a ring of six;
- `MOLECULES`: rings of five and six, aromatic ones, carboxylic acids, amides, amino alcohols.

Left out are the benchmark molecules with their isomers (`choose.LEFT_OUT`), malonaldehyde and acetylacetone, the best
known of these, among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from ..errors import MMEAError
from .choose import composition, compositions_left_out
from .conformers import numbers_of, rdkit, read_smiles, relax
from .label import LARGEST_FORCE
from .sample import write_frames
from .small import in_motion, labelled, xtb

DONORS, DONOR_SHARES = ("O", "N", "CN", "S"), (0.5, 0.3, 0.1, 0.1)
ACCEPTORS, ACCEPTOR_SHARES = ("O", "N", "S"), (0.65, 0.25, 0.1)
SUBSTITUENTS, SUBSTITUENT_SHARES = ("", "C", "F", "O", "N", "Cl", "C#N"), (0.55, 0.15, 0.1, 0.07, 0.07, 0.03, 0.03)
MOLECULES = (
    *("OCC=O", "OCCO", "NCCO", "NCCN", "OC(=O)C(=O)O", "OCC(=O)O", "CC(=O)C(=O)O", "O=CC(=O)O", "CC(=O)CO"),
    *("NCC(=O)O", "CC(O)C(=O)O", "NC(=O)C(=O)N", "O=CNO", "CC(=O)NO", "NC(=O)CO", "ON=CC=NO"),
    *("OC(=O)CC(=O)O", "NC(=O)CC(=O)N", "OCCCO", "NCCCO", "OCCC(=O)O", "NCCC(=O)O"),
    *("NC(=O)NC(=O)N", "O=CNC(=O)O", "NC(=O)N=CO", "NC(=N)NC=O"),
    *("O/C=C\\[N+](=O)[O-]", "N/C=C\\[N+](=O)[O-]", "O/C=C\\C(=O)O", "O/C=C\\C(=O)N", "N/C=C\\C(=O)O"),
    *("OC(=O)/C=C\\C(=O)O", "OC(=O)/C=C\\C=O", "OC(=O)/C=C\\C(=O)N", "NC(=O)/C=C\\C=O"),
    *("O=c1cccccc1O", "Oc1ccccc1O", "Oc1ccccc1F", "Nc1ccccc1O", "OCc1ccccn1"),
    *("O=Cc1ccccc1O", "O=Cc1ccccc1N", "NC(=O)c1ccccc1O", "Oc1ccccc1[N+](=O)[O-]", "N=Cc1ccccc1O", "OC(=O)c1ccccn1"),
)
_CONFORMERS = 8  # for every donor and acceptor
_EMBEDDED = (1.4, 2.2)  # A, from hydrogen to acceptor
_LONGEST = 2.4  # A, the same after the force field moved the atoms
_BONDS = 4  # at least so many from hydrogen to acceptor: rings of five and more
_ON_ITS_WAY = (0.35, 0.65)  # part of the line from donor to acceptor
_TEMPERATURES_K = (300.0, 600.0, 1000.0)


@dataclass(frozen=True)
class Bridge:
    """A hydrogen bond D-H...A, by the numbers of its atoms."""

    donor: int
    hydrogen: int
    acceptor: int


def chelates(
    *,
    out: Path,
    enols: int = 300,
    max_heavy: int = 7,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Write OUT/train-0.npz, labelled by GFN2-xTB, and OUT/order.npz; the number of structures.

    Args:
        out: folder.
        enols: molecules D-CR=CR-CR=A that are drawn; what is drawn twice is taken once.
        max_heavy: largest number of heavy atoms of these.
        seed: of the draws, conformers, velocities and the order.
        progress: told what is done.

    Raises:
        MMEAError: RDKit or tblite is not installed, or nothing is left.
    """
    rng = np.random.default_rng(seed)
    left_out = compositions_left_out()
    drawn = dict.fromkeys([*MOLECULES, *(vinylogous(rng) for _ in range(enols))])
    found: list[tuple[Atoms, float, np.ndarray]] = []
    closed = 0
    for smiles in drawn:
        start = embed(smiles, seed=int(rng.integers(2**31 - 1)))
        if start is None or composition(start[0].numbers) in left_out:
            continue
        if smiles not in MOLECULES and np.count_nonzero(start[0].numbers > 1) > max_heavy:
            continue
        found += _frames(*start, rng)
        closed += 1
    progress(f"{closed} of {len(drawn)} molecules with a hydrogen bond: {len(found)} frames")
    kept = [found[i] for i in rng.permutation(len(found)) if np.abs(found[i][2]).max() < LARGEST_FORCE]
    if not kept:
        raise MMEAError("no frame is left; ask for more of them")
    write_frames(out, kept)
    return len(kept)


def vinylogous(rng: np.random.Generator) -> str:
    """A molecule D-CR=CR-CR=A as SMILES, D and the carbon of A on the same side."""
    donor, acceptor = rng.choice(DONORS, p=DONOR_SHARES), rng.choice(ACCEPTORS, p=ACCEPTOR_SHARES)
    one, two, three = (f"({r})" if r else "" for r in rng.choice(SUBSTITUENTS, size=3, p=SUBSTITUENT_SHARES))
    return f"{donor}/C{one}=C{two}\\C{three}={acceptor}"


def embed(smiles: str, seed: int = 0) -> tuple[Atoms, Bridge] | None:
    """The conformer with the shortest hydrogen bond within the molecule; None if none closes.

    Args:
        smiles: the molecule.
        seed: of the conformers.

    Raises:
        MMEAError: RDKit is not installed, or cannot read the molecule.
    """
    chem, geometry, _, smooth = rdkit()
    molecule = chem.AddHs(read_smiles(smiles))
    numbers = numbers_of(molecule)
    best: tuple[float, np.ndarray, Bridge] | None = None
    for bridge in _bridges(numbers, chem.GetDistanceMatrix(molecule)):
        bounds = geometry.GetMoleculeBoundsMatrix(molecule, forceTransAmides=False)
        low, high = sorted((bridge.hydrogen, bridge.acceptor))
        bounds[high, low], bounds[low, high] = _EMBEDDED  # RDKit keeps the upper bounds above the diagonal
        if not smooth(bounds):
            continue
        settings = geometry.EmbedParameters()
        settings.randomSeed = seed
        settings.SetBoundsMat(bounds)
        for conformer in geometry.EmbedMultipleConfs(molecule, _CONFORMERS, settings):
            positions = relax(molecule, conformer)
            length = float(np.linalg.norm(positions[bridge.hydrogen] - positions[bridge.acceptor]))
            if length < (_LONGEST if best is None else best[0]):
                best = length, positions, bridge
    return None if best is None else (Atoms(numbers, best[1]), best[2])


def on_its_way(positions: np.ndarray, bridge: Bridge, share: float) -> np.ndarray:
    """The positions (n_atoms, 3; A) with the hydrogen on the line from donor to acceptor, at this part of it."""
    moved = positions.copy()
    start, end = positions[bridge.donor], positions[bridge.acceptor]
    moved[bridge.hydrogen] = start + share * (end - start)
    return moved


def _bridges(numbers: np.ndarray, bonds: np.ndarray) -> Iterator[Bridge]:
    """What could be one: bonds (n_atoms, n_atoms) counts those between two atoms."""
    polar = np.isin(numbers, (7, 8, 9, 16))
    for hydrogen in np.flatnonzero(numbers == 1):
        donor = int(np.flatnonzero(bonds[hydrogen] == 1)[0])
        if polar[donor]:
            for acceptor in np.flatnonzero(polar & (bonds[hydrogen] >= _BONDS)):
                yield Bridge(donor, int(hydrogen), int(acceptor))


def _frames(start: Atoms, bridge: Bridge, rng: np.random.Generator) -> Iterator[tuple[Atoms, float, np.ndarray]]:
    """In motion, then one with the hydrogen on its way, on the frame at the lowest temperature."""
    first: Atoms | None = None
    for frame in in_motion(start, _TEMPERATURES_K, rng):
        first = first or frame[0]
        yield frame
    if first is not None:
        atoms = Atoms(first.numbers, on_its_way(first.positions, bridge, rng.uniform(*_ON_ITS_WAY)))
        atoms.calc = xtb()
        try:
            yield labelled(atoms)
        except (RuntimeError, ValueError, ArithmeticError):  # xTB did not converge: this one is not for learning
            return


__all__ = ["MOLECULES", "Bridge", "chelates", "embed", "on_its_way", "vinylogous"]
