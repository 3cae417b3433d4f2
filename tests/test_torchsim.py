"""`MMEAModel` in TorchSim: the calculator's results, through optimisers, integrators and autobatching too."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet
from engine_potentials import adapter_file, reference, small_backbone

from conftest import crystal, ethanol

pytest.importorskip("torch_sim", reason="TorchSim is not installed: pip install 'mmea[torch-sim]'")

import torch_sim as ts
from torch_sim.models.interface import validate_model_outputs

from mmea_calc.errors import DataError, EngineError
from mmea_calc.torchsim import MMEAModel


@cache
def model() -> MMEAModel:
    """Tests leave it as it is."""
    return MMEAModel(adapter_file(), small_backbone())


def molecules() -> list[Atoms]:
    water = molecule("H2O")
    water.positions += 50.0  # far from the origin
    acid = molecule("CH3COOH")
    acid.rattle(0.05, seed=1)
    return [ethanol(), water, acid, Atoms("C")]


def crystals() -> list[Atoms]:
    big = bulk("C", "diamond", a=3.6, cubic=True) * (2, 1, 1)
    big.numbers[::3] = 8
    big.rattle(0.1, seed=2)
    big.positions[0] += 2 * big.cell[0] - big.cell[2]  # outside of its cell
    boxed = ethanol()
    boxed.set_cell([9.0, 10.0, 11.0])
    boxed.pbc = True
    return [crystal(), big, boxed]


def compared(structures: list[Atoms], results: dict[str, torch.Tensor], tolerance: float) -> None:
    """Energies, forces, and the stress where ASE has one, are the calculator's for each structure alone."""
    forces = results["forces"].split([len(a) for a in structures])
    for i, atoms in enumerate(structures):
        alone = atoms.copy()
        alone.calc = reference()
        assert float(results["energy"][i]) == pytest.approx(alone.get_potential_energy(), abs=tolerance)
        np.testing.assert_allclose(forces[i].numpy(), alone.get_forces(), atol=tolerance)
        if alone.pbc.all():
            np.testing.assert_allclose(results["stress"][i].numpy(), alone.get_stress(voigt=False), atol=tolerance)
            assert results["stress"][i].abs().max() > 10 * tolerance


def state_of(structures: list[Atoms]) -> Any:
    return ts.initialize_state(structures, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("structures", [molecules(), crystals()], ids=["molecules", "crystals"])
def test_a_mixed_batch_has_the_calculators_results(structures: list[Atoms]) -> None:
    results = model()(state_of(structures))
    assert all(t.dtype == torch.float64 for t in results.values())
    compared(structures, results, 1e-9)
    # in another order and company, and alone
    compared(structures[::-1], model()(state_of(structures[::-1])), 1e-9)
    compared(structures[1:2], model()(state_of(structures[1:2])), 1e-9)


@pytest.mark.parametrize("structures", [molecules(), crystals()], ids=["molecules", "crystals"])
def test_single_precision_of_the_network_keeps_within_1e_5(structures: list[Atoms]) -> None:
    single = MMEAModel(adapter_file(), small_backbone().to(None, "float32"))
    assert single.potential.dtype == torch.float32
    assert single.dtype == torch.float64
    compared(structures, single(state_of(structures)), 1e-5)


def test_a_molecule_in_vacuum_has_no_stress() -> None:
    results = model()(state_of(molecules()))
    assert results["stress"].shape == (4, 3, 3)
    assert not results["stress"].any()


def test_neighbours_follow_positions_cells_and_systems() -> None:
    structures = crystals()
    state = state_of(structures)
    compared(structures, model()(state), 1e-9)
    made = model()._forces
    for atoms in structures:
        atoms.rattle(0.2, seed=5)
    moved = state_of(structures)
    compared(structures, model()(moved), 1e-9)
    assert model()._forces is made
    structures[0].positions[0] += [3.1, 0.3, -7.7]
    compared(structures, model()(state_of(structures)), 1e-9)
    for atoms in structures:
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * np.tri(3)), scale_atoms=True)
    compared(structures, model()(state_of(structures)), 1e-9)
    structures[1].numbers[:] = 8
    compared(structures, model()(state_of(structures)), 1e-9)


def test_a_state_that_is_changed_in_place_is_noticed() -> None:
    structures = crystals()
    state = state_of(structures)
    model()(state)
    state.cell *= 1.02
    state.positions *= 1.02
    for atoms in structures:
        atoms.set_cell(atoms.cell.array * 1.02, scale_atoms=True)
    compared(structures, model()(state), 1e-9)


def test_a_call_computes_what_was_asked_for_and_leaves_its_state() -> None:
    partial = MMEAModel(None, small_backbone())
    state = state_of(molecules())
    before = state.clone()
    partial.compute_stress = False
    assert set(partial(state)) == {"energy", "forces"}
    partial.compute_forces = False
    assert set(partial(state)) == {"energy"}
    for name in ("positions", "cell", "atomic_numbers", "system_idx"):
        assert torch.equal(getattr(state, name), getattr(before, name))
        assert not getattr(state, name).requires_grad


def test_the_model_keeps_torchsims_contract() -> None:
    class Renamed(MMEAModel):
        """The validation's silicon and iron as carbon and oxygen, which this small network knows."""

        def forward(self, state: Any, **options: Any) -> dict[str, torch.Tensor]:
            state = state.clone()
            state.atomic_numbers = torch.where(state.atomic_numbers == 14, 6, 8)
            return super().forward(state, **options)

    validate_model_outputs(Renamed(adapter_file(), small_backbone()), torch.device("cpu"), torch.float64)


