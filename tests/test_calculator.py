"""`MMEACalculator`: agreement with mace-torch, adapters, committees, ASE's rules, errors."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from torch import nn

from conftest import ELEMENTS, crystal, ethanol, network_config, random_network, randomise, small_backbone_around
from mmea_calc.adapted import Adapter, attach
from mmea_calc.adapter_file import AdapterFile, read_adapter, write_adapter
from mmea_calc.backbone import BACKBONE_FOLDER, Backbone, load_backbone
from mmea_calc.calculator import MMEACalculator
from mmea_calc.config import DEFAULT_BACKBONE, AdapterConfig
from mmea_calc.errors import AdapterError, AdapterFileError, BackboneError, DataError, MMEAError
from mmea_calc.mace_bridge import build_network, mace_calculators
from mmea_calc.mace_networks import accept_neutral_graphs
from mmea_calc.potential import Potential

E0 = {1: -13.6, 6: -1027.3, 8: -2038.5}
CONFIG = AdapterConfig(gate_rank=3, low_rank=2)


# Building a network takes longer than most tests: those that a test has used go to the next one, as they were.
FREE: list[nn.Module] = []
TAKEN: list[nn.Module] = []


@pytest.fixture(autouse=True)
def _networks_return(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handles: list[Adapter] = []

    def recorded(*args: Any, **options: Any) -> Adapter:
        handles.append(attach(*args, **options))
        return handles[-1]

    monkeypatch.setattr("mmea_calc.potential.attach", recorded)
    yield
    for handle in handles:
        handle.detach()
    FREE.extend(n for n in TAKEN if {(p.dtype, p.device.type) for p in n.parameters()} == {(torch.float64, "cpu")})
    TAKEN.clear()


def small_backbone(device: str = "cpu") -> Backbone:
    """A random network with reference energies, as `load_backbone` would give it; each one its own."""
    network = FREE.pop() if FREE else random_network()
    TAKEN.append(network)
    return small_backbone_around(network, E0).to(device)


def adapter_for(backbone: Backbone, seed: int = 1, config: AdapterConfig = CONFIG, **fields: Any) -> AdapterFile:
    """A random adapter for a backbone, which stays as it is."""
    adapter = attach(backbone.network, replace(config, seed=seed))
    randomise(adapter, seed)
    tensors = adapter.state_dict()
    adapter.detach()
    fields = {"reference_energies": {6: -1000.0 - seed}, "elements": ELEMENTS, "head": backbone.head, **fields}
    return AdapterFile(adapter.config, tensors, backbone.name, backbone.fingerprint, **fields)


@cache
def mace_calculator(device: str = "cpu") -> Any:
    """mace-torch's own calculator on the network of `small_backbone`, built apart from it, with E0 inside."""
    network = build_network(network_config(atomic_energies=[E0[z] for z in ELEMENTS]))
    state = {k: v for k, v in random_network().state_dict().items() if not k.startswith("atomic_energies_fn.")}
    network.load_state_dict(state, strict=False)
    return mace_calculators().MACECalculator(models=[network], device=device, default_dtype="float64")


def one_atom_cell() -> Atoms:
    """A primitive cell so small that an atom meets more than a hundred images of itself."""
    return Atoms("C", cell=bulk("C", "fcc", a=2.2).cell.array @ (np.eye(3) + 0.02), pbc=True)


def slab() -> Atoms:
    atoms = fcc111("C", (1, 2, 2), a=3.4, vacuum=5.0)
    atoms.numbers[0] = 8
    atoms.rattle(0.05, seed=5)
    return atoms


def slab_without_height() -> Atoms:
    atoms = slab()
    atoms.cell[2] = 0
    return atoms


def wire() -> Atoms:
    atoms = Atoms("COH", [[0, 0, 0], [1.3, 0.2, 0], [2.0, 0.9, 0.3]], cell=[3.1, 0, 0], pbc=[True, False, False])
    atoms.positions += [50.0, -3.0, 7.0]
    return atoms


STRUCTURES: list[Callable[[], Atoms]] = [ethanol, crystal, one_atom_cell, slab, slab_without_height, wire]


