"""Bonds, angles and dihedrals of known geometries; radial distributions of an ideal gas and of a crystal."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import iread

from conftest import ROOT
from mmea_calc.analysis import structure
from mmea_calc.analysis.structure import angles, dihedrals, distances, find_angles, find_bonds, find_torsions
from mmea_calc.errors import DataError

# One for each bond of aspirin that turns: methyl, acetyl to oxygen, oxygen to ring, ring to carboxyl, carboxyl to H.
TORSIONS = ["C-C-C-O", "C-C-O-C", "C-O-C-O", "H-C-C-O", "H-O-C-O"]


def bonds_of(atoms: Atoms) -> structure.InternalCoordinates:
    return find_bonds(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)


def points(atoms: Atoms, coordinates: structure.InternalCoordinates) -> np.ndarray:
    return coordinates.points(atoms.positions[None], atoms.cell.array)[0]


def test_water_has_two_bonds_and_one_angle() -> None:
    water = molecule("H2O")
    bonds = bonds_of(water)
    assert bonds.atoms.tolist() == [[0, 1], [0, 2]]
    assert distances(points(water, bonds)) == pytest.approx([water.get_distance(0, 1)] * 2)
    assert angles(points(water, find_angles(bonds))) == pytest.approx([water.get_angle(1, 0, 2)])


def test_methane_is_a_tetrahedron() -> None:
    methane = molecule("CH4")
    found = angles(points(methane, find_angles(bonds_of(methane))))
    assert found == pytest.approx([np.degrees(np.arccos(-1 / 3))] * 6, abs=1e-3)


def test_angles_keep_their_digits_when_nearly_straight() -> None:
    bend = 1e-7
    straight = np.array([[1, 0, 0], [0, 0, 0], [-np.cos(bend), np.sin(bend), 0]])
    assert 180.0 - angles(straight) == pytest.approx(np.degrees(bend), rel=1e-6)
    assert angles([[1, 0, 0], [0, 0, 0], [-2, 0, 0]]) == 180.0


@pytest.mark.parametrize("degrees", [-179.9, -120.0, -60.0, 0.0, 30.0, 90.0, 180.0])
def test_dihedrals_have_the_sign_of_the_convention(degrees: float) -> None:
    """Seen along the middle bond from the second atom to the third, a positive one turns clockwise."""
    turn = np.radians(degrees)
    four = np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.5], [np.cos(turn), np.sin(turn), 2.0]])
    assert dihedrals(four) == pytest.approx(degrees, abs=1e-9)
    assert dihedrals(four[::-1]) == pytest.approx(degrees, abs=1e-9)
    mirrored = four * [1, -1, 1]
    assert abs(dihedrals(mirrored)) == pytest.approx(abs(degrees), abs=1e-9)


def test_angles_and_dihedrals_agree_with_ase() -> None:
    atoms = Atoms("H40", positions=np.random.default_rng(0).normal(size=(40, 3)))
    four = atoms.positions.reshape(10, 4, 3)
    for i in range(10):
        a, b, c, d = range(4 * i, 4 * i + 4)
        assert angles(four[i, :3]) == pytest.approx(atoms.get_angle(a, b, c))
        assert dihedrals(four[i]) % 360 == pytest.approx(atoms.get_dihedral(a, b, c, d))


def test_aspirin_has_its_bonds_and_turns_about_those_outside_the_ring() -> None:
    (aspirin,) = iread(ROOT / "examples" / "data" / "aspirin" / "start.xyz")
    bonds = bonds_of(aspirin)
    # 21 atoms with one ring have 21 bonds.
    assert len(bonds) == 21
    assert len(find_angles(bonds)) == 32
    torsions = find_torsions(aspirin.numbers, bonds)
    assert sorted(structure.type_labels(aspirin.numbers, torsions)) == TORSIONS


def test_hydrogen_peroxide_turns_about_one_bond() -> None:
    peroxide = molecule("H2O2")
    torsions = find_torsions(peroxide.numbers, bonds_of(peroxide))
    assert structure.type_labels(peroxide.numbers, torsions) == ["H-O-O-H"]
    a, b, c, d = torsions.atoms[0]
    assert dihedrals(points(peroxide, torsions)) % 360 == pytest.approx([peroxide.get_dihedral(a, b, c, d)])


def test_the_neighbour_with_the_highest_atomic_number_defines_a_torsion() -> None:
    ethanol = molecule("CH3CH2OH")
    torsions = find_torsions(ethanol.numbers, bonds_of(ethanol))
    assert sorted(structure.type_labels(ethanol.numbers, torsions)) == ["C-C-O-H", "H-C-C-O"]


def test_benzene_has_no_torsions() -> None:
    benzene = molecule("C6H6")
    assert len(find_torsions(benzene.numbers, bonds_of(benzene))) == 0


def test_straight_groups_have_no_defined_torsion() -> None:
    """Propyne's only bond outside its triple bond has the straight chain on one side."""
    propyne = molecule("C3H4_C3v")
    torsions = find_torsions(propyne.numbers, bonds_of(propyne))
    assert len(torsions) > 0
    assert structure.nearly_straight(torsions.points(propyne.positions[None], np.zeros((3, 3)))).all()


