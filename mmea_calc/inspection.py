"""What an adapter does to its backbone: which weights it changes and how much, and what its gates do on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor, nn

from .adapted import Adapter
from .errors import AdapterError, DataError
from .graph import Graph, check_elements
from .layer_shape import LayerShape
from .mace_bridge import convolution_paths
from .methods import Site
from .potential import Potential

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PathChange:
    """What happens to the weights of one path.

    Attributes:
        path: the irreps that it connects, such as "1o -> 1o"; empty where the tensor is not made of paths.
        order: order l of its output; None where it has none.
        entries: number of weights.
        changed: how many of them differ from the backbone's.
        rms_change: root mean square of the change, over all of them.
        rms_weight: that of the backbone's weights.
    """

    path: str
    order: int | None
    entries: int
    changed: int
    rms_change: float
    rms_weight: float


@dataclass(frozen=True)
class TensorChange:
    """What happens to one tensor of the backbone.

    Attributes:
        tensor: its path in the network.
        kind: of its site (see `methods`).
        paths: its parts.
    """

    tensor: str
    kind: str
    paths: tuple[PathChange, ...]

    def by_order(self) -> dict[int | None, PathChange]:
        """All paths of an order taken together."""
        orders = dict.fromkeys(p.order for p in self.paths)
        return {order: _together([p for p in self.paths if p.order == order]) for order in orders}

    @property
    def total(self) -> PathChange:
        """All paths taken together."""
        return _together(self.paths)


@dataclass(frozen=True)
class GateActivity:
    """What one gate does to its layer, over the atoms of a data set.

    Attributes:
        layer: path of the gated layer.
        irreps_out: of its output.
        shift: mean shift of every even scalar, (k0,), in units of the layer's features.
        scalar_rms: root mean square of the layer's even scalars before the gate; None where it has none.
        gains: irrep ("1o") -> mean factor of every multiplicity, (mul,). NaN where the layer gave zeros alone.
        gain_spreads: irrep -> standard deviation of the factor over atoms, (mul,).
    """

    layer: str
    irreps_out: str
    shift: FloatArray
    scalar_rms: float | None
    gains: dict[str, FloatArray]
    gain_spreads: dict[str, FloatArray]


@dataclass(frozen=True)
class Inspection:
    """All that is known of an adapter's effect.

    Attributes:
        method: of the adapter.
        changes: of weights, in the order of the network.
        gates: in the order of the network; empty if the adapter has none.
        n_structures, n_atoms: what the gates were measured on.
    """

    method: str
    changes: tuple[TensorChange, ...]
    gates: tuple[GateActivity, ...]
    n_structures: int = 0
    n_atoms: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values; NaN where there is no value."""
        return _plain(asdict(self))


