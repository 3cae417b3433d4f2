"""Networks compiled to machine code: energies, forces and stresses of a batch in one call.

Most of the time of a small molecule goes into the hundreds of small operations that torch starts one by one. `tracing`
makes one graph of them, derivatives included; torch's inductor fuses it and turns it into machine code (C++ on a CPU,
Triton on a GPU), once for each *form*: shape of the backbone, form of the adapter, precision, kind of processor. Values
are inputs of the program. So one program, kept in `machine_code.program_folder()`, serves all adapters of
that form, and opening it takes milliseconds.

    potential.compile()                   # a minute or two, once
    potential.predict(batch)              # from now on, in every process

What could go wrong is checked where it would:

| | |
|---|---|
| a program stands for another network | its name is a hash of all that the graph depends on (`machine_code.form_of`) |
| its results are not those of the network | the first batch of every process is computed by both (`TOLERANCE`) |
| values have changed since (another adapter, an edit) | versions of all tensors are compared at every call |
| somebody looks into the network by hooks of modules | their number is compared at every call |
| it does not cover a case (atoms closer than in training) | it says so itself, and the batch is computed plainly |
| edited weights give radial functions that no spline follows (`radial_table`) | the batch is computed plainly |
| most of the tables would be empty (a crystal among many small molecules) | that batch is computed plainly |
| no compiler, or an operation that inductor does not know | `compile` says so; everything goes on as without |

Plain attributes of modules (`avg_num_neighbors`, say) are read when a program is opened, and not looked at again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted import Adapter, attached
from ..backbone import Backbone
from ..errors import CompilationError
from ..graph import Batch, Found
from .arrangement import Arrangement
from .converted import ConvertedNetwork
from .machine_code import Program, any_made, being_made, build, is_made, named_tensors, path_of, tabled
from .parts import Part, Parts
from .tensor_state import Watched
from .tracing import Inputs, Tables, example, tables_of, trace

# A batch is computed plainly where its tables have more slots than this, and this many times as many as it has edges:
# a few atoms with many neighbours among many with few.
MANY_SLOTS, FILLED = 100_000, 3

# What the messages of a part of a batch may take for each thread, bytes (`parts`).
CACHE_PER_THREAD = 3_300_000
_MANY_COMPOSITIONS = 64

# Largest difference to the network's own results, in units of the largest force (at least 1 eV/A).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def stress_of(strain: Tensor, cell: Tensor) -> Tensor:
    """Gradients of strains (n_graphs, 3, 3), eV, and cells (3 n_graphs, 3), A -> stresses (n_graphs, 3, 3), eV/A^3."""
    stress = strain / torch.linalg.det(cell.view(-1, 3, 3)).abs().view(-1, 1, 1)
    return torch.where(stress.abs() < 1e10, stress, 0)  # as mace-torch does without a volume


def _sources(network: nn.Module, adapter: Adapter | None) -> dict[str, Tensor]:
    """Name -> tensors of values that a graph can take: the network's, and what a merged adapter makes of its own."""
    return {**dict(named_tensors(network)), **(adapter.derived() if adapter is not None else {})}


# --- programs -------------------------------------------------------------------------------------------------------