def forces_of(calculator: Any, atoms: Atoms) -> np.ndarray:
    return calculator.get_property("forces", atoms)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry at every evaluation of a network."""
    calls: list[int] = []
    original = Potential.predict

    def counted(self: Potential, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Potential, "predict", counted)
    return calls


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", STRUCTURES, ids=lambda f: f.__name__)
def test_bare_and_disabled_agree_with_mace_torch(make: Callable[[], Atoms], device: str) -> None:
    backbone = small_backbone(device)
    file = adapter_for(backbone)
    atoms, expected = make(), mace_calculator(device)
    ours = MMEACalculator(file, backbone, device=device)
    expected.calculate(atoms.copy())
    with ours.adapter_disabled():
        ours.calculate(atoms)
        found = ours.results
    ours.set_adapter(None)
    ours.calculate(atoms)
    for results in (found, ours.results):
        assert results["energy"] == pytest.approx(expected.results["energy"], abs=1e-9, rel=0)
        assert results["free_energy"] == results["energy"]
        np.testing.assert_allclose(results["forces"], expected.results["forces"], atol=1e-9, rtol=0)
        np.testing.assert_allclose(results["energies"], expected.results["energies"], atol=1e-9, rtol=0)
        if atoms.pbc.all():
            np.testing.assert_allclose(results["stress"], expected.results["stress"], atol=1e-9, rtol=0)
        else:
            assert "stress" not in results


@pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda f: f.__name__)
def test_folded_adapter_gives_what_the_unfolded_one_gives(make: Callable[[], Atoms], device: str) -> None:
    backbone = small_backbone(device)
    file, atoms = adapter_for(backbone), make()
    potential = Potential(small_backbone(device))
    potential.use(file)
    unfolded = potential.predict(potential.collate([potential.graph(atoms)]))
    calculator = MMEACalculator(file, backbone, device=device)
    forces = forces_of(calculator, atoms)
    assert unfolded.forces is not None
    np.testing.assert_allclose(forces, unfolded.forces.cpu(), atol=1e-11, rtol=0)
    assert calculator.results["energy"] == pytest.approx(float(unfolded.energy), abs=1e-9)
    with calculator.adapter_disabled():
        assert abs(forces_of(calculator, atoms) - forces).max() > 1e-3


def test_forces_and_stress_are_derivatives_of_the_energy() -> None:
    backbone = small_backbone()
    atoms = crystal()
    atoms.calc = MMEACalculator(adapter_for(backbone), backbone)
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), atol=1e-6)
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-6)


@pytest.mark.parametrize("make", [slab, lambda: Atoms(ethanol(), cell=[9, 10, 11])], ids=["slab", "molecule in a box"])
def test_stress_on_request_refers_to_the_volume_of_the_own_cell(make: Callable[[], Atoms]) -> None:
    atoms = make()
    atoms.calc = MMEACalculator(backbone=small_backbone(), stress=True)
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-7)


def test_energies_keep_double_precision_beside_single_precision_networks() -> None:
    atoms = ethanol()
    single = MMEACalculator(backbone=small_backbone(), dtype="float32")
    double = MMEACalculator(backbone=small_backbone())
    assert single.potential.dtype == torch.float32
    assert double.potential.dtype == torch.float64
    reference = sum(E0[z] for z in atoms.numbers)
    difference = single.get_potential_energy(atoms) - double.get_potential_energy(atoms)
    # the spacing of float32 at the total energy is 2.4e-4 eV
    assert abs(difference) < 3e-6 * max(1.0, abs(double.results["energy"] - reference))
    assert single.results["forces"].dtype == np.float64
    assert single.results["energies"].sum() == pytest.approx(single.results["energy"], abs=1e-4)


# --- stress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "stress", "reason"),
    [
        (ethanol, None, "stress=True"),
        (slab, None, "stress=True"),
        (ethanol, True, "volume"),
        (slab_without_height, True, "volume"),
        (crystal, False, "stress=False"),
    ],
)
def test_stress_that_a_structure_does_not_have_is_refused_with_a_reason(
    make: Callable[[], Atoms], stress: bool | None, reason: str, count: list[int]
) -> None:
    atoms = make()
    atoms.calc = MMEACalculator(backbone=small_backbone(), stress=stress)
    with pytest.raises(PropertyNotImplementedError, match=reason):
        atoms.get_stress()
    assert not count
    assert np.isfinite(atoms.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError, match=reason):
        atoms.get_stress()
    assert len(count) == 1


# --- adapters -------------------------------------------------------------------------------------------------------


def test_switching_adapters_gives_what_each_gives_alone() -> None:
    atoms, backbone, config = ethanol(), small_backbone(), AdapterConfig(method="gates", gate_rank=4)
    files = {
        "a": adapter_for(backbone, 1),
        "b": adapter_for(backbone, 2),  # of the same form
        "c": adapter_for(backbone, 3, config),  # of another
    }
    alone = {}
    for name, file in {**files, "bare": None}.items():
        single = Potential(backbone)
        single.use(file)
        prediction = single.predict(single.collate([single.graph(atoms)]))
        assert prediction.forces is not None
        alone[name] = (float(prediction.energy), prediction.forces.numpy())
        single.use(None)
    calculator = MMEACalculator(backbone=backbone)
    for name, file in files.items():
        calculator.load_adapter(name, file)
    assert tuple(calculator.adapters) == ("a", "b", "c")
    assert calculator.active_adapters == ()
    for name in ("a", "b", "bare", "c", "bare", "b", "c", "a"):
        calculator.set_adapter(None if name == "bare" else name)
        assert calculator.calculation_required(atoms, ["energy"])
        assert calculator.get_potential_energy(atoms) == pytest.approx(alone[name][0], abs=1e-10)
        np.testing.assert_allclose(forces_of(calculator, atoms), alone[name][1], atol=1e-11, rtol=0)
    assert len({round(energy, 3) for energy, _ in alone.values()}) == 4


def test_disabling_and_enabling_again_needs_no_second_calculation(count: list[int]) -> None:
    atoms, backbone = ethanol(), small_backbone()
    calculator = MMEACalculator(adapter_for(backbone), backbone)
    atoms.calc = calculator
    adapted = atoms.get_potential_energy()
    with calculator.adapter_disabled():
        assert calculator.active_adapters == ()
        bare = atoms.get_potential_energy()
        with calculator.adapter_disabled():
            assert atoms.get_potential_energy() == bare
    assert abs(adapted - bare) > 1.0  # reference energies of carbon differ, too
    before = len(count)
    assert atoms.get_potential_energy() == adapted
    assert len(count) == before
    with calculator.adapter_disabled():
        atoms.positions[0] += 0.1
        atoms.get_potential_energy()
    moved = atoms.get_potential_energy()
    assert moved == MMEACalculator(calculator.adapters["adapter"], small_backbone()).get_potential_energy(atoms)


def test_an_error_within_a_disabled_block_leaves_the_adapter_on() -> None:
    atoms, backbone = ethanol(), small_backbone()
    calculator = MMEACalculator(adapter_for(backbone), backbone)
    energy = calculator.get_potential_energy(atoms)
    with pytest.raises(DataError), calculator.adapter_disabled():
        calculator.get_potential_energy(Atoms())
    assert calculator.active_adapters == ("adapter",)
    assert calculator.get_potential_energy(atoms) == energy


def test_set_and_load_explain_what_they_refuse() -> None:
    backbone = small_backbone()
    file = adapter_for(backbone)
    calculator = MMEACalculator(file, backbone)
    with pytest.raises(AdapterError, match="no adapter called 'b' is loaded; loaded: adapter"):
        calculator.set_adapter("b")
    with pytest.raises(AdapterError, match="choose another name"):
        calculator.load_adapter("adapter", file)
    with pytest.raises(AdapterError, match="once"):
        calculator.set_adapter(["adapter", "adapter"])
    with pytest.raises(AdapterError, match="leave"), calculator.adapter_disabled():
        calculator.set_adapter(None)
    with pytest.raises(AdapterError, match="empty"):
        MMEACalculator([], backbone)
    assert calculator.active_adapters == ("adapter",)


def test_settings_of_a_calculator_that_is_made_cannot_be_set() -> None:
    calc = MMEACalculator(None, small_backbone())
    with pytest.raises(TypeError, match="dtype cannot be changed: make a new MMEACalculator"):
        calc.set(dtype="float64")
    assert calc.set() == {}


def test_an_adapter_that_does_not_fit_leaves_the_calculator_as_it_was() -> None:
    atoms, backbone = ethanol(), small_backbone()
    good = adapter_for(backbone)
    calculator = MMEACalculator(good, backbone)
    energy = calculator.get_potential_energy(atoms)
    broken = replace(good, config=AdapterConfig(method="gates"))
    with pytest.raises(AdapterError):
        calculator.load_adapter("broken", broken)
    with pytest.raises(AdapterFileError, match="fingerprint"):
        calculator.load_adapter("other", replace(good, fingerprint="0" * 64))
    with pytest.raises(AdapterFileError, match="head"):
        calculator.load_adapter("head", replace(good, head="other"))
    assert tuple(calculator.adapters) == ("adapter",)
    calculator.reset()
    assert calculator.get_potential_energy(atoms) == energy


def test_an_adapter_put_on_the_backbone_by_others_is_noticed() -> None:
    backbone = small_backbone()
    file = adapter_for(backbone)
    calculator = MMEACalculator(backbone=backbone)
    second = MMEACalculator(file, backbone)
    with pytest.raises(AdapterError, match="something else"):
        calculator.get_potential_energy(ethanol())
    second.set_adapter(None)
    assert np.isfinite(calculator.get_potential_energy(ethanol()))
    second.set_adapter("adapter")
    calculator.reset()
    with pytest.raises(AdapterError, match="something else"):
        calculator.get_potential_energy(ethanol())
    for adapter in (None, file):
        with pytest.raises(AdapterError, match="something else"):
            MMEACalculator(adapter, backbone)


def test_adapters_given_as_paths_are_named_by_their_stems(tmp_path: Path) -> None:
    backbone = small_backbone()
    paths = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        paths.append(write_adapter(tmp_path / str(seed) / "aspirin.adapter", adapter_for(backbone, seed)))
    calculator = MMEACalculator(paths, backbone)
    assert calculator.active_adapters == ("aspirin", "aspirin-2")
    assert MMEACalculator(str(paths[0]), small_backbone()).active_adapters == ("aspirin",)
    with pytest.raises(AdapterFileError, match="no such adapter file"):
        MMEACalculator(tmp_path / "nowhere.adapter", small_backbone())


def test_an_element_unseen_in_training_is_warned_of_once() -> None:
    backbone = small_backbone()
    calculator = MMEACalculator(adapter_for(backbone, elements=(1, 6)), backbone)
    with pytest.warns(UserWarning, match="seen no O in training"):
        calculator.get_potential_energy(ethanol())
    calculator.get_potential_energy(molecule("H2O"))  # a second warning would be an error here


def test_unseen_elements_are_warned_of_for_an_adapter_that_is_chosen_later() -> None:
    backbone, atoms = small_backbone(), ethanol()
    files = adapter_for(backbone), adapter_for(backbone, 2, elements=(1, 6))
    atoms.calc = calculator = MMEACalculator(files[0], backbone)
    atoms.get_potential_energy()
    calculator.load_adapter("b", files[1])
    calculator.set_adapter("b")
    with pytest.warns(UserWarning, match="adapter 'b' has seen no O in training"):
        atoms.get_potential_energy()


def test_unseen_elements_are_warned_of_when_the_backbone_alone_was_asked_first() -> None:
    backbone, atoms = small_backbone(), ethanol()
    atoms.calc = calculator = MMEACalculator(adapter_for(backbone, elements=(1, 6)), backbone)
    with calculator.adapter_disabled():
        atoms.get_potential_energy()
    with pytest.warns(UserWarning, match="seen no O in training"):
        atoms.get_potential_energy()


def test_an_interruption_while_an_adapter_is_put_on_leaves_the_calculator_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, atoms = small_backbone(), ethanol()
    atoms.calc = calculator = MMEACalculator(adapter_for(backbone), backbone)
    expected = atoms.get_potential_energy()
    calculator.set_adapter(None)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "load_state_dict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calculator.set_adapter("adapter")
    atoms.get_potential_energy()
    calculator.set_adapter("adapter")
    assert atoms.get_potential_energy() == expected


def test_a_backbone_of_a_relative_path_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in (".safetensors", ".json"):
        shutil.copy(BACKBONE_FOLDER / f"mmea-organic-s{ending}", tmp_path / f"mine{ending}")
    monkeypatch.chdir(tmp_path)
    calculator = MMEACalculator(backbone="mine.safetensors", device="cpu")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert copy.deepcopy(calculator).backbone.fingerprint == calculator.backbone.fingerprint


def test_a_backbone_that_somebody_moves_to_another_precision_is_followed() -> None:
    backbone, atoms = small_backbone(), ethanol()
    atoms.calc = calculator = MMEACalculator(adapter_for(backbone), backbone)
    before = atoms.get_forces()
    other = torch.float32 if backbone.dtype == torch.float64 else torch.float64
    backbone.to(dtype=other)
    calculator.reset()
    np.testing.assert_allclose(atoms.get_forces(), before, rtol=0, atol=1e-4)


def test_a_reference_energy_that_is_changed_in_its_place_is_seen() -> None:
    backbone, atoms = small_backbone(), ethanol()
    atoms.calc = calculator = MMEACalculator(adapter_for(backbone), backbone)
    before = atoms.get_potential_energy()
    calculator.potential.reference_energies[8] = calculator.potential.reference_energies[8] + 1.0
    calculator.reset()
    assert atoms.get_potential_energy() == pytest.approx(before + 1.0, abs=1e-4)


# --- committee ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda f: f.__name__)
def test_committee_gives_means_members_and_variances(make: Callable[[], Atoms]) -> None:
    atoms, backbone = make(), small_backbone()
    files = [adapter_for(backbone, seed) for seed in (1, 2, 3)]
    alone = []
    for file in files:
        single = MMEACalculator(file, backbone)
        single.calculate(atoms)
        alone.append(single.results)
        single.set_adapter(None)
    committee = MMEACalculator(files, backbone)
    for _ in range(2):  # the second call begins with another member on the network
        committee.reset()
        committee.calculate(atoms)
        results = committee.results
        for key in ("energy", "forces", *(["stress"] if atoms.pbc.all() else [])):
            members = np.stack([r[key] for r in alone])
            np.testing.assert_allclose(results[f"{key}_comm"], members, atol=1e-9, rtol=0)
            np.testing.assert_allclose(results[key], members.mean(0), atol=1e-9, rtol=0)
            np.testing.assert_allclose(results[f"{key}_var"], members.var(0), atol=1e-9, rtol=1e-9)
        np.testing.assert_allclose(results["energies"], np.mean([r["energies"] for r in alone], axis=0), atol=1e-9)
        assert results["free_energy"] == results["energy"]
    assert committee.get_property("energy_var", atoms) == results["energy_var"] > 0
    assert committee.get_property("forces_comm", atoms).shape == (3, len(atoms), 3)


def test_committee_of_one_form_keeps_one_backbone_and_one_adapter_on_it() -> None:
    backbone = small_backbone()
    size = sum(p.numel() for p in backbone.network.parameters())
    committee = MMEACalculator([adapter_for(backbone, seed) for seed in (1, 2, 3)], backbone)
    handle = committee.potential.adapter
    assert handle is not None
    committee.calculate(ethanol())
    assert committee.potential.adapter is handle
    on_network = sum(p.numel() for p in committee.backbone.network.parameters())
    assert on_network == size + sum(p.numel() for g in handle.gates.values() for p in g.parameters())


def test_a_committee_can_be_left_and_entered_again() -> None:
    atoms, backbone = ethanol(), small_backbone()
    calculator = MMEACalculator([adapter_for(backbone, seed) for seed in (1, 2)], backbone)
    both = calculator.get_potential_energy(atoms)
    calculator.set_adapter("adapter-2")
    assert calculator.active_adapters == ("adapter-2",)
    second = calculator.get_potential_energy(atoms)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("energy_var", atoms)
    with calculator.adapter_disabled():
        calculator.get_potential_energy(atoms)
    calculator.set_adapter(["adapter-2", "adapter"])
    assert calculator.get_potential_energy(atoms) == pytest.approx(both, abs=1e-10)
    assert calculator.results["energy_comm"][0] == pytest.approx(second, abs=1e-10)
    assert "energy_var" not in MMEACalculator.implemented_properties


# --- ASE's rules ----------------------------------------------------------------------------------------------------


def test_nothing_is_computed_twice_for_the_same_structure(count: list[int]) -> None:
    atoms = crystal()
    atoms.calc = MMEACalculator(backbone=small_backbone())
    for _ in range(2):
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()
    atoms.set_initial_charges([1, -1])
    atoms.set_initial_magnetic_moments([1, -1])
    atoms.get_potential_energy(force_consistent=True)
    atoms.calc.get_potential_energy(atoms.copy())
    assert len(count) == 1


def change_position(atoms: Atoms) -> None:
    atoms.positions[1, 0] += 1e-9


def change_cell(atoms: Atoms) -> None:
    atoms.set_cell(atoms.cell.array * 1.001)


def change_pbc(atoms: Atoms) -> None:
    atoms.pbc = [True, True, False]


def change_numbers(atoms: Atoms) -> None:
    atoms.numbers[0] = 1


@pytest.mark.parametrize("change", [change_position, change_cell, change_pbc, change_numbers])
def test_a_changed_structure_is_computed_anew_and_right(change: Callable[[Atoms], None], count: list[int]) -> None:
    atoms = crystal()
    atoms.calc = MMEACalculator(backbone=small_backbone())
    before = atoms.get_potential_energy()
    change(atoms)
    after = atoms.get_potential_energy()
    assert len(count) == 2
    assert after == MMEACalculator(backbone=small_backbone()).get_potential_energy(atoms)
    assert after != before or change is change_position


def test_results_handed_out_are_copies() -> None:
    atoms = ethanol()
    atoms.calc = MMEACalculator(backbone=small_backbone())
    atoms.get_forces()[:] = 0
    assert abs(atoms.get_forces()).max() > 0


def test_only_positions_change_hands_while_the_neighbours_stay() -> None:
    atoms = crystal()
    calculator = MMEACalculator(backbone=small_backbone())
    calculator.calculate(atoms)
    batch = calculator._batch
    assert batch is not None
    kept = batch.tensors["edge_index"]
    atoms.positions += 1e-4 * np.random.default_rng(0).standard_normal(atoms.positions.shape)
    calculator.calculate(atoms)
    assert calculator._batch is batch
    assert batch.tensors["edge_index"] is kept
    fresh = MMEACalculator(backbone=small_backbone())
    fresh.calculate(atoms)
    assert np.array_equal(calculator.results["forces"], fresh.results["forces"])
    assert np.array_equal(calculator.results["stress"], fresh.results["stress"])


def test_a_molecule_far_from_the_origin_has_the_same_graph_and_forces() -> None:
    atoms = ethanol()
    calculator = MMEACalculator(backbone=small_backbone())
    near, forces = calculator.potential.graph(atoms), forces_of(calculator, atoms)
    atoms.positions += [1e5, -2e5, 3e5]
    far = calculator.potential.graph(atoms)
    assert np.array_equal(near.edge_index, far.edge_index)
    assert np.array_equal(near.cell, far.cell)
    np.testing.assert_allclose(far.positions, near.positions, atol=1e-9)
    np.testing.assert_allclose(forces_of(calculator, atoms), forces, atol=1e-8)


def test_results_are_written_by_ase(tmp_path: Path) -> None:
    backbone = small_backbone()
    for adapters in (None, [adapter_for(backbone, seed) for seed in (1, 2)]):
        atoms = crystal()
        atoms.calc = MMEACalculator(adapters, small_backbone())
        atoms.get_stress()
        for name in ("a.traj", "a.xyz", "a.db"):
            write(tmp_path / name, atoms)
            again = read(tmp_path / name)
            assert isinstance(again, Atoms)
            assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
            np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-6)


def test_relaxation_of_a_molecule_lowers_its_energy(device: str) -> None:
    backbone = small_backbone(device)
    atoms = ethanol()
    atoms.calc = MMEACalculator(adapter_for(backbone), backbone, device=device)
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None, maxstep=0.02).run(fmax=1e-4, steps=8)
    assert atoms.get_potential_energy() < before - 1e-3


def test_relaxation_of_a_crystal_and_its_cell_takes_one_evaluation_per_step(count: list[int]) -> None:
    atoms = crystal()
    atoms.calc = MMEACalculator(backbone=small_backbone())
    before, volume = atoms.get_potential_energy(), atoms.cell.volume
    optimiser = FIRE(FrechetCellFilter(atoms), logfile=None, maxstep=0.02)
    optimiser.run(fmax=1e-6, steps=10)
    assert atoms.get_potential_energy() < before - 1e-5
    assert atoms.cell.volume != volume
    assert len(count) == 1 + optimiser.nsteps


def heat(atoms: Atoms, rng: np.random.Generator) -> None:
    """Momenta of 300 K."""
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * np.sqrt(atoms.get_masses() * 300 * units.kB)[:, None])


def test_dynamics_conserves_the_energy() -> None:
    backbone = small_backbone()
    atoms = ethanol()
    atoms.calc = MMEACalculator(adapter_for(backbone), backbone)
    BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=0.5, steps=20)
    heat(atoms, np.random.default_rng(1))
    energies = []
    dynamics = VelocityVerlet(atoms, 0.1 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(40)
    assert max(energies) - min(energies) < 0.02 * atoms.get_kinetic_energy()


def test_langevin_dynamics_repeats_itself_with_the_same_seed() -> None:
    ends = []
    for _ in range(2):
        backbone = small_backbone()
        atoms = ethanol()
        atoms.calc = MMEACalculator([adapter_for(backbone, s) for s in (1, 2)], backbone)
        rng = np.random.default_rng(2)
        heat(atoms, rng)
        friction = 0.01 / units.fs
        Langevin(atoms, 0.2 * units.fs, temperature_K=300, friction=friction, fixcm=False, rng=rng).run(5)
        ends.append(atoms.positions.copy())
    assert np.array_equal(*ends)
    assert np.isfinite(ends[0]).all()


# --- wrong input ----------------------------------------------------------------------------------------------------


def with_nan() -> Atoms:
    atoms = ethanol()
    atoms.positions[3, 1] = np.nan
    return atoms


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (molecule("NH3"), r"N \(7\); the backbone knows H, C, O"),
        (with_nan(), "atom 3"),
        (Atoms(), "no atoms"),
        (Atoms("H", pbc=True), "lattice vector"),
        ("ethanol.xyz", "expected a structure as ase.Atoms, got str"),
        (None, "got NoneType"),
    ],
)
def test_unusable_structures_are_refused_before_anything_is_computed(
    structure: Any, message: str, count: list[int]
) -> None:
    calculator = MMEACalculator(backbone=small_backbone())
    for ask in (calculator.get_potential_energy, calculator.get_forces, calculator.calculate):
        with pytest.raises(DataError, match=message):
            ask(structure)
    assert not count
    good = ethanol()
    energy = calculator.get_potential_energy(good)
    if structure is not None:  # asks for the last structure by now
        with pytest.raises(DataError, match=message):
            calculator.calculate(structure)
    assert calculator.get_potential_energy(good) == energy


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(BackboneError, match="head"):
        MMEACalculator(backbone=small_backbone(), head="other")
    with pytest.raises(BackboneError, match="dtype"):
        MMEACalculator(backbone=small_backbone(), dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="no backbone is called"):
        MMEACalculator(backbone="nothing-like-it")
    lost = adapter_for(small_backbone())
    with pytest.raises(BackboneError, match=r"give its file, with --backbone on the command line, with backbone="):
        MMEACalculator(lost)
    with pytest.raises(BackboneError, match="dtype") as caught:  # a backbone that is there is not to blame
        MMEACalculator(replace(lost, backbone="mmea-organic-s"), dtype="float16")  # type: ignore[arg-type]
    assert "give its file" not in str(caught.value)
    with pytest.raises(TypeError):
        MMEACalculator(backbone=small_backbone(), temperature_K=300)  # type: ignore[call-arg]


# --- the embedded backbone; copies ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the embedded backbone."""
    backbone, folder = load_backbone(), tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / f"{s}.adapter", adapter_for(backbone, s, reference_energies={}, elements=()))
        for s in (1, 2)
    ]