def test_a_dictionary_is_a_state_too() -> None:
    state = state_of(crystals())
    fields = {n: getattr(state, n) for n in ("positions", "cell", "atomic_numbers", "system_idx", "pbc")}
    results = model()(fields)
    for name, value in model()(state).items():
        assert torch.equal(results[name], value)


# -- TorchSim's machinery -----------------------------------------------------------------------------------------


def test_nve_of_a_batch_is_nve_of_ase_for_each() -> None:
    structures, dt, n_steps = molecules()[:3], 0.5, 10
    for i, atoms in enumerate(structures):
        atoms.set_momenta(np.random.default_rng(i).normal(0, 0.5, (len(atoms), 3)))
    state = state_of(structures)
    state.momenta = torch.as_tensor(np.concatenate([a.get_momenta() for a in structures]))
    init, update = ts.nve(
        model=model(),
        dt=torch.tensor(dt / 1000 * ts.units.MetalUnits.time, dtype=torch.float64),
        kT=torch.tensor(0.0, dtype=torch.float64),
    )
    md = init(state)
    for _ in range(n_steps):
        md = update(md)
    for atoms, positions in zip(structures, md.positions.split([len(a) for a in structures]), strict=True):
        start = atoms.positions.copy()
        atoms.calc = reference()
        VelocityVerlet(atoms, dt * units.fs).run(n_steps)
        assert np.abs(atoms.positions - start).max() > 0.02
        np.testing.assert_allclose(positions.numpy(), atoms.positions, atol=1e-6)


# TorchSim says so when it was told to end after some steps.
@pytest.mark.filterwarnings("ignore:Optimize has reached max steps:UserWarning")
@pytest.mark.parametrize("optimizer", [ts.optimizers.fire, ts.frechet_cell_fire], ids=["positions", "cell too"])
def test_optimisers_lower_energy_and_forces(optimizer: Any) -> None:
    structures = crystals()[:2]
    before = model()(state_of(structures))
    final = ts.optimize(
        system=structures,
        model=model(),
        optimizer=optimizer,
        max_steps=30,
        convergence_fn=ts.generate_force_convergence_fn(force_tol=0.01, include_cell_forces=False),
    )
    assert (final.energy < before["energy"] - 1e-3).all()
    compared(final.to_atoms(), {**model()(final), "energy": final.energy, "forces": final.forces}, 1e-9)


@pytest.mark.parametrize("periodic", [False, True], ids=["molecules", "crystals"])
def test_autobatching_changes_no_result(periodic: bool) -> None:
    structures = crystals() if periodic else molecules()[:3]
    one = MMEAModel(adapter_file(), small_backbone(), memory_scales_with="n_atoms")
    batcher = ts.BinningAutoBatcher(model=one, memory_scales_with="n_atoms", max_memory_scaler=17)
    together = ts.static(structures, one)
    apart = ts.static(structures, one, autobatcher=batcher)
    assert len(list(batcher.memory_scalers)) == len(structures)
    for a, b in zip(together, apart, strict=True):
        for name in ("potential_energy", "forces", "stress"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-9)


def test_systems_that_come_and_go_in_flight_end_where_they_would_alone() -> None:
    structures = molecules()[:3]

    def relaxed(autobatcher: Any) -> torch.Tensor:
        final = ts.optimize(
            system=structures,
            model=model(),
            optimizer=ts.optimizers.fire,
            max_steps=60,
            steps_between_swaps=2,
            autobatcher=autobatcher,
            convergence_fn=ts.generate_force_convergence_fn(force_tol=0.3, include_cell_forces=False),
        )
        return final.energy

    batcher = ts.InFlightAutoBatcher(model=model(), memory_scales_with="n_atoms", max_memory_scaler=12)
    torch.testing.assert_close(relaxed(batcher), relaxed(False), rtol=0, atol=1e-6)


# -- errors -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_computed_is_told() -> None:
    with pytest.raises(DataError, match="has Au"):
        model()(state_of([Atoms("Au")]))
    nan = state_of(molecules())
    nan.positions[3, 1] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity for atom 3"):
        model()(nan)
    flat = state_of(crystals())
    flat.cell[1] = 0.0
    with pytest.raises(DataError, match="lattice vector there is zero"):
        model()(flat)
    elsewhere = state_of(molecules())
    elsewhere.positions = elsewhere.positions.to("meta")
    with pytest.raises(DataError, match=r"expected a state on cpu.* got one on meta"):
        model()(elsewhere)


def test_an_element_that_the_adapter_has_not_seen_is_told_once() -> None:
    one = MMEAModel(replace(adapter_file(), elements=(1, 6)), small_backbone())
    with pytest.warns(UserWarning, match="has seen no O in training"):
        one(state_of([ethanol()]))
    one(state_of([molecule("H2O")]))  # (a second warning would be an error)


def test_without_torchsim_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_sim", "torch_sim.models.interface", "torch_sim.state"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mmea_calc.torchsim")
    with pytest.raises(EngineError, match=r"pip install 'mmea\[torch-sim\]'"):
        import_module("mmea_calc.torchsim")
