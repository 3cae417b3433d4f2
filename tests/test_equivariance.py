"""Symmetries and derivatives of adapted networks, for every architecture: float64, 1e-10 relative."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from ase import Atoms
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from conftest import batch_of, crystal, ethanol, randomise, run
from mmea_calc.adapted import Adapter, attach
from mmea_calc.config import AdapterConfig
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.methods import METHODS

RTOL = 1e-10
CASES = [
    *((name, "mmea", "exp") for name in ARCHITECTURES),
    ("agnostic", "mmea", "residual"),
    ("L=2", "gates", "residual"),
    ("L=2", "elora", "exp"),
]


def prepare(network: nn.Module, method: str, phi: str) -> Adapter:
    """Random gates, some of them levelling off, and random updates; the table contraction on top."""
    config = AdapterConfig(method=method, phi=phi, gate_rank=3, low_rank=2)  # type: ignore[arg-type]
    adapter = attach(network, config)
    randomise(adapter)
    for i, gate in enumerate(adapter.gates.values()):
        if i % 2:
            gate.set_range(torch.full_like(gate.z_low, -0.02), torch.full_like(gate.z_high, 0.03))
    use_fast_path(network)
    return adapter


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_the_start_the_adapted_network_is_its_backbone_to_the_bit(name: str) -> None:
    batches = batch_of(ethanol()), batch_of(crystal())
    with borrowed(name) as network:
        before = [run(network, batch, compute_stress=True) for batch in batches]
        for method in (name for name, method in METHODS.items() if method.identity):
            adapter = attach(network, AdapterConfig(method=method))
            for batch, expected in zip(batches, before, strict=True):
                found = run(network, batch, compute_stress=True)
                for key in ("energy", "node_energy", "forces", "stress"):
                    assert torch.equal(found[key], expected[key]), (method, key)
            adapter.detach()


def test_each_head_of_a_network_is_adapted() -> None:
    with borrowed("heads") as network:
        bare = [run(network, batch_of(ethanol(), head=head))["forces"] for head in (0, 1)]
        adapter = prepare(network, "mmea", "exp")
        for head in (0, 1):
            changed = run(adapter.network, batch_of(ethanol(), head=head))["forces"]
            assert float((changed - bare[head]).abs().max()) > 1e-3


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def adapted(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    name, method, phi = request.param
    with borrowed(name) as network:
        bare = run(network, batch_of(ethanol()))
        adapter = prepare(network, method, phi)
        changed = run(network, batch_of(ethanol()))
        # what follows would say nothing of an adapter that changes nothing
        assert float((changed["forces"] - bare["forces"]).abs().max()) > 1e-3 * float(bare["forces"].abs().max())
        yield adapter


def evaluate(adapter: Adapter, atoms: Atoms) -> dict[str, Tensor]:
    return run(adapter.network, batch_of(atoms), compute_stress=bool(atoms.pbc.all()))


def assert_same(one: Tensor, other: Tensor) -> None:
    scale = max(float(one.abs().max()), 1e-3)
    torch.testing.assert_close(one, other, rtol=0, atol=RTOL * scale)


@pytest.mark.parametrize("handedness", [1, -1], ids=["rotation", "reflection"])
def test_energy_forces_and_stress_turn_with_the_structure(adapted: Adapter, handedness: int) -> None:
    matrix = handedness * Rotation.random(random_state=5 + handedness).as_matrix()
    turn = torch.as_tensor(matrix)
    for atoms in (ethanol(), crystal()):
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ matrix.T)
        turned.positions = atoms.positions @ matrix.T
        before, after = evaluate(adapted, atoms), evaluate(adapted, turned)
        assert_same(after["energy"], before["energy"])
        assert_same(after["forces"], before["forces"] @ turn.T)
        if atoms.pbc.all():
            assert_same(after["stress"], turn @ before["stress"] @ turn.T)


def test_atoms_may_come_in_any_order(adapted: Adapter) -> None:
    for atoms in (ethanol(), crystal()):
        order = np.random.default_rng(1).permutation(len(atoms))
        before, after = evaluate(adapted, atoms), evaluate(adapted, atoms[order])
        assert_same(after["energy"], before["energy"])
        assert_same(after["forces"], before["forces"][torch.as_tensor(order)])


def test_nothing_changes_when_the_structure_is_moved(adapted: Adapter) -> None:
    for atoms in (ethanol(), crystal()):
        moved = atoms.copy()
        moved.positions += [11.3, -7.1, 3.9]
        before, after = evaluate(adapted, atoms), evaluate(adapted, moved)
        for key in ("energy", "forces"):
            assert_same(after[key], before[key])


def test_structures_of_a_batch_do_not_see_each_other(adapted: Adapter) -> None:
    alone = evaluate(adapted, ethanol())
    together = run(adapted.network, batch_of(crystal(), ethanol(), crystal()))
    assert_same(together["energy"][1:2], alone["energy"])
    assert_same(together["forces"][2:-2], alone["forces"])


def test_forces_are_the_gradient_of_the_energy(adapted: Adapter) -> None:
    step = 1e-4
    for atoms in (ethanol(), crystal()):
        forces = evaluate(adapted, atoms)["forces"]
        displaced = []
        for atom, axis in ((0, 0), (1, 2)):
            for sign in (1, -1):
                displaced.append(atoms.copy())
                displaced[-1].positions[atom, axis] += sign * step
        energies = run(adapted.network, batch_of(*displaced), compute_force=False)["energy"]
        numeric = -(energies[0::2] - energies[1::2]) / (2 * step)
        scale = max(1.0, float(forces.abs().max()))
        torch.testing.assert_close(numeric, forces[[0, 1], [0, 2]], rtol=0, atol=1e-6 * scale)


def test_stress_is_the_gradient_of_the_energy_by_strain(adapted: Adapter) -> None:
    atoms, step = crystal(), 3e-5
    stress = evaluate(adapted, atoms)["stress"][0]
    pairs = ((0, 0), (1, 2))
    strained = []
    for i, j in pairs:
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            strained.append(atoms.copy())
            strained[-1].set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    energies = run(adapted.network, batch_of(*strained), compute_force=False)["energy"]
    numeric = (energies[0::2] - energies[1::2]) / (2 * step) / atoms.get_volume()
    expected = stress[[i for i, _ in pairs], [j for _, j in pairs]]
    torch.testing.assert_close(numeric, expected, rtol=0, atol=1e-6 * max(0.1, float(stress.abs().max())))
