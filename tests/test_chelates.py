"""Geometries of molecules with a hydrogen bond within themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from commands import mmea

from mmea_calc.calculator import MMEACalculator
from mmea_calc.errors import MMEAError
from mmea_calc.pretrain import chelates, small
from mmea_calc.pretrain.label import LARGEST_FORCE, draw, indices


@pytest.mark.parametrize(
    ("smiles", "donor", "acceptor", "ring"),
    [
        ("O/C=C\\C=O", 8, 8, 6),
        ("N/C(F)=C\\C=O", 7, 8, 6),
        ("OCC=O", 8, 8, 5),
        ("OC(=O)/C=C\\C(=O)O", 8, 8, 7),
        ("O=Cc1ccccc1O", 8, 8, 6),
    ],
)
def test_a_hydrogen_bond_closes_a_ring(smiles: str, donor: int, acceptor: int, ring: int) -> None:
    embedded = chelates.embed(smiles, seed=1)
    assert embedded is not None
    atoms, bridge = embedded
    assert (atoms.numbers[bridge.donor], atoms.numbers[bridge.acceptor]) == (donor, acceptor)
    assert atoms.numbers[bridge.hydrogen] == 1
    assert atoms.get_distance(bridge.donor, bridge.hydrogen) < 1.1
    assert 1.4 < atoms.get_distance(bridge.hydrogen, bridge.acceptor) < 2.4
    assert _bonds_between(atoms, bridge.hydrogen, bridge.acceptor) == ring - 1


def _bonds_between(atoms: Atoms, one: int, other: int) -> int:
    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.2))
    reached, steps = {one}, 0
    while other not in reached:
        reached |= set(second[np.isin(first, list(reached))].tolist())
        steps += 1
        assert steps < len(atoms)
    return steps


def test_where_no_ring_closes_there_is_none() -> None:
    assert chelates.embed("CO") is None  # too few bonds apart
    assert chelates.embed("O/C=C/C=O", seed=1) is None  # on the other side of the double bond
    assert chelates.embed("O=CC=O") is None  # nothing to give


def test_what_is_no_molecule_is_told() -> None:
    with pytest.raises(MMEAError, match="'C1C' is no molecule"):
        chelates.embed("C1C")


def test_every_molecule_of_the_list_closes_one() -> None:
    assert [smiles for smiles in chelates.MOLECULES if chelates.embed(smiles) is None] == []


def test_drawn_molecules_are_of_the_form_and_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    drawn = [chelates.vinylogous(rng) for _ in range(200)]
    assert {s.split("/")[0] for s in drawn} == set(chelates.DONORS)
    assert {s.split("=")[-1] for s in drawn} == set(chelates.ACCEPTORS)
    closed = [chelates.embed(smiles) for smiles in drawn[:10]]
    assert sum(found is not None for found in closed) >= 8


def test_a_hydrogen_on_its_way_is_on_the_line_and_all_others_stay() -> None:
    positions = np.random.default_rng(0).normal(size=(6, 3))
    bridge = chelates.Bridge(donor=4, hydrogen=1, acceptor=3)
    moved = chelates.on_its_way(positions, bridge, 0.4)
    assert np.linalg.norm(moved[1] - moved[4]) == pytest.approx(0.4 * np.linalg.norm(moved[3] - moved[4]))
    assert np.linalg.norm(moved[1] - moved[3]) == pytest.approx(0.6 * np.linalg.norm(moved[3] - moved[4]))
    rest = [0, 2, 3, 4, 5]
    assert np.array_equal(moved[rest], positions[rest])


def test_frames_in_motion_and_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calculator = MMEACalculator(backbone="mmea-organic-s7", device="cpu")
    monkeypatch.setattr(small, "xtb", lambda: calculator)
    monkeypatch.setattr(chelates, "xtb", lambda: calculator)
    monkeypatch.setattr(small, "_STEPS", 5)
    # malonaldehyde and an isomer of acetylacetone are measured by; the last has too many heavy atoms
    enols = iter(["O/C=C\\C=O", "O/C(CC)=C\\C=O", "N/C=C\\C=O", "N/C=C\\C=O", "O/C(C)=C(C)\\C(C#N)=N"])
    monkeypatch.setattr(chelates, "MOLECULES", ("OCC=O",))
    monkeypatch.setattr(chelates, "vinylogous", lambda rng: next(enols))
    told: list[str] = []
    count = chelates.chelates(out=tmp_path, enols=5, progress=told.append)
    drawn = list(draw(tmp_path, 7, set(), indices([tmp_path / "order.npz"])))
    assert len(drawn) == count == 8
    assert told == ["2 of 5 molecules with a hydrogen bond: 8 frames"]
    formulas = [Atoms(numbers).get_chemical_formula() for _, numbers, _ in drawn]
    assert sorted(formulas) == ["C2H4O2"] * 4 + ["C3H5NO"] * 4
    with np.load(tmp_path / "train-0.npz") as content:
        assert np.abs(content["forces"]).max() < LARGEST_FORCE


@pytest.mark.parametrize("absent", ["rdkit", "tblite"])
def test_without_the_packages_for_labels_the_message_names_them(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [absent, *(m for m in sys.modules if m.startswith(f"{absent}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    result = mmea("pretrain", "chelates", "--out", str(tmp_path / "geometries"))
    assert result.exit_code == 1
    assert "mmea[label]" in result.output
    assert not (tmp_path / "geometries").exists()
