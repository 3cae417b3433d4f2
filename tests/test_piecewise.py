"""Linear layers and reshapes of compiled networks are e3nn's and mace's, piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, borrowed

from conftest import batch_of, ethanol, random_network
from mmea_calc._e3nn import o3
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig
from mmea_calc.fast.arrangement import Stage, arrange, arranged
from mmea_calc.fast.piecewise import LinearByPiece, ReshapeByPiece, remove_pieces, use_pieces
from mmea_calc.mace_bridge import quiet, reshapes


def now() -> Stage:
    return Stage(arrange(batch_of(ethanol()).tensors), {})


def layer(irreps_in: str, irreps_out: str, **options: Any) -> Any:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = o3.Linear(irreps_in, irreps_out, **options).double()
    use_pieces(made)
    return made


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out"),
    [
        ("5x0e", "7x0e"),
        ("4x0e+3x1o+2x2e", "2x0e+5x1o+3x2e"),
        ("4x0e+4x0e+3x1o+2x1o+3x1o+2x2e", "2x0e+5x1o+3x2e"),
        ("4x0e+3x1o+2x2e", "3x1o"),
        ("4x0e+3x1o", "3x1o+2x0e"),
        ("4x0e+3x1o", "2x0e+5x0e+3x1o"),
        ("4x0e+2x0o+3x1o+2x1e", "2x0e+3x0o+5x1o+1x1e"),
    ],
)
def test_values_and_derivatives_are_those_of_the_layer(irreps_in: str, irreps_out: str) -> None:
    linear = layer(irreps_in, irreps_out)
    assert isinstance(linear.__dict__.get("forward"), LinearByPiece)
    x = random(6, linear.irreps_in.dim)
    weight = linear.weight.detach().clone().requires_grad_()
    expected = type(linear).forward(linear, x, weight)
    with arranged(now()):
        found = linear(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    theirs = torch.autograd.grad(expected.square().sum(), (x, weight))
    own = torch.autograd.grad(found.square().sum(), (x, linear.weight))
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out", "options"),
    [
        ("4x0e+3x1o", "2x0e+3x1o", dict(biases=True)),
        ("4x0e+3x1o+4x0e", "2x0e+3x1o", {}),  # one irrep in two pieces
        ("4x0e+4x0e+3x1o", "2x0e+2x0e+3x1o", {}),  # weights of an output are not side by side
        ("4x0e", "2x0e+3x1o", {}),  # an output from nothing
        ("0x0e+4x1o", "3x1o", {}),  # an input of no channels
        ("4x0e+3x1o", "2x0e+3x1o", dict(internal_weights=False, shared_weights=False)),
    ],
)
def test_layers_of_another_form_stay_as_they_are(irreps_in: str, irreps_out: str, options: dict[str, Any]) -> None:
    assert "forward" not in layer(irreps_in, irreps_out, **options).__dict__


def test_weights_given_in_a_call_are_used() -> None:
    linear = layer("4x0e+3x1o", "2x0e+3x1o")
    x, weight = random(6, linear.irreps_in.dim), torch.ones(linear.weight_numel, dtype=torch.float64)
    with arranged(now()):
        torch.testing.assert_close(linear(x, weight), type(linear).forward(linear, x, weight), rtol=0, atol=0)


BLOCKS = ((2, 1), (3, 3))


def test_what_was_joined_is_not_split_again() -> None:
    stage, x = now(), random(6, 11)
    first = stage.split(x, BLOCKS)
    assert [piece.shape for piece in first] == [(6, 1, 2), (6, 3, 3)]
    torch.testing.assert_close(first[1][:, 2, 1], x[:, 2 + 3 * 1 + 2], rtol=0, atol=0)
    assert all(a is b for a, b in zip(stage.split(x, BLOCKS), first, strict=True))
    joined = stage.join(first)
    torch.testing.assert_close(joined, x, rtol=0, atol=0)
    assert all(a is b for a, b in zip(stage.split(joined, BLOCKS), first, strict=True))
    other = stage.split(joined, ((1, 1), (2, 5)))
    torch.testing.assert_close(stage.join(other), x, rtol=0, atol=0)


def test_what_was_changed_in_place_is_split_anew() -> None:
    stage, x = now(), random(6, 11)
    before = stage.split(stage.join(stage.split(x, BLOCKS)), BLOCKS)
    joined = stage.join(before)
    joined += 1
    torch.testing.assert_close(stage.split(joined, BLOCKS)[1], before[1] + 1, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("operation", "known"),
    [
        (lambda x, y: x + y, True),
        (lambda x, y: y - x, True),  # y has not been split before
        (lambda x, y: x / 14.2, True),
        (lambda x, y: 3 * x, True),
        (lambda x, y: x / (y[:, :1] + 2), True),  # one factor for every atom
        (lambda x, y: x * y[0, 0], True),
        (lambda x, y: x * y[:1], False),  # one factor for every component
        (lambda x, y: x.add(y, alpha=2), False),
    ],
)
def test_sums_and_products_are_known_in_pieces(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], known: bool
) -> None:
    stage, x, y = now(), random(6, 11), random(6, 11)
    with arranged(stage):
        result = operation(stage.join(stage.split(x, BLOCKS)), y)
    torch.testing.assert_close(result, operation(x, y), rtol=0, atol=1e-15)
    assert (BLOCKS in stage.pieces_of(result)) is known
    torch.testing.assert_close(stage.join(stage.split(result, BLOCKS)), result, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reshapes_are_maces_on_every_architecture(name: str) -> None:
    with borrowed(name) as network:
        use_pieces(network)
        assert reshapes(network)
        for module in reshapes(network):
            assert isinstance(module.__dict__["forward"], ReshapeByPiece)
            x = random(6, module.irreps.dim)
            with arranged(now()):
                found = module(x)
            torch.testing.assert_close(found, type(module).forward(module, x), rtol=0, atol=0)


def test_elsewhere_the_stock_form_is_called_to_the_bit() -> None:
    network = random_network()
    layers = [m for m in network.modules() if isinstance(m, o3.Linear)]
    x = [random(4, m.irreps_in.dim) for m in layers]
    before = [m(one) for m, one in zip(layers, x, strict=True)]
    use_pieces(network)
    assert all("forward" in m.__dict__ for m in layers)
    assert all(torch.equal(m(one), b) for m, one, b in zip(layers, x, before, strict=True))
    with quiet():
        twin = copy.deepcopy(network)
    for m, original in zip((m for m in twin.modules() if isinstance(m, o3.Linear)), layers, strict=True):
        assert m.__dict__["forward"].stock is m is not original
    remove_pieces(network)
    assert not any("forward" in m.__dict__ for m in (*layers, *reshapes(network)))


def test_layers_whose_weights_are_updated_are_computed_with_the_update() -> None:
    network = random_network()
    use_pieces(network)
    adapter = attach(network, AdapterConfig(method="elora"))
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype))
    updated: list[Any] = [m for m in network.modules() if isinstance(m, o3.Linear)]
    for m in updated:
        x = random(4, m.irreps_in.dim)
        with arranged(now()):
            torch.testing.assert_close(m(x), type(m).forward(m, x), rtol=0, atol=1e-12)
    assert any(torch.nn.utils.parametrize.is_parametrized(m) for m in updated)
