"""Scans of short distances: geometry of the paths, forces along them, and holes in walls of known shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torch import Tensor

from conftest import ELEMENTS, crystal, ethanol, network_config, random_network
from mmea_calc.backbone import Backbone
from mmea_calc.check import paths
from mmea_calc.check.scans import Path, Scan, scan
from mmea_calc.config import CheckConfig
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.graph import Graph, build_graph
from mmea_calc.potential import Potential

CONFIG = CheckConfig()


class OfDistance:
    """Stands in for a `Potential`: the energy of two atoms as a function of their distance."""

    def __init__(self, energy: Callable[[Tensor], Tensor]) -> None:
        self.energy = energy

    def graph(self, atoms: Atoms) -> Graph:
        return build_graph(atoms, 6.0)

    def predict_graphs(self, graphs: Sequence[Graph], *, batch_size: int) -> tuple[Tensor, list[Tensor]]:
        x = torch.tensor(np.stack([g.positions for g in graphs]), requires_grad=True)
        energy = self.energy((x[:, 1] - x[:, 0]).norm(dim=1))
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach(), list(-gradient)


def scanned(energy: Callable[[Tensor], Tensor], config: CheckConfig = CONFIG) -> Scan:
    (result,) = scan(OfDistance(energy), paths.pairs([6], config), config)  # type: ignore[arg-type]
    return result


def morse(d: Tensor) -> Tensor:
    """Minimum of -5 eV at 1.2 A."""
    return 5.0 * ((1 - torch.exp(-2.0 * (d - 1.2))) ** 2 - 1) - 100.0


def dip(d: Tensor, depth: float, at: float = 0.6) -> Tensor:
    return -depth * torch.exp(-(((d - at) / 0.05) ** 2))


# -- holes -----------------------------------------------------------------------------------------------------------


def test_a_wall_without_a_hole_begins_where_the_energy_has_risen_enough() -> None:
    found = scanned(morse)
    assert found.hole is None
    # 5 (1 - exp(-2 x))^2 = 1
    assert found.wall_A == pytest.approx(1.2 - np.log(1 + np.sqrt(0.2)) / 2, abs=CONFIG.pair_step_A)
    assert found.energies_eV.min() == 0
    assert found.largest_force_eV_per_A == pytest.approx(np.abs(found.forces_eV_per_A).max() / 1.0)
    assert found.wall_A is not None
    assert (found.forces_eV_per_A[found.distances_A < found.wall_A] > 0).all()


def test_a_hole_is_found_with_its_rim_and_depth() -> None:
    found = scanned(lambda d: morse(d) + dip(d, 20.0))
    energies, r = found.energies_eV, found.distances_A
    assert found.hole is not None
    bottom = int(np.argmin(np.where((r > 0.5) & (r < 0.7), energies, np.inf)))
    outside = np.where((r > r[bottom]) & (r < 0.9), energies, -np.inf)
    assert found.hole.bottom_A == r[bottom]
    assert found.hole.rim_A == r[int(outside.argmax())]
    assert found.hole.rim_eV == outside.max()
    assert found.hole.depth_eV == pytest.approx(outside.max() - energies[bottom])


def test_a_hole_deeper_than_the_minimum_is_a_hole_and_not_the_minimum() -> None:
    found = scanned(lambda d: morse(d) - 1e4 * torch.exp(-(((d - 0.4) / 0.1) ** 2)))
    assert found.hole is not None
    assert found.hole.bottom_A == pytest.approx(0.4)
    assert found.hole.depth_eV > 5e3
    assert found.energies_eV[found.distances_A > 0.9].min() == 0


def test_the_outermost_hole_is_reported_and_a_shallow_fall_is_none() -> None:
    both = scanned(lambda d: morse(d) + dip(d, 20.0, 0.8) + dip(d, 60.0, 0.5))
    assert both.hole is not None
    assert both.hole.rim_A > 0.8
    fall = CheckConfig(min_hole_eV=1e3)
    assert scanned(lambda d: morse(d) + dip(d, 20.0), fall).hole is None


def test_a_potential_that_never_rises_has_no_wall() -> None:
    found = scanned(lambda d: -1.0 / d)
    assert (found.wall_A, found.hole) == (None, None)


def test_values_that_are_not_finite_have_no_largest_force() -> None:
    found = scanned(lambda d: torch.where(d < 0.5, torch.nan, morse(d)))
    assert found.largest_force_eV_per_A is None
    assert found.to_dict()["largest_force_eV_per_A"] is None
    assert "energies_eV" not in found.to_dict(curves=False)


# -- paths -----------------------------------------------------------------------------------------------------------


def test_pairs_are_all_pairs_of_elements_from_the_closest_to_the_bond_region() -> None:
    found = paths.pairs([8, 1, 1, 6, 53], CONFIG)
    assert [p.label for p in found] == ["H-H", "H-C", "H-O", "H-I", "C-C", "C-O", "C-I", "O-O", "O-I", "I-I"]
    for path in found:
        d = [a.get_distance(0, 1) for a in path.structures]
        np.testing.assert_allclose(d, path.distances_A)
        assert d[0] == pytest.approx(0.4)
        assert d[-1] >= 1.5 - 1e-9
    assert found[-1].distances_A[-1] > 2.7  # beyond the bond of two iodine atoms


def test_both_sides_of_a_squeezed_bond_move_rigidly() -> None:
    atoms = ethanol()
    found, n_bonds = paths.squeezes(atoms, CONFIG)
    assert n_bonds == len(found) == 8
    cc = next(p for p in found if p.label.count("C") == 2)
    a, b = (int(i[1:]) for i in cc.label.split("-"))
    side = atoms.get_distances(a, range(9)) < atoms.get_distances(b, range(9))
    start = atoms.get_all_distances()
    for d, moved in zip(cc.distances_A, cc.structures, strict=True):
        assert moved.get_distance(a, b) == pytest.approx(d)
        for part in (side, ~side):
            np.testing.assert_allclose(moved.get_all_distances()[np.ix_(part, part)], start[np.ix_(part, part)])


def test_in_a_ring_the_two_atoms_move_alone() -> None:
    found, _ = paths.squeezes(molecule("C6H6"), CONFIG)
    moving = {p.label: int((np.abs(p.tangent).sum(1) > 0).sum()) for p in found}
    assert {n for label, n in moving.items() if label.count("C") == 2} == {2}
    assert {n for label, n in moving.items() if label.count("H") == 1} == {12}


def test_bonds_of_a_crystal_are_squeezed_across_its_border() -> None:
    found, n_bonds = paths.squeezes(crystal(), CONFIG)
    assert n_bonds == 4  # of an atom of diamond to its neighbours in other cells and in its own
    for path in found:
        assert int((np.abs(path.tangent).sum(1) > 0).sum()) == 2
        nearest = [a.get_distance(0, 1, mic=True) for a in path.structures]
        assert nearest[0] == pytest.approx(0.4)


def test_many_bonds_are_thinned_out_over_all_kinds() -> None:
    found, n_bonds = paths.squeezes(ethanol(), CheckConfig(max_bonds=4))
    assert (len(found), n_bonds) == (4, 8)
    assert len({"".join(c for c in p.label if c.isalpha()) for p in found}) >= 2


def test_two_molecules_meet_with_their_leading_atoms() -> None:
    atoms = ethanol()
    found = paths.approaches(atoms, CONFIG)
    assert len(found) == 6
    n, start = len(atoms), atoms.get_all_distances()
    for path in found:
        a, b = (int("".join(c for c in part if c.isdigit())) for part in path.label.split("..."))
        for d, both in zip(path.distances_A[::10], path.structures[::10], strict=True):
            assert both.get_distance(a, n + b) == pytest.approx(d)
            for copy in (both[:n], both[n:]):
                np.testing.assert_allclose(copy.get_all_distances(), start, atol=1e-9)
    hydrogens = next(p for p in found if p.label.count("H") == 2)
    between = hydrogens.structures[0].get_all_distances()[:n, n:]
    assert between.min() == pytest.approx(hydrogens.distances_A[0])


def test_a_crystal_is_not_pushed_into_another() -> None:
    assert paths.approaches(crystal(), CONFIG) == []


def random_potential() -> Potential:
    network = random_network()
    use_fast_path(network)
    settings: dict[str, Any] = dict(heads=("Default",), head="Default", atomic_energies=dict.fromkeys(ELEMENTS, -1.0))
    return Potential(Backbone("small", "tests", network, network_config(), "f" * 64, ELEMENTS, 4.0, **settings))


def test_the_force_along_every_path_is_minus_the_slope_of_its_energy() -> None:
    potential, step = random_potential(), 1e-4
    config = CheckConfig(scan_step_A=0.5, pair_step_A=0.5, max_bonds=3, max_approaches=2)
    tasks = [*paths.pairs([1, 8], config), *paths.squeezes(ethanol(), config)[0]]
    tasks += [*paths.approaches(molecule("H2O"), config), *paths.squeezes(crystal(), config)[0]]

    def shifted(by: float) -> list[Path]:
        result = []
        for path in tasks:
            moved = [a.copy() for a in path.structures]
            for a in moved:
                a.positions += by * path.tangent
            result.append(Path(path.label, path.distances_A + by, tuple(moved), path.tangent))
        return result

    here, above, below = (scan(potential, p, config) for p in (tasks, shifted(step), shifted(-step)))
    for one, high, low in zip(here, above, below, strict=True):
        # each scan's energies have an origin of their own: differences along it do not
        slope = (high.energies_eV - low.energies_eV) / (2 * step)
        difference = slope + one.forces_eV_per_A
        np.testing.assert_allclose(difference, difference[0], atol=1e-5)
        assert np.ptp(one.forces_eV_per_A) > 1e-3
