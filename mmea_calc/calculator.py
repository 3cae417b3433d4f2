"""`MMEACalculator`: a backbone with adapters as a calculator of ASE.

One adapter, and the bare backbone beside it:

    atoms.calc = MMEACalculator("aspirin.adapter")
    atoms.get_forces()
    with atoms.calc.adapter_disabled():
        atoms.get_forces()  # the bare backbone's
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from .adapted import attached
from .adapter_file import AdapterFile, read_adapter
from .backbone import EMBEDDED, Backbone, load_backbone
from .committee import COMMITTEE_PROPERTIES, combine
from .config import DEFAULT_BACKBONE, Kernels, Precision
from .errors import AdapterError, BackboneError, DataError
from .graph import SMALLEST_VOLUME, Batch, Graph, check_elements, move, same_neighbours
from .mace_names import PUBLISHED
from .methods import method_named
from .potential import Potential, Prediction
from .recorded_call import RecordedCall

AdapterSource = str | Path | AdapterFile
Results = dict[str, Any]

PROPERTIES = ("energy", "free_energy", "energies", "forces", "stress")


class MMEACalculator(Calculator):
    """Energies, forces and stress of a backbone with one adapter, several to choose from, or a committee of them.

    Args:
        adapter: path of an `.adapter` file (or a file read already), or None for the bare backbone. A list is a
            committee: results are means over its members, and `results` also holds `energy_comm` (n_members,),
            `energy_var`, `forces_comm` (n_members, n_atoms, 3), `forces_var` and, with a stress, `stress_comm`
            (n_members, 6) and `stress_var`; variances are over members, divided by their number. One backbone
            serves all members.
        backbone: name or path, or a loaded `Backbone`, which is then taken over. None: the one named in the
            adapter, or without an adapter the embedded default.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where there is one, else the CPU. A loaded backbone
            stays where it is under "auto".
        dtype: precision of the network, float32 unless given; a loaded backbone keeps its own unless given.
            Positions, reference energies and sums of energies are in float64 in any case.
        head: head of a backbone with several; None: the adapter's.
        fast: False computes everything in mace-torch's own, slower forms, without compiled programs; a loaded backbone
            keeps what it was loaded with. Results are the same to rounding.
        kernels: "cuequivariance" computes with the layers of that package, an extra for GPUs (`load_backbone`).
        stress: None gives a stress for structures that are periodic in three directions. True also gives one for
            others, referred to the volume of their own cell, vacuum included; without a volume there is none.
            False never gives one.

    Energies are total energies: reference energies plus interaction energies, eV; `energies` are per atom. Forces
    in eV/A; stress in eV/A^3, Voigt order xx, yy, zz, yz, xz, xy, positive under tension. All that a structure has
    is computed in one call; nothing is computed again until positions, numbers, cell or pbc change.

    Pickles and copies hold adapters and the backbone's name or path, and load the backbone anew.

    Raises:
        AdapterFileError: a file is damaged, or made for another backbone or head.
        AdapterError: an adapter's tensors do not fit.
        BackboneError: the backbone cannot be loaded; no such device, head or precision.
    """

    # ASE's names, declared by ASE as plain attributes; a committee gives its calculator a longer list of its own.
    implemented_properties = list(PROPERTIES)  # noqa: RUF012
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012
    name = "mmea"

    def __init__(
        self,
        adapter: AdapterSource | Sequence[AdapterSource] | None = None,
        backbone: str | Path | Backbone | None = None,
        *,
        device: str = "auto",
        dtype: Precision | None = None,
        head: str | None = None,
        stress: bool | None = None,
        fast: bool = True,
        kernels: Kernels = "own",
    ) -> None:
        super().__init__()
        sources = _sources(adapter)
        if adapter is not None and not sources:
            raise AdapterError("the list of adapters is empty; expected at least one, or None for the bare backbone")
        files = _named([s if isinstance(s, AdapterFile) else read_adapter(s) for s in sources])
        first = next(iter(files.values()), None)
        self._device = device if not isinstance(backbone, Backbone) or device != "auto" else str(backbone.device)
        self._start(_backbone(backbone, first, device, dtype, head, fast, kernels), stress)
        for name, file in files.items():
            self.load_adapter(name, file)
        self.set_adapter(list(files) or None)

    def _start(self, backbone: Backbone, stress: bool | None) -> None:
        self.potential = Potential(backbone)
        self._recorded = RecordedCall(self.potential) if backbone.device.type == "cuda" else None
        self.stress = stress
        self._files: dict[str, AdapterFile] = {}
        self._active: tuple[str, ...] = ()
        self._mounted: str | None = None  # the adapter that sits on the network
        self._disabled = False
        self._graph: Graph | None = None
        self._batch: Batch | None = None
        self._warned: set[tuple[str, int]] = set()
        self._check_alone()

    def set(self, **settings: Any) -> dict[str, Any]:
        """ASE's way to change a setting; those of this calculator stay as they were when it was made.

        Raises:
            TypeError: for any setting.
        """
        if settings:
            names = ", ".join(settings)
            raise TypeError(f"{names} cannot be changed: make a new MMEACalculator with it (adapters: `set_adapter`)")
        return {}

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The resident backbone."""
        return self.potential.backbone

    @property
    def adapters(self) -> dict[str, AdapterFile]:
        """The loaded adapters by name."""
        return dict(self._files)

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """Names of the adapters in use: none, one, or the members of a committee."""
        return () if self._disabled else self._active

    def load_adapter(self, name: str, adapter: AdapterSource) -> None:
        """Load a further adapter for the resident backbone; `set_adapter` puts it to use.

        Raises:
            AdapterFileError: the file is damaged, or made for another backbone or head.
            AdapterError: the name is taken, or the tensors do not fit. The calculator is as it was then.
        """
        if name in self._files:
            raise AdapterError(f"an adapter called {name!r} is loaded already: choose another name")
        file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
        file.check_backbone(self.backbone)
        if not method_named(file.config.method).equivariant:
            warnings.warn(
                f"adapter {name!r} of method {file.config.method!r} is not equivariant: its energies change when a "
                "structure is turned",
                stacklevel=2,
            )
        # On the device now, so that a committee does not copy its members there at every step.
        here = {key: t.to(self.potential.device, self.potential.dtype) for key, t in file.tensors.items()}
        before = self._mounted
        try:
            self._mount(name, replace(file, tensors=here))
        finally:
            self._mount(before, None if before is None else self._files[before])
        self._files[name] = replace(file, tensors=here)

    def set_adapter(self, names: str | Sequence[str] | None) -> None:
        """Put an adapter to use, or several as a committee; None is the bare backbone. Cached results are dropped.

        Raises:
            AdapterError: no adapter of this name is loaded, one is named twice, or adapters are disabled at present.
        """
        if self._disabled:
            raise AdapterError("adapters are disabled at present: leave the `adapter_disabled()` block first")
        wanted = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        if unknown := [n for n in wanted if n not in self._files]:
            known = ", ".join(self._files) or "none"
            raise AdapterError(f"no adapter called {unknown[0]!r} is loaded; loaded: {known}")
        if len(set(wanted)) < len(wanted):
            raise AdapterError(f"an adapter can be in a committee once, got {', '.join(wanted)}")
        if not wanted:
            self._mount(None, None)
        elif self._mounted not in wanted:
            self._mount(wanted[0], self._files[wanted[0]])
        self._active = wanted
        self._results_changed()

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within this context: the bare backbone with its own reference energies.

        Results from before are there again afterwards, for the structure that they belong to.
        """
        before, cached = self._disabled, (self.atoms, self.results)
        self._disabled = True
        self._results_changed()
        try:
            yield
        finally:
            self._disabled = before
            self._results_changed()
            self.atoms, self.results = cached

    def _results_changed(self) -> None:
        self.reset()
        self._batch = None  # made anew: its elements may be new to what is in use now
        committee = COMMITTEE_PROPERTIES if len(self.active_adapters) > 1 else ()
        self.implemented_properties = [*PROPERTIES, *committee]

    def _mount(self, name: str | None, file: AdapterFile | None) -> None:
        """Have this adapter on the network, its weight updates folded."""
        if name == self._mounted:
            return
        self._mounted = None
        self.potential.use(file)
        if self.potential.adapter is not None:
            for parameter in self.potential.adapter.parameters():
                parameter.requires_grad_(False)
            self.potential.adapter.merge()
        self._mounted = name

    # -- calculation ---------------------------------------------------------------------------------------------

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; ASE asks this before every other question."""
        return super().check_state(_checked(atoms), tol)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Compute all that `atoms` has. ASE calls this; `atoms.get_forces()` and the like are for users.

        Raises:
            DataError: no atoms, positions that are not finite, an element that the backbone lacks.
            PropertyNotImplementedError: a stress is asked for that this structure does not have.
            AdapterError: something else has changed the adapter on the backbone.
        """
        structure: Any = _checked(self.atoms if atoms is None else atoms)
        why_no_stress = self._why_no_stress(structure)
        if why_no_stress and "stress" in properties:
            raise PropertyNotImplementedError(why_no_stress)
        self._check_alone()
        stress = why_no_stress is None
        prediction = self._recorded_prediction(structure, stress)
        results = (
            self._evaluate(self._updated_batch(structure), stress) if prediction is None else _results_of(prediction)
        )
        self.atoms, self.results = structure.copy(), results

    def _recorded_prediction(self, atoms: Atoms, stress: bool) -> Prediction | None:
        """On a GPU, for one adapter or none, on a structure that only moves; otherwise None."""
        if self._recorded is None or self.active_adapters != ((self._mounted,) if self._mounted else ()):
            return None
        return self._recorded.predict(atoms, stress=stress)

    def _check_alone(self) -> None:
        if attached(self.backbone.network) is not self.potential.adapter:
            raise AdapterError("something else has put an adapter on this calculator's backbone: load one of its own")

    def _why_no_stress(self, atoms: Atoms) -> str | None:
        if self.stress is False:
            return "this calculator was made with stress=False"
        if not (atoms.pbc.all() or self.stress):
            return (
                "a structure that is not periodic in all three directions has no stress by default; "
                "MMEACalculator(..., stress=True) gives one that refers to the volume of its cell"
            )
        if atoms.cell.volume < SMALLEST_VOLUME:
            return "a stress refers to a volume, and the cell of this structure has none: give it a cell"
        return None

    def _updated_batch(self, atoms: Atoms) -> Batch:
        """Tensors of the structure: those of the last call with new positions while the neighbours are the same."""
        graph = self.potential.graph(atoms)
        batch = self._batch
        if batch is not None and self._serves(batch) and self._graph and same_neighbours(graph, self._graph):
            move(batch, graph)
        else:
            present = np.unique(graph.numbers)
            check_elements(present, self.backbone.elements, "the structure")
            self._warn_of_unseen(present)
            batch = self.potential.collate([graph])
        self._graph, self._batch = graph, batch
        return batch

    def _serves(self, batch: Batch) -> bool:
        """Whether the backbone, which others may move, still has the precision and device of this batch."""
        like = batch.tensors["positions"]
        return like.dtype == self.potential.dtype and like.device == self.potential.device

    def _warn_of_unseen(self, present: NDArray[np.int64]) -> None:
        for name in self.active_adapters:
            seen = self._files[name].elements
            for number in present if seen else ():
                if int(number) not in seen and (name, int(number)) not in self._warned:
                    self._warned.add((name, int(number)))
                    warnings.warn(
                        f"adapter {name!r} has seen no {chemical_symbols[number]} in training: here it "
                        "extrapolates, with the backbone's reference energy for it",
                        stacklevel=2,
                    )

    def _evaluate(self, batch: Batch, stress: bool) -> Results:
        active = self.active_adapters
        if not active:
            with self.potential.adapter_disabled():
                return self._evaluate_mounted(batch, stress)
        found: dict[str, Results] = {}
        # The one on the network goes first: that saves a switch in every call.
        for name in sorted(active, key=lambda n: n != self._mounted):
            self._mount(name, self._files[name])
            found[name] = self._evaluate_mounted(batch, stress)
        members = [found[name] for name in active]
        return members[0] if len(members) == 1 else combine(members)

    def _evaluate_mounted(self, batch: Batch, stress: bool) -> Results:
        return _results_of(self.potential.predict(batch, stress=stress))

    # -- copying and storing -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Adapters by value (as safetensors), the backbone by name or path: no network is ever pickled."""
        return {
            "backbone": _reference(self.backbone),
            "fingerprint": self.backbone.fingerprint,
            "head": self.backbone.head,
            "device": self._device,
            "dtype": str(self.potential.dtype).removeprefix("torch."),
            "stress": self.stress,
            "fast": self.backbone.fast,
            "kernels": self.backbone.kernels,
            "adapters": [
                (name, replace(file, tensors={}), safetensors.torch.save({k: t.cpu() for k, t in file.tensors.items()}))
                for name, file in self._files.items()
            ],
            "active": self._active,
            # Results of the bare backbone would be taken for the adapter's where the `with` block does not reach.
            "atoms": None if self._disabled else self.atoms,
            "results": {} if self._disabled else self.results,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self._device = state["device"]
        options = {key: state[key] for key in ("head", "device", "dtype", "fast", "kernels")}
        backbone = load_backbone(state["backbone"], **options)
        if backbone.fingerprint != state["fingerprint"]:
            raise BackboneError(
                f"{state['backbone']} is not the backbone that this calculator had: its fingerprint is "
                f"{backbone.fingerprint}, expected {state['fingerprint']}"
            )
        self._start(backbone, state["stress"])
        for name, file, stored in state["adapters"]:
            self.load_adapter(name, replace(file, tensors=safetensors.torch.load(stored)))
        self.set_adapter(state["active"])
        self.atoms, self.results = state["atoms"], dict(state["results"])

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What ASE's databases store of a calculator."""
        return {
            "backbone": self.backbone.name,
            "fingerprint": self.backbone.fingerprint,
            "head": self.backbone.head,
            "adapters": list(self.active_adapters),
            "dtype": str(self.potential.dtype).removeprefix("torch."),
        }


def _checked(atoms: object) -> Atoms:
    if not isinstance(atoms, Atoms):
        raise DataError(f"expected a structure as ase.Atoms, got {type(atoms).__name__}")
    return atoms


def _results_of(prediction: Prediction) -> Results:
    """ASE's results, of a batch of one structure. Raises DataError."""
    assert prediction.forces is not None
    energy = float(prediction.energy[0])
    if not np.isfinite(energy):
        raise DataError(f"the energy is {energy}: are two atoms at the same place?")
    results: Results = {
        "energy": energy,
        "free_energy": energy,
        "energies": prediction.node_energy.cpu().numpy(),
        "forces": prediction.forces.double().cpu().numpy(),
    }
    if prediction.stress is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].double().cpu().numpy())
    return results


