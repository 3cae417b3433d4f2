"""A neighbour list in torch operations: it runs where its tensors are, in time and memory linear in the atoms.

Atoms are wrapped into the cell and sorted into bins along the lattice vectors, between faces at least a cutoff apart
where the cell is that large; a smaller cell is one bin, searched in as many layers of images as the cutoff needs.
Directions that are not periodic have bins where there are atoms, however far apart. Every atom meets those of its own
bin and of half of the bins around it, some of these candidates at a time; what is near is a pair both ways.

A pair is one integer, of sender, receiver and layer of images: sorting these gives the order of the list, and no step
whose rounding may differ between devices decides what is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..neighbours import FloatArray, periodic_cell

# Candidates looked at together: they take some tens of bytes each.
CANDIDATES = 2**20
# Of bins along one direction, so that the number of a bin fits into 64 bits.
MOST_BINS = 2**20


@torch.no_grad()
def pairs_within(positions: Tensor, cell: Tensor, pbc: Tensor | Sequence[bool], cutoff: float) -> tuple[Tensor, Tensor]:
    """Ordered pairs (every pair both ways) closer than `cutoff`, sorted by sender, receiver and unit shift.

    An atom is a neighbour of its images, never of itself; two atoms at one place are neighbours.

    Args:
        positions: (n_atoms, 3), A, in the cell or not.
        cell: (3, 3), A, rows are lattice vectors; those of directions that are not periodic are not used.
        pbc: (3,), the periodic directions.
        cutoff: A.

    Returns:
        Sender and receiver, (2, n_pairs), int64, and lattice vectors crossed, (n_pairs, 3), float64, on the device of
        the positions. From sender to receiver leads positions[receiver] - positions[sender] + unit_shifts @ cell.

    Raises:
        DataError: no atoms, positions or cell that are not finite, a cutoff that is not positive and finite, or
            lattice vectors of periodic directions that are zero or depend on each other.
    """
    box, periodic = _checked(positions, cell, pbc, cutoff)
    x = positions.to(torch.float64)
    n_atoms, device = len(x), x.device
    lattice, is_periodic = torch.as_tensor(box, device=device), torch.as_tensor(periodic, device=device)
    inverse = np.linalg.inv(box)
    fractional = x @ torch.as_tensor(inverse, device=device)
    crossed = torch.where(is_periodic, fractional.floor(), 0.0)

    # The margin is above the rounding of wrapped positions, up to some 10^9 A from the origin.
    reach = cutoff + 1e-6 * (1.0 + cutoff)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)
    grid = [_bins(f, h, p, reach) for f, h, p in zip((fractional - crossed).T, heights, periodic, strict=True)]
    bins, counts, around = (list(part) for part in zip(*grid, strict=True))
    layers = [-(-a // c) if p else 0 for a, c, p in zip(around, counts, periodic, strict=True)]
    images = _box_of(layers, device)
    keys = _keys(x - crossed @ lattice, torch.stack(bins, 1), counts, around, layers, is_periodic, lattice, reach)

    pair, image = keys // len(images), keys % len(images)
    sender, receiver = pair // n_atoms, pair % n_atoms
    unit_shifts = images[image].to(torch.float64) - crossed[receiver] + crossed[sender]
    # Element by element: a matrix product may round differently on another device.
    distance2 = torch.zeros_like(keys, dtype=torch.float64)
    for axis in range(3):
        shift = sum(unit_shifts[:, i] * float(box[i, axis]) for i in range(3))
        vector = x[receiver, axis] - x[sender, axis] + shift
        distance2 += vector * vector
    near = distance2 < cutoff * cutoff
    return torch.stack([sender[near], receiver[near]]), unit_shifts[near]


def _checked(
    positions: Tensor, cell: Tensor, pbc: Tensor | Sequence[bool], cutoff: float
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The cell, completed, and the periodic directions; what makes no list is a DataError."""
    if not (math.isfinite(cutoff) and cutoff > 0):
        raise DataError(f"expected a positive, finite cutoff in A, got {cutoff}: choose another")
    if len(positions) == 0:
        raise DataError("the structure has no atoms; expected at least one")
    bad = (~positions.isfinite().all(1)).nonzero()
    if len(bad):
        raise DataError(
            f"positions must be finite, got NaN or infinity for atom {int(bad[0])} ({len(bad)} atoms in all): "
            "correct or remove the structure"
        )
    given = cell.cpu().to(torch.float64).numpy()
    if not np.isfinite(given).all():
        raise DataError("the cell must be finite, got NaN or infinity: correct or remove the structure")
    periodic = np.array([bool(p) for p in pbc])
    return periodic_cell(given, periodic), periodic


