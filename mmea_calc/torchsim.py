"""`MMEAModel`: a backbone with an adapter as a model of TorchSim (the package torch-sim-atomistic).

    model = MMEAModel("aspirin.adapter")
    torch_sim.optimize(system=structures, model=model, optimizer=torch_sim.fire)

Importing this module imports TorchSim.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from .adapter_file import AdapterFile, read_adapter
from .backbone import Backbone, load_backbone
from .config import DEFAULT_BACKBONE, Precision
from .errors import DataError, EngineError
from .md.forces import ReplicaForces
from .md.simulation import check_equivariant
from .md.state import Layout, Replica
from .potential import Potential

try:
    from torch_sim.models.interface import ModelInterface
    from torch_sim.state import SimState
except ImportError as problem:
    raise EngineError(
        f"TorchSim cannot be imported ({problem}): pip install 'mmea[torch-sim]' (Python 3.11 or newer)"
    ) from problem

MemoryScaling = Literal["n_atoms_x_density", "n_atoms"]


class MMEAModel(ModelInterface):
    """Energies, forces and stress of all systems of a state in one call of the network.

    Args:
        adapter: path of an `.adapter` file (or a file read already), or None for the bare backbone.
        backbone: name or path, or a loaded `Backbone`, which is then taken over. None: the one named in the adapter,
            or without an adapter the embedded default.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where there is one, else the CPU.
        dtype: precision of the network alone. States are in float64 whatever it is (`model.dtype`): at -17,000 eV the
            spacing of float32 energies is 2 meV.
        head: head of a backbone with several; None: the adapter's.
        compute_forces, compute_stress: what a call computes beyond energies; both may be set later.
        memory_scales_with: what TorchSim's autobatching measures systems by. The default, density times atoms, needs
            a cell; for molecules without one, give "n_atoms".
        force: take an adapter whose method is not equivariant.

    A state's results are a dictionary in the state's precision: `energy` (n_systems,), total, eV; `forces`
    (n_atoms, 3), eV/A; `stress` (n_systems, 3, 3), eV/A^3, positive under tension. The stress of a system that is not
    periodic refers to the volume of its cell, and is zero when it has none.

    Neighbour lists are kept while numbers, cells and systems stay the same, and renewed as atoms move.

    Raises:
        AdapterFileError: the file is damaged, or made for another backbone.
        AdapterError: an adapter's tensors do not fit.
        BackboneError: the backbone cannot be loaded; no such device, head or precision.
        DynamicsError: an adapter that is not equivariant.
    """

    def __init__(
        self,
        adapter: str | Path | AdapterFile | None = None,
        backbone: str | Path | Backbone | None = None,
        *,
        device: str = "auto",
        dtype: Precision = "float32",
        head: str | None = None,
        compute_forces: bool = True,
        compute_stress: bool = True,
        memory_scales_with: MemoryScaling = "n_atoms_x_density",
        force: bool = False,
    ) -> None:
        super().__init__()
        file = read_adapter(adapter) if isinstance(adapter, str | Path) else adapter
        if not isinstance(backbone, Backbone):
            named = backbone or (file.backbone if file is not None else DEFAULT_BACKBONE)
            own_head = head or (file.head if file is not None else None)
            backbone = load_backbone(named, head=own_head, device=device, dtype=dtype)
        self.potential = Potential(backbone)
        self.potential.use(file)
        check_equivariant(self.potential, force)
        if self.potential.adapter is not None:
            for parameter in self.potential.adapter.parameters():
                parameter.requires_grad_(False)
            self.potential.adapter.merge()
        self._device, self._dtype = self.potential.device, torch.float64
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        self._memory_scales_with = memory_scales_with
        self._unseen = set(backbone.elements) - set(file.elements) if file is not None and file.elements else set()
        self._forces: ReplicaForces | None = None
        self._made_for: tuple[Tensor, Tensor, Tensor, bool] | None = None

    @property
    def compute_forces(self) -> bool:
        """Whether a call computes forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, compute_forces: bool) -> None:
        self._compute_forces = compute_forces

    @property
    def compute_stress(self) -> bool:
        """Whether a call computes stresses."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute_stress: bool) -> None:
        self._compute_stress = compute_stress

    def forward(self, state: SimState | dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """Results of a state, or of a dictionary with a state's fields; see the class.

        Raises:
            DataError: an element that the backbone lacks, positions that are not finite, a periodic system whose cell
                has no volume, a state on another device.
        """
        if isinstance(state, dict):
            state = SimState(**{"masses": torch.ones_like(state["positions"][:, 0]), **state})
        if state.device != self._device:
            raise DataError(f"expected a state on {self._device}, where the model is, got one on {state.device}")
        positions = state.positions.detach().double()
        if not bool(torch.isfinite(positions).all()):
            bad = int((~torch.isfinite(positions).all(1)).nonzero()[0])
            raise DataError(f"positions must be finite, got NaN or infinity for atom {bad} of the batch")
        prediction = self._forces_of(state).predict(positions, forces=self._compute_forces, stress=self._compute_stress)
        results = {"energy": prediction.energy.to(state.dtype)}
        if prediction.forces is not None:
            results["forces"] = prediction.forces.to(state.dtype)
        if prediction.stress is not None:
            has_volume = torch.linalg.det(state.cell.double()).abs() > 1e-8
            stress = torch.where(has_volume[:, None, None], prediction.stress.double(), 0.0)
            results["stress"] = stress.to(state.dtype)
        return results

    def _forces_of(self, state: SimState) -> ReplicaForces:
        """Batch and neighbour lists of these systems, those of the last call if nothing but positions has changed."""
        now = (state.atomic_numbers, state.system_idx, state.cell, bool(state.pbc))
        if self._forces is None or self._made_for is None or not _same(now, self._made_for):
            self._warn_of_unseen(state.atomic_numbers)
            self._forces = ReplicaForces(self.potential, self._layout(state))
            self._made_for = (*(t.clone() for t in now[:3]), now[3])
        return self._forces

    def _warn_of_unseen(self, numbers: Tensor) -> None:
        for number in sorted(self._unseen & set(numbers.tolist())):
            self._unseen.discard(number)
            warnings.warn(
                f"the adapter has seen no {chemical_symbols[number]} in training: here it extrapolates, with the "
                "backbone's reference energy for it",
                stacklevel=5,
            )

    def _layout(self, state: SimState) -> Layout:
        counts = state.system_idx.bincount().tolist()
        numbers = state.atomic_numbers.detach().cpu().split(counts)
        positions = state.positions.detach().double().cpu().split(counts)
        cells = state.row_vector_cell.detach().double().cpu()
        systems = zip(numbers, positions, cells, strict=True)
        atoms = [Atoms(z.numpy(), x.numpy(), cell=cell.numpy(), pbc=bool(state.pbc)) for z, x, cell in systems]
        # Temperatures are the integrator's business.
        return Layout([Replica(i, 0.0, 0, one) for i, one in enumerate(atoms)], device=self._device)


def _same(one: tuple[Tensor, Tensor, Tensor, bool], other: tuple[Tensor, Tensor, Tensor, bool]) -> bool:
    return one[3] == other[3] and all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