def _sources(adapter: object) -> list[AdapterSource]:
    """What was given as a list. Raises AdapterError for what is no adapter."""
    many = isinstance(adapter, Iterable) and not isinstance(adapter, AdapterSource)
    sources: list[Any] = [] if adapter is None else list(adapter) if many else [adapter]  # type: ignore[call-overload]
    if wrong := [s for s in sources if not isinstance(s, AdapterSource)]:
        raise AdapterError(f"expected the path of an adapter, an AdapterFile, or a list of these; got {wrong[0]!r}")
    return sources


def _named(files: Sequence[AdapterFile]) -> dict[str, AdapterFile]:
    """Names for adapters given without one: the files' stems, numbered where they repeat."""
    named: dict[str, AdapterFile] = {}
    for file in files:
        stem = name = file.path.stem if file.path else "adapter"
        count = 1
        while name in named:
            count += 1
            name = f"{stem}-{count}"
        named[name] = file
    return named


def _backbone(
    wanted: str | Path | Backbone | None,
    adapter: AdapterFile | None,
    device: str,
    dtype: Precision | None,
    head: str | None,
    fast: bool,
    kernels: Kernels,
) -> Backbone:
    """The backbone that was asked for, or the one that the adapter names. Raises BackboneError."""
    if isinstance(wanted, Backbone):
        if head not in (None, wanted.head):
            raise BackboneError(f"head {head!r} is asked for, but the given backbone was loaded with {wanted.head!r}")
        return wanted.to(None if device == "auto" else device, dtype)
    if head is None and adapter is not None:
        head = adapter.head
    how: dict[str, Any] = dict(head=head, device=device, dtype=dtype or "float32", fast=fast, kernels=kernels)
    if wanted is not None or adapter is None:
        return load_backbone(wanted or DEFAULT_BACKBONE, **how)
    return adapter.load_backbone(**how)


def _reference(backbone: Backbone) -> str:
    """What `load_backbone` finds this backbone by: the absolute path of its file, or its name."""
    if Path(backbone.source).is_file():
        return str(Path(backbone.source).resolve())
    if backbone.name in EMBEDDED or backbone.name in PUBLISHED:
        return backbone.name
    raise BackboneError(
        f"backbone {backbone.name!r} has neither a name known to mmea nor a file, so a calculator with it cannot be "
        "copied or stored: save it (save_backbone) and load it from there"
    )
