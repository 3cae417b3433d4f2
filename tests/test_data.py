"""Reading labelled structures, splits and hashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from mmea_calc.data.preflight import PreflightReport, preflight
from mmea_calc.data.preparing import prepare
from mmea_calc.data.reading import Dataset, Labelled, read_dataset, split
from mmea_calc.errors import DataError

ASPIRIN = Path(__file__).parents[1] / "examples" / "data" / "aspirin"
HCNO = (1, 6, 7, 8)


def water(seed: int, *, scale: float = 0.05) -> Atoms:
    atoms = molecule("H2O")
    atoms.positions += np.random.default_rng(seed).normal(scale=scale, size=(3, 3))
    return atoms


def labelled(n: int = 4, prefix: str = "REF_") -> list[Atoms]:
    """Water molecules with made-up energies and forces that sum to zero."""
    frames = []
    for k in range(n):
        atoms = water(k)
        forces = np.random.default_rng(100 + k).normal(size=(3, 3))
        forces -= forces.mean(axis=0)
        atoms.info[f"{prefix}energy"] = -2081.1234567890123 - 0.1 * k
        atoms.arrays[f"{prefix}forces"] = forces
        frames.append(atoms)
    return frames


def with_calculator(atoms: Atoms, **results: object) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, **results)
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


# Reading ------------------------------------------------------------------------------------------------------------


def test_shipped_aspirin_data_are_read_with_their_keys(aspirin: Dataset) -> None:
    assert len(aspirin) == 50
    assert aspirin.keys == {"energy": "REF_energy", "forces": "REF_forces", "stress": None}
    assert aspirin.counts == {"energy": 50, "forces": 50, "stress": 0}
    assert aspirin.elements == (1, 6, 8)
    assert {s.config_type for s in aspirin.structures} == {"500K"}
    first = aspirin.structures[0]
    assert first.energy == -17617.296223273443  # every digit of the file
    assert first.forces is not None
    assert first.forces.dtype == np.float64


def test_isolated_atoms_are_kept_apart() -> None:
    data = read_dataset([ASPIRIN / "train.xyz", ASPIRIN / "isolated_atoms.xyz"])
    assert len(data) == 50
    assert sorted(data.isolated_atoms) == [1, 6, 8]
    assert data.isolated_atoms[1] == pytest.approx(-13.57028349160633, abs=1e-12)


def test_single_atoms_count_as_isolated_unless_they_are_periodic(tmp_path: Path) -> None:
    free = with_calculator(Atoms("H"), energy=-13.6)
    marked = with_calculator(Atoms("O", cell=[12, 12, 12], pbc=True), energy=-2041.0)
    marked.info["config_type"] = "isolated_atom"
    crystal = with_calculator(bulk("Al"), energy=-3.7)
    data = read_dataset(write(tmp_path / "a.xyz", [free, marked, crystal]))
    assert data.isolated_atoms == {1: -13.6, 8: -2041.0}
    assert [s.atoms.symbols[0] for s in data.structures] == ["Al"]


def test_contradicting_isolated_atoms_are_refused(tmp_path: Path) -> None:
    frames = [with_calculator(Atoms("H"), energy=e) for e in (-13.6, -12.0)]
    with pytest.raises(DataError, match=r"isolated H has -12\.0 eV.*-13\.6"):
        read_dataset(write(tmp_path / "a.xyz", frames))


@pytest.mark.parametrize("suffix", ["xyz", "traj", "db", "json"])
def test_calculator_results_survive_every_format(tmp_path: Path, suffix: str) -> None:
    frames = []
    for k in range(3):
        atoms = bulk("C", "diamond", cubic=True)
        atoms.rattle(0.05, seed=k)
        stress = np.array([0.1, 0.2, 0.3, 0.04, 0.05, 0.06]) + k
        frames.append(with_calculator(atoms, energy=-72.5 - k, forces=np.full((8, 3), 0.1 * k), stress=stress))
    data = read_dataset(write(tmp_path / f"data.{suffix}", frames))
    assert data.keys == {"energy": "energy", "forces": "forces", "stress": "stress"}
    for k, item in enumerate(data.structures):
        assert item.energy == pytest.approx(-72.5 - k, abs=1e-12)
        assert item.forces is not None
        assert item.stress is not None
        np.testing.assert_allclose(item.forces, 0.1 * k, atol=1e-8)
        # ASE's Voigt order: xx, yy, zz, yz, xz, xy
        expected = np.array([[0.1, 0.06, 0.05], [0.06, 0.2, 0.04], [0.05, 0.04, 0.3]]) + k
        np.testing.assert_allclose(item.stress, expected, atol=1e-10)
        assert item.atoms.calc is None
        assert item.index == k


def test_labels_in_the_key_value_pairs_and_data_of_a_database_are_found(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "a.db") as database:
        for atoms in labelled(2):
            database.write(
                atoms,
                key_value_pairs={"REF_energy": atoms.info["REF_energy"]},
                data={"REF_forces": atoms.arrays["REF_forces"]},
            )
    data = read_dataset(tmp_path / "a.db")
    assert data.counts == {"energy": 2, "forces": 2, "stress": 0}
    np.testing.assert_array_equal(data.structures[1].forces, labelled(2)[1].arrays["REF_forces"])


@pytest.mark.parametrize("shape", [(6,), (9,), (3, 3)])
def test_stress_comes_in_three_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    full = np.array([[1.0, 0.3, 0.2], [0.3, 2.0, 0.1], [0.2, 0.1, 3.0]])
    atoms = bulk("C")
    atoms.info["REF_stress"] = np.array([1, 2, 3, 0.1, 0.2, 0.3]) if shape == (6,) else full.reshape(shape)
    atoms.info["REF_energy"] = -18.0
    item = read_dataset(write(tmp_path / "a.traj", [atoms])).structures[0]
    assert item.stress is not None
    np.testing.assert_allclose(item.stress, full)


def test_stress_of_a_molecule_is_left_out(tmp_path: Path) -> None:
    atoms = with_calculator(water(0), energy=-1.0, stress=np.zeros(6))
    assert read_dataset(write(tmp_path / "a.xyz", [atoms])).structures[0].stress is None
    atoms.set_cell([5.0, 6.0, 0.0])
    atoms.pbc = (True, True, False)  # a sheet without a volume
    assert read_dataset(write(tmp_path / "b.xyz", [atoms])).structures[0].stress is None
    atoms.set_cell([5.0, 6.0, 7.0])
    assert read_dataset(write(tmp_path / "c.xyz", [atoms])).structures[0].stress is not None


def test_each_label_is_optional(tmp_path: Path) -> None:
    energy_only, forces_only = labelled(2)
    del energy_only.arrays["REF_forces"]
    del forces_only.info["REF_energy"]
    data = read_dataset(write(tmp_path / "a.xyz", [energy_only, forces_only]))
    assert data.counts == {"energy": 1, "forces": 1, "stress": 0}
    assert data.structures[0].forces is None
    assert data.structures[1].energy is None


def test_ref_keys_win_over_plain_ones(tmp_path: Path) -> None:
    frames = [with_calculator(a, energy=1.0, forces=np.ones((3, 3))) for a in labelled(2)]
    data = read_dataset(write(tmp_path / "a.traj", frames), forces_key="forces")
    assert data.structures[0].energy == pytest.approx(-2081.1234567890123, abs=1e-12)
    assert data.keys["forces"] == "forces"
    np.testing.assert_array_equal(data.structures[0].forces, 1.0)
    assert any("same calculation" in note for note in data.notes)


def test_structures_with_only_the_other_key_are_pointed_out(tmp_path: Path) -> None:
    frames = [*labelled(3), with_calculator(water(9), energy=-5.0)]
    data = read_dataset(write(tmp_path / "a.xyz", frames))
    assert data.counts["energy"] == 3
    assert any("1 structures have 'energy' but no 'REF_energy'" in note for note in data.notes)


def test_other_names_are_used_only_when_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", labelled(2, prefix="dft_"))
    with pytest.raises(DataError, match=r"dft_energy.*dft_forces"):
        read_dataset(path)
    data = read_dataset(path, energy_key="dft_energy", forces_key="dft_forces")
    assert data.keys == {"energy": "dft_energy", "forces": "dft_forces", "stress": None}
    assert "dft_energy" not in data.structures[0].atoms.info


def test_a_named_key_that_does_not_exist_lists_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'dft_energy' is in no structure.*REF_energy.*REF_forces"):
        read_dataset(write(tmp_path / "a.xyz", labelled(2)), energy_key="dft_energy")


def test_constraints_do_not_change_forces(tmp_path: Path) -> None:
    atoms = water(0)
    atoms.set_constraint(FixAtoms([0]))
    forces = np.arange(9.0).reshape(3, 3)
    data = read_dataset(write(tmp_path / "a.traj", [with_calculator(atoms, energy=0.0, forces=forces)]))
    np.testing.assert_array_equal(data.structures[0].forces, forces)
    assert not data.structures[0].atoms.constraints


def test_forces_lie_row_by_row(tmp_path: Path) -> None:
    """ASE's reader of extended xyz gives columns for names that it does not know."""
    data = read_dataset(write(tmp_path / "a.xyz", labelled()))
    assert all(s.forces is not None and s.forces.flags.c_contiguous for s in data.structures)


