"""Adapters on networks that are not MACE: e3nn's own, and what is refused by name."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import conftest
from mmea_calc._e3nn import FullyConnectedNet, o3
from mmea_calc.adapted import Adapter, attach, attached
from mmea_calc.config import AdapterConfig
from mmea_calc.errors import AdapterError, BackboneError
from mmea_calc.methods import METHODS, linear_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # e3nn's TorchScript annotations
    import e3nn
    from e3nn.nn.models.v2106.gate_points_networks import NetworkForAGraphWithAttributes, SimpleNetwork

pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")

SMALL: dict[str, Any] = dict(gate_rank=3, low_rank=2, alpha=2.0)
FITTING = ("mmea", "gates", "elora", "full", "sparse", "bottleneck")  # methods that need no network of mace's
EQUIVARIANT = [m for m in FITTING if METHODS[m].equivariant]


def built(make: Any, *args: Any, **settings: Any) -> nn.Module:
    """In float64, from a fixed seed, its alphas not 0, in plain code: TorchScript does not repeat itself to the bit."""
    before = dict(e3nn.get_optimization_defaults())
    e3nn.set_optimization_defaults(jit_script_fx=False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = make(*args, **settings).double()
            for name, parameter in network.named_parameters():
                if name.endswith("alpha.weight"):  # 0 at first: nothing would depend on where the atoms are
                    nn.init.normal_(parameter)
    finally:
        e3nn.set_optimization_defaults(**before)
    return network


SIZES: dict[str, Any] = dict(max_radius=3.0, num_neighbors=4.0, num_nodes=6.0, mul=4, layers=2, lmax=1)
_SIMPLE = built(SimpleNetwork, "2x0e", "0e", **SIZES)
_VECTORS = built(NetworkForAGraphWithAttributes, "2x0e + 1o", "2x0e + 1o", "0e", "0e + 1o", pool_nodes=False, **SIZES)


def _lent(network: nn.Module) -> Iterator[nn.Module]:
    state = {key: value.clone() for key, value in network.state_dict().items()}
    yield network
    if adapter := attached(network):
        adapter.detach()
    network.load_state_dict(state)


@pytest.fixture
def network() -> Iterator[nn.Module]:
    """e3nn's SimpleNetwork: energies from positions and elements."""
    yield from _lent(_SIMPLE)


@pytest.fixture
def vectors() -> Iterator[nn.Module]:
    """A network of points with vectors in and out."""
    yield from _lent(_VECTORS)


def randomise(adapter: Adapter, std: float = 0.03) -> None:
    """Values small enough that the gains of many layers do not drown what is to be seen."""
    conftest.randomise(adapter, std=std)


def points(seed: int = 0, n: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    positions = 1.5 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    elements = torch.eye(2, dtype=torch.float64)[torch.arange(n) % 2]
    return {"pos": positions, "x": elements}


def energy_and_forces(network: nn.Module, data: dict[str, Tensor], train: bool = False) -> tuple[Tensor, Tensor]:
    positions = data["pos"].detach().clone().requires_grad_()
    energy = network({**data, "pos": positions}).sum()
    (gradient,) = torch.autograd.grad(energy, positions, create_graph=train)
    return (energy, -gradient) if train else (energy.detach(), -gradient.detach())


def rotation(reflect: bool) -> Tensor:
    angles = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)
    turned = o3.angles_to_matrix(*angles)
    return -turned if reflect else turned


# -- what is attached ------------------------------------------------------------------------------------------------


def test_gates_sit_on_every_product_of_features_and_attributes(network: nn.Module) -> None:
    assert not any(isinstance(m, o3.Linear) for m in network.modules())
    products = [n for n, m in network.named_modules() if isinstance(m, o3.FullyConnectedTensorProduct)]
    adapter = attach(network, AdapterConfig(method="gates", **SMALL))
    assert len(products) == 3 * 4  # sc, lin1, lin2 and alpha of every convolution
    assert sorted([*adapter.gates, *adapter.skipped]) == sorted(products)
    assert all("has no even scalar" in r or "leads to an output" in r for r in adapter.skipped.values())
    assert len(adapter.gates) >= 10


def test_a_network_with_linear_layers_has_gates_on_them_alone() -> None:
    mixed = nn.Sequential(o3.Linear("2x0e", "2x0e"), o3.FullyConnectedTensorProduct("2x0e", "0e", "2x0e"))
    assert [name for name, _ in linear_layers(mixed)] == ["0"]


