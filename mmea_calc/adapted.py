"""Attach an adapter to a frozen network, switch it, take it off again.

    adapter = attach(network, AdapterConfig(method="mmea"))
    network(batch)                    # adapted
    with adapter.disabled():
        network(batch)                # the backbone, bit for bit
    adapter.detach()

Gates (and the bottlenecks of the baseline that is not equivariant) are forward hooks on the network's own linear
layers (`methods.linear_layers`), and so is the fade of radial functions at short distances; weight updates are
parametrizations (`torch.nn.utils.parametrize`). All live inside the given network and nowhere else, move with it
(`.to`), and leave nothing behind when detached.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ._e3nn import FullyConnectedNet, o3
from .adapter_state import SHORTEST, check_state
from .config import AdapterConfig
from .errors import AdapterError
from .fast.element_tables import ElementTables
from .fast.frozen_gates import FrozenGate
from .gates import MagnitudeGate, reason_not_adaptable
from .mace_bridge import element_layers, is_radial_embedding
from .methods import METHODS, LinearPart, Method, Site, find_sites, linear_layers, method_named
from .other_networks import compiled_modules, foreign_layers, listed
from .short_range import ShortRange
from .updated_weights import UpdatedWeights
from .updates import ParameterGroup, Replacement, Update

_SHORT_RANGE = "short_range"  # name of the submodule that an adapted radial embedding carries
_PART = "magnitude_gate"  # name of the submodule that an adapted linear layer carries
_FROZEN = "_mmea_frozen_gate"  # attribute of a gated layer while its adapter is merged
_HANDLE = "_mmea_adapter"  # attribute of an adapted network: its handle, which so lives as long as the network


@dataclass(frozen=True)
class TrainableTensor:
    """What trains in one place: where it is, what it is, and for which order l.

    Attributes:
        module: path of the gated layer, or of the tensor that is updated.
        part: "gate.down", "gate.shift", "gate.gain", "low rank", "dense", ...
        order: the order l that it acts on: "0" (even scalars), ">=1" (and odd scalars, where there are any) or "all".
        count: number of entries.
    """

    module: str
    part: str
    order: str
    count: int


def attach(network: nn.Module, config: AdapterConfig | None = None, *, start: bool = True) -> Adapter:
    """Attach a new adapter to `network` and freeze the network's own parameters.

    With the default `init_std=0` the adapted network equals its backbone exactly, unless the method starts elsewhere
    (`Method.identity`).

    Args:
        network: any network made of `o3.Linear`, `o3.FullyConnectedTensorProduct`, `e3nn.nn.FullyConnectedNet`,
            NequIP's MLPs of scalars and mace's symmetric contraction; other modules stay as they are.
        config: what to attach.
        start: False if values are loaded at once: a method that starts from a network of its own then builds none.

    Returns:
        The handle of what was attached.

    Raises:
        BackboneError: the method needs a fresh network of this shape, and none can be built.
        AdapterError: an unknown method, an unusable setting, a target that matches no module, a network that is
            scripted or compiled or has an adapter already, layers of another make than e3nn's among those to adapt
            (cuEquivariance's linear ones can be gated), or no module to adapt. Nothing has been changed then.
    """
    config = config or AdapterConfig()
    method = _checked(network, config)
    wanted = _selector(method, config)
    _check_make(network, method, wanted)
    sites = [s for s in find_sites(network) if s.kind in method.updates and wanted(s.name)]
    linears, skipped = _linear_layers(network, method, config, wanted)
    _check_targets(config, [*(s.name for s in sites), *linears, *skipped])
    if not sites and not linears:
        targets = f" matching {list(config.targets)}" if config.targets else ""
        named = f" among {list(method.only)}" if method.only != ("*",) else ""
        raise AdapterError(f"method {config.method!r} finds no module to adapt{named}{targets}{listed(skipped)}")

    fresh = method.start(network, config.seed) if start and method.start is not None else {}
    generator = torch.Generator().manual_seed(config.seed)
    updates = {s.path: method.updates[s.kind](s, config, generator) for s in sites}
    for path, update in updates.items():
        if fresh and isinstance(update, Replacement):
            update.start(fresh[path])
    parts = {name: method.gates.make(linear, config, generator) for name, linear in linears.items() if method.gates}
    return Adapter(network, config, parts, {s.path: s for s in sites}, updates, skipped)


def attached(network: nn.Module) -> Adapter | None:
    """The adapter that is on `network` at present."""
    return network.__dict__.get(_HANDLE)


def _checked(network: nn.Module, config: AdapterConfig) -> Method:
    method = method_named(config.method)
    for name, rank in (("gate_rank", config.gate_rank), ("low_rank", config.low_rank)):
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"{name} must be a whole number, at least 1, got {rank!r}")
    if config.phi not in ("exp", "residual"):
        raise AdapterError(f"phi must be 'exp' or 'residual', got {config.phi!r}")
    if config.gains not in ("channel", "order", "none"):
        raise AdapterError(f"gains must be 'channel', 'order' or 'none', got {config.gains!r}")
    if not 0 <= config.init_std < math.inf:
        raise AdapterError(f"init_std must be finite and not negative, got {config.init_std}")
    if not math.isfinite(config.alpha):
        raise AdapterError(f"alpha must be finite, got {config.alpha}")
    if compiled := compiled_modules(network):
        raise AdapterError(f"a compiled network cannot be adapted{listed(compiled)}")
    if attached(network) or any(parametrize.is_parametrized(m) or hasattr(m, _PART) for m in network.modules()):
        raise AdapterError("this network has an adapter (or another parametrization) already: detach it first")
    return method


def _check_make(network: nn.Module, method: Method, wanted: Callable[[str], bool]) -> None:
    if "other" in method.updates:  # these take any tensor, whatever it belongs to
        return
    found = foreign_layers(network, updated=method.updates.keys())
    if foreign := {name: reason for name, reason in found.items() if wanted(name)}:
        raise AdapterError(f"some layers of this network are not e3nn's and cannot be adapted{listed(foreign)}")


def _check_targets(config: AdapterConfig, names: Iterable[str]) -> None:
    names = list(names)
    if idle := [p for p in config.targets or () if not any(fnmatchcase(name, p) for name in names)]:
        raise AdapterError(
            f"nothing that method {config.method!r} adapts matches the targets {idle}; expected shell-style patterns "
            "of module names, such as 'interactions.*'"
        )


# Asked for at every call of a network: no loop of Python's own.
_switches_of = attrgetter("calibrated", "recording", "active")


def _selector(method: Method, config: AdapterConfig) -> Callable[[str], bool]:
    def wanted(name: str) -> bool:
        return all(
            any(fnmatchcase(name, p) for p in patterns) for patterns in (method.only, config.targets) if patterns
        )

    return wanted


def _linear_layers(
    network: nn.Module, method: Method, config: AdapterConfig, wanted: Callable[[str], bool]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers whose output the method changes, and those that it would but cannot, with the reason."""
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    updated = "linear" in method.updates and "other" not in method.updates  # those that take any tensor skip none
    for name, module in linear_layers(network):
        if not wanted(name):
            continue
        if method.gates is None:
            if updated and (reason := reason_not_adaptable(module)):
                skipped[name] = reason
        elif reason := method.gates.reason_not(module, config):
            skipped[name] = reason
        else:
            found[name] = module
    return found, skipped


class Adapter:
    """The handle of an attached adapter; made by `attach`.

    Attributes:
        network: the adapted network.
        config: the settings it was made with.
        on_linears: module path of a linear layer -> what changes its output.
        gates: those of them that are magnitude gates.
        updates: tensor path -> weight update.
        sites: tensor path -> where the updated tensor is.
        weights: the updated weights, live or folded.
        short_range: the fade of updated radial functions below the distances of the training data; None where nothing
            radial is updated, there are no gates (so that all of the adapter can be folded), the network is not one
            of mace's, or `config.saturate` is off.
        skipped: linear layers whose output cannot be changed, with the reason.
    """

    def __init__(
        self,
        network: nn.Module,
        config: AdapterConfig,
        on_linears: dict[str, LinearPart],
        sites: dict[str, Site],
        updates: dict[str, Update],
        skipped: dict[str, str],
    ) -> None:
        self.network, self.config = network, config
        self.on_linears, self.updates, self.skipped = on_linears, updates, skipped
        self.gates = {name: part for name, part in on_linears.items() if isinstance(part, MagnitudeGate)}
        # A module keeps these for life.
        self._hooks_of_gates = [h for g in self.gates.values() for h in (g._forward_pre_hooks, g._forward_hooks)]
        self.sites = sites
        self._enabled, self._attached = True, True
        self._tables: ElementTables | None = None
        self._merged = False
        self._frozen_before = {id(p): (p, p.requires_grad) for p in network.parameters()}
        for parameter, _ in self._frozen_before.values():
            parameter.requires_grad_(False)
        self._hooks: dict[str, RemovableHandle] = {}
        try:
            for name, part in on_linears.items():
                network.get_submodule(name).add_module(_PART, part)
            self._hook(on_linears)
            self.weights = UpdatedWeights(sites, updates)
        except BaseException:  # Ctrl-C: nobody holds this adapter yet who could take it off
            self._take_gates_off()
            raise
        self._embeddings = [m for m in network.modules() if is_radial_embedding(m)]
        self.short_range = self._fade() if config.saturate and self.gates else None
        network.__dict__[_HANDLE] = self

    # -- what trains ---------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained tensors, by the names they have in an adapter file."""
        for name, part in self.on_linears.items():
            for key, parameter in part.named_parameters():
                yield f"{part.family}.{name}.{key}", parameter
        for path, update in self.updates.items():
            for key, parameter in update.named_parameters():
                yield f"updates.{path}.{key}", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    @property
    def n_parameters(self) -> int:
        """Number of trained entries."""
        return sum(p.numel() for p in self.parameters())

    def trainable(self) -> list[TrainableTensor]:
        """What trains, module by module."""
        rows = []
        for name, part in self.on_linears.items():
            for attribute, order in part.parts.items():
                if (trained := getattr(part, attribute)) is not None:
                    rows.append(TrainableTensor(name, f"{part.label}.{attribute}", order, _count(trained)))
        for path, update in self.updates.items():
            rows.append(TrainableTensor(path, update.label, "all", _count(update)))
        return rows

    def counts(self) -> dict[str, int]:
        """Trained entries by kind of site: "gates", "tensor_product", "radial_layer", ..."""
        total: Counter[str] = Counter()
        for part in self.on_linears.values():
            total[part.family] += _count(part)
        for path, update in self.updates.items():
            total[self.sites[path].kind] += _count(update)
        return {kind: count for kind, count in total.items() if count}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The trained tensors by how they are optimised; within a group in the order of `parameters`."""
        common = [p for part in self.on_linears.values() for p in part.parameters()]
        groups = [ParameterGroup(common), *(group for update in self.updates.values() for group in update.groups())]
        joined: list[ParameterGroup] = []
        for rates, masked in sorted({(g.rates, g.decaying is not None) for g in groups}, reverse=True):
            alike = [g for g in groups if (g.rates, g.decaying is not None) == (rates, masked)]
            masks = tuple(m for g in alike for m in g.decaying or ()) if masked else None
            shapes = tuple(s for g in alike for s in g.all_shapes())
            joined.append(ParameterGroup([p for g in alike for p in g.parameters], rates, masks, shapes))
        return [group for group in joined if group.parameters]

    @property
    def equivariant(self) -> bool:
        """Whether energies stay the same when a structure is turned; True for all methods but one."""
        return METHODS[self.config.method].equivariant

    # -- on and off ----------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the network is adapted at present."""
        return self._enabled and self._attached

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._require_attached()
        self._switch(value)

    def _switch(self, value: bool) -> None:
        self._enabled = value
        self.weights.switch(value)
        for part in self._switched():
            part.active = value

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the network is its backbone, bit for bit."""
        before = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            if self._attached:  # it may have been detached in between
                self.enabled = before

    def detach(self) -> None:
        """Take the adapter off: the network is what it was before `attach`, in every bit and every name."""
        if not self._attached:
            return
        self.unmerge()
        self.weights.remove()
        self._take_gates_off()
        if self.short_range is not None:
            self.short_range.remove()
            delattr(self._embeddings[0], _SHORT_RANGE)
        del self.network.__dict__[_HANDLE]
        self._attached = False

    def _take_gates_off(self) -> None:
        """And give the network's own parameters back as they were."""
        self._unhook(list(self._hooks))
        for name in self.on_linears:
            self.network.get_submodule(name)._modules.pop(_PART, None)
        for parameter, requires_grad in self._frozen_before.values():
            parameter.requires_grad_(requires_grad)

    # -- folding -------------------------------------------------------------------------------------------------

    @property
    def foldable(self) -> bool:
        """Whether all of the adapter is a change of weights, so that `merge` leaves nothing to compute."""
        return not self.on_linears

    @property
    def merged(self) -> bool:
        """Whether all that can be folded is folded at present."""
        return self._merged

    def merge(self) -> list[str]:
        """Write the weight updates into the weights, for inference; gates depend on their input and stay.

        Gated layers that see nothing but an atom's element become tables of their results (`element_tables`), the other
        gates take the form of constants (`frozen_gates`). Nothing can be trained while merged. The adapter can still be
        switched off and detached without loss: the backbone's own tensors are kept.

        Returns:
            Paths of the folded tensors.
        """
        self._require_attached()
        if not self.weights.folded:
            self.weights.fold()
            self._switch(self._enabled)
        if not self._merged:
            self._tabulate()
            for name in self.gates.keys() & self._hooks.keys():
                self.network.get_submodule(name).__dict__[_FROZEN] = FrozenGate(self.gates[name])
            self._merged = True
        return self.weights.folded

    def unmerge(self) -> None:
        """Undo `merge`: the adapter can be trained again."""
        if self._tables is not None:
            self._tables.remove()
            self._tables = None
            self._hook(name for name in self.on_linears if name not in self._hooks)
        for name in self.gates:
            self.network.get_submodule(name).__dict__.pop(_FROZEN, None)
        self._merged = False
        self.weights.unfold()
        self._switch(self._enabled)

    def derived(self) -> dict[str, Tensor]:
        """Name -> tensors that a merged adapter computes with in the place of its own; renewed when those change."""
        found = self._tables.tables() if self._tables is not None else {}
        for name in self.gates:
            frozen: FrozenGate | None = self.network.get_submodule(name).__dict__.get(_FROZEN)
            constants = {} if frozen is None else frozen.constants()
            found.update({f"gates.{name}.{key}": tensor for key, tensor in constants.items()})
        return found

    @property
    def observed(self) -> bool:
        """Whether somebody else looks into the gates at present, by hooks that all of their calls should reach."""
        return any(self._hooks_of_gates)

    def situation(self) -> tuple[object, ...]:
        """Equal as long as the adapted network takes the same steps, whatever its values are."""
        fade = self.short_range
        known = fade is not None and (fade.calibrated, fade.recording)
        return self._enabled, self._merged, known, *map(_switches_of, self.gates.values())

    # -- values --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that makes this adapter: trained tensors and, once recorded, the ranges seen in training (copies)."""
        state = {name: p.detach().clone() for name, p in self.named_parameters()}
        for name, gate in self.gates.items():
            if gate.calibrated:
                state[f"ranges.{name}.low"] = gate.z_low.clone()
                state[f"ranges.{name}.high"] = gate.z_high.clone()
        if self.short_range is not None and self.short_range.calibrated:
            state[SHORTEST] = self.short_range.shortest.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of `state`; the inverse of `state_dict`.

        Raises:
            AdapterError: missing, unexpected or misshapen tensors. Nothing has been changed then.
        """
        own = dict(self.named_parameters())
        expected: dict[str, Tensor] = dict(own)
        for name, gate in self.gates.items():
            low, high = f"ranges.{name}.low", f"ranges.{name}.high"
            # a layer that was never called while ranges were recorded has none
            if low in state or high in state:
                expected |= {low: gate.z_low, high: gate.z_high}
        fade = self.short_range
        if fade is not None and SHORTEST in state:
            expected[SHORTEST] = fade.shortest
        check_state(expected, state)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.weights.refold()
        for name, gate in self.gates.items():
            infinite = torch.full_like(gate.z_low, torch.inf)
            gate.set_range(
                state.get(f"ranges.{name}.low", -infinite).to(gate.z_low),
                state.get(f"ranges.{name}.high", infinite).to(gate.z_high),
            )
        if fade is not None:
            fade.set_shortest(state.get(SHORTEST, torch.zeros_like(fade.shortest)))

    def widen(self, state: Mapping[str, Tensor]) -> None:
        """Let the ranges seen in training hold those of `state` too, which an earlier stage of this adapter saw."""
        own = self.state_dict()
        for name in own.keys() & state.keys():
            if name.startswith("ranges."):
                widest = torch.maximum if name.endswith(".high") else torch.minimum
                own[name] = widest(own[name], state[name].to(own[name]))
        self.load_state_dict(own)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Run the training set through the network within this context: gates and the fade keep what they see.

        An exception within it leaves the ranges as they were before.
        """
        before = self.state_dict()
        for part in self._ranged():
            part.start_recording()
        try:
            yield
        except BaseException:
            for part in self._ranged():
                part.stop_recording()
            self.load_state_dict(before)
            raise
        for part in self._ranged():
            part.stop_recording()

    # -- inside --------------------------------------------------------------------------------------------------

    def _require_attached(self) -> None:
        if not self._attached:
            raise AdapterError("this adapter has been detached from its network: attach a new one")

    def _ranged(self) -> list[MagnitudeGate | ShortRange]:
        """The parts that know a range."""
        return [*self.gates.values(), *([] if self.short_range is None else [self.short_range])]

    def _switched(self) -> list[LinearPart | ShortRange]:
        """The parts, beside the weight updates, that can be switched off."""
        return [*self.on_linears.values(), *([] if self.short_range is None else [self.short_range])]

    def _fade(self) -> ShortRange | None:
        radial = [path for path, site in self.sites.items() if site.kind in ("radial_layer", "radial_basis")]
        if not radial or len(self._embeddings) != 1:
            return None

        @contextmanager
        def bare() -> Iterator[None]:
            self.weights.switch(False, radial)
            try:
                yield
            finally:
                self.weights.switch(True, radial)

        fade = ShortRange(
            self._embeddings[0],
            [m for m in self.network.modules() if isinstance(m, FullyConnectedNet)],
            n_elements=len(self.network.get_buffer("atomic_numbers")),
            like=self.sites[radial[0]].value,
            bare=bare,
        )
        self._embeddings[0].add_module(_SHORT_RANGE, fade)
        return fade

    def _hook(self, names: Iterable[str]) -> None:
        for name in names:
            self._hooks[name] = self.network.get_submodule(name).register_forward_hook(_apply_part)

    def _unhook(self, names: Iterable[str]) -> None:
        for name in names:
            self._hooks.pop(name).remove()

    def _tabulate(self) -> None:
        chain = element_layers(self.network)
        while chain and chain[-1] not in self.gates:
            chain.pop()
        layers = [self.network.get_submodule(name) for name in chain]
        if layers and all(isinstance(layer, o3.Linear) for layer in layers):
            self._tables = ElementTables([(layer, self.gates.get(n)) for n, layer in zip(chain, layers, strict=True)])
            self._unhook(name for name in chain if name in self.gates)

    def __getstate__(self) -> dict[str, Any]:
        # A copy would share torch's parametrized classes with the original, and break when either is detached.
        raise AdapterError(
            "an adapted network cannot be copied or pickled: detach the adapter first, or attach its config to another "
            "network and load its state_dict there"
        )

    def __repr__(self) -> str:
        return (
            f"Adapter(method={self.config.method!r}, {self.n_parameters} parameters, {len(self.on_linears)} gates, "
            f"{len(self.updates)} updates, enabled={self.enabled})"
        )


def _apply_part(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    part = getattr(linear, _PART)
    if not part.active:
        return output
    if not inputs:
        raise AdapterError(f"an adapted {type(linear).__name__} layer must be given its features by place, not by name")
    return linear.__dict__.get(_FROZEN, part)(inputs[0], output)


def _count(trained: nn.Module | nn.Parameter) -> int:
    return trained.numel() if isinstance(trained, nn.Parameter) else sum(p.numel() for p in trained.parameters())


__all__ = ["METHODS", "Adapter", "TrainableTensor", "attach", "attached"]
