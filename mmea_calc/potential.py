"""A backbone, at most one adapter on it at a time, and reference energies: structures in, energies and forces out.

The total energy of a structure is the sum of its atoms' reference energies, in float64, plus the network's
interaction energy in the network's precision: at -17,000 eV the spacing of float32 numbers is 2 meV.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from ase import Atoms
from torch import Tensor, nn

from .adapted import Adapter, attach
from .adapter_file import AdapterFile
from .backbone import Backbone
from .errors import CompilationError, DataError
from .fast.compiled import CompiledNetwork, Programs, compile_program
from .fast.converted import ConvertedNetwork
from .fast.machine_code import named_tensors
from .fast.tensor_state import State, state_of
from .graph import Batch, Found, Graph, build_graph, charge_of, collate, spin_of


@dataclass
class Prediction:
    """Results for a batch.

    Attributes:
        energy: total energy, (n_graphs,), eV, float64.
        interaction_energy: energy without reference energies, (n_graphs,), eV.
        node_energy: of every atom, reference energy included, (n_atoms,), eV, float64.
        forces: (n_atoms, 3), eV/A, or None.
        stress: (n_graphs, 3, 3), eV/A^3, ASE's sign (positive is tension), or None.
    """

    energy: Tensor
    interaction_energy: Tensor
    node_energy: Tensor
    forces: Tensor | None
    stress: Tensor | None


class Potential:
    """Evaluates structures with a backbone and, if one is set, an adapter.

    Args:
        backbone: the backbone; the potential takes it over and may attach adapters to its network.

    Attributes:
        adapter: handle of the attached adapter, or None.
        reference_energies: atomic number -> eV; the backbone's own unless an adapter brings others.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.adapter: Adapter | None = None
        self._own_energies: dict[int, float] = dict(backbone.atomic_energies)
        self._adapter_energies: dict[int, float] | None = None
        self._charge_told = False
        self._table: tuple[dict[int, float], Tensor] | None = None
        self._references: tuple[dict[int, float], Tensor, Tensor, Tensor, Tensor] | None = None
        self._programs = Programs(backbone)

    # -- adapters ------------------------------------------------------------------------------------------------

    def use(self, file: AdapterFile | None) -> None:
        """Put the adapter of `file` on the backbone, in the place of any other; None: the bare backbone.

        Raises:
            AdapterFileError: it was made for another backbone.
            AdapterError: its tensors do not fit.
        """
        if file is None:
            if self.adapter is not None:
                self.adapter.detach()
                self.adapter = None
            self.reference_energies = self.backbone.atomic_energies
            return
        file.check_backbone(self.backbone)
        if self.adapter is None or self.adapter.config.form() != file.config.form():
            self.use(None)  # from here on a failure leaves the bare backbone, not half of two adapters
            fresh = attach(self.backbone.network, file.config, start=False)
            try:
                fresh.load_state_dict(file.tensors)
            except BaseException:  # Ctrl-C among them: an adapter that nobody holds could not be taken off again
                fresh.detach()
                raise
            self.adapter = fresh
        else:
            self.adapter.load_state_dict(file.tensors)
            self.adapter.config = file.config
        self.reference_energies = {**self.backbone.atomic_energies, **file.reference_energies}

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within this context: the bare backbone with its own reference energies."""
        energies = self._adapter_energies
        try:
            self._adapter_energies = None
            if self.adapter is None:
                yield
            else:
                with self.adapter.disabled():
                    yield
        finally:
            self._adapter_energies = energies

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Within this context the adapter's weight updates are folded: faster, and otherwise the same."""
        adapter = self.adapter
        if adapter is None or adapter.merged:
            yield
            return
        adapter.merge()
        try:
            yield
        finally:
            adapter.unmerge()

    @property
    def reference_energies(self) -> dict[int, float]:
        return self._own_energies if self._adapter_energies is None else self._adapter_energies

    @reference_energies.setter
    def reference_energies(self, energies: dict[int, float]) -> None:
        self._adapter_energies = dict(energies)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def reference_energy_of(self, batch: Batch) -> Tensor:
        """Sum of the reference energies of each structure's atoms, (n_graphs,), eV, float64, where the batch is."""
        return self._references_of(batch)[1]

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def graph(self, atoms: Atoms) -> Graph:
        """Neighbour list within the backbone's cutoff. Raises DataError."""
        self.check_charge(atoms)
        return build_graph(atoms, self.backbone.r_max)

    def check_charge(self, atoms: Atoms) -> None:
        """Warn of a total charge (`atoms.info["charge"]`), once: backbones here compute what is neutral.

        Raises:
            DataError: the backbone knows charges and spins, and the structure is no neutral singlet: its energy would
                be that of another state.
        """
        charge, spin = charge_of(atoms), spin_of(atoms)
        if getattr(self.backbone.network, "embedding_specs", None) and (charge or spin != 1):
            raise DataError(
                f"the structure has a total charge of {charge:g} and a spin multiplicity of {spin:g}: with this "
                "backbone mmea computes neutral singlets alone, use mace-torch's MACECalculator for others"
            )
        if charge and not self._charge_told:
            self._charge_told = True
            warnings.warn(
                f"the structure has a total charge of {charge:g}, of which this backbone knows nothing", stacklevel=3
            )

    def collate(self, graphs: Sequence[Graph], *, device: torch.device | None = None) -> Batch:
        """One batch on a device, the backbone's if none is given, and in its precision. Raises DataError."""
        return collate(
            graphs,
            self.backbone.elements,
            head_index=self.backbone.head_index,
            dtype=self.dtype,
            device=self.device if device is None else device,
        )

    def predict(self, batch: Batch, *, forces: bool = True, stress: bool = False, training: bool = False) -> Prediction:
        """Energies, forces and stress of a batch.

        Args:
            batch: from `collate`.
            forces, stress: what to compute beyond energies.
            training: keep what the gradient of a loss of forces needs; the results are then part of its graph.
        """
        if self.backbone.fast and forces and not training:
            found = self._programs.predict(
                self.adapter, batch, stress=stress, plainly=lambda: self.found_plainly(batch, stress=stress)
            )
            if found is not None:
                return self.totalled(batch, found)
        return self._predict_plainly(batch, forces=forces, stress=stress, training=training)

    def compile(self, *, stress: bool = False) -> Path:
        """Compile the network as it is now, with the adapter's weight updates folded, unless that was done before.

        Args:
            stress: for calls that compute stresses; those without need a program of their own.

        Returns:
            the program's path, without ending. `predict` finds it from now on, in this process and in others.

        Raises:
            CompilationError: see `mmea_calc.fast.compiled`.
        """
        if not self.backbone.fast:
            raise CompilationError("this backbone was loaded with fast=False: load it without")
        if self.backbone.kernels != "own":
            raise CompilationError(f"this backbone was loaded with kernels={self.backbone.kernels!r}: load it without")

        def plainly(batch: Batch) -> Found:
            return self.found_plainly(batch, stress=stress)

        with self.folded():
            path = compile_program(self.backbone, self.adapter, stress=stress, plainly=plainly)
        self._programs.forget()
        return path

    def program(self, *, stress: bool = False) -> Callable[..., list[Tensor]] | None:
        """The network as machine code with its values of now: `tracing.Inputs.tensors` -> what `tracing.evaluator`
        gives. None where there is no program, or no call of `predict` has proven it yet.
        """
        found = self._programs.proven(self.adapter, stress=stress) if self.backbone.fast else None
        return found.with_values_of_now() if isinstance(found, CompiledNetwork) else None

    def stand_in(self, *, stress: bool = False) -> nn.Module | None:
        """The network of other layers, with its values of now. None where there is none, or none is proven yet."""
        found = self._programs.proven(self.adapter, stress=stress) if self.backbone.fast else None
        return found.network() if isinstance(found, ConvertedNetwork) else None

    def unproven(self, *, stress: bool = False) -> bool:
        """Whether there is a `program` or a `stand_in` that only awaits a call of `predict` which proves it."""
        return self.backbone.fast and self._programs.unproven(self.adapter, stress=stress)

    def state(self) -> State:
        """All that predictions depend on, for `tensor_state.same_state`: values of the network and what is on it."""
        network = self.backbone.network
        tensors = [t for _, t in named_tensors(network)]
        asked = None if self.adapter is None else self.adapter.situation()
        return state_of(tensors, self.adapter, self.backbone.head, asked, self.reference_energies.copy())

    def found_plainly(self, batch: Batch, *, stress: bool) -> Found:
        """What a program is to give, from the network itself."""
        prediction = self._predict_plainly(batch, forces=True, stress=stress, training=False)
        assert prediction.forces is not None
        own = prediction.node_energy - self._references_of(batch)[0]
        return Found(own, prediction.forces, prediction.stress)

    def totalled(self, batch: Batch, found: Found) -> Prediction:
        """What was found for a batch, with sums over structures and reference energies."""
        per_atom, per_structure = self._references_of(batch)
        own = found.node_energy.double()
        zero = torch.zeros(batch.n_graphs, dtype=torch.float64, device=self.device)
        interaction = zero.index_add(0, batch.tensors["batch"], own)
        return Prediction(
            energy=interaction + per_structure,
            interaction_energy=interaction.to(self.dtype),
            node_energy=per_atom + own,
            forces=found.forces,
            stress=found.stress,
        )

    def _predict_plainly(self, batch: Batch, *, forces: bool, stress: bool, training: bool) -> Prediction:
        tensors = dict(batch.tensors)
        # The network switches gradients on for the tensor it is given; a fresh one keeps the batch as it is.
        tensors["positions"] = tensors["positions"].detach().clone()
        with torch.set_grad_enabled(training or forces or stress):
            output = self.backbone.network(
                tensors, training=training, compute_force=forces or stress, compute_stress=stress
            )
        interaction = output["energy"]
        per_atom, per_structure = self._references_of(batch)

        def result(tensor: Tensor | None, wanted: bool) -> Tensor | None:
            if tensor is None or not wanted:
                return None
            return tensor if training else tensor.detach()

        interaction = interaction if training else interaction.detach()
        return Prediction(
            energy=per_structure + interaction.double(),
            interaction_energy=interaction,
            node_energy=per_atom + output["node_energy"].detach().double(),
            forces=result(output["forces"], forces),
            stress=result(output["stress"], stress),
        )

    def predict_graphs(
        self, graphs: Sequence[Graph], *, batch_size: int = 16, forces: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Total energies (n_structures,), eV, float64, and forces of every structure, eV/A, float64, on the CPU."""
        energies, all_forces = [], []
        for start in range(0, len(graphs), batch_size):
            some = graphs[start : start + batch_size]
            prediction = self.predict(self.collate(some), forces=forces)
            energies.append(prediction.energy.cpu())
            if prediction.forces is not None:
                all_forces += prediction.forces.double().cpu().split([g.n_atoms for g in some])
        return torch.cat(energies) if energies else torch.zeros(0, dtype=torch.float64), all_forces

    def _references_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Reference energies of the atoms (n_atoms,) and of the structures (n_graphs,), eV, float64.

        Kept for the batch seen last: in dynamics it is the same one at every step, with other positions.
        """
        energies, kept = self.reference_energies, self._references
        numbers, owner = batch.numbers, batch.tensors["batch"]
        # Energies by their values: a user may change one of them.
        if kept is None or kept[1] is not numbers or kept[2] is not owner or kept[0] != energies:
            per_atom = self._reference_table(numbers.device)[numbers]
            zero = torch.zeros(batch.n_graphs, dtype=torch.float64, device=numbers.device)
            self._references = kept = (dict(energies), numbers, owner, per_atom, zero.index_add(0, owner, per_atom))
        return kept[3], kept[4]

    def _reference_table(self, device: torch.device) -> Tensor:
        """By atomic number."""
        energies, kept = self.reference_energies, self._table
        if kept is None or kept[0] != energies or kept[1].device != device:
            table = torch.zeros(120, dtype=torch.float64)
            table[list(energies)] = torch.tensor(list(energies.values()), dtype=torch.float64)
            self._table = kept = (dict(energies), table.to(device))
        return kept[1]