def _bins(coordinate: Tensor, height: float, periodic: bool, reach: float) -> tuple[Tensor, int, int]:
    """Along one direction: each atom's bin, the number of bins, and how many to search on either side.

    Args:
        coordinate: fractional, (n_atoms,); in [0, 1] if periodic.
        height: of the cell in this direction, A.
        periodic: whether it is.
        reach: A.
    """
    if periodic:
        count = min(max(int(height / reach), 1), MOST_BINS)
        # A coordinate just below zero is wrapped to one.
        return (coordinate * count).long().clamp(max=count - 1), count, math.ceil(reach * count / height)
    bins = ((coordinate - coordinate.min()) * (height / reach)).clamp(max=2.0**53).long()
    # Empty bins beyond one between neighbours are left out: an atom that flew away costs nothing.
    occupied, which = torch.unique(bins, return_inverse=True)
    steps = occupied.diff(prepend=occupied[:1]).clamp(max=2)
    bins = steps.cumsum(0).clamp(max=MOST_BINS - 1)[which]
    count = int(bins.max()) + 1
    return bins, count, min(count - 1, 1)


def _box_of(reach: list[int], device: torch.device) -> Tensor:
    """Integer vectors within `reach` of zero, in lexicographic order, so that the last is minus the first."""
    return torch.cartesian_prod(*(torch.arange(-r, r + 1, device=device) for r in reach))


def _number(vectors: Tensor, sizes: list[int]) -> Tensor:
    """The place of integer vectors (..., 3) among all from zero up to `sizes`, in lexicographic order."""
    return (vectors[..., 0] * sizes[1] + vectors[..., 1]) * sizes[2] + vectors[..., 2]


def _keys(
    wrapped: Tensor,
    bins: Tensor,
    counts: list[int],
    around: list[int],
    layers: list[int],
    is_periodic: Tensor,
    lattice: Tensor,
    reach: float,
) -> Tensor:
    """Sorted (sender * n_atoms + receiver) * n_images + image of the pairs of wrapped atoms within `reach` (A)."""
    n_atoms, device = len(wrapped), wrapped.device
    sizes = [2 * a + 1 for a in layers]
    n_images = math.prod(sizes)
    numbers, order = _number(bins, counts).sort()
    occupied, held = torch.unique_consecutive(numbers, return_counts=True)
    ends = held.cumsum(0)
    wrapped, bins = wrapped[order], bins[order]
    columns = wrapped.T.contiguous()
    offsets = _box_of(around, device)
    # The other half sees the same pairs from the other side.
    offsets = offsets[len(offsets) // 2 :]
    per_direction, outermost = torch.tensor(counts, device=device), torch.tensor(layers, device=device)
    found: list[Tensor] = []
    block = max(1, CANDIDATES // (len(offsets) * int(held.max())))
    for start in range(0, n_atoms, block):
        atoms = torch.arange(start, min(start + block, n_atoms), device=device)
        target = bins[atoms, None] + offsets
        layer = target.div(per_direction, rounding_mode="floor")
        number = _number(target - layer * per_direction, counts)
        place = torch.searchsorted(occupied, number).clamp(max=len(occupied) - 1)
        there = (occupied[place] == number) & ((layer == 0) | is_periodic).all(-1)
        first = ends[place] - held[place]
        first[:, 0] = atoms + 1  # of an atom's own bin, those after it
        n_met = torch.where(there, ends[place] - first, 0).flatten()

        row = torch.arange(len(n_met), device=device).repeat_interleave(n_met)
        met = (first.flatten() - n_met.cumsum(0) + n_met)[row] + torch.arange(len(row), device=device)
        origins = (wrapped[atoms, None] - layer.to(torch.float64) @ lattice).flatten(0, 1).T.contiguous()
        distance2 = torch.zeros_like(row, dtype=torch.float64)
        for column, origin in zip(columns, origins, strict=True):
            distance2 += (column[met] - origin[row]).square_()
        near = (distance2 < reach * reach).nonzero().squeeze(1)

        row = row[near]
        one, other = order[start + row // len(offsets)], order[met[near]]
        image = _number(layer + outermost, sizes).flatten()[row]
        found.append((one * n_atoms + other) * n_images + image)
        found.append((other * n_atoms + one) * n_images + (n_images - 1 - image))
    return torch.cat(found).sort().values
