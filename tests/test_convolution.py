"""The fast convolution gives the values and derivatives of mace's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from ase import Atoms
from torch import Tensor, nn

from conftest import batch_of, crystal, ethanol, random_network, randomise, run
from mmea_calc._e3nn import o3
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig
from mmea_calc.fast import convolution
from mmea_calc.fast.convolution import FastConvolution, _Planner, remove_fast_convolution, use_fast_convolution
from mmea_calc.fast.switch import remove_fast_path, use_fast_path
from mmea_calc.graph import Batch
from mmea_calc.mace_bridge import interaction_blocks

F64 = torch.float64


def structures(dtype: torch.dtype = F64) -> Batch:
    """A molecule, a crystal whose atoms have many more neighbours, and an atom alone."""
    return batch_of(ethanol(), crystal(), Atoms("H"), dtype=dtype)


def assert_agree(network: nn.Module, batch: Batch, tolerance: float) -> None:
    remove_fast_convolution(network)
    stock = run(network, batch, compute_stress=True)
    assert use_fast_convolution(network) == {}
    fast = run(network, batch, compute_stress=True)
    for key in ("energy", "forces", "stress"):
        scale = float(stock[key].abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(fast[key], stock[key], rtol=0, atol=tolerance * scale)


def is_fast(network: nn.Module) -> list[bool]:
    return [isinstance(b.conv_tp.__dict__.get("forward"), FastConvolution) for _, b in interaction_blocks(network)]


@pytest.mark.parametrize("slots", [7, 512])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_gives_the_stock_values(name: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "SLOTS", slots)
    with borrowed(name) as network:
        assert_agree(network, structures(), 1e-13)
        assert is_fast(network)
        assert all(is_fast(network))
        assert_agree(network.float(), structures(torch.float32), 1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_of_a_loss_of_forces_is_the_stock_one(name: str) -> None:
    tensors = dict(structures().tensors)

    def gradients(network: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
        output = network({**tensors, "positions": tensors["positions"].clone()}, training=True)
        loss = output["forces"].square().sum() + output["energy"].square().sum()
        return list(torch.autograd.grad(loss, parameters))

    with borrowed(name) as network:
        adapter = attach(network, AdapterConfig(gate_rank=2, low_rank=2))
        randomise(adapter)
        stock = gradients(network, adapter.parameters())
        use_fast_convolution(network)
        fast = gradients(network, adapter.parameters())
    scale = max(float(g.abs().max()) for g in stock)
    assert scale > 1e-3
    for one, other in zip(fast, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * scale)


def layer(network: nn.Module) -> Any:
    """The second block's tensor product, whose features have orders 0 and 1."""
    return interaction_blocks(network)[1][1].conv_tp


def inputs(product: Any, n_nodes: int = 4, n_edges: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    edges = torch.randint(0, n_nodes - 1, (2, n_edges), generator=generator)  # the last node has none
    return (
        normal(n_nodes, product.irreps_in1.dim),
        normal(n_edges, product.irreps_in2.dim),
        normal(n_edges, product.weight_numel),
        edges,
    )


def test_first_and_second_derivatives_by_every_input_are_those_of_finite_differences() -> None:
    product = layer(random_network())
    fast = FastConvolution(product, _Planner())
    *leaves, edges = inputs(product)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call(h: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return fast(h, y, r, edges)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_a_value_that_is_not_finite_stays_with_the_nodes_it_belongs_to() -> None:
    product = layer(random_network())
    fast = FastConvolution(product, _Planner())
    h, y, r, edges = inputs(product)
    expected = fast(h, y, r, edges)
    for edge in range(edges.shape[1]):
        for broken in (y, r):
            kept = broken[edge].clone()
            broken[edge] = torch.nan
            out = fast(h, y, r, edges)
            touched = torch.zeros(len(h), dtype=torch.bool)
            touched[edges[1, edge]] = True
            assert torch.equal(out.isnan().any(1), touched)
            assert torch.equal(out[~touched], expected[~touched])
            broken[edge] = kept


def test_nodes_without_edges_and_no_edges_at_all_give_zeros() -> None:
    product = layer(random_network())
    fast = FastConvolution(product, _Planner())
    h, y, r, edges = inputs(product)
    assert torch.equal(fast(h, y, r, edges)[-1], torch.zeros(product.irreps_out.dim, dtype=F64))
    h.requires_grad_()
    out = fast(h, y[:0], r[:0], edges[:, :0])
    assert torch.equal(out, torch.zeros(len(h), product.irreps_out.dim, dtype=F64))
    (gradient,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(gradient, torch.zeros_like(h))


def test_other_edges_are_seen_whether_the_tensor_is_new_or_changed_in_place() -> None:
    product = layer(random_network())
    fast = FastConvolution(product, _Planner())
    h, y, r, edges = inputs(product)
    before = fast(h, y, r, edges)
    swapped = edges.flip(0).contiguous()
    expected = FastConvolution(product, _Planner())(h, y, r, swapped)
    assert not torch.allclose(expected, before)
    assert torch.equal(fast(h, y, r, swapped), expected)
    edges.copy_(swapped)
    assert torch.equal(fast(h, y, r, edges), expected)


def test_it_serves_each_precision_and_inference_mode() -> None:
    network = random_network()
    expected = run(network, structures())["energy"]
    use_fast_convolution(network)
    with torch.inference_mode():
        torch.testing.assert_close(run(network, structures(), compute_force=False)["energy"], expected)
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 1e-5), (F64, 1e-12)):
        assert_agree(network.to(dtype), structures(dtype), tolerance)


def test_removing_restores_the_stock_modules() -> None:
    network = random_network()
    before = {name: set(module.__dict__) for name, module in network.named_modules()}
    state, stock = list(network.state_dict()), run(network, structures())
    use_fast_path(network)
    use_fast_path(network)  # a second time changes nothing
    assert list(network.state_dict()) == state
    remove_fast_path(network)
    assert {name: set(module.__dict__) for name, module in network.named_modules()} == before
    assert torch.equal(run(network, structures())["forces"], stock["forces"])


# e3nn 0.4 compiles what is copied; torch finds fault with its annotations.
@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")
def test_a_copy_of_a_network_has_its_own() -> None:
    network = random_network()
    use_fast_path(network)
    before = run(network, structures())["forces"]
    other = copy.deepcopy(network)
    assert all(is_fast(other))
    torch.testing.assert_close(run(other, structures())["forces"], before, rtol=0, atol=1e-12)
    remove_fast_path(other)
    assert all(is_fast(network))


def test_a_block_that_is_not_covered_stays_plain_and_is_named() -> None:
    network = random_network()
    name, block = interaction_blocks(network)[0]
    block.conv_tp.irreps_in1 = block.conv_tp.irreps_in1 + o3.Irreps("3x0e")
    with pytest.warns(UserWarning, match=rf"slower form: {name}: its channels are not the same"):
        use_fast_path(network)
    assert is_fast(network) == [False, True]
    assert not hasattr(block, "conv_fusion")