def test_mmea_updates_products_and_radial_layers(network: nn.Module) -> None:
    adapter = attach(network, AdapterConfig(**SMALL))
    counts = adapter.counts()
    assert set(counts) == {"gates", "tensor_product", "radial_layer"}
    assert sum(counts.values()) == adapter.n_parameters == sum(row.count for row in adapter.trainable())
    assert "mp.layers.0.first.fc.layer0.weight" in adapter.updates
    assert adapter.short_range is None  # the fade knows mace's radial embedding alone


def test_full_trains_every_weight_of_the_network(network: nn.Module) -> None:
    total = sum(p.numel() for p in network.parameters())
    adapter = attach(network, AdapterConfig(method="full"))
    assert adapter.n_parameters == total


# -- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in FITTING if METHODS[m].identity])
def test_an_untrained_adapter_changes_no_bit(network: nn.Module, method: str) -> None:
    before = energy_and_forces(network, points())
    attach(network, AdapterConfig(method=method, **SMALL))
    for one, other in zip(energy_and_forces(network, points()), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("method", EQUIVARIANT)
def test_energy_stays_and_forces_turn_with_the_points(network: nn.Module, method: str, reflect: bool) -> None:
    data, turn = points(), rotation(reflect)
    bare, _ = energy_and_forces(network, data)
    randomise(attach(network, AdapterConfig(method=method, **SMALL)))
    energy, forces = energy_and_forces(network, data)
    assert not torch.allclose(energy, bare, rtol=1e-3)
    assert forces.abs().max() > 1e-3
    turned_energy, turned_forces = energy_and_forces(network, {**data, "pos": data["pos"] @ turn.T})
    torch.testing.assert_close(turned_energy, energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned_forces, forces @ turn.T, rtol=1e-9, atol=1e-9)


def test_the_bottleneck_baseline_is_not_equivariant(network: nn.Module) -> None:
    data = points()
    randomise(attach(network, AdapterConfig(method="bottleneck", **SMALL)), std=0.3)
    energy, _ = energy_and_forces(network, data)
    turned, _ = energy_and_forces(network, {**data, "pos": data["pos"] @ rotation(False).T})
    assert (turned - energy).abs() > 1e-6


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("method", EQUIVARIANT)
def test_vectors_of_an_adapted_network_turn_with_its_inputs(vectors: Any, method: str, reflect: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    turn, n = rotation(reflect), 6
    kinds = {
        "node_input": vectors.irreps_node_input,
        "node_attr": vectors.irreps_node_attr,
        "edge_attr": o3.Irreps("0e"),
    }
    src = torch.arange(n)
    edges = {"edge_src": src, "edge_dst": src.roll(1), "edge_index": torch.stack([src, src.roll(1)])}  # e3nn 0.4; 0.6
    data = {key: torch.randn(n, ir.dim, generator=generator, dtype=torch.float64) for key, ir in kinds.items()}
    turned = {key: value @ kinds[key].D_from_matrix(turn).T for key, value in data.items()}
    positions = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    turned_positions = positions @ o3.Irreps("1o").D_from_matrix(turn).T
    bare = vectors({**data, **edges, "pos": positions})
    randomise(attach(vectors, AdapterConfig(method=method, **SMALL)))
    output = vectors({**data, **edges, "pos": positions})
    assert not torch.allclose(output, bare, rtol=1e-3)
    expected = output @ vectors.irreps_node_output.D_from_matrix(turn).T
    torch.testing.assert_close(vectors({**turned, **edges, "pos": turned_positions}), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", EQUIVARIANT)
def test_forces_are_the_negative_gradient_of_the_energy(network: nn.Module, method: str) -> None:
    data, step = points(), 1e-4
    randomise(attach(network, AdapterConfig(method=method, **SMALL)))
    _, forces = energy_and_forces(network, data)
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        energies = []
        for sign in (1, -1):
            positions = data["pos"].clone()
            positions[atom, axis] += sign * step
            energies.append(energy_and_forces(network, {**data, "pos": positions})[0])
        numerical = -(energies[0] - energies[1]) / (2 * step)
        torch.testing.assert_close(forces[atom, axis], numerical, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", FITTING)
def test_training_on_energies_and_forces_lowers_the_loss(network: nn.Module, method: str) -> None:
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    sets = [points(seed) for seed in range(2)]
    targets = [tuple(1.2 * t for t in energy_and_forces(network, data)) for data in sets]
    adapter = attach(network, AdapterConfig(method=method, **SMALL))
    optimiser = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for data, (energy, forces) in zip(sets, targets, strict=True):
            e, f = energy_and_forces(network, data, train=True)
            loss = loss + (e - energy) ** 2 + ((f - forces) ** 2).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    adapter.detach()
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


# -- switched, kept, taken off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FITTING)
def test_switched_off_or_detached_the_network_is_itself_to_the_bit(network: nn.Module, method: str) -> None:
    data, names = points(), list(network.state_dict())
    bare = energy_and_forces(network, data)
    flags = [p.requires_grad for p in network.parameters()]
    adapter = attach(network, AdapterConfig(method=method, **SMALL))
    randomise(adapter)
    adapted = energy_and_forces(network, data)
    assert not torch.allclose(adapted[1], bare[1])
    with adapter.disabled():
        assert all(map(torch.equal, energy_and_forces(network, data), bare))
    assert all(map(torch.equal, energy_and_forces(network, data), adapted))
    adapter.detach()
    assert all(map(torch.equal, energy_and_forces(network, data), bare))
    assert list(network.state_dict()) == names
    assert [p.requires_grad for p in network.parameters()] == flags
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("method", FITTING)
def test_a_merged_adapter_gives_the_same_and_can_be_unmerged(network: nn.Module, method: str) -> None:
    adapter = attach(network, AdapterConfig(method=method, **SMALL))
    randomise(adapter)
    expected = energy_and_forces(network, points())
    adapter.merge()
    for one, other in zip(energy_and_forces(network, points()), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    adapter.unmerge()
    assert all(map(torch.equal, energy_and_forces(network, points()), expected))


@pytest.mark.parametrize("method", FITTING)
def test_values_saved_from_one_adapter_make_another_the_same(network: nn.Module, method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = AdapterConfig(method=method, **SMALL)
    adapter = attach(network, config)
    randomise(adapter)
    with adapter.recording():
        network(points(1))
    expected = energy_and_forces(network, points())
    save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")
    adapter.detach()
    other = attach(network, AdapterConfig(method=method, seed=5, **SMALL))
    state = load_file(tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match="missing"):
        other.load_state_dict(dict(list(state.items())[1:]))
    other.load_state_dict(state)
    assert all(map(torch.equal, energy_and_forces(network, points()), expected))


def test_gates_of_products_level_off_beyond_what_they_saw(network: nn.Module) -> None:
    adapter = attach(network, AdapterConfig(method="gates", **SMALL))
    randomise(adapter, std=0.3)
    with adapter.recording():
        network(points(1))
    assert all(gate.calibrated for gate in adapter.gates.values())
    far = {**points(2), "x": 50 * points(2)["x"]}
    first = next(iter(adapter.gates.values()))
    z = first.bottleneck(far["x"])
    assert (z.abs() > first.z_high.abs().max() * 2).any()
    assert torch.isfinite(energy_and_forces(network, far)[1]).all()
    # never called with what was recorded twice as far out: within the margin of the range
    assert bool((first.level_off(z) <= first.z_high + 0.26 * first._range_width()).all())


# -- what is not supported says so -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: o3.Linear("2x0e", "2x0e", internal_weights=False), "it has no weights of its own"),
        (lambda: o3.Linear("2x0e", "2x0e", f_in=2, f_out=3), "it maps several features at once"),
    ],
)
@pytest.mark.parametrize("method", ["mmea", "gates", "elora", "bottleneck"])
def test_a_layer_that_cannot_be_adapted_is_named_with_the_reason(layer: Any, reason: str, method: str) -> None:
    config = AdapterConfig(method=method, **SMALL)
    with pytest.raises(AdapterError, match=f"finds no module to adapt; block.odd: {reason}"):
        attach(nn.ModuleDict({"block": nn.ModuleDict({"odd": layer()})}), config)
    adapter = attach(nn.ModuleDict({"odd": layer(), "plain": o3.Linear("2x0e", "2x0e")}), config)
    assert set(adapter.skipped) == {"odd"}
    assert adapter.skipped["odd"].startswith(reason)


def test_a_product_with_outside_weights_is_named(network: nn.Module) -> None:
    product = o3.FullyConnectedTensorProduct("2x0e", "0e", "2x0e", internal_weights=False, shared_weights=True)
    with pytest.raises(AdapterError, match="the network itself: it has no weights of its own"):
        attach(product, AdapterConfig(method="gates"))


class Linear(nn.Module):
    """Like `o3.Linear` of another e3nn: alike in all but its class."""

    def __init__(self) -> None:
        super().__init__()
        self.irreps_in = self.irreps_out = "2x0e"
        self.weight = nn.Parameter(torch.ones(4))


def test_layers_of_another_e3nn_are_refused_by_name() -> None:
    foreign = nn.ModuleDict({"own": o3.Linear("2x0e", "2x0e"), "other": Linear()})
    names = list(foreign.state_dict())
    for method in ("mmea", "gates", "elora", "sparse", "bottleneck"):
        with pytest.raises(
            AdapterError, match=r"other: a layer of class .*Linear, which is none of the installed e3nn's"
        ):
            attach(foreign, AdapterConfig(method=method))
        assert list(foreign.state_dict()) == names
    adapter = attach(foreign, AdapterConfig(method="gates", targets=("own",)))  # the rest, if so wished
    assert list(adapter.gates) == ["own"]


def test_many_foreign_layers_are_counted_rather_than_listed() -> None:
    with pytest.raises(AdapterError, match=r"; 4: a layer of .*; \.\.\. \(7 in all\)$"):
        attach(nn.Sequential(*(Linear() for _ in range(7))), AdapterConfig())


def test_scripted_and_compiled_modules_are_refused_by_name() -> None:
    holder = nn.ModuleDict({"inner": torch.jit.script(o3.Linear("2x0e", "2x0e"))})
    with pytest.raises(AdapterError, match=r"inner: it is scripted \(TorchScript\): load the eager network"):
        attach(holder, AdapterConfig(method="gates"))
    layer = o3.Linear("2x0e", "2x0e")
    wrapped: Any = torch.compile(layer)
    for compiled in (wrapped, nn.ModuleDict({"inner": wrapped})):
        with pytest.raises(AdapterError, match=r"went through torch\.compile: attach to the eager network"):
            attach(compiled, AdapterConfig(method="gates"))
    layer.compile()
    with pytest.raises(AdapterError, match=r"the network itself: it went through torch\.compile"):
        attach(layer, AdapterConfig(method="gates"))


def test_features_given_by_name_are_refused_at_the_call() -> None:
    layer = o3.Linear("2x0e", "2x0e")
    attach(layer, AdapterConfig(method="gates"))
    with pytest.raises(AdapterError, match="must be given its features by place, not by name"):
        layer(features=torch.zeros(1, 2))


def test_methods_that_know_mace_alone_say_so(network: nn.Module) -> None:
    with pytest.raises(AdapterError, match=r"'readout' finds no module to adapt among \['readouts', 'readouts\.\*'\]"):
        attach(network, AdapterConfig(method="readout"))
    if find_spec("mace") is None:
        pytest.skip("mace-torch is not installed")
    with pytest.raises(BackboneError, match="networks of class SimpleNetwork are not supported"):
        attach(network, AdapterConfig(method="scratch"))
    assert attached(network) is None


def test_radial_networks_of_another_e3nn_are_refused_by_name() -> None:
    other = type("FullyConnectedNet", (nn.Sequential,), {})
    with pytest.raises(AdapterError, match=r"1: a layer of class .*FullyConnectedNet"):
        attach(nn.Sequential(FullyConnectedNet([2, 2]), other(nn.Linear(2, 2))), AdapterConfig())


@pytest.fixture
def cue() -> Any:
    """cuEquivariance and its layers."""
    module = pytest.importorskip("cuequivariance", reason="cuequivariance is not installed")
    pytest.importorskip("cuequivariance_torch", reason="cuequivariance-torch is not installed")
    return module


CUE_IRREPS = "3x0e + 2x0o + 2x1o + 2x2e"


def cue_layer(cue: Any, layout: str) -> nn.ModuleDict:
    irreps = cue.Irreps("O3", CUE_IRREPS)
    torch.manual_seed(0)
    layer = sys.modules["cuequivariance_torch"].Linear(
        irreps, irreps, layout=getattr(cue, layout), method="naive", dtype=torch.float64
    )
    return nn.ModuleDict({"lin": layer})


def components_last(x: Tensor, layout: str) -> Tensor:
    """Features in the layout of e3nn."""
    if layout == "mul_ir":
        return x
    irreps = o3.Irreps(CUE_IRREPS)
    parts = [
        x[..., s].unflatten(-1, (ir.dim, mul)).transpose(-1, -2).flatten(-2)
        for (mul, ir), s in zip(irreps, irreps.slices(), strict=True)
    ]
    return torch.cat(parts, dim=-1)


def components_first(x: Tensor, layout: str) -> Tensor:
    """The inverse."""
    if layout == "mul_ir":
        return x
    irreps = o3.Irreps(CUE_IRREPS)
    parts = [
        x[..., s].unflatten(-1, (mul, ir.dim)).transpose(-1, -2).flatten(-2)
        for (mul, ir), s in zip(irreps, irreps.slices(), strict=True)
    ]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("gains", ["channel", "order"])
def test_gates_work_in_both_layouts_of_cuequivariance(cue: Any, gains: Any) -> None:
    x = torch.randn(5, o3.Irreps(CUE_IRREPS).dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for layout in ("mul_ir", "ir_mul"):
        network = cue_layer(cue, layout)
        layer = network["lin"]
        bare = layer(components_first(x, layout))
        adapter = attach(network, AdapterConfig(method="gates", gate_rank=3, gains=gains))
        assert torch.equal(layer(components_first(x, layout)), bare)  # the identity at the start
        randomise(adapter, std=0.5)

        def apply(x: Tensor, layer: nn.Module = layer, layout: str = layout) -> Tensor:
            return components_last(layer(components_first(x, layout)), layout)

        outputs.append(apply(x))
        assert not torch.allclose(outputs[-1], components_last(bare, layout), atol=0.01)
        for turn in (o3.rand_matrix().double(), -o3.rand_matrix().double()):
            d = o3.Irreps(CUE_IRREPS).D_from_matrix(turn)
            torch.testing.assert_close(apply(x @ d.T), apply(x) @ d.T, rtol=0, atol=1e-10)
        adapter.merge()
        torch.testing.assert_close(apply(x), outputs[-1], rtol=0, atol=1e-12)
        adapter.detach()
        assert torch.equal(layer(components_first(x, layout)), bare)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)  # the same weights, the same gates


def test_weights_of_cuequivariance_are_not_updated_and_named(cue: Any) -> None:
    network = cue_layer(cue, "mul_ir")
    for method in ("elora", "sparse"):
        with pytest.raises(AdapterError, match="lin: a linear layer of cuEquivariance, whose weights this method"):
            attach(network, AdapterConfig(method=method))
    without_parity = cue.Irreps("SO3", "2x0 + 1x1")
    linear = sys.modules["cuequivariance_torch"].Linear(without_parity, without_parity, layout=cue.mul_ir)
    with pytest.raises(AdapterError, match=r"lin: its irreps 2x0\+1 -> 2x0\+1 are not those of O\(3\)"):
        attach(nn.ModuleDict({"lin": linear}), AdapterConfig(method="gates"))


@pytest.mark.skipif(find_spec("mace") is None, reason="mace-torch is not installed")
def test_a_mace_network_converted_to_cuequivariance_is_gated(cue: Any) -> None:
    convert = pytest.importorskip("mace.cli.convert_e3nn_cueq")
    from conftest import batch_of, ethanol, random_network, run

    plain = random_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mace-torch and cuEquivariance
        try:
            converted = convert.run(plain, device="cpu").double()
        finally:
            torch.set_default_dtype(torch.float32)  # which mace-torch's converter changes
    batch = batch_of(ethanol())
    bare = run(converted, batch)["forces"]
    torch.testing.assert_close(bare, run(plain, batch)["forces"], rtol=0, atol=1e-8)
    with pytest.raises(AdapterError, match="a layer of cuEquivariance with weights: choose method gates"):
        attach(converted, AdapterConfig())
    adapters = [attach(network, AdapterConfig(method="gates", gate_rank=2)) for network in (plain, converted)]
    assert list(adapters[0].gates) == list(adapters[1].gates)
    randomise(adapters[0], std=0.3)
    adapters[1].load_state_dict(adapters[0].state_dict())
    forces = run(converted, batch)["forces"]
    assert not torch.allclose(forces, bare, atol=1e-3)
    torch.testing.assert_close(forces, run(plain, batch)["forces"], rtol=0, atol=1e-8)


@pytest.mark.skipif(find_spec("mace") is None, reason="mace-torch is not installed")
def test_the_loop_of_the_example_trains_energies_and_forces() -> None:
    example = runpy.run_path(str(conftest.ROOT / "examples/other_network.py"))
    network = built(example["simple_network"]).float()
    data = example["read_labelled"](example["DATA"] / "test.xyz")
    few = type(data)(data.numbers, data.positions[:3], data.energies[:3], data.forces[:3])
    mean, which = few.energies.mean(), torch.arange(3)

    def error() -> Tensor:
        return (example["predict"](network, few, which, mean, train=False)[1] - few.forces).square().mean()

    before = error()
    adapter = attach(network, AdapterConfig(**SMALL))
    assert torch.equal(example["train"](network, adapter.parameters(), few, steps=4, lr=5e-3), mean)
    assert error() < before
    adapter.detach()
    torch.testing.assert_close(error(), before)
