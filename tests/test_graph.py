"""Neighbour lists against brute force, and the border between structures and tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from conftest import ELEMENTS, crystal, ethanol
from mmea_calc.errors import DataError
from mmea_calc.graph import Graph, build_graph, check_elements, collate, graph_with_edges, shifts_as_given


def brute_force(atoms: Atoms, r_max: float) -> np.ndarray:
    """Sorted rows (sender, receiver, x, y, z) of all edges, every image within reach tried in turn."""
    cell, pbc = atoms.cell.array, atoms.pbc
    spread = np.ptp(atoms.positions, axis=0)
    reach = r_max + float(np.linalg.norm(spread))
    counts = [0, 0, 0]
    for axis in np.flatnonzero(pbc):
        others = [cell[i] for i in np.flatnonzero(pbc) if i != axis]
        normal = cell[axis].copy()  # distance between lattice planes: component normal to the other periodic vectors
        if others:
            q, _ = np.linalg.qr(np.array(others).T)
            normal -= q @ (q.T @ normal)
        counts[axis] = int(np.ceil(reach / np.linalg.norm(normal)))
    rows = []
    images = np.array(np.meshgrid(*[np.arange(-n, n + 1) for n in counts], indexing="ij")).reshape(3, -1).T
    for shift in images:
        vectors = atoms.positions[None] + shift @ cell - atoms.positions[:, None]
        lengths = np.linalg.norm(vectors, axis=-1)
        near = lengths < r_max
        if not shift.any():
            np.fill_diagonal(near, False)
        for i, j in np.argwhere(near):
            rows.append([i, j, *vectors[i, j]])
    return ordered(np.array(rows).reshape(-1, 5))


def edges(graph: Graph) -> np.ndarray:
    first, second = graph.edge_index
    vectors = graph.positions[second] - graph.positions[first] + graph.unit_shifts @ graph.cell
    return ordered(np.column_stack([first, second, vectors]))


def ordered(rows: np.ndarray) -> np.ndarray:
    rounded = np.round(rows, 6) + 0.0
    return rows[np.lexsort(rounded.T[::-1])]


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 1, 3), a=3.6, vacuum=4.0)
    atoms.rattle(0.05, seed=1)
    return atoms


def slab_without_a_third_vector() -> Atoms:
    atoms = slab()
    atoms.cell[2] = 0.0
    return atoms


def wire() -> Atoms:
    atoms = Atoms(
        "CO2", [[0.1, 0.0, 0.0], [1.2, 0.3, 0.1], [2.0, 5.0, -0.2]], cell=[2.7, 0, 0], pbc=[True, False, False]
    )
    atoms.rattle(0.02, seed=2)
    return atoms


def tilted_wire() -> Atoms:
    return Atoms(
        "CO", [[0, 0, 0], [0.5, 0.9, 0.2]], cell=[[0, 0, 0], [0, 0, 0], [0.7, 0.4, 2.1]], pbc=[False, False, True]
    )


def sheared() -> Atoms:
    atoms = bulk("Cu", a=3.6)
    atoms.set_cell([[2.5, 0, 0], [2.1, 1.6, 0], [-1.9, 0.8, 2.2]])
    return atoms


def left_handed() -> Atoms:
    atoms = crystal()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def outside() -> Atoms:
    atoms = crystal()
    atoms.positions += np.array([[7, -3, 2], [-4, 5, -11]]) @ atoms.cell.array
    return atoms


def on_the_faces() -> Atoms:
    return Atoms("C4", [[0, 0, 0], [3.0, 0, 0], [0, -1e-17, 0], [1.5, 3.0 - 1e-16, 1.5]], cell=[3.0] * 3, pbc=True)


def gas() -> Atoms:
    positions = np.random.default_rng(0).uniform(0, 14, (90, 3))
    return Atoms("H90", positions)


def boxed_molecule() -> Atoms:
    return Atoms("CO", [[0, 0, 0], [0, 0, 1.1]], cell=[3.0, 3.0, 3.0], pbc=False)


@pytest.mark.parametrize("r_max", [3.1, 5.0])
@pytest.mark.parametrize(
    "structure",
    [
        ethanol, crystal, slab, slab_without_a_third_vector, wire, tilted_wire, sheared, left_handed, outside, gas,
        boxed_molecule,
    ],
)  # fmt: skip
def test_edges_are_those_of_brute_force(structure: Callable[[], Atoms], r_max: float) -> None:
    atoms = structure()
    expected, found = brute_force(atoms, r_max), edges(build_graph(atoms, r_max))
    assert len(expected) > 0
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_a_tiny_cell_has_edges_to_many_images_of_one_atom() -> None:
    atoms = Atoms("C", [[0.3, 0.2, 0.1]], cell=[1.6, 1.7, 1.8], pbc=True)
    graph = build_graph(atoms, 5.0)
    np.testing.assert_allclose(edges(graph), brute_force(atoms, 5.0), atol=1e-9)
    assert graph.edge_index.shape[1] > 80


def test_atoms_on_the_faces_of_the_cell_keep_all_their_edges() -> None:
    # two atoms coincide with images of others: compare the sorted distances alone
    atoms = on_the_faces()
    found, expected = edges(build_graph(atoms, 4.0)), brute_force(atoms, 4.0)
    lengths = [np.sort(np.linalg.norm(rows[:, 2:], axis=1)) for rows in (found, expected)]
    np.testing.assert_allclose(lengths[0], lengths[1], atol=1e-9)


def test_a_single_atom_has_no_edges() -> None:
    graph = build_graph(Atoms("H"), 5.0)
    assert graph.edge_index.shape == (2, 0)
    assert graph.unit_shifts.shape == (0, 3)


@pytest.mark.parametrize("n_molecules", [1, 30])
def test_distance_from_the_origin_does_not_matter(n_molecules: int) -> None:
    atoms = molecule("CH3CH2OH")
    for i in range(1, n_molecules):  # more atoms than are treated pair by pair
        other = molecule("H2O")
        other.positions += [3.7 * i, 0, 0]
        atoms += other
    near = build_graph(atoms, 4.0)
    atoms.positions += [1e6, -3e5, 2e5]
    far = build_graph(atoms, 4.0)
    np.testing.assert_array_equal(far.edge_index, near.edge_index)
    np.testing.assert_allclose(far.positions, near.positions, atol=1e-8)
    assert np.abs(far.positions.mean(axis=0)).max() < 1e-8


def test_an_atom_that_flew_away_costs_no_memory() -> None:
    atoms = gas()
    atoms.positions[0] = [3e5, -2e5, 1e5]
    graph = build_graph(atoms, 3.0)
    assert 0 not in graph.edge_index
    np.testing.assert_allclose(edges(graph), brute_force(atoms, 3.0), atol=1e-8)


def test_a_crystal_is_wrapped_into_its_cell_and_keeps_its_vectors() -> None:
    graph = build_graph(outside(), 4.0)
    fractional = graph.positions @ np.linalg.inv(graph.cell)
    assert fractional.min() > -1e-9
    assert fractional.max() < 1 + 1e-9
    np.testing.assert_allclose(edges(graph), edges(build_graph(crystal(), 4.0)), atol=1e-9)


def test_edges_run_from_sender_to_receiver() -> None:
    graph = build_graph(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]), 3.0)
    row = edges(graph)[0]
    np.testing.assert_allclose(row, [0, 1, 0, 0, 1.1])


@pytest.mark.parametrize("structure", [on_the_faces, sheared, tilted_wire, slab, outside, ethanol])
def test_edges_that_are_kept_fit_wherever_rounding_puts_an_atom(structure: Callable[[], Atoms]) -> None:
    atoms = structure()
    graph = build_graph(atoms, 5.0)
    kept = shifts_as_given(atoms, graph)
    again = graph_with_edges(atoms, graph.edge_index, kept)
    np.testing.assert_array_equal(again.unit_shifts, graph.unit_shifts)
    vectors = edges(graph)
    # Another processor rounds otherwise: atoms on a face come out on its other side.
    rng = np.random.default_rng(0)
    atoms.positions += rng.choice([-1e-13, 1e-13], atoms.positions.shape)
    found = edges(graph_with_edges(atoms, graph.edge_index, kept))
    np.testing.assert_allclose(found, vectors, rtol=0, atol=1e-9)


def test_the_structure_is_not_changed() -> None:
    atoms = outside()
    positions = atoms.positions.copy()
    build_graph(atoms, 4.0)
    np.testing.assert_array_equal(atoms.positions, positions)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_no_atoms() -> None:
    with pytest.raises(DataError, match="no atoms; expected at least one"):
        build_graph(Atoms(), 5.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_positions_that_are_not_finite_name_the_atom(value: float) -> None:
    atoms = ethanol()
    atoms.positions[4, 1] = value
    with pytest.raises(DataError, match=r"NaN or infinity for atom 4 \(1 atom"):
        build_graph(atoms, 5.0)


def test_a_cell_that_is_not_finite() -> None:
    atoms = crystal()
    atoms.cell[0, 0] = np.nan
    with pytest.raises(DataError, match="cell must be finite"):
        build_graph(atoms, 5.0)


def test_a_periodic_direction_without_a_vector() -> None:
    with pytest.raises(DataError, match="periodic along axis 1, but its lattice vector there is zero"):
        build_graph(Atoms("H", cell=[3.0, 0, 3.0], pbc=True), 5.0)


def test_lattice_vectors_in_one_plane() -> None:
    with pytest.raises(DataError, match="linearly dependent"):
        build_graph(Atoms("H", cell=[[3, 0, 0], [0, 3, 0], [1, 1, 0]], pbc=True), 5.0)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_structures_side_by_side() -> None:
    graphs = [build_graph(a, 4.0) for a in (ethanol(), crystal())]
    batch = collate(graphs, ELEMENTS, head_index=1, dtype=torch.float64)
    tensors = batch.tensors
    assert (batch.n_graphs, batch.n_atoms) == (2, 11)
    assert tensors["ptr"].tolist() == [0, 9, 11]
    assert tensors["batch"].tolist() == [0] * 9 + [1] * 2
    assert tensors["head"].tolist() == [1, 1]
    assert tensors["edge_index"][:, : graphs[0].edge_index.shape[1]].max() < 9
    assert tensors["edge_index"][:, graphs[0].edge_index.shape[1] :].min() >= 9
    elements = torch.tensor(ELEMENTS)
    assert torch.equal(elements[tensors["node_attrs"].argmax(1)], batch.numbers)
    assert torch.equal(tensors["node_attrs"].sum(1), torch.ones(11, dtype=torch.float64))


def test_elements_need_not_be_sorted() -> None:
    order = (8, 1, 6)
    batch = collate([build_graph(ethanol(), 4.0)], order)
    assert torch.equal(torch.tensor(order)[batch.tensors["node_attrs"].argmax(1)], batch.numbers)


@pytest.mark.parametrize(("symbol", "number"), [("Br", 35), ("He", 2), ("X", 0)])
def test_an_element_that_the_backbone_lacks_is_named_with_its_structure(symbol: str, number: int) -> None:
    graphs = [build_graph(a, 4.0) for a in (ethanol(), Atoms(["H", symbol], [[0, 0, 0], [0, 0, 1.4]]))]
    with pytest.raises(DataError, match=rf"structure 1 has {symbol} \({number}\); the backbone knows H, C, O: choose"):
        collate(graphs, ELEMENTS)


def test_nothing_to_put_together() -> None:
    with pytest.raises(DataError, match="at least one structure, got none"):
        collate([], ELEMENTS)


def test_known_elements_pass() -> None:
    check_elements(np.array([1, 8]), ELEMENTS, "the structure")
