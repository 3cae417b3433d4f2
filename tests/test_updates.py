"""Weight updates: W + (alpha / r) A B block by block, and dense ones."""

from __future__ import annotations

import pytest
import torch

from mmea_calc._e3nn import o3
from mmea_calc.config import AdapterConfig
from mmea_calc.methods import find_sites, low_rank
from mmea_calc.updates import Block, Dense, LowRank

# e3nn 0.4 scripts its layers when they are built outside of mmea; torch finds fault with its annotations.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(update: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(update.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(i), dtype=F64))


def test_an_update_starts_as_the_identity() -> None:
    weight = torch.randn(6 * 4, generator=generator(), dtype=F64)
    for update in (LowRank(weight, [Block((6,), 4)], rank=2, alpha=3.0, generator=generator()), Dense(weight)):
        assert torch.equal(update(weight), weight)


def test_low_rank_update_is_the_scaled_product_of_its_factors_for_every_block() -> None:
    weight = torch.randn(6 * 4 + 3 * 2, generator=generator(), dtype=F64)
    update = LowRank(weight, [Block((6,), 4), Block((3,), 2)], rank=2, alpha=5.0, generator=generator())
    randomise(update)
    first, second = (2.5 * a @ b for a, b in zip(update.A, update.B, strict=True))
    expected = weight + torch.cat([first.flatten(), second.flatten()])
    torch.testing.assert_close(update(weight), expected, rtol=1e-14, atol=0)


def test_elements_of_a_contraction_share_their_second_factor() -> None:
    weight = torch.zeros(3, 5, 7, dtype=F64)  # elements, paths, channels
    update = LowRank(weight, [Block((3, 5), 7, std=0.2)], rank=2, alpha=2.0, generator=generator())
    randomise(update)
    assert [tuple(p.shape) for p in update.parameters()] == [(3, 5, 2), (2, 7)]
    expected = torch.einsum("epr,rc->epc", update.A[0], update.B[0])
    torch.testing.assert_close(update.change(), expected, rtol=1e-13, atol=1e-14)


def test_the_first_factor_is_normal_with_the_spread_of_its_block_and_the_second_zero() -> None:
    weight = torch.zeros(200 * 50 + 200 * 50, dtype=F64)
    update = LowRank(
        weight, [Block((200,), 50), Block((200,), 50, std=0.1)], rank=16, alpha=16.0, generator=generator()
    )
    assert float(update.A[0].detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(update.A[1].detach().std()) == pytest.approx(0.1, rel=0.05)
    assert not any(bool(b.any()) for b in update.B)


def test_a_switched_off_update_returns_the_very_tensor() -> None:
    weight = torch.ones(4, dtype=F64)
    update = Dense(weight)
    randomise(update)
    update.active = False
    assert update(weight) is weight
    update.active = True
    assert not torch.equal(update(weight), weight)


def test_a_dense_update_moves_every_entry_freely() -> None:
    weight = torch.ones(2, 3, dtype=F64)
    update = Dense(weight)
    randomise(update)
    assert torch.equal(update(weight), weight + update.D)


def test_values_take_the_precision_of_the_weight() -> None:
    weight = torch.ones(4, dtype=torch.float32)
    for update in (LowRank(weight, [Block((2,), 2)], rank=1, alpha=1.0, generator=generator()), Dense(weight)):
        assert {p.dtype for p in update.parameters()} == {torch.float32}


def test_irreps_left_apart_at_the_input_of_a_linear_layer_share_one_low_rank_matrix() -> None:
    layer = o3.Linear("2x0e + 3x0e + 2x1o", "4x0e + 2x1o").double()
    (site,) = find_sites(layer)
    assert [(b.rows, b.columns) for b in site.blocks] == [((5,), 4), ((2,), 2)]
    update = low_rank(site, AdapterConfig(low_rank=1), generator())
    randomise(update)
    change = update.change()
    stacked = change[: 5 * 4].view(5, 4)
    assert int(torch.linalg.matrix_rank(stacked)) == 1
    # the layer reads its flat weight in the same order
    views = list(layer.weight_views(change))
    assert torch.equal(torch.cat([views[0], views[1]]), stacked)


def test_low_rank_update_of_a_linear_layer_equals_that_of_its_simplified_twin() -> None:
    x = torch.randn(5, 11, generator=generator(), dtype=F64)
    outputs = []
    for irreps_in in ("2x0e + 3x0e + 2x1o", "5x0e + 2x1o"):
        layer = o3.Linear(irreps_in, "4x0e + 2x1o").double()
        (site,) = find_sites(layer)
        update = low_rank(site, AdapterConfig(low_rank=2), generator())
        randomise(update)
        outputs.append(layer(x, update.change()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


def test_paths_of_a_tensor_product_are_matrices_of_both_inputs_by_output() -> None:
    product = o3.FullyConnectedTensorProduct("3x0e + 2x1o", "4x0e", "5x0e + 2x1o").double()
    (site,) = find_sites(product)
    assert site.kind == "tensor_product"
    assert [(b.rows, b.columns) for b in site.blocks] == [((12,), 5), ((8,), 2)]
    assert sum(b.rows[0] * b.columns for b in site.blocks) == product.weight.numel()
