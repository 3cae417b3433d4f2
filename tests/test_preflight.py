"""The checks and the report before training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule

from mmea_calc.data.preflight import PreflightReport, preflight, robust_scores
from mmea_calc.data.reading import Dataset, Labelled, read_dataset
from mmea_calc.data.unit_checks import all_electron_energy, bond_stiffness, unit_warnings
from mmea_calc.errors import DataError
from mmea_calc.neighbours import neighbours

ASPIRIN = Path(__file__).parents[1] / "examples" / "data" / "aspirin"
HCNO = (1, 6, 7, 8)


def water(seed: int, *, scale: float = 0.05) -> Atoms:
    atoms = molecule("H2O")
    atoms.positions += np.random.default_rng(seed).normal(scale=scale, size=(3, 3))
    return atoms


def write(path: Path, frames: Sequence[Atoms]) -> Path:
    ase.io.write(path, list(frames))
    return path


def dataset_of(frames: Sequence[Labelled]) -> Dataset:
    return Dataset(tuple(frames), "made up", {"energy": "energy", "forces": "forces", "stress": None})


def check(frames: Sequence[Labelled]) -> PreflightReport:
    return preflight(dataset_of(frames), backbone_elements=HCNO)


@pytest.fixture(scope="module")
def aspirin() -> Dataset:
    return read_dataset(ASPIRIN / "train.xyz")


# What is refused ---------------------------------------------------------------------------------------------------


def test_an_unknown_element_is_named_with_those_known(aspirin: Dataset) -> None:
    atoms = Atoms("CBr", [[0, 0, 0], [1.9, 0, 0]])
    frames = [*aspirin.structures[:17], Labelled(atoms, energy=-1.0, index=17, source="x.xyz")]
    with pytest.raises(DataError, match=r"structure 17 of x\.xyz has Br \(35\); the backbone knows H, C, N, O: choose"):
        check(frames)


def test_atoms_on_top_of_each_other_are_refused() -> None:
    with pytest.raises(DataError, match=r"0\.200 A apart"):
        check([Labelled(Atoms("H2", [[0, 0, 0], [0, 0, 0.2]]), energy=0.0)])
    across = Atoms("H2", [[0.05, 5, 5], [9.9, 5, 5]], cell=[10, 10, 10], pbc=True)
    with pytest.raises(DataError, match=r"0\.150 A apart"):
        check([Labelled(across, energy=0.0)])
    with pytest.raises(DataError, match="its own image"):
        check([Labelled(Atoms("C", cell=[0.25, 5, 5], pbc=True), energy=0.0)])
    across.pbc = False
    assert check([Labelled(across, energy=0.0)]).sets["train"]["shortest_distance_A"] is None


def test_a_periodic_structure_needs_a_cell() -> None:
    with pytest.raises(DataError, match="cell vector there is zero"):
        check([Labelled(Atoms("C2", [[0, 0, 0], [1.4, 0, 0]], pbc=True), energy=0.0)])


def test_a_set_without_structures_or_labels_is_refused() -> None:
    with pytest.raises(DataError, match="no structures"):
        check([])
    with pytest.raises(DataError, match="nothing to learn"):
        check([Labelled(water(0))])


# The report ---------------------------------------------------------------------------------------------------------


def test_the_shipped_data_pass_without_a_warning(aspirin: Dataset) -> None:
    valid, test = (read_dataset(ASPIRIN / f"{name}.xyz") for name in ("valid", "test"))
    report = preflight(aspirin, valid, test, backbone_elements=HCNO, r_max=4.5)
    assert report.warnings == ()
    assert report.columns == ("", "train", "valid", "test")
    assert all(len(row) == 4 for row in report.rows)
    assert report.sets["train"]["atoms"] == 1050
    assert report.sets["train"]["labels"]["energy"] == {"key": "REF_energy", "structures": 50}
    assert report.sets["test"]["in_train"] == 0
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["sets"]["train"]["elements"] == ["H", "C", "O"]


def test_duplicates_are_found_in_any_place_orientation_and_order(aspirin: Dataset) -> None:
    item = aspirin.structures[0]
    turned = item.atoms[::-1]
    turned.rotate(77, (1, 2, 3))
    turned.translate([100, -50, 3])
    nearly = item.atoms.copy()
    nearly.positions[3, 1] += 0.02
    copies = [item, Labelled(turned, energy=item.energy), Labelled(nearly, energy=item.energy)]
    report = check(copies)
    assert report.sets["train"]["duplicates"] == 1
    assert any("1 structures repeat" in w for w in report.warnings)


def test_duplicates_of_crystals_are_found_through_wrapping() -> None:
    crystal = bulk("C", "diamond", cubic=True)
    crystal.rattle(0.05, seed=1)
    moved = crystal.copy()
    moved.positions += [1.3, 0.2, -2.0]
    moved.wrap()
    other = bulk("C", "diamond", cubic=True)
    other.rattle(0.05, seed=2)
    frames = [Labelled(a, energy=-72.0) for a in (crystal, moved, other)]
    assert check(frames).sets["train"]["duplicates"] == 1


def test_equal_geometries_with_unequal_energies_are_pointed_out(aspirin: Dataset) -> None:
    item = aspirin.structures[0]
    assert item.energy is not None
    report = check([item, dataclasses.replace(item, energy=item.energy + 1.0)])
    assert any("same geometry but energies that differ" in w for w in report.warnings)


def test_overlap_between_sets_is_pointed_out(aspirin: Dataset) -> None:
    train, rest = aspirin.subset(range(30)), aspirin.subset(range(25, 40))
    report = preflight(train, None, rest, backbone_elements=HCNO)
    assert report.sets["test"]["in_train"] == 5
    assert any("5 structures of test are also in train" in w for w in report.warnings)


def test_a_molecule_in_a_periodic_box_stays_periodic(tmp_path: Path, aspirin: Dataset) -> None:
    frames = []
    for item in aspirin.structures[:5]:
        atoms = item.atoms.copy()
        atoms.set_cell([20, 20, 20])
        atoms.pbc = True
        atoms.info["REF_energy"] = item.energy
        frames.append(atoms)
    data = read_dataset(write(tmp_path / "box.xyz", frames))
    assert all(s.atoms.pbc.all() for s in data.structures)
    report = preflight(data, backbone_elements=HCNO, r_max=4.5)
    assert report.sets["train"]["periodic"] == 5
    free = check(aspirin.structures[:5]).sets["train"]["shortest_distance_A"]
    assert report.sets["train"]["shortest_distance_A"] == pytest.approx(free, abs=1e-6)


def test_outliers_are_found(aspirin: Dataset) -> None:
    frames = list(aspirin.structures)
    energy, forces = frames[10].energy, frames[20].forces
    assert energy is not None
    assert forces is not None
    kick = np.zeros_like(forces)
    kick[0], kick[1] = 60.0, -60.0
    frames[10] = dataclasses.replace(frames[10], energy=energy + 20.0)
    frames[20] = dataclasses.replace(frames[20], forces=forces + kick)
    text = "\n".join(check(frames).warnings)
    assert "1 energies are outliers (first: structure 10" in text
    assert "1 structures have outlying forces (first: structure 20" in text


def test_energies_of_different_molecules_are_no_outliers() -> None:
    names = ["H2O", "CH4", "NH3", "CO2", "C2H6", "CH3OH", "HCN", "C2H2"]
    e0 = {1: -13.6, 6: -1028.0, 7: -1483.0, 8: -2040.0}
    generator = np.random.default_rng(0)
    frames = []
    for k in range(40):
        atoms = molecule(names[k % len(names)])
        atoms.rattle(0.01, seed=k)
        frames.append(Labelled(atoms, energy=sum(e0[z] for z in atoms.numbers) + generator.normal(scale=0.5), index=k))
    assert check(frames).warnings == ()


def test_robust_scores_ignore_the_outlier_itself() -> None:
    values = np.append(np.random.default_rng(0).normal(size=1000), 1e6)
    scores = robust_scores(values)
    assert scores[-1] > 1e5
    assert np.mean(scores[:-1] < 1.0) == pytest.approx(0.683, abs=0.05)  # within one standard deviation
    np.testing.assert_array_equal(robust_scores(np.ones(5)), 0.0)


def test_net_forces_and_placeholder_zeros_are_pointed_out(aspirin: Dataset) -> None:
    pushed = [dataclasses.replace(s, forces=s.forces + 0.1) for s in aspirin.structures if s.forces is not None]
    assert any("50 structures have a net force" in w for w in check(pushed).warnings)
    zeros = [dataclasses.replace(s, forces=np.zeros((21, 3))) for s in aspirin.structures]
    warnings = check(zeros).warnings
    assert any("exactly zero" in w for w in warnings)
    assert not any("forces look like" in w for w in warnings)


def test_an_atom_without_neighbours_is_pointed_out() -> None:
    far = Atoms("OH2H", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [30, 0, 0]])
    report = preflight(dataset_of([Labelled(far, energy=0.0)]), backbone_elements=HCNO, r_max=4.5)
    assert any("without neighbours" in w for w in report.warnings)


def test_elements_that_only_the_test_set_has_are_pointed_out() -> None:
    train, test = (dataset_of([Labelled(molecule(m), energy=-1.0)]) for m in ("H2O", "NH3"))
    report = preflight(train, None, test, backbone_elements=HCNO)
    assert any("elements that the training set lacks: N" in w for w in report.warnings)


def test_neighbours_do_not_depend_on_where_the_molecule_is() -> None:
    atoms = molecule("C6H6")
    reference = np.sort(neighbours(atoms, 3.0).distances)
    for shift, cell in [((0, 0, 0), None), ((500, -3, 7), None), ((40, 40, 40), [10, 10, 10])]:
        moved = atoms.copy()
        moved.translate(shift)
        moved.set_cell(cell)
        np.testing.assert_allclose(np.sort(neighbours(moved, 3.0).distances), reference, atol=1e-9)
    slab = atoms.copy()
    slab.set_cell([20, 20, 0])
    slab.pbc = (True, True, False)
    slab.translate([100, 50, -70])
    np.testing.assert_allclose(np.sort(neighbours(slab, 3.0).distances), reference, atol=1e-9)


# Units --------------------------------------------------------------------------------------------------------------

KCAL = units.kcal / units.mol
FORCE_HARTREE = units.Hartree / units.Bohr


def in_units(data: Dataset, energy: float, forces: float) -> list[Labelled]:
    return [
        dataclasses.replace(s, energy=s.energy / energy, forces=s.forces / forces)
        for s in data.structures
        if s.energy is not None and s.forces is not None
    ]


@pytest.mark.parametrize(
    ("energy", "forces", "expected"),
    [
        (1.0, 1.0, []),
        (units.Hartree, FORCE_HARTREE, ["energies look like Hartree", "forces look like Hartree/Bohr"]),
        (KCAL, KCAL, ["energies look like kcal/mol", "forces look like kcal/mol/A"]),
        (1.0, KCAL, ["forces look like kcal/mol/A", "energies and forces disagree"]),
        (1.0, FORCE_HARTREE, ["forces look like Hartree/Bohr", "energies and forces disagree"]),
        (units.Hartree, 1.0, ["energies look like Hartree", "energies and forces disagree"]),
        (1.0, -1.0, ["wrong sign", "not gradients"]),
    ],
)
def test_wrong_units_are_recognised(aspirin: Dataset, energy: float, forces: float, expected: list[str]) -> None:
    warnings = unit_warnings(in_units(aspirin, energy, forces))
    assert len(warnings) == len(expected)
    for warning, text in zip(warnings, expected, strict=True):
        assert text in warning


def test_units_of_forces_are_recognised_over_different_molecules(aspirin: Dataset) -> None:
    # No two structures are of the same molecule: only the bonds to hydrogen can be compared.
    frames = []
    for k, item in enumerate(in_units(aspirin, 1.0, KCAL)):
        shuffled = np.random.default_rng(k).permutation(len(item.atoms))
        assert item.forces is not None
        frames.append(Labelled(item.atoms[shuffled], forces=item.forces[shuffled]))
    assert any("kcal/mol/A" in w for w in unit_warnings(frames))


def test_the_stiffness_of_bonds_is_that_of_chemistry(aspirin: Dataset) -> None:
    stiffness = bond_stiffness(aspirin.structures)
    assert stiffness is not None
    assert 20.0 < stiffness < 60.0


def test_relaxed_structures_with_small_forces_raise_no_suspicion() -> None:
    frames = [Labelled(molecule(m), forces=np.full((len(molecule(m)), 3), 1e-3)) for m in ("H2O", "CH4", "NH3") * 5]
    assert unit_warnings(frames) == []


def test_pseudopotential_energies_raise_no_suspicion() -> None:
    # Per atom some -6 eV (relative to atoms) or -150 eV (valence electrons only): no unit can be told from that.
    for per_atom in (-6.0, -150.0):
        frames = [Labelled(water(k), energy=3 * per_atom + 0.1 * k) for k in range(20)]
        assert unit_warnings(frames) == []


@pytest.mark.parametrize(("z", "hartree"), [(1, -0.5), (6, -37.84), (8, -75.07), (17, -460.15), (35, -2573.4)])
def test_total_energies_of_atoms_are_right_to_one_percent(z: int, hartree: float) -> None:
    # Nonrelativistic limits, rounded: Chakravorty et al., Phys. Rev. A 47, 3649 (1993); Br from PBE.
    assert all_electron_energy(z) == pytest.approx(hartree * units.Hartree, rel=0.01)
