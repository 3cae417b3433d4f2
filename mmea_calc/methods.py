"""The table of methods: what is attached to which kind of module.

A network is read as a list of sites, a site being one tensor (or one layer, for gates) of a kind:

| kind | where |
|---|---|
| `linear` | `e3nn.o3.Linear` |
| `tensor_product` | `e3nn.o3.TensorProduct` with weights of its own, such as `FullyConnectedTensorProduct` |
| `radial_layer` | layers of `e3nn.nn.FullyConnectedNet` and of NequIP's MLPs of scalars |
| `contraction_highest` | mace's symmetric contraction, highest correlation: (elements, paths, channels) |
| `contraction_lower` | its lower correlations |
| `radial_basis` | frequencies of mace's Bessel basis |
| `other` | any other parameter; only methods that train everything look at it |

A new method is one more line of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._e3nn import FullyConnectedNet, o3
from .config import AdapterConfig
from .errors import AdapterError
from .feature_bottleneck import FeatureBottleneck
from .gates import MagnitudeGate, reason_not_adaptable, reason_not_gatable
from .layer_shape import is_cue_linear
from .mace_bridge import contraction_order, fresh_tensors, is_bessel, is_contraction, is_untrained
from .other_networks import dense_weights
from .updates import Block, Dense, LowRank, Replacement, SoftThreshold, Update

Kind = Literal[
    "linear", "tensor_product", "radial_layer", "contraction_highest", "contraction_lower", "radial_basis", "other"
]


@dataclass(frozen=True)
class Site:
    """One tensor of a network that a method may change.

    Attributes:
        name: path of the module in the network.
        kind: see the module's table.
        module: the module that owns the tensor.
        tensor: attribute name of the tensor in `module`.
        blocks: the matrices the tensor consists of, for low-rank updates.
    """

    name: str
    kind: Kind
    module: nn.Module = field(repr=False)
    tensor: str
    blocks: tuple[Block, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.name}.{self.tensor}" if self.name else self.tensor

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.tensor)

    def by_path(self, tensor: Tensor) -> Iterator[tuple[str, int | None, Tensor]]:
        """The entries of a tensor of this site's shape, path by path.

        Returns:
            Name of the path (see `Block.path`; empty where the tensor is not made of paths), order l of its output
            (None where it has none), its entries.
        """
        sizes = [prod(block.rows) * block.columns for block in self.blocks]
        if sum(sizes) != tensor.numel():
            yield "", None, tensor
            return
        for block, part in zip(self.blocks, tensor.flatten().split(sizes), strict=True):
            if len(block.rows) == 2:  # elements, paths
                for number, entries in enumerate(part.view(*block.rows, block.columns).unbind(1)):
                    yield f"{block.path}, path {number}", block.order, entries
            else:
                yield block.path, block.order, part


UpdateFactory = Callable[[Site, AdapterConfig, torch.Generator], Update]


def low_rank(site: Site, config: AdapterConfig, generator: torch.Generator) -> Update:
    return LowRank(site.value, site.blocks, rank=config.low_rank, alpha=config.alpha, generator=generator)


def dense(site: Site, config: AdapterConfig, generator: torch.Generator) -> Update:
    return Dense(site.value, site.blocks)


def sparse(site: Site, config: AdapterConfig, generator: torch.Generator) -> Update:
    return SoftThreshold(site.value, generator=generator)


def replacement(site: Site, config: AdapterConfig, generator: torch.Generator) -> Update:
    return Replacement(site.value)


LinearPart = MagnitudeGate | FeatureBottleneck


@dataclass(frozen=True)
class OnLinears:
    """What acts on the output of linear layers (`linear_layers`).

    Attributes:
        make: (layer, config, generator) -> module that maps the layer's input and output to a new output.
        reason_not: (layer, config) -> why this layer cannot have one; None if it can.
    """

    make: Callable[[Any, AdapterConfig, torch.Generator], LinearPart]
    reason_not: Callable[[Any, AdapterConfig], str | None]


def magnitude_gate(linear: Any, config: AdapterConfig, generator: torch.Generator) -> LinearPart:
    return MagnitudeGate(
        linear,
        rank=config.gate_rank,
        phi=config.phi,
        saturate=config.saturate,
        init_std=config.init_std,
        nonlinearity=config.nonlinearity,
        separate_bottlenecks=config.separate_bottlenecks,
        shift=config.shift,
        gains=config.gains,
        generator=generator,
    )


def feature_bottleneck(linear: Any, config: AdapterConfig, generator: torch.Generator) -> LinearPart:
    return FeatureBottleneck(linear, rank=config.gate_rank, generator=generator)


_GATES = OnLinears(magnitude_gate, lambda linear, c: reason_not_gatable(linear, shift=c.shift, gains=c.gains))
_BOTTLENECKS = OnLinears(feature_bottleneck, lambda linear, c: reason_not_adaptable(linear))


@dataclass(frozen=True)
class Method:
    """What a method attaches.

    Attributes:
        summary: one line for users.
        gates: what it puts on every linear layer (`linear_layers`), if anything.
        updates: kind of site -> update; kinds that are absent stay frozen.
        only: shell-style patterns of module names that the method is restricted to by nature.
        start: (network, seed) -> tensor path -> value that a `Replacement` starts from.
        identity: whether the adapted network equals its backbone to the bit before it is trained.
        equivariant: whether energies stay the same when a structure is turned.
    """

    summary: str
    gates: OnLinears | None = None
    updates: Mapping[str, UpdateFactory] = field(default_factory=dict)
    only: tuple[str, ...] = ("*",)
    start: Callable[[nn.Module, int], Mapping[str, Tensor]] | None = None
    identity: bool = True
    equivariant: bool = True


_OF_GATES = ("gate_rank", "phi", "nonlinearity", "separate_bottlenecks", "shift", "gains", "init_std")

# What MMEA and ELoRA share: everything that is no o3.Linear (arXiv 2511.06696).
_BESIDE_LINEARS: dict[str, UpdateFactory] = {
    "tensor_product": low_rank,
    "radial_layer": low_rank,
    "contraction_highest": low_rank,
    "contraction_lower": dense,
    "radial_basis": dense,
}
_PATHS: tuple[str, ...] = ("linear", "tensor_product", "radial_layer", "contraction_highest", "contraction_lower")
_ALL: tuple[str, ...] = (*_PATHS, "radial_basis", "other")

METHODS: dict[str, Method] = {
    "mmea": Method("gates on every linear layer, low-rank updates of the rest", gates=_GATES, updates=_BESIDE_LINEARS),
    "gates": Method("gates on every linear layer, nothing else", gates=_GATES),
    "elora": Method("low-rank updates of every layer (ELoRA)", updates={**_BESIDE_LINEARS, "linear": low_rank}),
    "auto": Method(
        "gates and low-rank updates of every layer; replays other molecules if the backbone is near the data",
        gates=_GATES,
        updates={**_BESIDE_LINEARS, "linear": low_rank},
    ),
    "sparse": Method("soft-thresholded changes of few weights", updates=dict.fromkeys(_PATHS, sparse), identity=False),
    "full": Method("every parameter of the backbone", updates=dict.fromkeys(_ALL, dense)),
    "readout": Method("the readouts alone", updates=dict.fromkeys(_ALL, dense), only=("readouts", "readouts.*")),
    "scratch": Method(
        "a fresh network of the backbone's shape",
        updates=dict.fromkeys(_ALL, replacement),
        start=fresh_tensors,
        identity=False,
    ),
    "bottleneck": Method(
        "conventional adapters of the features; not equivariant", gates=_BOTTLENECKS, equivariant=False
    ),
}


def method_named(name: str) -> Method:
    """The method called `name`.

    Raises:
        AdapterError: there is none.
    """
    if name not in METHODS:
        raise AdapterError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def unused_settings(config: AdapterConfig) -> list[str]:
    """Settings that were changed and that the method does nothing with."""
    method, default = method_named(config.method), AdapterConfig()
    used = set(_OF_GATES) if method.gates is _GATES else {"gate_rank"} if method.gates else set()
    used |= {"low_rank", "alpha"} if low_rank in method.updates.values() else set()
    changed = (f for f in (*_OF_GATES, "low_rank", "alpha") if getattr(config, f) != getattr(default, f))
    return [name for name in changed if name not in used]


def linear_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of the layers of `network` that gates sit on, in the order of its modules.

    They are its linear layers, e3nn's and cuEquivariance's. A network without any, such as those of
    `e3nn.nn.models.v2106`, mixes its channels in fully connected products of features and attributes of the atom; these
    are its linear layers then.
    """
    modules = list(network.named_modules())
    linears = [(name, m) for name, m in modules if isinstance(m, o3.Linear) or is_cue_linear(m)]
    return linears or [(name, m) for name, m in modules if isinstance(m, o3.FullyConnectedTensorProduct)]


