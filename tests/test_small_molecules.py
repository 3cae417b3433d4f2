"""Geometries of very small molecules: hydrogen bonds, and bonds that are rare."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.data import covalent_radii
from commands import mmea

from mmea_calc.calculator import MMEACalculator
from mmea_calc.pretrain import small
from mmea_calc.pretrain.label import LARGEST_FORCE, draw, indices


def test_halogens_stand_where_hydrogens_were() -> None:
    ethanol = molecule("CH3CH2OH")
    hydrogens = np.flatnonzero(ethanol.numbers == 1)
    of_oxygen = next(int(h) for h in hydrogens if ethanol.get_distance(int(h), 2) < 1.1)
    of_carbon = next(int(h) for h in hydrogens if h != of_oxygen)
    changed = small.exchange(ethanol, [of_oxygen, of_carbon], [9, 35])
    assert changed.get_chemical_formula() == "C2H4BrFO"
    for site, halogen in ((of_oxygen, 9), (of_carbon, 35)):
        before, after = ethanol.get_all_distances()[site], changed.get_all_distances()[site]
        neighbour = int(np.argsort(before)[1])
        assert after[neighbour] == pytest.approx(covalent_radii[halogen] + covalent_radii[ethanol.numbers[neighbour]])
        bonds = [a.positions[site] - a.positions[neighbour] for a in (ethanol, changed)]
        assert np.cross(*bonds) == pytest.approx(np.zeros(3), abs=1e-12)  # in the same direction
    rest = [i for i in range(len(ethanol)) if i not in (of_oxygen, of_carbon)]
    assert np.array_equal(changed.positions[rest], ethanol.positions[rest])


def test_molecules_touch_and_keep_their_form() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        atoms, belongs = small.touching(("H2O", "CH3OH", "NH3"), rng, (1.8, 2.6))
        assert belongs.tolist() == [0] * 3 + [1] * 6 + [2] * 4
        apart = atoms.get_all_distances()
        for turn, name in enumerate(("H2O", "CH3OH", "NH3")):
            own = belongs == turn
            assert apart[np.ix_(own, own)] == pytest.approx(molecule(name).get_all_distances())
            if turn:
                assert 1.8 - 0.05 <= apart[np.ix_(own, belongs < turn)].min() <= 2.6


def test_frames_of_pairs_clusters_and_exchanged_molecules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calculator = MMEACalculator(backbone="mmea-organic-s", device="cpu")
    monkeypatch.setattr(small, "xtb", lambda: calculator)
    monkeypatch.setattr(small, "_STEPS", 5)
    monkeypatch.setattr(small, "PARTNERS", ("H2O", "CH4", "H2CO"))
    monkeypatch.setattr(small, "CLUSTERS", (("H2O", "H2O", "H2O"),))
    monkeypatch.setattr(small, "PARENTS", ("CH4",))
    count = small.small(out=tmp_path, pairs=1, clusters=1, exchanged=2)
    drawn = list(draw(tmp_path, 7, set(), indices([tmp_path / "order.npz"])))
    assert len(drawn) == count
    formulas = [Atoms(numbers).get_chemical_formula() for _, numbers, _ in drawn]
    # all pairs of partners are made, but not two waters; methane and formaldehyde together are ethanol's isomer
    assert not {"H4O2", "C2H6O"} & set(formulas)
    assert {"H6O3", "CH6O", "C2H8"} <= set(formulas)
    # a frame for each of two temperatures and one with a molecule pushed out of place, if none was too wild
    assert formulas.count("H6O3") == 3
    assert any(set(f) & set("FIB") or "Cl" in f for f in formulas)
    with np.load(tmp_path / "train-0.npz") as content:
        assert np.abs(content["forces"]).max() < LARGEST_FORCE


def test_molecules_that_something_is_measured_by_are_not_for_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calculator = MMEACalculator(backbone="mmea-organic-s", device="cpu")
    monkeypatch.setattr(small, "xtb", lambda: calculator)
    monkeypatch.setattr(small, "_STEPS", 5)
    monkeypatch.setattr(small, "PARTNERS", ("H2O", "NH3"))
    monkeypatch.setattr(small, "CLUSTERS", ())
    monkeypatch.setattr(small, "_exchanged", lambda rng: small.exchange(molecule("CH4"), [1], [17]))
    small.small(out=tmp_path, pairs=1, exchanged=1)
    everything = [Atoms(numbers).get_chemical_formula() for _, numbers, _ in draw(tmp_path, 7, set(), range(9))]
    for_labels = draw(tmp_path, 7, set(), indices([tmp_path / "order.npz"]))
    assert "CH3Cl" in everything
    assert "CH3Cl" not in [Atoms(numbers).get_chemical_formula() for _, numbers, _ in for_labels]


def test_without_tblite_it_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    result = mmea("pretrain", "small", "--out", tmp_path / "geometries")
    assert result.exit_code == 1
    assert "mmea[label]" in result.stderr
    assert not (tmp_path / "geometries").exists()