def test_the_backbone_and_the_device_are_found_by_themselves(stored: list[Path]) -> None:
    calculator = MMEACalculator(stored[0])
    assert calculator.backbone.name == DEFAULT_BACKBONE
    assert calculator.potential.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert calculator.potential.dtype == torch.float32
    assert np.isfinite(forces_of(calculator, ethanol())).all()


@pytest.mark.parametrize("duplicate", [lambda c: pickle.loads(pickle.dumps(c)), copy.copy, copy.deepcopy])
def test_copies_give_the_same_results_and_go_their_own_ways(
    duplicate: Callable[[MMEACalculator], MMEACalculator], stored: list[Path], count: list[int]
) -> None:
    atoms = ethanol()
    original = MMEACalculator(stored, device="cpu")
    original.calculate(atoms)
    results = copy.deepcopy(original.results)
    count.clear()
    again = duplicate(original)
    assert again.active_adapters == original.active_adapters
    assert again.get_property("energy_var", atoms) == results["energy_var"]
    assert not count  # cached results came along
    again.reset()
    again.calculate(atoms)
    assert again.results["energy"] == results["energy"]
    assert np.array_equal(again.results["forces"], results["forces"])
    again.set_adapter(None)
    again.calculate(atoms)
    original.reset()
    original.calculate(atoms)
    assert original.results["energy"] == results["energy"] != again.results["energy"]