def test_several_files_keep_their_own_keys_and_indices(tmp_path: Path) -> None:
    one = write(tmp_path / "one.xyz", labelled(2))
    two = write(tmp_path / "two.xyz", [with_calculator(water(7), energy=-3.0)])
    data = read_dataset([one, two])
    assert data.keys["energy"] == "REF_energy | energy"
    assert data.indices == {str(one): [0, 1], str(two): [0]}
    assert any("different keys in different files" in note for note in data.notes)


def test_isolated_atoms_in_a_file_of_their_own_need_not_have_a_named_key(tmp_path: Path) -> None:
    frames = labelled(3)
    for atoms in frames:
        atoms.info["dft_energy"] = atoms.info.pop("REF_energy")
    one = write(tmp_path / "one.xyz", frames)
    alone = [Atoms(s, info={"REF_energy": e}) for s, e in (("H", -13.5), ("O", -2040.0))]
    two = write(tmp_path / "two.xyz", alone)
    for data in (
        read_dataset([one, two], energy_key="dft_energy"),
        prepare([one, two], tmp_path / "a.h5", r_max=4.0, energy_key="dft_energy"),
    ):
        assert data.isolated_atoms == {1: -13.5, 8: -2040.0}
        assert data.counts["energy"] == 3
        assert any("different keys in different files (dft_energy | REF_energy)" in note for note in data.notes)
    # A crystal of one atom is no isolated atom, and structures count under the named key alone.
    metal = Atoms("O", cell=[3.0] * 3, pbc=True, info={"REF_energy": -2000.0})
    data = read_dataset([one, write(tmp_path / "three.xyz", [metal])], energy_key="dft_energy")
    assert data.structures[-1].energy is None