def test_every_bond_of_a_crystal_is_found_once_although_it_leaves_the_cell() -> None:
    diamond = bulk("C", "diamond", a=3.567)
    bonds = bonds_of(diamond)
    assert len(bonds) == 4
    assert distances(points(diamond, bonds)) == pytest.approx([np.sqrt(3) / 4 * 3.567] * 4)
    found = angles(points(diamond, find_angles(bonds)))
    assert len(found) == 12
    assert found == pytest.approx([np.degrees(np.arccos(-1 / 3))] * 12)


def test_an_atom_bonded_to_its_own_image_counts_once_per_direction() -> None:
    assert len(bonds_of(bulk("Cu", "fcc", a=3.6))) == 6


def test_a_bond_is_followed_when_its_atoms_have_crossed_the_cell() -> None:
    diamond = bulk("C", "diamond", a=3.567)
    bonds = bonds_of(diamond)
    moved = diamond.positions + 5 * diamond.cell.array[1]
    assert distances(bonds.points(moved[None], diamond.cell.array)) == pytest.approx(
        distances(bonds.points(diamond.positions[None], diamond.cell.array))
    )


def test_labels_do_not_depend_on_direction() -> None:
    coordinates = structure.InternalCoordinates(np.array([[0, 1], [1, 0]]), np.zeros((2, 2, 3), dtype=int))
    assert structure.type_labels([8, 1], coordinates) == ["H-O", "H-O"]
    assert structure.atom_labels([8, 1], coordinates) == ["O0-H1", "H1-O0"]


def test_a_distribution_integrates_to_one_and_has_the_right_density() -> None:
    x = np.random.default_rng(0).uniform(2.0, 4.0, 40000)
    d = structure.distribution(x, np.linspace(1.0, 5.0, 41))
    assert np.sum(d.density * np.diff(d.edges)) == pytest.approx(1.0)
    assert d.density[(d.centres > 2) & (d.centres < 4)] == pytest.approx(0.5, rel=0.1)
    assert d.density[d.centres < 2].max() == 0.0


def test_a_distribution_outside_its_bins_is_refused() -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        structure.distribution([2.0], [0.0, 0.5, 1.0])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(\.\.\., 3, 3\), got \(2, 3\)"):
        angles(np.zeros((2, 3)))


TRICLINIC = np.array([[11.0, 0, 0], [3.0, 12.0, 0], [-2.0, 4.0, 10.0]])


def test_the_radial_distribution_of_an_ideal_gas_is_flat() -> None:
    rng = np.random.default_rng(5)
    numbers = np.array([6] * 30 + [8] * 20)
    frames = rng.uniform(-2, 3, size=(150, 50, 3)) @ TRICLINIC  # unwrapped
    half = structure.half_height(TRICLINIC)
    found = structure.radial_distribution(numbers, frames, TRICLINIC, half, n_bins=20)
    expected = {"C-C": 29 / 30, "O-O": 19 / 20, "C-O": 1.0, "all": 49 / 50}
    shells = 4 * np.pi * found.r_A**2 * (found.r_A[1] - found.r_A[0])
    volume = abs(np.linalg.det(TRICLINIC))
    for pair, pairs in {"C-C": 30 * 29 / 2, "O-O": 20 * 19 / 2, "C-O": 600, "all": 50 * 49 / 2}.items():
        error = expected[pair] / np.sqrt(pairs * 150 * shells / volume)
        deviation = (found.g[pair] - expected[pair]) / error
        assert np.mean(deviation[2:] ** 2) == pytest.approx(1.0, abs=0.9)
        assert abs(np.mean(deviation[2:])) < 4 / np.sqrt(18)


def test_beyond_half_the_cell_images_count_and_the_mean_stays_one() -> None:
    rng = np.random.default_rng(6)
    cell = np.diag([5.0, 5.0, 5.0])
    frames = rng.uniform(size=(60, 20, 3)) @ cell
    found = structure.radial_distribution(np.full(20, 6), frames, cell, 12.0, n_bins=24)
    far = found.r_A > 4.0
    shells = found.r_A**2
    assert np.sum((found.g["all"] * shells)[far]) / np.sum(shells[far]) == pytest.approx(1.0, rel=0.02)


def test_the_first_peak_of_a_crystal_counts_its_neighbours() -> None:
    rocksalt = bulk("NaCl", "rocksalt", a=5.6)
    found = structure.radial_distribution(rocksalt.numbers, rocksalt.positions[None], rocksalt.cell.array, 3.2, 64)
    volume = rocksalt.cell.volume
    edges = np.linspace(0, 3.2, 65)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    assert np.sum(found.g["Na-Cl"] * shells) / volume == pytest.approx(6.0)
    assert not found.g["Na-Na"].any()


def test_a_radial_distribution_needs_a_volume() -> None:
    with pytest.raises(DataError, match="volume"):
        structure.radial_distribution([1], np.zeros((1, 1, 3)), np.zeros((3, 3)), 5.0)
    with pytest.raises(DataError, match="positions of shape"):
        structure.radial_distribution([1], np.zeros((1, 3)), np.eye(3), 5.0)


def test_half_the_height_of_a_sheared_cell_is_less_than_half_its_edges() -> None:
    assert structure.half_height(np.diag([4.0, 6.0, 8.0])) == pytest.approx(2.0)
    assert structure.half_height([[4.0, 0, 0], [3.0, 1.0, 0], [0, 0, 9.0]]) == pytest.approx(0.5)
