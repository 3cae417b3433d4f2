"""Geometries of molecules with carbonyl groups, and what makes molecules of SMILES."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from commands import mmea

from mmea_calc.calculator import MMEACalculator
from mmea_calc.errors import MMEAError
from mmea_calc.md import open_potential
from mmea_calc.pretrain import carbonyls, conformers, small
from mmea_calc.pretrain.choose import composition, compositions_left_out
from mmea_calc.pretrain.label import LARGEST_FORCE, draw, indices


def _carbonyl_groups(smiles: str) -> int:
    """Carbons, aromatic ones too, with a double bond to an oxygen that has no other."""
    pattern = conformers.rdkit().chem.MolFromSmarts("[#6]=[OX1]")
    return len(conformers.read_smiles(smiles).GetSubstructMatches(pattern))


def test_drawn_molecules_have_carbonyl_groups_and_are_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    drawn = [carbonyls.draw_molecule(rng) for _ in range(300)]
    assert min(_carbonyl_groups(smiles) for smiles in drawn) >= 1
    assert sum(smiles.startswith("O=C") and "1" not in smiles for smiles in drawn) > 120  # chains
    assert {smiles for smiles in drawn if "c1ccccc1" in smiles}
    assert {smiles for smiles in drawn if "[nH]" in smiles}
    assert len(set(drawn)) > 200


def test_every_ring_of_the_list_has_a_carbonyl_group_and_a_conformer() -> None:
    assert len(set(carbonyls.RINGS)) == len(carbonyls.RINGS)
    assert [ring for ring in carbonyls.RINGS if not _carbonyl_groups(ring)] == []
    assert [ring for ring in carbonyls.RINGS if conformers.conformer(ring) is None] == []


def test_a_group_takes_the_place_of_a_hydrogen_on_carbon() -> None:
    rng = np.random.default_rng(0)
    before = Atoms("C4H4N2O2")  # maleimide's and others' neighbours: uracil
    for _ in range(5):
        attached = conformers.attach("O=C1C=CNC(=O)N1", ["F"], rng)
        assert attached is not None
        molecule = conformers.rdkit().chem.AddHs(conformers.read_smiles(attached))
        numbers = conformers.numbers_of(molecule)
        assert Atoms(numbers).get_chemical_formula() == "C4H3FN2O2"
        assert len(numbers) == len(before)
        (fluorine,) = (atom for atom in molecule.GetAtoms() if atom.GetAtomicNum() == 9)
        assert [neighbour.GetAtomicNum() for neighbour in fluorine.GetNeighbors()] == [6]


def test_no_more_groups_than_carbons_with_hydrogens() -> None:
    rng = np.random.default_rng(0)
    assert conformers.attach("O=C1C=CC(=O)O1", ["C", "C", "C"], rng) is None
    assert conformers.attach("O=C1C=CC(=O)O1", ["C", "C"], rng) == "CC1=C(C)C(=O)OC1=O"


def test_a_conformer_is_the_molecule_and_the_same_again() -> None:
    atoms, again = conformers.conformer("O=CNC=O", seed=3), conformers.conformer("O=CNC=O", seed=3)
    assert atoms is not None
    assert again is not None
    assert atoms.get_chemical_formula() == "C2H3NO2"
    assert np.array_equal(atoms.positions, again.positions)
    assert 1.15 < min(atoms.get_distance(i, j) for i in (0, 4) for j in (1, 3)) < 1.3  # C=O
    with pytest.raises(MMEAError, match="'C1C' is no molecule"):
        conformers.conformer("C1C")


@pytest.fixture
def molecules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four, of which one is drawn twice; malonaldehyde is measured by, and the last has too many heavy atoms."""
    calculator = MMEACalculator(backbone="mmea-organic-s7", device="cpu")
    for module in (small, carbonyls):
        monkeypatch.setattr(module, "xtb", lambda: calculator)
    monkeypatch.setattr(small, "_STEPS", 5)
    drawn = iter(["O=CC=O", "O=CCC=O", "O=CNC=O", "O=CNC=O", "O=Cc1ccc(C(C)=O)cc1"])
    monkeypatch.setattr(carbonyls, "draw_molecule", lambda rng: next(drawn))


def _formulas(folder: Path) -> list[str]:
    drawn = list(draw(folder, 9, set(), indices([folder / "order.npz"])))
    assert all(composition(numbers) not in compositions_left_out() for _, numbers, _ in drawn)
    with np.load(folder / "train-0.npz") as content:
        assert np.abs(content["forces"]).max() < LARGEST_FORCE
    return sorted(Atoms(numbers).get_chemical_formula() for _, numbers, _ in drawn)


def test_one_frame_at_every_temperature(tmp_path: Path, molecules: None) -> None:
    told: list[str] = []
    assert carbonyls.carbonyls(out=tmp_path, drawn=5, max_heavy=9, progress=told.append) == 6
    assert told == ["2 of 4 molecules: 6 frames"]
    assert _formulas(tmp_path) == ["C2H2O2"] * 3 + ["C2H3NO2"] * 3


def test_a_dozen_frames_where_a_potential_moves_them(
    tmp_path: Path, molecules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carbonyls, "_TOGETHER", 1)
    by, told = open_potential("mmea-organic-s7", device="cpu"), list[str]()
    assert carbonyls.carbonyls(out=tmp_path / "one", by=by, drawn=5, max_heavy=9, progress=told.append) == 24
    assert told == ["1 of 2 molecules", "2 of 2 molecules", "2 of 4 molecules: 24 frames"]
    assert _formulas(tmp_path / "one") == ["C2H2O2"] * 12 + ["C2H3NO2"] * 12


@pytest.mark.parametrize("absent", ["rdkit", "tblite"])
def test_without_the_packages_for_labels_the_message_names_them(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [absent, *(m for m in sys.modules if m.startswith(f"{absent}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    result = mmea("pretrain", "carbonyls", "--out", str(tmp_path / "geometries"))
    assert result.exit_code == 1
    assert "mmea[label]" in result.output
    assert not (tmp_path / "geometries").exists()