# What is refused ----------------------------------------------------------------------------------------------------


def test_missing_empty_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_dataset(tmp_path / "none.xyz")
    (tmp_path / "empty.xyz").touch()
    with pytest.raises(DataError, match="empty"):
        read_dataset(tmp_path / "empty.xyz")
    (tmp_path / "blank.xyz").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank\.xyz"):
        read_dataset(tmp_path / "blank.xyz")
    for name in ("noise.xyz", "noise.db", "noise.traj", "noise.unknown"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(300))
        with pytest.raises(DataError, match="cannot be read"):
            read_dataset(tmp_path / name)
    text = (ASPIRIN / "train.xyz").read_text(encoding="utf-8")
    (tmp_path / "cut.xyz").write_text(text[:5000], encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        read_dataset(tmp_path / "cut.xyz")


def test_structures_without_any_label_are_refused() -> None:
    with pytest.raises(DataError, match="no structure has an energy"):
        read_dataset(ASPIRIN / "start.xyz")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["energy", "forces", "positions"])
def test_nan_and_infinity_are_refused(tmp_path: Path, what: str, bad: float) -> None:
    frames = labelled(3)
    if what == "energy":
        frames[1].info["REF_energy"] = bad
    elif what == "forces":
        frames[1].arrays["REF_forces"][2, 0] = bad
    else:
        frames[1].positions[2, 0] = bad
    # Arrays under names of their own are not kept by .traj: the labels go through the information.
    for atoms in frames:
        atoms.info["REF_forces"] = atoms.arrays.pop("REF_forces")
    path = write(tmp_path / "a.traj", frames)
    with pytest.raises(DataError, match=rf"structure 1 of a\.traj.*{what}"):
        read_dataset(path)


def test_labels_of_the_wrong_shape_or_type_are_refused(tmp_path: Path) -> None:
    for name, value in {
        "REF_forces": np.zeros((2, 3)),
        "REF_energy": np.zeros(3),
        "REF_stress": np.zeros(5),
    }.items():
        atoms = bulk("C") if name == "REF_stress" else water(0)
        atoms.info[name] = value
        with pytest.raises(DataError, match=rf"structure 0 of a\.traj: {name[4:]} .* has shape .*expected"):
            read_dataset(write(tmp_path / "a.traj", [atoms]))
    atoms = water(0)
    atoms.info["REF_energy"] = "None"
    with pytest.raises(DataError, match="expected a number in eV"):
        read_dataset(write(tmp_path / "a.xyz", [atoms]))
    crystal = bulk("C")
    crystal.info["REF_stress"] = np.arange(9.0).reshape(3, 3)
    with pytest.raises(DataError, match="not symmetric"):
        read_dataset(write(tmp_path / "a.xyz", [crystal]))


# Splits and hashes --------------------------------------------------------------------------------------------------


