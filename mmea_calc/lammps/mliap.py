"""A backbone with its adapter as LAMMPS's `pair_style mliap unified` asks for it.

LAMMPS divides the atoms over domains, one per process. A domain hands over its own atoms, copies of the atoms around
it (*ghosts*), and every pair (i, j) of an own atom i and a neighbour j with r_ij = x_j - x_i; it takes the energy of
each own atom and, for each pair, dE/dr_ij, which it adds to the force on i and takes from that on j (LAMMPS,
`src/ML-IAP/mliap_unified.cpp`).

A message passing network needs the features of ghosts in every layer but the first. They are computed where those atoms
are owned and fetched by `forward_exchange`; on the way back, `reverse_exchange` returns the gradients and adds them up.
Both are calls in which all processes take part, so a domain without atoms makes them as well. Everything an adapter
does (gates per atom, changes of weights, fades per pair) needs nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch.nn import functional as F

from ..adapter_file import AdapterFile
from ..backbone import Backbone
from ..errors import EngineError
from ..mace_networks import domain_energies, reason_no_domains
from ..potential import Potential


class MLIAPPotential:
    """What LAMMPS is given: `lammps.mliap.load_unified_kokkos` takes it, `export_mliap` puts it into a file.

    Args:
        backbone: is taken over.
        file: the adapter, or None for the bare backbone.
        stored: what its pickle holds (see `mmea_calc.lammps.export`); without it, it cannot be pickled.

    Attributes:
        element_types: symbols of the elements, in the order of the numbers that LAMMPS uses for them.
        rcutfac: half the cutoff, A; cutoff: the cutoff, A.
        ndescriptors, nparams: 1; LAMMPS asks for them, and they mean nothing here.
        interface: LAMMPS's own, which it puts here.
        widths: numbers per atom in each exchange, in the order of the forward exchanges.

    Raises:
        EngineError: networks of this kind cannot be spread over domains.
        AdapterFileError: the adapter was made for another backbone.
        AdapterError: its tensors do not fit.
    """

    def __init__(self, backbone: Backbone, file: AdapterFile | None, stored: dict[str, Any] | None = None) -> None:
        if reason := reason_no_domains(backbone.network):
            raise EngineError(
                f"backbone {backbone.name!r} cannot be used with ML-IAP: {reason}; "
                "`mmea_calc.lammps.start_lammps` runs it in one process"
            )
        self.potential, self.file, self.stored = Potential(backbone), file, stored
        self.interface: Any = None
        self.element_types = [chemical_symbols[z] for z in backbone.elements]
        self.ndescriptors = self.nparams = 1
        self.cutoff = backbone.r_max
        self.rcutfac = 0.5 * backbone.r_max
        self._elements: Tensor | None = None
        self._one_hot: Tensor | None = None
        self._mount(backbone.device)
        self.widths = self._exchanged_widths()

    def compute_descriptors(self, data: Any) -> None:
        """LAMMPS calls this before `compute_forces`; nothing is to do."""

    def compute_gradients(self, data: Any) -> None:
        """LAMMPS calls this before `compute_forces`; nothing is to do."""

    def compute_forces(self, data: Any) -> None:
        """Energies (eV, totals) and pair forces (eV/A) of one domain; all processes call this at every step.

        Args:
            data: LAMMPS's MLIAPData, on the CPU or on a GPU; the network follows it there.

        Raises:
            EngineError: LAMMPS runs without Kokkos; an atom type is mapped to no element.
        """
        n_local, n_atoms, n_pairs = int(getattr(data, "nlocal", data.nlistatoms)), int(data.ntotal), int(data.npairs)
        if data.nlistatoms != n_local:
            raise EngineError(
                f"the pair style has {data.nlistatoms} of the {n_local} atoms of this domain: ML-IAP potentials of "
                "mmea take all atoms, so do not use them in pair_style hybrid"
            )
        # LAMMPS's arrays cannot be asked for while they are empty.
        if n_atoms:
            self._renew(torch.as_tensor(data.elems).to(torch.int64, copy=True))
        exchange = Exchange(data)
        if n_local == 0:
            self._only_exchange(exchange, n_atoms)
            data.energy = 0.0
            return
        like = self.potential.backbone
        assert self._one_hot is not None
        assert self._elements is not None
        if n_pairs:
            edges = torch.stack([torch.as_tensor(data.pair_j), torch.as_tensor(data.pair_i)]).to(
                like.device, torch.int64
            )
            vectors = (-torch.as_tensor(data.rij)).to(like.device, like.dtype)  # mace's run from sender to receiver
        else:
            edges = self._elements.new_zeros(2, 0)
            vectors = self._one_hot.new_zeros(0, 3)
        interaction = self._interaction(vectors, self._one_hot, edges, n_local, exchange)
        (of_vectors,) = torch.autograd.grad(interaction.sum(), vectors)
        energies = self._reference[self._elements[:n_local]] + interaction.detach().double()
        data.energy = float(energies.sum())
        _set_energies(data, energies)
        if n_pairs:
            _set_forces(data, -of_vectors.double())

    def _interaction(self, vectors: Tensor, one_hot: Tensor, edges: Tensor, n_local: int, exchange: Exchange) -> Tensor:
        backbone = self.potential.backbone
        with torch.enable_grad():
            return domain_energies(
                backbone.network,
                vectors.requires_grad_(True),
                one_hot,
                edges,
                n_local=n_local,
                head_index=backbone.head_index,
                exchange=exchange,
            )

    def _mount(self, device: torch.device) -> None:
        """Backbone and adapter on `device`, folded where that is possible."""
        potential = self.potential
        potential.use(None)
        potential.backbone.to(device)
        if self.file is not None:
            potential.use(self.file)
        if potential.adapter is not None:
            for parameter in potential.adapter.parameters():
                parameter.requires_grad_(False)
            potential.adapter.merge()
        energies = [potential.reference_energies[z] for z in potential.backbone.elements]
        self._reference = torch.tensor(energies, dtype=torch.float64, device=device)
        self._elements = self._one_hot = None

    def _renew(self, elements: Tensor) -> None:
        """Follow LAMMPS to its device; one-hot elements of own atoms and ghosts, kept while they stay the same."""
        backbone = self.potential.backbone
        if elements.device != backbone.device:
            self._mount(elements.device)
        if self._elements is None or not torch.equal(elements, self._elements):
            if int(elements.min()) < 0:
                raise EngineError("an atom type has no element: name one for each type in `pair_coeff * *`, not NULL")
            self._elements = elements
            self._one_hot = F.one_hot(elements, len(self.element_types)).to(backbone.dtype)

    def _exchanged_widths(self) -> list[int]:
        """What the exchanges of this network are, found by two atoms that no other domain has part in."""
        backbone, seen = self.potential.backbone, _Recorder()
        one_hot = torch.zeros(2, len(self.element_types), dtype=backbone.dtype, device=backbone.device)
        one_hot[:, 0] = 1
        vectors = one_hot.new_tensor([[1.0, 0, 0], [-1.0, 0, 0]])
        edges = torch.tensor([[0, 1], [1, 0]], device=backbone.device)
        self._interaction(vectors, one_hot, edges, 2, Exchange(seen))
        return seen.widths

    def _only_exchange(self, exchange: Exchange, n_ghosts: int) -> None:
        """The part in the exchanges of a domain that owns no atoms."""
        backbone = self.potential.backbone
        for widths, exchanged in (
            (self.widths, exchange.forward_exchange),
            (reversed(self.widths), exchange.reverse_exchange),
        ):
            for width in widths:
                nothing = torch.zeros(n_ghosts, width, dtype=backbone.dtype, device=backbone.device)
                exchanged(nothing, torch.empty_like(nothing), width)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.stored is None:
            raise EngineError("this potential was not made for a file: use mmea_calc.lammps.export_mliap")
        from .export import restore

        return restore, (self.stored,)


class Exchange:
    """LAMMPS's exchanges, of whole tensors.

    LAMMPS takes addresses of arrays that are contiguous, on its own stream; gradients need not be contiguous.

    Args:
        data: LAMMPS's MLIAPData.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    def forward_exchange(self, source: Tensor, target: Tensor, width: int) -> None:
        """Features of own atoms (n_atoms, width) into `target`, those of ghosts from their owners."""
        self._call("forward_exchange", source, target, width)

    def reverse_exchange(self, source: Tensor, target: Tensor, width: int) -> None:
        """Gradients (n_atoms, width) into `target`, those of ghosts added to their owners'."""
        self._call("reverse_exchange", source, target, width)

    def _call(self, name: str, source: Tensor, target: Tensor, width: int) -> None:
        if not hasattr(self._data, name):
            raise EngineError(
                "this LAMMPS offers ML-IAP no exchange of features between domains: it runs without Kokkos (start it "
                "with `-k on g 1 -sf kk`), or is older than spring 2025"
            )
        whole = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        _wait(source)
        getattr(self._data, name)(source.contiguous(), whole, int(width))
        _wait(source)
        target.copy_(whole)


class _Recorder:
    """MLIAPData of a domain without ghosts that notes what is exchanged."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def forward_exchange(self, source: Tensor, target: Tensor, width: int) -> None:
        self.widths.append(width)
        target.copy_(source)


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def _set_energies(data: Any, energies: Tensor) -> None:
    """Atomic energies in the order of LAMMPS's list of atoms."""
    order = torch.as_tensor(data.iatoms).to(energies.device, torch.int64)[: data.nlistatoms]
    energies = energies[order]
    try:
        data.eatoms = energies.cpu().numpy()
    except AttributeError:  # with Kokkos the array itself is lent, and is not replaced
        torch.as_tensor(data.eatoms).copy_(energies)


def _set_forces(data: Any, pair_forces: Tensor) -> None:
    """dE/dr_ij for all pairs, (n_pairs, 3), eV/A."""
    pair_forces = pair_forces.contiguous()
    _wait(pair_forces)
    data.update_pair_forces(pair_forces if pair_forces.is_cuda else pair_forces.numpy())
    _wait(pair_forces)