def test_pickles_hold_no_network_and_no_results_of_a_disabled_block(stored: list[Path]) -> None:
    atoms = ethanol()
    calculator = MMEACalculator(device="cpu")
    calculator.calculate(atoms)
    assert len(pickle.dumps(calculator)) < 10_000
    calculator.load_adapter("a", stored[0])
    calculator.set_adapter("a")
    energy = calculator.get_potential_energy(atoms)
    with calculator.adapter_disabled():
        calculator.get_potential_energy(atoms)
        text = pickle.dumps(calculator)
    assert b"torch" not in text
    assert pickle.loads(text).get_potential_energy(atoms) == energy


def test_a_pickle_is_not_opened_with_another_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    text = pickle.dumps(MMEACalculator(device="cpu"))
    other = load_backbone("mmea-organic-s-xtb")
    monkeypatch.setattr("mmea_calc.calculator.load_backbone", lambda *args, **kwargs: other)
    with pytest.raises(BackboneError, match="fingerprint"):
        pickle.loads(text)


def test_a_calculator_whose_backbone_has_no_name_and_no_file_cannot_be_stored() -> None:
    with pytest.raises(MMEAError, match="save it"):
        pickle.dumps(MMEACalculator(backbone=small_backbone()))


def test_an_adapter_for_another_backbone_is_refused(stored: list[Path]) -> None:
    fingerprint = read_adapter(stored[0]).fingerprint
    with pytest.raises(AdapterFileError, match=fingerprint):
        MMEACalculator(stored[0], backbone="mmea-organic-s-xtb", device="cpu")


