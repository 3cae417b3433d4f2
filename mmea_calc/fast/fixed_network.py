"""A potential's network on tensors that stay where they are, for calls that are recorded (`recorded`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..graph import Batch
from ..potential import Potential
from .arrangement import arrange_elements
from .full_table import FullTable
from .tracing import Inputs, evaluator, tables_of


class FixedNetwork:
    """Energies of atoms and forces for one set of atoms, with the edges of a full table.

    Args:
        potential: the backbone, with what is on it. Its values are those of now: see `Potential.state`.
        batch: elements, structures and cells; its positions and edges are not looked at.
        table: the edges. What it holds may change, its tensors may not.
        stress: with the gradient of a strain.
        plainly: not by a program; hooks of modules are called then.
    """

    def __init__(
        self, potential: Potential, batch: Batch, table: FullTable, *, stress: bool = False, plainly: bool = False
    ) -> None:
        other = None if plainly else potential.stand_in(stress=stress)
        network, elements = other or potential.backbone.network, arrange_elements(batch.tensors["node_attrs"])
        program = None if plainly or other is not None else potential.program(stress=stress)
        compiled = program is not None
        tables = tables_of(network, elements[1], compiled=compiled, frozen=True)
        # A recording reads them where they are, and whoever merges the adapter again makes others in their place.
        self._derived = {} if potential.adapter is None else potential.adapter.derived()
        tensors = {**batch.tensors, "edge_index": table.index}
        fixed = Batch(tensors, batch.numbers, batch.atoms_per_graph)
        self._inputs = Inputs.of(fixed, table.arrangement(elements), tables, stress=stress)
        head_index = potential.backbone.head_index
        self._run: Callable[..., Sequence[Tensor]] = program or evaluator(
            network, self._inputs, head_index, compiled=False
        )

    def __call__(self, positions: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The network's results.

        Args:
            positions: (n_atoms, 3), A, in the precision of the network.
            shifts: of the edges, (n_edges, 3), A, likewise.

        Returns:
            energies of atoms (n_atoms,), eV, without reference energies; forces (n_atoms, 3), eV/A; the gradient of a
            strain of each structure (n_graphs, 3, 3), eV, or None; whether these do not hold, so that the plain path
            is to be asked, a bool tensor without dimensions.
        """
        self._inputs.batch.update(positions=positions, shifts=shifts)
        node_energy, forces, *strain, doubt = self._run(*self._inputs.tensors())
        return node_energy, forces, strain[0][:-1] if strain else None, doubt


__all__ = ["FixedNetwork"]
