"""Below the shortest distances of the training data the radial functions are the backbone's again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from ase import Atoms
from ase.build import molecule
from torch import Tensor, nn

from conftest import ELEMENTS, batch_of, ethanol, random_network, randomise, run
from mmea_calc.adapted import Adapter, attach
from mmea_calc.backbone import load_backbone
from mmea_calc.config import AdapterConfig
from mmea_calc.errors import AdapterError
from mmea_calc.graph import build_graph, collate
from mmea_calc.short_range import FADED, smooth_step

SMALL: dict[str, Any] = dict(gate_rank=4, low_rank=3)
F64 = torch.float64
SHORTEST = "ranges.radial_embedding.shortest"


def adapted(network: nn.Module, *, only: tuple[str, ...] = ("",), std: float = 0.05) -> Adapter:
    """An adapter with random values in the tensors whose names contain a word of `only`, that has seen ethanol."""
    adapter = attach(network, AdapterConfig(**SMALL))
    start = adapter.state_dict()
    randomise(adapter, std=std)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not any(word in name for word in only):
                parameter.copy_(start[name])
    with adapter.recording():
        run(network, batch_of(ethanol()))
    return adapter


RADIAL = ("conv_tp_weights", "bessel_weights")


def pair(distance: float, symbols: str = "CO") -> Atoms:
    return Atoms(symbols, [[0, 0, 0], [0, 0, distance]])


def forces(network: nn.Module, *structures: Atoms) -> Tensor:
    return run(network, batch_of(*structures))["forces"]


def test_the_step_is_twice_differentiable_and_ends_exactly() -> None:
    x = torch.linspace(0.3, 1.4, 2001, dtype=F64, requires_grad=True)
    value = smooth_step(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(value[x >= 1], torch.ones_like(value[x >= 1]))
    assert torch.equal(value[x <= FADED], torch.zeros_like(value[x <= FADED]))
    for one in (value.detach(), first.detach(), second):
        assert float(one.diff().abs().max()) < 0.02 * float(one.abs().max())  # a jump would be of order 1


def test_the_shortest_distance_of_every_pair_of_elements_is_kept() -> None:
    atoms = ethanol()
    adapter = adapted(random_network())
    assert adapter.short_range is not None
    shortest = adapter.short_range.shortest
    distances, numbers = torch.from_numpy(atoms.get_all_distances()), torch.from_numpy(atoms.numbers)
    distances.fill_diagonal_(torch.inf)
    for i, a in enumerate(ELEMENTS):
        for j, b in enumerate(ELEMENTS):
            if (a, b) == (8, 8):  # one oxygen only: no such pair
                assert shortest[i, j] == shortest.min()
            else:
                expected = distances[numbers == a][:, numbers == b].min()
                torch.testing.assert_close(shortest[i, j], expected, rtol=0, atol=1e-12)


def test_at_the_distances_of_the_data_and_beyond_no_bit_changes() -> None:
    network = random_network()
    adapter = adapted(network)
    assert adapter.short_range is not None
    further = ethanol()
    further.positions *= 1.05
    seen = forces(network, ethanol(), further)
    adapter.short_range.active = False
    assert torch.equal(forces(network, ethanol(), further), seen)


@pytest.mark.parametrize("merged", [False, True])
def test_far_below_the_data_radial_updates_change_nothing(merged: bool) -> None:
    """An adapter that changes radial functions alone is its backbone there, and differs without the fade."""
    network = random_network()
    bare = {r: forces(network, pair(r)) for r in (0.3, 0.5, 0.8, 1.3, 2.0)}
    adapter = adapted(network, only=RADIAL, std=0.3)
    if merged:
        adapter.merge()
    assert adapter.short_range is not None
    limit = float(adapter.short_range.shortest[1, 2])
    for r, expected in bare.items():
        if r < FADED * limit:
            torch.testing.assert_close(forces(network, pair(r)), expected, rtol=1e-12, atol=1e-12)
        else:
            assert not torch.allclose(forces(network, pair(r)), expected, rtol=1e-3)
    adapter.short_range.active = False
    assert not torch.allclose(forces(network, pair(0.3)), bare[0.3], rtol=1e-3)


def squeezed() -> Atoms:
    """Ethanol with its C-O bond within the fade, and a hydrogen below it."""
    atoms = ethanol()
    for one, other, scale in ((1, 2, 0.8), (2, 3, 0.5)):
        atoms.positions[other] = atoms.positions[one] + scale * (atoms.positions[other] - atoms.positions[one])
    return atoms


def test_folding_keeps_what_the_fade_gives() -> None:
    network = random_network()
    adapter = adapted(network)
    before = forces(network, squeezed())
    adapter.merge()
    torch.testing.assert_close(forces(network, squeezed()), before, rtol=1e-10, atol=1e-10)
    adapter.unmerge()
    assert torch.equal(forces(network, squeezed()), before)


@pytest.mark.parametrize("merged", [False, True])
def test_switched_off_and_detached_it_is_the_backbone_to_the_bit(merged: bool) -> None:
    network = random_network()
    bare, names = forces(network, squeezed()), list(network.state_dict())
    adapter = adapted(network)
    if merged:
        adapter.merge()
    assert not torch.allclose(forces(network, squeezed()), bare)
    with adapter.disabled():
        assert torch.equal(forces(network, squeezed()), bare)
    assert not torch.allclose(forces(network, squeezed()), bare)
    adapter.detach()
    assert torch.equal(forces(network, squeezed()), bare)
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["small", *(n for n in ARCHITECTURES if "density" in n or "agnesi" in n.lower())])
def test_forces_within_the_fade_are_the_gradient_of_the_energy(name: str, merged: bool) -> None:
    network = random_network(**({} if name == "small" else ARCHITECTURES[name]))
    adapter = adapted(network)
    if merged:
        adapter.merge()
    atoms = squeezed()
    exact = forces(network, atoms)
    step = 1e-5
    for atom in (1, 2, 3):
        moved = []
        for sign in (1, -1):
            other = atoms.copy()
            other.positions[atom, 1] += sign * step
            moved.append(run(network, batch_of(other))["energy"])
        numeric = -(moved[0] - moved[1]).item() / (2 * step)
        assert numeric == pytest.approx(float(exact[atom, 1]), rel=1e-6, abs=1e-6)


def test_a_loss_of_forces_within_the_fade_has_a_gradient() -> None:
    """Training goes on under the ranges of an earlier training, and squeezed structures may be among its data."""
    network = random_network()
    adapter = adapted(network, only=RADIAL, std=0.3)
    tensors = dict(batch_of(squeezed()).tensors)

    def loss() -> Tensor:
        return network(tensors | {"positions": tensors["positions"].clone()}, training=True)["forces"].square().sum()

    name, weight = next((n, p) for n, p in adapter.named_parameters() if n.endswith("layer0.weight.B.0"))
    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
        values.append(float(loss().detach()))
        with torch.no_grad():
            weight[0, 0] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[0, 0]), rel=1e-5), name


def test_edges_of_a_batch_fade_by_their_own_length() -> None:
    network = random_network()
    adapted(network)
    alone = [forces(network, a) for a in (ethanol(), squeezed(), pair(0.4))]
    torch.testing.assert_close(
        forces(network, ethanol(), squeezed(), pair(0.4)), torch.cat(alone), rtol=1e-12, atol=1e-12
    )


def test_the_distances_are_part_of_the_state() -> None:
    network, other = random_network(), random_network()
    adapter = adapted(network)
    state = adapter.state_dict()
    fresh = attach(other, AdapterConfig(**SMALL))
    fresh.load_state_dict(state)
    assert torch.equal(forces(other, squeezed()), forces(network, squeezed()))
    del state[SHORTEST]  # of an adapter that knows none: it never fades
    fresh.load_state_dict(state)
    assert adapter.short_range is not None
    adapter.short_range.active = False
    assert torch.equal(forces(other, squeezed()), forces(network, squeezed()))
    with pytest.raises(AdapterError, match="must hold positive distances"):
        fresh.load_state_dict({**state, SHORTEST: torch.zeros(3, 3)})


@pytest.mark.parametrize("options", [dict(saturate=False), dict(method="gates"), dict(method="elora")])
def test_published_adapters_and_those_without_gates_or_radial_updates_do_not_fade(
    options: dict[str, Any],
) -> None:
    adapter = attach(random_network(), AdapterConfig(**SMALL, **options))
    assert adapter.short_range is None


def largest_forces(network: nn.Module, symbols: str, elements: tuple[int, ...], r_max: float) -> Tensor:
    distances = torch.arange(0.3, 3.0, 0.03).tolist()
    graphs = [build_graph(pair(r, symbols), r_max) for r in distances]
    return run(network, collate(graphs, elements, dtype=F64))["forces"].norm(dim=-1).amax()


def worst_ratio(*, fade: bool) -> float:
    """Largest force on two atoms from 0.3 A outwards over the bare embedded backbone's, worst of 5 pairs and 3 draws.

    The low-rank factors B of the radial layers have the spread that training on aspirin gives them, 0.03 to 0.12.
    """
    backbone = load_backbone("mmea-organic-s", dtype="float64")
    network, elements = backbone.network, backbone.elements
    molecules = [molecule(name) for name in ("CH3CH2OH", "CH3OH", "C2H6", "H2CO", "HCOOH", "C6H6")]
    data = collate([build_graph(a, backbone.r_max) for a in molecules], elements, dtype=F64)
    pairs = ("CH", "CO", "CC", "HH", "OH")
    bare = [largest_forces(network, p, elements, backbone.r_max) for p in pairs]
    worst = 0.0
    for seed in range(3):
        adapter = attach(network, AdapterConfig(seed=seed))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if ".B." in name and "conv_tp_weights" in name:
                    parameter.add_(0.07 * torch.randn(parameter.shape, generator=generator, dtype=F64))
        with adapter.recording():
            run(network, data)
        assert adapter.short_range is not None
        adapter.short_range.active = fade
        ratios = [largest_forces(network, p, elements, backbone.r_max) / b for p, b in zip(pairs, bare, strict=True)]
        worst = max(worst, float(torch.stack(ratios).max()))
        adapter.detach()
    return worst


def test_radial_updates_of_trained_size_leave_two_close_atoms_the_backbone_s_forces() -> None:
    assert worst_ratio(fade=True) < 3


def test_without_the_fade_they_do_not() -> None:
    assert worst_ratio(fade=False) > 30