def inspect(
    potential: Potential,
    structures: Sequence[Atoms] = (),
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """What the adapter on `potential` does.

    Args:
        potential: with an adapter.
        structures: to measure gates on; needed for an adapter that has some, not looked at otherwise.
        batch_size: structures per call of the network.
        progress: called with the number of structures done and their total.

    Raises:
        AdapterError: there is no adapter, or it has neither gates nor updates of weights.
        DataError: the adapter has gates and there are no structures; an element that the backbone lacks.
    """
    adapter = potential.adapter
    if adapter is None or not (adapter.gates or adapter.updates):
        found = "there is no adapter" if adapter is None else f"method {adapter.config.method!r} has neither"
        raise AdapterError(f"expected an adapter with gates or updates of weights to look into: {found}")
    if adapter.gates and not structures:
        raise DataError(
            f"the {len(adapter.gates)} gates of this adapter act on the features of atoms: give structures to measure "
            "them on, such as the training set (mmea inspect FILE DATA.xyz)"
        )
    graphs = _graphs(potential, structures) if adapter.gates else []
    changes = weight_changes(adapter)
    if not graphs:
        return Inspection(adapter.config.method, changes, ())
    gates = gate_activity(potential, graphs, batch_size=batch_size, progress=progress)
    return Inspection(adapter.config.method, changes, gates, len(graphs), sum(g.n_atoms for g in graphs))


def _graphs(potential: Potential, structures: Sequence[Atoms]) -> list[Graph]:
    """Neighbour lists, every structure checked before the first is computed. Raises DataError."""
    graphs = []
    for number, atoms in enumerate(structures):
        check_elements(np.unique(atoms.numbers), potential.backbone.elements, f"structure {number}")
        try:
            graphs.append(potential.graph(atoms))
        except DataError as problem:
            raise DataError(f"structure {number}: {problem}") from problem
    return graphs


# --- weights --------------------------------------------------------------------------------------------------------


def weight_changes(adapter: Adapter) -> tuple[TensorChange, ...]:
    """The change of every updated tensor, path by path; the last layer of a radial MLP by path of its convolution."""
    convolutions = convolution_paths(adapter.network)
    with torch.no_grad(), adapter.disabled():
        weights = {path: site.value.detach().double() for path, site in adapter.sites.items()}
    found = []
    for path, site in adapter.sites.items():
        columns = convolutions.get(path, ())
        changes = adapter.updates[path].difference(weights[path]).detach().double()
        pairs = zip(_by_path(site, columns, weights[path]), _by_path(site, columns, changes), strict=True)
        found.append(TensorChange(path, site.kind, tuple(_measured(*one, other[2]) for one, other in pairs)))
    return tuple(found)


def _by_path(
    site: Site, columns: Sequence[tuple[str, int, int]], tensor: Tensor
) -> Iterator[tuple[str, int | None, Tensor]]:
    if not columns:
        return site.by_path(tensor)
    parts = tensor.split([width for _, _, width in columns], dim=1)
    return iter([(path, order, part) for (path, order, _), part in zip(columns, parts, strict=True)])


def _measured(path: str, order: int | None, weight: Tensor, change: Tensor) -> PathChange:
    return PathChange(path, order, change.numel(), int(change.count_nonzero()), _rms(change), _rms(weight))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _together(paths: Sequence[PathChange]) -> PathChange:
    entries = sum(p.entries for p in paths)

    def rms(name: str) -> float:
        return (sum(p.entries * getattr(p, name) ** 2 for p in paths) / entries) ** 0.5

    order = paths[0].order if len({p.order for p in paths}) == 1 else None
    return PathChange("", order, entries, sum(p.changed for p in paths), rms("rms_change"), rms("rms_weight"))


# --- gates ----------------------------------------------------------------------------------------------------------


def gate_activity(
    potential: Potential,
    graphs: Sequence[Graph],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[GateActivity, ...]:
    """What every gate does on these structures, from what comes in and goes out: the same for all forms of gates.

    Raises:
        AdapterError: the adapter is merged, or switched off.
    """
    adapter = potential.adapter
    assert adapter is not None
    if adapter.merged:
        raise AdapterError("this adapter is merged, which leaves gates out that could be folded: unmerge it first")
    if not adapter.enabled:
        raise AdapterError("this adapter is switched off, so that its gates do nothing: enable it first")
    watches = {name: _Watch(adapter.network.get_submodule(name)) for name in adapter.gates}
    hooks = [gate.register_forward_hook(watches[name]) for name, gate in adapter.gates.items()]
    try:
        for start in range(0, len(graphs), batch_size):
            potential.predict(potential.collate(graphs[start : start + batch_size]), forces=False)
            progress(min(start + batch_size, len(graphs)), len(graphs))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(watch.activity(name) for name, watch in watches.items() if watch.n)


class _Watch:
    """Sums over what passes one gate, in float64."""

    def __init__(self, linear: Any) -> None:
        shape = LayerShape.of(linear)
        self.irreps, self.components_first = shape.irreps_out, shape.components_first
        self.n = 0
        self._shift: list[Tensor] = []  # sums over atoms, by run of even scalars
        self._square = torch.zeros((), dtype=torch.float64)
        self._gains: dict[str, list[Tensor]] = {}  # irrep -> sums of 1, gain, gain^2 by run: (3, mul)

    def __call__(self, gate: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        y, out = (t.detach().flatten(0, -2).double().cpu() for t in (inputs[1], output))
        first, self.n = not self.n, self.n + len(y)
        shifts: list[Tensor] = []
        gains: dict[str, list[Tensor]] = {}
        for (mul, ir), where in zip(self.irreps, self.irreps.slices(), strict=True):
            if mul == 0:
                continue
            before, after = y[:, where], out[:, where]
            if ir.l == 0 and ir.p == 1:
                shifts.append((after - before).sum(0))
                self._square += before.square().sum()
            else:
                sizes = (ir.dim, mul) if self.components_first else (mul, ir.dim)
                y_l, out_l = (t.unflatten(1, sizes) for t in (before, after))
                if self.components_first:
                    y_l, out_l = y_l.transpose(1, 2), out_l.transpose(1, 2)
                gains.setdefault(str(ir), []).append(_gain_sums(y_l, out_l))
        self._shift = shifts if first else [a + b for a, b in zip(self._shift, shifts, strict=True)]
        for name, runs in gains.items():
            self._gains[name] = runs if first else [a + b for a, b in zip(self._gains[name], runs, strict=True)]

    def activity(self, name: str) -> GateActivity:
        shift = torch.cat(self._shift) / self.n if self._shift else torch.zeros(0, dtype=torch.float64)
        means, spreads = {}, {}
        for ir, runs in self._gains.items():
            count, total, square = torch.cat(runs, dim=1)
            mean = total / count  # 0 / 0 is NaN: no atom had anything to multiply
            means[ir], spreads[ir] = mean.numpy(), (square / count - mean**2).clamp(min=0).sqrt().numpy()
        rms = float((self._square / (self.n * len(shift))).sqrt()) if len(shift) else None
        return GateActivity(name, str(self.irreps), shift.numpy(), rms, means, spreads)


def _gain_sums(y: Tensor, out: Tensor) -> Tensor:
    """Sums over atoms of 1, gain and gain^2, (3, mul), where the layer's output y (n, mul, 2l+1) is not zero."""
    norm = y.square().sum(-1)
    known = (norm > 0).double()
    gain = torch.where(norm > 0, (y * out).sum(-1) / norm, 0.0)
    return torch.stack([known.sum(0), gain.sum(0), gain.square().sum(0)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


__all__ = ["GateActivity", "Inspection", "PathChange", "TensorChange", "gate_activity", "inspect", "weight_changes"]
