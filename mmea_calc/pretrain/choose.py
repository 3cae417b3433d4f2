"""Which structures of a packed set are worth labels: those on which two potentials disagree.

Of structures of one composition a few are kept. Half of what is chosen is then taken by disagreement (root mean square
difference of the forces of two potentials) per cost of a label, without the wildest structures, and half as drawn, so
that the set does not consist of oddities alone. Both halves alternate, and so do molecules of H, C, N and O with
others, so that every beginning of the order is a fair part of it.

The molecules of rMD17, 3BPA and acetylacetone are left out, as are all of their isomers: benchmarks on them stay fair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.formula import Formula

from ..errors import DataError
from ..potential import Potential
from .dataset import check_ending, read_arrays, spans, write_arrays
from .label import LARGEST_FORCE, indices

# rMD17's ten, then 3BPA and acetylacetone.
LEFT_OUT = (
    *("C9H8O4", "C2H6O", "C3H4O2", "C7H8", "C4H4N2O2", "C6H6", "C10H8", "C12H10N2", "C8H9NO2", "C7H6O3"),
    *("C12H12N2O", "C5H8O2"),
)
_PER_COMPOSITION = 3
_COMMON_PER_OTHER = 3  # molecules of H, C, N, O for every one with other elements
_WILDEST = 0.02
_COST = 2.2  # power of the number of atoms that the time of a label grows with


def choose(
    *,
    data: Path,
    out: Path,
    by: tuple[Potential, Potential],
    pool: int = 4000,
    min_heavy: int = 3,
    max_heavy: int = 12,
    skip: Sequence[Path] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the order, `index`, in which `label` takes structures.

    Args:
        data: folder of a packed set.
        out: .npz file to write.
        by: two potentials at one level of theory, made in different ways.
        pool: how many structures both are asked about.
        min_heavy, max_heavy: smallest and largest number of heavy atoms.
        skip: packed sets whose structures are left out.
        seed: of the draw.
        progress: told what is found.

    Returns:
        the number of structures.

    Raises:
        DataError: the set cannot be read, nothing is left of it, or the name does not end in .npz.
    """
    check_ending(out)
    arrays = read_arrays(sorted(data.glob("train-[0-9]*.npz")))
    where = spans(arrays)
    known, left_out = set(indices(skip)), compositions_left_out()
    seen: Counter[tuple[int, ...]] = Counter()
    groups: dict[bool, list[int]] = {True: [], False: []}
    for k in np.random.default_rng(seed).permutation(len(where)).tolist():
        span = where[k]
        made_of = composition(arrays["numbers"][span])
        heavy = sum(z > 1 for z in made_of)
        if k in known or made_of in left_out or not (len(made_of) >= 4 and min_heavy <= heavy <= max_heavy):
            continue
        if seen[made_of] == _PER_COMPOSITION or float(np.abs(arrays["forces"][span]).max()) > LARGEST_FORCE:
            continue
        seen[made_of] += 1
        groups[set(made_of) <= {1, 6, 7, 8}].append(k)
    shares = {True: _COMMON_PER_OTHER, False: 1}
    orders = {}
    for common, members in groups.items():
        members = members[: pool * shares[common] // sum(shares.values())]
        structures = [Atoms(arrays["numbers"][where[k]], arrays["positions"][where[k]].astype(float)) for k in members]
        apart = disagreement(by, structures)
        orders[common] = [members[i] for i in ordered(apart, np.array([len(s) for s in structures]))]
        if members:
            middle, high = (1e3 * float(x) for x in np.quantile(apart, [0.5, 0.9]))
            kind = "H, C, N, O" if common else "other elements too"
            progress(
                f"{kind}: {len(members)} structures, disagreement {middle:.0f} (half), {high:.0f} (nine of ten) meV/A"
            )
    chosen = interleaved(orders[True], orders[False])
    if not chosen:
        raise DataError(f"{data} has no structures to choose from that are not left out")
    write_arrays(out, index=np.array(chosen))
    return len(chosen)


def composition(numbers: Iterable[int]) -> tuple[int, ...]:
    """Equal for isomers."""
    return tuple(sorted(int(z) for z in numbers))


def compositions_left_out() -> set[tuple[int, ...]]:
    """Those of `LEFT_OUT`."""
    return {composition(atomic_numbers[s] for s in Formula(text)) for text in LEFT_OUT}


def disagreement(by: tuple[Potential, Potential], structures: Sequence[Atoms]) -> np.ndarray:
    """Root mean square difference of the forces of two potentials on each structure, eV/A, (n,)."""
    forces = [p.predict_graphs([p.graph(atoms) for atoms in structures])[1] for p in by]
    return np.array([float((a - b).square().mean().sqrt()) for a, b in zip(*forces, strict=True)])


def ordered(apart: np.ndarray, n_atoms: np.ndarray) -> list[int]:
    """Numbers of structures: by disagreement per cost, and as they are, in turn."""
    if not len(apart):
        return []
    worth = apart / n_atoms ** (_COST / 2)
    worth[apart > np.quantile(apart, 1 - _WILDEST)] = 0
    first = np.argsort(-worth, kind="stable")[: (len(apart) + 1) // 2].tolist()
    rest = [i for i in range(len(apart)) if i not in set(first)]
    return [i for pair in zip_longest(first, rest) for i in pair if i is not None]


def interleaved(common: Sequence[int], other: Sequence[int]) -> list[int]:
    """Both orders as one, in fixed shares as long as there are both."""
    found, rest = [], list(other)
    for i, k in enumerate(common):
        found.append(k)
        if rest and i % _COMMON_PER_OTHER == _COMMON_PER_OTHER - 1:
            found.append(rest.pop(0))
    return found + rest