# --- what it does not compute ---------------------------------------------------------------------------------------


def test_a_charge_is_pointed_out_where_the_backbone_knows_none_and_refused_where_it_knows_them() -> None:
    atoms = ethanol()
    for value in (1, "1", np.array(1.0), np.array([1])):
        atoms.info["charge"] = value
        with pytest.warns(UserWarning, match="a total charge of 1, of which this backbone knows nothing"):
            MMEACalculator(backbone=small_backbone()).get_potential_energy(atoms)
    specs = {"total_charge": {"type": "continuous", "emb_dim": 4, "per": "graph", "in_dim": 1}}
    network = random_network(embedding_specs=specs)
    accept_neutral_graphs(network)  # as where a backbone is loaded
    charged = MMEACalculator(backbone=small_backbone_around(network, E0))
    with pytest.raises(DataError, match="computes neutral singlets alone"):
        charged.get_potential_energy(atoms)
    atoms.info = {"charge": 0, "spin": 1}
    assert np.isfinite(charged.get_potential_energy(atoms))


def test_what_is_no_adapter_is_told() -> None:
    for wrong in (123, [123], {"a.adapter": 1.0}.values()):
        with pytest.raises(AdapterError, match="expected the path of an adapter, an AdapterFile, or a list of these"):
            MMEACalculator(wrong)  # type: ignore[arg-type]


def test_two_atoms_at_one_place_are_no_energy() -> None:
    atoms = ethanol()
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(DataError, match="are two atoms at the same place"):
        MMEACalculator(backbone=small_backbone()).get_potential_energy(atoms)
