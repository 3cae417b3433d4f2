"""A double of what LAMMPS's ML-IAP gives to and takes from a potential: domains, ghosts, pairs, exchanges.

The interface is that of `mliap_unified_couple_kokkos.pyx` and, without exchanges, `mliap_unified_couple.pyx` of LAMMPS:
names, shapes and types of arrays, what can be read or set, what exchanges do to own atoms and to ghosts. Domains run in
threads of their own and meet in the exchanges, as processes do in MPI.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from numpy.typing import NDArray
from torch import Tensor

from mmea_calc.graph import build_graph

SKIN = 0.5  # of LAMMPS's lists, A: ghosts lie up to the cutoff and the skin away, pairs within the cutoff alone
PATIENCE = 20.0  # seconds until a domain that others wait for is given up


@dataclass
class Domain:
    """One process's part: atoms by their numbers in the structure, own ones first, and pairs of own atoms."""

    atoms: NDArray[np.int64]
    n_local: int
    pair_i: NDArray[np.int32]
    pair_j: NDArray[np.int32]
    rij: NDArray[np.float64]

    @property
    def n_atoms(self) -> int:
        return len(self.atoms)


def decompose(atoms: Atoms, r_max: float, grid: tuple[int, int, int], seed: int = 0) -> list[Domain]:
    """The structure over a grid of bricks; own atoms, ghosts and pairs come in random order, as they may in LAMMPS."""
    generator = np.random.default_rng(seed)
    graph = build_graph(atoms, r_max + SKIN)
    low, cell = np.zeros(3), graph.cell
    if not graph.pbc.any():
        low, cell = graph.positions.min(axis=0), np.diag(np.ptp(graph.positions, axis=0) + 1e-6)
    fractional = (graph.positions - low) @ np.linalg.inv(cell)
    bricks = np.minimum((fractional * grid).astype(int), np.array(grid) - 1)
    owner = np.ravel_multi_index(bricks.T, grid)
    senders, receivers = graph.edge_index
    vectors = graph.positions[receivers] - graph.positions[senders] + graph.unit_shifts @ graph.cell
    near = np.linalg.norm(vectors, axis=1) < r_max
    domains = []
    for number in range(int(np.prod(grid))):
        own = generator.permutation(np.flatnonzero(owner == number))
        mine = generator.permutation(np.flatnonzero(owner[receivers] == number))
        images = [(int(senders[e]), *(int(-s) for s in graph.unit_shifts[e])) for e in mine]
        row: dict[tuple[int, ...], int] = {(int(atom), 0, 0, 0): i for i, atom in enumerate(own)}
        for image in images:
            row.setdefault(image, len(row))
        pairs = [(row[int(receivers[e]), 0, 0, 0], row[k], e) for k, e in zip(images, mine, strict=True) if near[e]]
        i, j, edges = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
        domains.append(
            Domain(
                np.array([image[0] for image in row], dtype=np.int64),
                len(own),
                i.astype(np.int32),
                j.astype(np.int32),
                np.ascontiguousarray(-vectors[edges]),
            )
        )
    return domains


