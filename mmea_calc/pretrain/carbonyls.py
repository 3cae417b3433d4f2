"""Geometries of molecules with carbonyl groups: chains, rings and aromatic ones, in motion.

    mmea pretrain carbonyls --out geometries

writes a packed set as `chelates` does, of molecules that are drawn:

- `dicarbonyl`: two carbonyl groups, one beside the other or with something between: aldehydes, ketones, acids, esters,
  amides, imides, anhydrides;
- `ring`: `RINGS`, lactams, imides, cyclic ureas, pyrimidinones and lactones among them, with at most two hydrogens
  exchanged;
- `aromatic`: a benzene or pyridine ring with one or two groups, of which the first holds a carbonyl group.

RDKit embeds them. GFN2-xTB moves them, and there is one frame at each of three temperatures: geometries for `label`.
With `--by POTENTIAL` that one moves them, all at once and for longer, and GFN2-xTB labels a dozen frames of each: many
geometries for `relabel`. Left out are the benchmark molecules with their isomers (`choose.LEFT_OUT`), malonaldehyde,
uracil and aspirin among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms

from ..config import MDConfig
from ..errors import MMEAError
from ..md.record import record
from ..potential import Potential
from .choose import composition, compositions_left_out
from .conformers import attach, conformer
from .label import LARGEST_FORCE
from .sample import write_frames
from .small import in_motion, labelled, xtb

ENDS, END_SHARES = ("", "C", "O", "OC", "N", "NC", "F", "CC"), (0.36, 0.2, 0.12, 0.08, 0.1, 0.06, 0.04, 0.04)
BETWEEN = ("", "C", "C(C)", "CC", "C=C", "O", "N", "N(C)", "NN", "C(O)", "C(F)", "C(N)", "OC", "NC", "C#C", "CCC")
BETWEEN_SHARES = (
    0.14,
    *(0.2, 0.08, 0.1, 0.08),
    *(0.06, 0.1, 0.03, 0.02),
    *(0.03, 0.02, 0.02),
    *(0.05, 0.05),
    0.01,
    0.01,
)
RINGS = (
    *("O=C1CCN1", "O=C1CCC(=O)N1", "O=C1C=CC(=O)N1", "O=C1CNC(=O)N1", "O=C1NC=CN1", "O=C1CCNC(=O)N1", "O=C1C=CC=CN1"),
    *("O=C1N=CC=CN1", "O=C1C=CN=CN1", "O=C1C=CC=NN1", "NC1=NC(=O)NC=C1", "O=C1CC(=O)NC(=O)N1", "O=C1C=NNC(=O)N1"),
    *("O=C1NC(=O)C=NN1", "O=C1CNC(=O)CN1", "O=C1CCO1", "O=C1C=CCO1", "O=C1CCCO1", "O=C1OC=CO1", "O=C1OCCO1"),
    *("O=C1C=COC=C1", "O=C1C=CNC=C1", "O=C1C=CC=CO1", "O=C1C=CC(=O)C=C1", "O=C1C=CC(=O)O1", "O=C1NCCO1", "O=C1NC=CO1"),
    *(
        "O=C1CCCN1",
        "O=C1NCC=N1",
        "O=C1C=CC=C1",
        "O=C1CCC1",
        "O=CC1=CC=CO1",
        "O=CC1=CC=CN1",
        "O=CC1=CN=CN1",
        "O=C1NC=NC=N1",
    ),
)
EXCHANGED, EXCHANGED_SHARES = ("C", "F", "O", "N", "Cl", "C=O"), (0.4, 0.15, 0.15, 0.15, 0.05, 0.1)
RINGS_AROMATIC, AROMATIC_SHARES = ("c1ccccc1", "n1ccccc1"), (0.75, 0.25)
GROUPS = ("C=O", "C(C)=O", "C(=O)O", "C(=O)OC", "C(=O)N", "OC=O", "OC(C)=O", "NC=O", "NC(C)=O")
SECOND, SECOND_SHARES = (
    ("", "C", "O", "OC", "N", "F", "C=O", "C(=O)O", "OC=O"),
    (0.3, *(0.1, 0.15, 0.08, 0.1, 0.07), *(0.07, 0.07, 0.06)),
)
_KINDS, _KIND_SHARES = ("dicarbonyl", "ring", "aromatic"), (0.5, 0.3, 0.2)
_SHORT = MDConfig(
    temperatures_K=(300.0, 600.0, 1000.0), timestep_fs=0.5, time_ps=0.24, stats_every=120, traj_every=120, drift_every=0
)
_TOGETHER = 64  # molecules in one batch


def carbonyls(
    *,
    out: Path,
    by: Potential | None = None,
    drawn: int = 600,
    max_heavy: int = 11,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Write OUT/train-0.npz, labelled by GFN2-xTB, and OUT/order.npz; the number of structures.

    Args:
        out: folder.
        by: potential that moves them; GFN2-xTB if not given.
        drawn: molecules that are drawn; what is drawn twice is taken once.
        max_heavy: largest number of heavy atoms.
        seed: of the draws, conformers, velocities and the order.
        progress: told what is done.

    Raises:
        MMEAError: RDKit or tblite is not installed, or nothing is left.
    """
    xtb()  # before what takes long
    rng = np.random.default_rng(seed)
    left_out = compositions_left_out()
    molecules = dict.fromkeys(draw_molecule(rng) for _ in range(drawn))
    starts = [conformer(smiles, seed=int(rng.integers(2**31 - 1))) for smiles in molecules]
    fit = [
        start
        for start in starts
        if start and np.count_nonzero(start.numbers > 1) <= max_heavy and composition(start.numbers) not in left_out
    ]
    found: list[tuple[Atoms, float, np.ndarray]] = []
    if by is None:
        for start in fit:
            found += in_motion(start, _SHORT.temperatures_K, rng)
    else:
        for first in range(0, len(fit), _TOGETHER):
            found += _moved(by, fit[first : first + _TOGETHER], seed + first)
            progress(f"{min(first + _TOGETHER, len(fit))} of {len(fit)} molecules")
    progress(f"{len(fit)} of {len(molecules)} molecules: {len(found)} frames")
    kept = [found[i] for i in rng.permutation(len(found)) if np.abs(found[i][2]).max() < LARGEST_FORCE]
    if not kept:
        raise MMEAError("no frame is left; ask for more of them")
    write_frames(out, kept)
    return len(kept)