def differing_form(config: AdapterConfig, start: AdapterConfig) -> list[str]:
    """Settings that keep an adapter of `config` from starting with the values of one of `start`; none if it can.

    The method may be one that does all that the other does, and more: what is new starts as the identity.
    """
    one, other = method_named(config.method), method_named(start.method)
    wanted, has = config.form(), start.form()
    differing = {name for name in wanted if wanted[name] != has[name]}
    more = (
        other.gates in (None, one.gates)
        and all(one.updates.get(kind) is update for kind, update in other.updates.items())
        and (one.only, one.identity, other.identity) == (other.only, True, True)
    )
    if more:
        differing -= {"method"} if other.updates else {"method", "low_rank", "alpha"}
    return sorted(differing)


def find_sites(network: nn.Module) -> list[Site]:
    """Every tensor of `network` that some method may change, in the order of its modules."""
    return list(_walk(network))


def _walk(network: nn.Module) -> Iterator[Site]:
    claimed: set[int] = set()
    for name, module in network.named_modules():
        for site in _sites_of(name, module):
            if id(site.value) not in claimed:
                claimed.add(id(site.value))
                yield site
    for name, module in network.named_modules():
        for tensor, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in claimed and not is_untrained(parameter):
                claimed.add(id(parameter))
                yield Site(name, "other", module, tensor)