def test_a_split_is_repeated_by_its_seed_and_recorded(aspirin: Dataset) -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    train, valid = split(aspirin, 0.2, seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]  # noqa: NPY002
    again, _ = split(aspirin, 0.2, seed=3)
    other, _ = split(aspirin, 0.2, seed=4)
    assert (len(train), len(valid)) == (40, 10)
    (chosen,), (kept_out,) = train.indices.values(), valid.indices.values()
    assert sorted(chosen + kept_out) == list(range(50))
    assert again.indices == train.indices
    assert other.indices != train.indices
    assert again.hash == train.hash != valid.hash


def test_a_split_leaves_something_on_both_sides(aspirin: Dataset) -> None:
    two = aspirin.subset([0, 1])
    assert [len(part) for part in split(two, 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in split(two, 0.99, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="cannot be split"):
        split(aspirin.subset([0]), 0.5, seed=0)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(DataError, match="between 0 and 1"):
            split(aspirin, fraction, seed=0)


def test_the_hash_is_of_the_content(aspirin: Dataset) -> None:
    item = aspirin.structures[0]
    reference = dataset_of([item]).hash
    assert item.energy is not None
    moved = item.atoms.copy()
    moved.positions[0, 0] += 1e-9
    boxed = item.atoms.copy()
    boxed.cell = [30, 30, 30]
    changes: list[Labelled] = [
        dataclasses.replace(item, energy=item.energy + 1e-9),
        dataclasses.replace(item, forces=None),
        dataclasses.replace(item, atoms=moved),
        dataclasses.replace(item, atoms=boxed),
    ]
    hashes = {dataset_of([changed]).hash for changed in changes}
    assert len(hashes | {reference}) == 5
    assert dataset_of([dataclasses.replace(item, index=7, source="elsewhere")]).hash == reference


# What is easily overlooked -----------------------------------------------------------------------------------------


def test_forces_under_another_name_are_pointed_out(tmp_path: Path) -> None:
    frames = labelled()
    for atoms in frames:
        atoms.arrays["dft_forces"] = atoms.arrays.pop("REF_forces")
        atoms.arrays["momenta"] = np.ones((3, 3))
    data = read_dataset(write(tmp_path / "a.xyz", frames))
    assert any("no forces found" in note and "; dft_forces would fit" in note for note in data.notes)
    assert read_dataset(write(tmp_path / "b.xyz", labelled())).notes == ()


def test_an_isolated_atom_in_a_box_is_one_and_a_crystal_of_one_atom_is_not(tmp_path: Path) -> None:
    atom = with_calculator(Atoms("H", cell=[20.0] * 3, pbc=True), energy=-13.5)
    data = read_dataset(write(tmp_path / "a.xyz", [*labelled(prefix=""), atom]))
    assert data.isolated_atoms == {1: -13.5}
    metal = with_calculator(Atoms("O", cell=[3.0] * 3, pbc=True), energy=-2000.0)
    data = read_dataset(write(tmp_path / "b.xyz", [*labelled(prefix=""), metal]))
    assert (data.isolated_atoms, len(data)) == ({}, 5)


def test_what_has_neither_energy_nor_forces_does_not_validate() -> None:
    frames = [Labelled(water(k), energy=0.0 if k % 4 == 0 else None) for k in range(8)]
    for seed in range(10):
        train, valid = split(dataset_of(frames), 0.3, seed)
        assert len(valid) in (1, 2)
        assert valid.counts["energy"] == len(valid)
        assert len(train) + len(valid) == 8
    with pytest.raises(DataError, match="fewer than two have an energy or forces"):
        split(dataset_of([dataclasses.replace(s, energy=None) for s in frames]), 0.3, 0)


def test_copies_of_a_geometry_stay_on_one_side_of_a_split() -> None:
    frames = [Labelled(water(k // 2), energy=0.0, index=k, source="a") for k in range(12)]
    for seed in range(5):
        train, valid = split(dataset_of(frames), 0.3, seed)
        assert len(valid) == 4
        sides = [{i // 2 for i in part.indices["a"]} for part in (train, valid)]
        assert not sides[0] & sides[1]
    with pytest.raises(DataError, match="all 3 structures are one geometry"):
        split(dataset_of([Labelled(water(0), energy=0.0)] * 3), 0.3, 0)


def test_positions_in_bohr_and_charges_are_pointed_out(aspirin: Dataset) -> None:
    frames = []
    for item in aspirin.structures[:10]:
        atoms = item.atoms.copy()
        atoms.positions /= 0.529177
        atoms.info["charge"] = 1
        frames.append(Labelled(atoms, energy=item.energy, forces=item.forces))
    warnings = check(frames).warnings
    assert any("are positions in Bohr?" in w for w in warnings)
    assert "train: 10 structures have a total charge, which the backbone does not see" in warnings
