"""Reference energies: where they come from, and what is said about them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from mmea_calc.data.reading import Dataset, Labelled, read_dataset
from mmea_calc.data.reference_energies import identity_of, resolve_reference_energies
from mmea_calc.errors import DataError

ASPIRIN = Path(__file__).parents[1] / "examples" / "data" / "aspirin"
# PBE/def2-SVP, from the shipped isolated atoms; N from the same calculation.
PBE = {1: -13.57028349160633, 6: -1027.2635983680996, 7: -1482.1112823621527, 8: -2038.532326236881}


@dataclass
class Backbone:
    """As much of a backbone as reference energies need."""

    name: str = "test-backbone"
    atomic_energies: dict[int, float] = field(default_factory=lambda: {1: -13.0, 6: -1020.0, 7: -1480.0, 8: -2030.0})


def made(names: list[str], e0: dict[int, float], interaction: np.ndarray, **isolated: float) -> Dataset:
    """Molecules whose labels are exactly E0s + interaction."""
    frames = []
    for k, name in enumerate(names):
        atoms = molecule(name)
        frames.append(Labelled(atoms, energy=float(sum(e0[z] for z in atoms.numbers) + interaction[k]), index=k))
    alone = {Atoms(symbol).numbers[0]: energy for symbol, energy in isolated.items()}
    return Dataset(tuple(frames), "made.xyz", {"energy": "energy"}, alone)


MIXED = ["H2O", "CH4", "CO2", "CH3OH", "C2H6", "H2CO"]
INTERACTION = np.linspace(-30.0, -10.0, len(MIXED))


def test_isolated_atoms_are_the_default_when_all_are_there() -> None:
    data = made(MIXED, PBE, INTERACTION, H=PBE[1], C=PBE[6], O=PBE[8])
    result = resolve_reference_energies(None, data, Backbone(), INTERACTION)
    assert result.method == "isolated"
    assert {z: result.energies[z] for z in (1, 6, 8)} == {z: PBE[z] for z in (1, 6, 8)}
    assert result.energies[7] == -1480.0
    assert "(N) keep the backbone's" in result.note
    assert result.residual_meV_per_atom == pytest.approx(0.0, abs=1e-6)
    assert result.warnings == []


def test_the_shipped_isolated_atoms_are_used() -> None:
    data = read_dataset([ASPIRIN / "train.xyz", ASPIRIN / "isolated_atoms.xyz"])
    # The atomisation energy of aspirin, some 5 eV per atom: about what a backbone would predict.
    interaction = np.array([s.energy - sum(PBE[z] for z in s.atoms.numbers) for s in data.structures if s.energy])
    assert np.all((interaction / 21 > -6.5) & (interaction / 21 < -4.0))
    result = resolve_reference_energies(None, data, Backbone(), interaction + 21 * 0.1)
    assert result.method == "isolated"
    assert result.residual_meV_per_atom == pytest.approx(100.0, abs=1e-6)


def test_estimation_finds_the_energies_that_make_predictions_meet_labels() -> None:
    data = made(MIXED, PBE, INTERACTION)
    result = resolve_reference_energies(None, data, Backbone(), INTERACTION)
    assert result.method == "estimated"
    for z in (1, 6, 8):
        assert result.energies[z] == pytest.approx(PBE[z], abs=1e-8)
    assert result.energies[7] == -1480.0
    assert result.residual_meV_per_atom == pytest.approx(0.0, abs=1e-5)
    assert result.warnings == []


def test_structures_without_an_energy_do_not_count() -> None:
    data = made(MIXED, PBE, INTERACTION)
    bare = Labelled(molecule("C6H6"), forces=np.zeros((12, 3)))
    mixed = Dataset((bare, *data.structures, bare), data.name, data.keys)
    padded = np.concatenate([[1e6], INTERACTION, [-1e6]])
    result = resolve_reference_energies("estimated", mixed, Backbone(), padded)
    assert result.energies[6] == pytest.approx(PBE[6], abs=1e-8)
    assert result.residual_meV_per_atom == pytest.approx(0.0, abs=1e-5)


def test_one_composition_takes_the_smallest_shift_and_says_so() -> None:
    data = read_dataset(ASPIRIN / "train.xyz")
    backbone = Backbone()
    interaction = np.full(len(data), -100.0)
    result = resolve_reference_energies(None, data, backbone, interaction)
    counts = {1: 8, 6: 9, 8: 4}
    shift = {z: result.energies[z] - backbone.atomic_energies[z] for z in counts}
    # The least of all shifts with the right sum is parallel to the composition.
    for z in counts:
        assert shift[z] / counts[z] == pytest.approx(shift[1] / counts[1], rel=1e-9)
    labels = np.array([s.energy for s in data.structures], dtype=np.float64)
    total = sum(n * result.energies[z] for z, n in counts.items()) - 100.0
    assert total == pytest.approx(labels.mean(), abs=1e-8)
    assert "1 composition in the data fix only 1 of 3" in result.note
    assert "smallest is taken" in result.note
    assert any("rank-deficient" in w for w in result.warnings)
    expected = 1000 * np.abs(labels - labels.mean()).mean() / 21
    assert result.residual_meV_per_atom == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["symbols", "numbers", "json", "python", "json file", "yaml file", "xyz file"])
def test_given_energies_come_in_many_forms(tmp_path: Path, form: str) -> None:
    values = {"H": -13.5, "C": -1027.0, "O": -2038.0}
    numbers = {1: -13.5, 6: -1027.0, 8: -2038.0}
    spec: str | Path | dict[str, float] | dict[int, float]
    if form == "symbols":
        spec = values
    elif form == "numbers":
        spec = numbers
    elif form == "json":
        spec = json.dumps(values)
    elif form == "python":
        spec = str(numbers)
    elif form == "json file":
        spec = tmp_path / "e0.json"
        spec.write_text(json.dumps(numbers), encoding="utf-8")
    elif form == "yaml file":
        spec = str(tmp_path / "e0.yaml")
        Path(spec).write_text("H: -13.5\nC: -1.027e3\nO: -2038.0\nNo: -1.0\n", encoding="utf-8")  # No is nobelium
    else:
        spec = tmp_path / "atoms.xyz"
        atoms = [Atoms(symbol, info={"REF_energy": energy}) for symbol, energy in values.items()]
        ase.io.write(spec, atoms)
    data = made(MIXED, PBE, INTERACTION, H=1.0, C=2.0, O=3.0)
    result = resolve_reference_energies(spec, data, Backbone(), INTERACTION)
    assert result.method == "given"
    assert {z: result.energies[z] for z in numbers} == numbers
    assert sorted(result.energies) == [1, 6, 7, 8]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("isolatd", r"expected one of isolated, estimated, average, backbone.*file"),
        ("{nonsense", "expected JSON"),
        ({"H": -13.6}, r"made\.xyz also has C, O"),
        ({"H": -13.6, "C": float("nan"), "O": -1.0}, "reference energy of C is nan"),
        ({"H": -13.6, "C": "many", "O": -1.0}, "reference energy of C is 'many'"),
        ({"H": -13.6, "Xx": -1.0}, "'Xx' is no element"),
        ({"H": -13.6, 1: -13.7}, "H is given twice"),
        ({}, "expected reference energies as a mapping"),
    ],
)
def test_bad_specifications_are_refused(spec: str | dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_reference_energies(spec, made(MIXED, PBE, INTERACTION), Backbone(), INTERACTION)


def test_files_that_hold_no_energies_are_refused(tmp_path: Path) -> None:
    data = made(MIXED, PBE, INTERACTION)
    (tmp_path / "a.yaml").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as JSON or YAML"):
        resolve_reference_energies(tmp_path / "a.yaml", data, Backbone(), INTERACTION)
    (tmp_path / "b.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(DataError, match="mapping"):
        resolve_reference_energies(tmp_path / "b.json", data, Backbone(), INTERACTION)
    with pytest.raises(DataError, match="no isolated atoms"):
        resolve_reference_energies(ASPIRIN / "train.xyz", data, Backbone(), INTERACTION)


def test_isolated_by_name_needs_every_element() -> None:
    data = made(MIXED, PBE, INTERACTION, H=PBE[1], C=PBE[6])
    with pytest.raises(DataError, match="none for O"):
        resolve_reference_energies("isolated", data, Backbone(), INTERACTION)
    result = resolve_reference_energies(None, data, Backbone(), INTERACTION)
    assert result.method == "estimated"
    assert any("those of O are missing" in w for w in result.warnings)


def test_averages_fit_the_labels_alone_and_carry_a_warning() -> None:
    data = made(MIXED, PBE, np.zeros(len(MIXED)))
    result = resolve_reference_energies("average", data, Backbone(), INTERACTION)
    assert result.method == "average"
    for z in (1, 6, 8):
        assert result.energies[z] == pytest.approx(PBE[z], abs=1e-7)  # the interaction plays no part
    assert any("dissociation" in w for w in result.warnings)


def test_averages_of_bound_molecules_count_bonds_twice_and_that_is_said() -> None:
    result = resolve_reference_energies("average", made(MIXED, PBE, INTERACTION), Backbone(), INTERACTION)
    assert result.residual_meV_per_atom > 500
    assert any("probable mismatch" in w and "a second time" in w for w in result.warnings)


def test_the_backbones_own_energies_are_kept_on_request() -> None:
    backbone = Backbone(atomic_energies=dict(PBE))
    data = made(MIXED, PBE, INTERACTION, H=0.0, C=0.0, O=0.0)
    result = resolve_reference_energies("backbone", data, backbone, INTERACTION)
    assert result.method == "backbone"
    assert result.energies == PBE
    assert result.residual_meV_per_atom == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("spec", [None, "estimated", "average"])
def test_without_energies_the_backbones_are_kept_and_that_is_said(spec: str | None) -> None:
    data = Dataset((Labelled(molecule("H2O"), forces=np.zeros((3, 3))),), "forces.xyz", {})
    result = resolve_reference_energies(spec, data, Backbone(), np.zeros(1))
    assert result.method == "backbone"
    assert result.energies == Backbone().atomic_energies
    assert "have no energies" in result.note
    assert np.isnan(result.residual_meV_per_atom)


def test_a_large_residual_is_called_a_mismatch_and_its_cause_is_told() -> None:
    data = made(MIXED, PBE, INTERACTION)
    wrong_level = resolve_reference_energies("backbone", data, Backbone(), INTERACTION)
    assert wrong_level.residual_meV_per_atom > 500
    assert any("probable mismatch" in w and "another level of theory" in w for w in wrong_level.warnings)
    kcal = [Labelled(s.atoms, energy=s.energy * 23.06, index=s.index) for s in data.structures if s.energy is not None]
    noise = np.array([0.0, 60.0, -50.0, 40.0, -30.0, 20.0])
    wrong_units = resolve_reference_energies(
        "estimated", Dataset(tuple(kcal), "kcal.xyz", {}), Backbone(), INTERACTION + noise
    )
    assert any("probable mismatch" in w and "look at the units" in w for w in wrong_units.warnings)


def test_large_energies_lose_no_digits() -> None:
    # Bromine has -70,000 eV: a float32 could not tell 4 meV apart.
    e0 = {1: -13.570283491606, 35: -70025.979576260}
    molecules = [molecule("H2"), Atoms("HBr", [[0, 0, 0], [1.41, 0, 0]])]
    frames = [Labelled(a, energy=float(sum(e0[z] for z in a.numbers)) - 4.0, index=k) for k, a in enumerate(molecules)]
    backbone = Backbone(atomic_energies={1: -10.0, 35: -110.0})
    result = resolve_reference_energies(
        "estimated", Dataset(tuple(frames), "hbr", {}), backbone, np.full(2, -4.0, dtype=np.float32)
    )
    assert result.energies[35] == pytest.approx(e0[35], abs=1e-7)
    assert result.energies[1] == pytest.approx(e0[1], abs=1e-7)


def test_an_element_the_backbone_lacks_is_named() -> None:
    with pytest.raises(DataError, match=r"has C, O; the backbone knows H: choose another backbone"):
        resolve_reference_energies(
            None, made(MIXED, PBE, INTERACTION), Backbone(atomic_energies={1: -13.6}), INTERACTION
        )


def test_interaction_energies_must_fit_the_data() -> None:
    data = made(MIXED, PBE, INTERACTION)
    with pytest.raises(ValueError, match=r"shape \(6,\), got \(5,\)"):
        resolve_reference_energies(None, data, Backbone(), INTERACTION[:5])
    with pytest.raises(ValueError, match="finite"):
        resolve_reference_energies(None, data, Backbone(), np.full(6, np.nan))


def test_a_file_of_structures_is_read_under_the_key_of_the_training_data(tmp_path: Path) -> None:
    alone = [Atoms(s, info={"REF_energy": PBE[z] + 100, "dft_energy": PBE[z]}) for s, z in (("H", 1), ("O", 8))]
    ase.io.write(tmp_path / "alone.xyz", alone, format="extxyz")
    data = made(["H2O"], PBE, np.array([-10.0]))
    for key, shift in (("dft_energy", 0.0), ("energy", 100.0), ("a | b", 100.0)):
        named = Dataset(data.structures, data.name, {"energy": key})
        result = resolve_reference_energies(tmp_path / "alone.xyz", named, Backbone(), np.array([-10.0]))
        assert result.energies[8] == pytest.approx(PBE[8] + shift)


def test_a_specification_is_the_same_as_long_as_it_says_the_same(tmp_path: Path) -> None:
    (path := tmp_path / "e0.json").write_text('{"H": -13.0}')
    first = identity_of(str(path))
    assert identity_of(path) == first
    path.write_text('{"H": -14.0}')
    assert identity_of(str(path)) != first
    assert identity_of("average") == "average"
    assert identity_of(None) is None
    assert identity_of({"H": 1.0}) != identity_of({"H": 2.0})