def _sites_of(name: str, module: nn.Module) -> Iterator[Site]:
    if isinstance(module, o3.Linear) and module.internal_weights and module.weight.dim() == 1 and module.weight.numel():
        yield Site(name, "linear", module, "weight", tuple(_linear_blocks(module)))
    elif isinstance(module, o3.TensorProduct) and module.internal_weights and module.weight.numel():
        yield Site(name, "tensor_product", module, "weight", tuple(_product_blocks(module)))
    elif isinstance(module, FullyConnectedNet):
        for layer_name, layer in module.named_children():
            n_in, n_out = layer.weight.shape
            yield Site(f"{name}.{layer_name}", "radial_layer", layer, "weight", (Block((n_in,), n_out),))
    elif is_contraction(module):
        yield from _contraction_sites(name, module)
    elif is_bessel(module):
        yield Site(name, "radial_basis", module, "bessel_weights")
    else:
        for path, owner, tensor, weight in dense_weights(name, module):
            n_in, n_out = weight.shape
            yield Site(path, "radial_layer", owner, tensor, (Block((n_in,), n_out),))


def _contraction_sites(name: str, contraction: Any) -> Iterator[Site]:
    highest, degree, order = contraction.weights_max, int(contraction.correlation), contraction_order(contraction)
    if not is_untrained(highest):
        yield Site(
            name, "contraction_highest", contraction, "weights_max", (_contraction_block(highest, degree, order),)
        )
    for number, (tensor, lower) in enumerate(contraction.weights.named_parameters(), 1):
        if not is_untrained(lower):
            block = _contraction_block(lower, degree - number, order)
            yield Site(f"{name}.weights", "contraction_lower", contraction.weights, tensor, (block,))


def _contraction_block(weight: Tensor, degree: int, order: int) -> Block:
    n_elements, n_paths, n_channels = weight.shape
    return Block((n_elements, n_paths), n_channels, 1 / n_paths, f"nu={degree} -> l={order}", order)


def _linear_blocks(linear: Any) -> Iterator[Block]:
    """One matrix per pair of irreps: paths that mace left apart (`128x0e+128x0e`) count as one.

    e3nn stores one (mul_in, mul_out) matrix per path, so neighbouring paths into the same output stack up.
    """
    paths = [ins for ins in linear.instructions if ins.i_in >= 0 and prod(ins.path_shape)]
    for _, group in groupby(paths, key=lambda ins: (ins.i_out, linear.irreps_in[ins.i_in].ir)):
        stacked = list(group)
        ir_in, ir_out = linear.irreps_in[stacked[0].i_in].ir, linear.irreps_out[stacked[0].i_out].ir
        rows, columns = sum(ins.path_shape[0] for ins in stacked), stacked[0].path_shape[1]
        yield Block((rows,), columns, path=f"{ir_in} -> {ir_out}", order=ir_out.l)


def _product_blocks(product: Any) -> Iterator[Block]:
    """One (m1 * m2, m_out) matrix per weighted path."""
    for ins in product.instructions:
        if ins.has_weight and prod(ins.path_shape):
            *rows, columns = ins.path_shape
            one, two = product.irreps_in1[ins.i_in1].ir, product.irreps_in2[ins.i_in2].ir
            ir_out = product.irreps_out[ins.i_out].ir
            path = f"{one} x {two} -> {ir_out}"
            yield Block((prod(rows),), columns, path=path, order=ir_out.l, row_axes=tuple(rows))
