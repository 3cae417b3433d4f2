"""The self-connections of compiled networks are mace's, element by element."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from ase import Atoms

from conftest import batch_of, crystal, ethanol, random_network
from mmea_calc.fast.arrangement import Stage, arrange, arranged
from mmea_calc.fast.self_connection import SelfConnection, remove_self_connections, use_self_connections
from mmea_calc.mace_bridge import interaction_blocks, quiet

STRUCTURES = {
    "three elements": (ethanol(), crystal()),
    "one element": (Atoms("CC", positions=[[0, 0, 0], [0, 0, 1.4]]),),
}


def connections(network: torch.nn.Module) -> list[Any]:
    return [block.skip_tp for _, block in interaction_blocks(network)]


@pytest.mark.parametrize("structures", STRUCTURES)
@pytest.mark.parametrize("name", ["agnostic", "L=2"])
def test_values_and_derivatives_are_those_of_the_tensor_product(name: str, structures: str) -> None:
    tensors = batch_of(*STRUCTURES[structures]).tensors
    attrs, now = tensors["node_attrs"], Stage(arrange(tensors), {})
    with borrowed(name) as network:
        use_self_connections(network)
        for product in connections(network):
            form = product.__dict__["forward"]
            assert isinstance(form, SelfConnection)
            weight = product.weight.detach().clone().requires_grad_()
            x = torch.randn(
                len(attrs),
                product.irreps_in1.dim,
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float64,
                requires_grad=True,
            )
            expected = type(product).forward(product, x, attrs, weight)
            product.weight.requires_grad_()
            with arranged(now):
                found = product(x, attrs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
            of_them = torch.autograd.grad(expected.square().sum(), (x, weight), create_graph=True)
            own = torch.autograd.grad(found.square().sum(), (x, product.weight), create_graph=True)
            for one, other in zip(own, of_them, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
            (again,) = torch.autograd.grad(own[0].square().sum(), x)
            (theirs,) = torch.autograd.grad(of_them[0].square().sum(), x)
            torch.testing.assert_close(again, theirs, rtol=0, atol=1e-10)


def test_elsewhere_the_stock_form_is_called_to_the_bit() -> None:
    network = random_network()
    attrs = batch_of(ethanol()).tensors["node_attrs"]
    x = [torch.randn(len(attrs), p.irreps_in1.dim, dtype=torch.float64) for p in connections(network)]
    before = [p(one, attrs) for p, one in zip(connections(network), x, strict=True)]
    use_self_connections(network)
    assert all(torch.equal(p(o, attrs), b) for p, o, b in zip(connections(network), x, before, strict=True))
    with quiet():
        twin = copy.deepcopy(network)
    for product, original in zip(connections(twin), connections(network), strict=True):
        assert product.__dict__["forward"].stock is product is not original
    remove_self_connections(network)
    assert not any("forward" in product.__dict__ for product in connections(network))


def test_what_is_no_product_with_an_element_is_left_alone() -> None:
    with borrowed("nonlinear") as network:
        use_self_connections(network)
        assert not any("forward" in product.__dict__ for product in connections(network))
    for name in set(ARCHITECTURES) - {"nonlinear"}:
        with borrowed(name) as network:
            use_self_connections(network)
            assert all("forward" in product.__dict__ for product in connections(network)), name
            remove_self_connections(network)
