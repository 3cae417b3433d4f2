"""The molecules that fine-tuning replays (`training.replay`): geometries alone, since the backbone makes their labels.

    mmea pretrain pool data/pbe/train-*.npz --broad FOLDER/valid.npz --out replay_molecules.npz

takes all structures of the first sets and some of the last one, which has larger molecules, and leaves out isomers of
the benchmark molecules, so that tables of what is forgotten remain fair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from .choose import composition, compositions_left_out
from .dataset import check_ending, read_arrays, spans, write_arrays


def pool(sets: Sequence[Path], *, broad: Path, out: Path, number: int = 500, seed: int = 0) -> int:
    """Write OUT: `numbers` (atoms), `n_atoms` (structures), `positions` (atoms, 3; A).

    Args:
        sets: packed sets that are taken whole.
        broad: a packed set that some are drawn from.
        out: .npz file to write.
        number: how many are drawn.
        seed: of the draw.

    Returns:
        how many structures there are.

    Raises:
        DataError: a set cannot be read, `broad` has too few structures, or the name does not end in .npz.
    """
    check_ending(out)
    chosen, left = _structures(sets), _structures([broad])
    if len(left) < number:
        raise DataError(f"{broad} has {len(left)} structures that are no isomers of benchmark molecules, not {number}")
    chosen += [left[i] for i in np.random.default_rng(seed).permutation(len(left))[:number]]
    write_arrays(
        out,
        numbers=np.concatenate([numbers for numbers, _ in chosen]).astype(np.uint8),
        n_atoms=np.array([len(numbers) for numbers, _ in chosen], np.uint8),
        positions=np.concatenate([positions for _, positions in chosen]).astype("f4"),
    )
    return len(chosen)


def _structures(files: Sequence[Path]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Atomic numbers and positions, without isomers of the benchmark molecules."""
    arrays, left_out = read_arrays(files), compositions_left_out()
    both = [(arrays["numbers"][span], arrays["positions"][span]) for span in spans(arrays)]
    return [one for one in both if composition(one[0].astype(np.int64)) not in left_out]


__all__ = ["pool"]