class CompiledNetwork:
    """A program, with the values of one network.

    Args:
        network: whose values; it has the fast path.
        adapter: what is on it, merged; None if there is none or it is switched off.
        path: the program's files without their endings.

    Raises:
        CompilationError: the files are not there, or not what they should be.
    """

    def __init__(self, network: nn.Module, adapter: Adapter | None, path: Path) -> None:
        self.network, self.adapter = network, adapter
        self._program = Program(path, next(network.parameters()).device)
        self._tabled = tabled(network)
        self._holds = True  # that the same radial MLPs can be given as tables
        self._dtype = next(network.parameters()).dtype
        self._watched = Watched(store for m in network.modules() for store in (m._parameters, m._buffers))
        self._values: list[Tensor] = []
        self._parts = Parts(None)
        self._atoms_per_thread = atoms_in_cache(network)
        self._tables: dict[tuple[int, ...], Tables] = {}

    def __call__(self, batch: Batch, *, stress: bool) -> Found | None:
        """Results of a batch; None where they would not hold, or most of the tables would be empty."""
        if not self._takes(batch.tensors):
            return None
        if batch.tensors["positions"].device.type == "cpu":
            self._parts.most = self._atoms_per_thread * torch.get_num_threads()
        with torch.no_grad():
            self._renew()
            if not self._holds:
                return None
            found = []
            for part in self._parts.of(batch):
                one = self._of_part(part, stress=stress)
                if one is None:
                    return None
                found.append(one)
        return found[0] if len(found) == 1 else _joined(found)

    def _takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a batch has the types of the network: the code looks at addresses alone."""
        same = all(tensors[key].dtype == self._dtype for key in ("positions", "node_attrs", "shifts", "unit_shifts"))
        return same and all(tensors[key].dtype == torch.int64 for key in ("edge_index", "batch", "ptr"))

    def _of_part(self, part: Part, *, stress: bool) -> Found | None:
        if mostly_empty(part.arrangement):
            return None
        inputs = Inputs.of(part.batch, part.arrangement, self._tables_of(part.arrangement.present), stress=stress)
        *found, doubt = self._program(inputs.tensors(), self._values)
        if bool(doubt):
            return None
        cell = part.batch.tensors["cell"]
        return Found(found[0], found[1], stress_of(found[2][:-1], cell) if stress else None)

    def with_values_of_now(self) -> Callable[..., list[Tensor]]:
        """`Inputs.tensors` -> what the program gives, with the values that the network has at present."""
        self._renew()
        if not self._holds:
            raise CompilationError("the network's radial functions have become others than the program can take")
        program, values = self._program, self._values
        return lambda *inputs: program(list(inputs), values)

    def _renew(self) -> None:
        if self._watched.changed():
            self._values = self._program.values(_sources(self.network, self.adapter))
            self._tables.clear()
            self._holds = tabled(self.network) == self._tabled

    def _tables_of(self, present: Tensor) -> Tables:
        key = tuple(present.tolist())
        if key not in self._tables:
            if len(self._tables) >= _MANY_COMPOSITIONS:
                self._tables.clear()
            self._tables[key] = tables_of(self.network, present, compiled=True, frozen=True)
        return self._tables[key]


def _joined(found: Sequence[Found]) -> Found:
    stresses = [one.stress for one in found if one.stress is not None]
    return Found(
        torch.cat([one.node_energy for one in found]),
        torch.cat([one.forces for one in found]),
        torch.cat(stresses) if stresses else None,
    )


def atoms_in_cache(network: nn.Module) -> int:
    """How many atoms' messages fit into a thread's share of the cache, at the neighbours that the network expects."""
    interactions: Any = network.get_submodule("interactions")
    widest = max(interaction.conv_tp.irreps_out.dim for interaction in interactions)
    per_atom = float(interactions[0].avg_num_neighbors) * widest * next(network.parameters()).element_size()
    return max(2, int(CACHE_PER_THREAD / per_atom))


def mostly_empty(arrangement: Arrangement) -> bool:
    """Whether a batch takes longer in tables than plainly."""
    return arrangement.edges.rows.numel() > max(MANY_SLOTS, FILLED * arrangement.edges.slots.shape[1])


@dataclass
class _Opened:
    """A program, and whether it has been compared with its network."""

    program: CompiledNetwork | ConvertedNetwork
    named: str
    proven: bool = False


_ADVICE = {CompiledNetwork: ": remove it, and run `mmea compile` again", ConvertedNetwork: ""}


class Programs:
    """The programs of one backbone, found in the folder and opened where they are needed."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._known: dict[tuple[object, ...], _Opened | None] = {}
        self._hooks: list[Mapping[int, object]] = []  # of all modules, while one adapter is on the network
        self._hooks_with: Adapter | None = None

    def forget(self) -> None:
        """Look into the folder again."""
        self._known = {}

    def predict(
        self, adapter: Adapter | None, batch: Batch, *, stress: bool, plainly: Callable[[], Found]
    ) -> Found | None:
        """Results of a batch from a program; None where there is none for it.

        Args:
            adapter: what is on the network.
            batch: the batch.
            stress: whether its stresses are wanted.
            plainly: computes it with the network itself.
        """
        if batch.tensors["edge_index"].shape[1] == 0 or batch.n_atoms < 2:
            return None
        key, opened = self._opened(adapter, stress=stress)
        if opened is None:
            return None
        if opened.proven:
            return opened.program(batch, stress=stress)
        try:
            found = opened.program(batch, stress=stress)
            if found is None:  # this batch says nothing: the next one will be asked
                return None
            expected = plainly()
            if not bool(torch.isfinite(expected.forces).all()):  # two atoms at one place: this one says nothing either
                return None
            difference, allowed = disagreement(found, expected)
            problem = f"forces differ by {difference:.2g} eV/A, expected at most {allowed:.2g}"
            opened.proven = difference <= allowed
        except Exception as failure:  # whatever a program for something else makes torch raise
            problem = str(failure)
        if opened.proven:
            return found
        self._known[key] = None
        warnings.warn(
            f"{opened.named} does not give what its network gives ({problem}) and is not used"
            + _ADVICE[type(opened.program)],
            stacklevel=3,
        )
        return None

    def proven(self, adapter: Adapter | None, *, stress: bool) -> CompiledNetwork | ConvertedNetwork | None:
        """What stands for the network as it is, if there is one and a batch has shown that it is right."""
        _, opened = self._opened(adapter, stress=stress)
        return opened.program if opened is not None and opened.proven else None

    def unproven(self, adapter: Adapter | None, *, stress: bool) -> bool:
        """Whether there is something to stand for the network as it is that no batch has shown to be right yet."""
        _, opened = self._opened(adapter, stress=stress)
        return opened is not None and not opened.proven

    def _opened(self, adapter: Adapter | None, *, stress: bool) -> tuple[tuple[object, ...], _Opened | None]:
        if attached(self.backbone.network) is not adapter:
            return (), None
        if adapter is not None and not (adapter.merged and adapter.enabled and not adapter.observed):
            return (), None
        if not self._hooks or self._hooks_with is not adapter:
            modules = list(self.backbone.network.modules())
            self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
            self._hooks_with = adapter
        key = (adapter, sum(map(len, self._hooks)), *_situation(self.backbone, adapter, stress))
        try:
            return key, self._known[key]
        except KeyError:
            self._known = {k: v for k, v in self._known.items() if k[0] is adapter}  # others may be gone for ever
            self._known[key] = self._open(adapter, stress=stress)
            return key, self._known[key]

    def _open(self, adapter: Adapter | None, *, stress: bool) -> _Opened | None:
        try:
            if self.backbone.kernels == "cuequivariance":
                return _Opened(ConvertedNetwork(self.backbone, adapter), "the network of cuEquivariance's layers")
            if not any_made() or not is_made(path := _path(self.backbone, stress)):
                return None
            return _Opened(CompiledNetwork(self.backbone.network, adapter, path), f"{path}.pt2")
        except CompilationError as problem:
            warnings.warn(str(problem), stacklevel=4)
            return None