def draw_molecule(rng: np.random.Generator) -> str:
    """A molecule of one of the three kinds as SMILES."""
    kind = rng.choice(_KINDS, p=_KIND_SHARES)
    if kind == "dicarbonyl":
        one, other = (f"({end})" if end else "" for end in rng.choice(ENDS, size=2, p=END_SHARES))
        return f"O=C{one}{rng.choice(BETWEEN, p=BETWEEN_SHARES)}C{other}=O"
    if kind == "ring":
        ring, groups = str(rng.choice(RINGS)), rng.choice(EXCHANGED, size=rng.integers(3), p=EXCHANGED_SHARES).tolist()
    else:
        ring = str(rng.choice(RINGS_AROMATIC, p=AROMATIC_SHARES))
        groups = [g for g in (str(rng.choice(GROUPS)), str(rng.choice(SECOND, p=SECOND_SHARES))) if g]
    return attach(ring, groups, rng) or ring


def _moved(by: Potential, starts: Sequence[Atoms], seed: int) -> Iterator[tuple[Atoms, float, np.ndarray]]:
    """Frames of dynamics with this potential, labelled by GFN2-xTB."""
    run = record(by, starts, replace(_SHORT, seed=seed), frames_every=1)
    for i, positions in run.frames:
        atoms = Atoms(run.replicas[i].atoms.numbers, positions)
        atoms.calc = xtb()
        try:
            yield labelled(atoms)
        except (RuntimeError, ValueError, ArithmeticError):  # xTB did not converge: this one is not for learning
            continue


__all__ = ["RINGS", "carbonyls", "draw_molecule"]