class World:
    """What connects the domains."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self.domains = list(domains)
        self.rank_and_row = {
            int(atom): (rank, row) for rank, d in enumerate(domains) for row, atom in enumerate(d.atoms[: d.n_local])
        }
        self.barrier = threading.Barrier(len(domains), timeout=PATIENCE)
        self.sent: list[Tensor | None] = [None] * len(domains)
        self.calls: list[list[tuple[str, int]]] = [[] for _ in domains]

    def meet(self, rank: int, name: str, source: Tensor, width: int) -> list[Tensor]:
        """What every domain gave to this exchange."""
        self.calls[rank].append((name, width))
        self.sent[rank] = source.clone()
        self.barrier.wait()
        assert len({tuple(calls) for calls in self.calls}) == 1, "processes are in different exchanges"
        sent = [s for s in self.sent if s is not None]
        self.barrier.wait()
        return sent


@dataclass
class Results:
    """Of all domains together."""

    energy: float
    energies: NDArray[np.float64]
    forces: NDArray[np.float64]
    virial: NDArray[np.float64]
    calls: list[list[tuple[str, int]]] = field(default_factory=list)


class PlainData:
    """MLIAPData without Kokkos: no exchanges; atomic energies are taken, not lent."""

    def __init__(self, domain: Domain, elements: NDArray[np.int32]) -> None:
        self._domain, self._elements = domain, elements
        generator = np.random.default_rng(domain.n_local)
        self._list = generator.permutation(domain.n_local).astype(np.int32)
        self._eatoms = np.full(domain.n_local, np.nan)
        self.forces = np.zeros((domain.n_atoms, 3))
        self.virial = np.zeros((3, 3))
        self.energy = np.nan
        self.ntotal, self.npairs = domain.n_atoms, len(domain.pair_i)
        self.nlistatoms = self.natomneigh = domain.n_local

    @staticmethod
    def _lent(array: NDArray[Any]) -> NDArray[Any]:
        # Cython cannot make a view of an empty array.
        if array.shape[0] == 0:
            raise ValueError("Invalid shape in axis 0: 0.")
        return array

    elems = property(lambda self: self._lent(self._elements))
    iatoms = property(lambda self: self._lent(self._list))
    pair_i = property(lambda self: self._lent(self._domain.pair_i))
    jatoms = property(lambda self: self._lent(self._domain.pair_j))
    pair_j = jatoms
    rij = property(lambda self: self._lent(self._domain.rij))

    def _take_energies(self, value: NDArray[np.float64]) -> None:
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.float64
        self._eatoms[:] = value

    eatoms: Any = property(None, _take_energies)

    def update_pair_forces(self, fij: NDArray[np.float64]) -> None:
        assert isinstance(fij, np.ndarray)
        assert fij.dtype == np.float64
        assert fij.flags.c_contiguous
        assert fij.shape == (self.npairs, 3)
        assert self.npairs > 0
        np.add.at(self.forces, self._domain.pair_i, fij)
        np.add.at(self.forces, self._domain.pair_j, -fij)
        self.virial -= self._domain.rij.T @ fij

    @property
    def energies(self) -> NDArray[np.float64]:
        """By own atom: the list of atoms may be in another order."""
        result = np.empty(len(self._list))
        result[self._list] = self._eatoms
        return result


class KokkosData(PlainData):
    """MLIAPData with Kokkos, on the CPU."""

    def __init__(self, domain: Domain, elements: NDArray[np.int32], world: World, rank: int) -> None:
        super().__init__(domain, elements)
        self.nlocal = domain.n_local
        self._world, self._rank = world, rank

    eatoms = property(lambda self: self._lent(self._eatoms))

    def _start(self, name: str, source: Tensor, target: Tensor, width: int) -> list[Tensor]:
        # LAMMPS sees addresses alone.
        assert source.dtype == target.dtype
        assert source.dtype in (torch.float32, torch.float64)
        assert source.is_contiguous()
        assert target.is_contiguous()
        assert source.data_ptr() != target.data_ptr() or not source.numel()
        assert source.numel() == target.numel() == self.ntotal * width
        return self._world.meet(self._rank, name, source.detach().view(self.ntotal, width), width)

    def forward_exchange(self, source: Tensor, target: Tensor, width: int) -> None:
        sent = self._start("forward", source, target, width)
        target.copy_(source)
        for row in range(self.nlocal, self.ntotal):
            rank, own = self._world.rank_and_row[int(self._domain.atoms[row])]
            target.view(self.ntotal, width)[row] = sent[rank][own]

    def reverse_exchange(self, source: Tensor, target: Tensor, width: int) -> None:
        sent = self._start("reverse", source, target, width)
        rows = target.view(self.ntotal, width)
        target.copy_(source)
        for rank, domain in enumerate(self._world.domains):
            for row in range(domain.n_local, domain.n_atoms):
                owner, own = self._world.rank_and_row[int(domain.atoms[row])]
                if owner == self._rank:
                    rows[own] += sent[rank][row]
        rows[self.nlocal :] = 0


def elements_of(potential: Any, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
    """What `pair_coeff * *` makes of atomic numbers."""
    order = [atomic_numbers[symbol] for symbol in potential.element_types]
    return np.array([order.index(z) for z in numbers], dtype=np.int32)


def evaluate(
    potentials: Sequence[Any],
    atoms: Atoms,
    grid: tuple[int, int, int],
    seed: int = 0,
    data_class: Callable[..., KokkosData] = KokkosData,
) -> Results:
    """One step of LAMMPS with a process per potential."""
    domains = decompose(atoms, 2 * potentials[0].rcutfac, grid, seed)
    assert len(domains) == len(potentials)
    world = World(domains)
    data = [
        data_class(d, elements_of(p, atoms.numbers[d.atoms]), world, rank)
        for rank, (d, p) in enumerate(zip(domains, potentials, strict=True))
    ]
    problems: list[BaseException] = []

    def process(rank: int) -> None:
        try:
            potentials[rank].compute_descriptors(data[rank])
            potentials[rank].compute_gradients(data[rank])
            potentials[rank].compute_forces(data[rank])
        except BaseException as problem:
            problems.append(problem)
            world.barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem in sorted(problems, key=lambda p: isinstance(p, threading.BrokenBarrierError)):
        raise problem
    forces, energies = np.zeros((len(atoms), 3)), np.full(len(atoms), np.nan)
    for domain, part in zip(domains, data, strict=True):
        np.add.at(forces, domain.atoms, part.forces)  # `newton on`: forces on ghosts go to their owners
        energies[domain.atoms[: domain.n_local]] = part.energies
    return Results(sum(d.energy for d in data), energies, forces, np.sum([d.virial for d in data], axis=0), world.calls)