def _path(backbone: Backbone, stress: bool) -> Path:
    return path_of(backbone.network, backbone.head_index, stress)


def _situation(backbone: Backbone, adapter: Adapter | None, stress: bool) -> tuple[object, ...]:
    """Changes whenever `form_of` may: quick to ask, at every call."""
    asked = None if adapter is None else adapter.situation()
    return stress, backbone.head, backbone.dtype, backbone.device, backbone.kernels, asked


def disagreement(one: Found, other: Found) -> tuple[float, float]:
    """Largest difference of two results in forces and node energies, eV/A and eV, and how much rounding explains."""
    scale = max(1.0, float(other.forces.abs().max()), float(other.node_energy.abs().max()))
    pairs = [(one.node_energy, other.node_energy), (one.forces, other.forces)]
    if one.stress is not None and other.stress is not None:
        pairs.append((one.stress, other.stress))
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    return worst, TOLERANCE[other.forces.dtype] * scale


# --- compiling ------------------------------------------------------------------------------------------------------


def compile_program(
    backbone: Backbone, adapter: Adapter | None, *, stress: bool, plainly: Callable[[Batch], Found]
) -> Path:
    """Make the program of this backbone with this adapter as they are, unless it is there.

    Args:
        backbone: on the fast path.
        adapter: what is on it, merged.
        stress: for calls that compute stresses.
        plainly: computes a batch with the network itself.

    Returns:
        its path without ending.

    Raises:
        CompilationError: it cannot be made here, or is not the network: nothing is kept then.
    """
    if adapter is not None and not adapter.merged:
        raise CompilationError("an adapter must be merged before its network is compiled")
    network, path = backbone.network, _path(backbone, stress)
    if is_made(path):
        return path
    head_index = backbone.head_index
    batch = example(
        backbone.elements, backbone.r_max, head_index=head_index, dtype=backbone.dtype, device=backbone.device
    )
    with being_made(path) as made:
        build(trace(network, batch, head_index, stress=stress), _sources(network, adapter), made, one_block=True)
        found = CompiledNetwork(network, adapter, made)(batch, stress=stress)
        if found is not None:
            difference, allowed = disagreement(found, plainly(batch))
            if not difference <= allowed:
                raise CompilationError(
                    f"the compiled network differs from the network by {difference:.2g} eV/A, expected at most "
                    f"{allowed:.2g}: it is not kept"
                )
    return path


__all__ = ["TOLERANCE", "CompiledNetwork", "Found", "Programs", "compile_program", "disagreement", "stress_of"]
