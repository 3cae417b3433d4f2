"""Edges of one number for every atom, filled up with what weighs nothing, give what the edges alone give."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from ase import Atoms
from ase.build import molecule
from test_compiled import adapted, assert_the_same
from waiting import Watching

from conftest import batch_of, crystal, ethanol
from mmea_calc.fast.arrangement import arrange_elements
from mmea_calc.fast.full_table import FullTable, width_of
from mmea_calc.fast.tracing import Inputs, evaluator, tables_of
from mmea_calc.graph import Batch

R_MAX, SKIN, SPARE = 4.0, 1.0, 3

SETS = {"molecule": (ethanol(),), "crystal": (crystal(),), "mixed": (ethanol(), crystal(), molecule("CH3COOH"))}


def table_of(batch: Batch, spare: int = SPARE) -> FullTable:
    index = batch.tensors["edge_index"]
    return FullTable.of(index, batch.n_atoms, width_of(index, batch.n_atoms) + spare)


def filled(batch: Batch, table: FullTable) -> dict[str, torch.Tensor]:
    """The tensors of a batch with the edges of its table."""
    kept = {name: batch.tensors[name][table.pair].masked_fill(table.filling, 0) for name in ("shifts", "unit_shifts")}
    kept["shifts"] = kept["shifts"] + table.far(R_MAX).to(kept["shifts"])
    return {**batch.tensors, **kept, "edge_index": table.index}


def inputs_of(
    network: torch.nn.Module, structures: tuple[Atoms, ...], *, compiled: bool = True
) -> tuple[Inputs, Batch]:
    """Inputs with all pairs within the cutoff and a skin, filled up, and the batch of the pairs within the cutoff."""
    wide = batch_of(*structures, r_max=R_MAX + SKIN)
    table = table_of(wide)
    elements = arrange_elements(wide.tensors["node_attrs"])
    tables = tables_of(network, elements[1], compiled=compiled, frozen=True)
    tensors = filled(wide, table)
    inputs = Inputs.of(
        Batch(tensors, wide.numbers, wide.atoms_per_graph), table.arrangement(elements), tables, stress=True
    )
    return inputs, batch_of(*structures)


def test_every_atom_has_as_many_edges_and_those_given_are_among_them() -> None:
    batch = batch_of(*SETS["mixed"])
    table = table_of(batch)
    n, edges = batch.n_atoms, batch.tensors["edge_index"]
    assert torch.equal(torch.bincount(table.index[1], minlength=n), torch.full((n,), table.width))
    assert torch.equal(torch.bincount(table.index[0], minlength=n), torch.full((n,), table.width))
    own = ~table.filling.squeeze(1)
    assert torch.equal(table.pair[own].sort().values, torch.arange(edges.shape[1]))
    assert torch.equal(table.index[:, own], edges[:, table.pair[own]])
    assert torch.equal(table.index[0, ~own], table.index[1, ~own])
    assert torch.equal(table.index[0][table.sent], torch.arange(n).expand(table.width, n))


def test_a_table_takes_the_edges_of_another_where_it_is() -> None:
    one, other = (table_of(batch_of(atoms), 0) for atoms in (ethanol(), ethanol()))
    moved = ethanol()
    moved.rattle(0.8, seed=1)
    batch = batch_of(moved)
    other = FullTable.of(batch.tensors["edge_index"], batch.n_atoms, one.width)
    before = one.index.data_ptr()
    assert not torch.equal(one.index, other.index)
    one.take(other)
    assert one.index.data_ptr() == before
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("index", "pair", "filling", "sent"))


# Its radial MLPs have biases, and by default nothing of mace ends what they give at the cutoff: energies jump there.
UNENDING = "nonlinear"


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != UNENDING])
def test_a_full_table_with_a_skin_gives_the_networks_values(name: str, compiled: bool) -> None:
    with adapted(name) as network:
        for structures in SETS.values():
            inputs, batch = inputs_of(network, structures, compiled=compiled)
            found = evaluator(network, inputs, 0, compiled=compiled)(*inputs.tensors())
            assert_the_same(found, batch, network, 1e-12)


def test_a_network_in_which_far_pairs_weigh_something_shows() -> None:
    with adapted(UNENDING) as network:
        inputs, batch = inputs_of(network, SETS["molecule"])
        with pytest.raises(AssertionError, match="not close"):
            assert_the_same(evaluator(network, inputs, 0)(*inputs.tensors()), batch, network, 1e-12)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_in_a_call_waits_for_the_device(name: str, compiled: bool) -> None:
    """What a CUDA graph could not hold."""
    with adapted(name) as network:
        inputs, _ = inputs_of(network, SETS["mixed"], compiled=compiled)
        evaluate = evaluator(network, inputs, 0, compiled=compiled)
        evaluate(*inputs.tensors())
        with Watching() as watching:
            evaluate(*inputs.tensors())
        assert watching.found == set()
        with Watching() as watching:  # and it would be noticed
            bool(torch.tensor([1.0]).nonzero().any())
        assert {"lift_fresh", "nonzero"} <= watching.found
