"""The readouts of recorded and compiled networks with several heads are mace's, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from torch import nn

from conftest import batch_of, crystal, ethanol, random_network
from mmea_calc.fast.arrangement import Stage, arrange, arranged
from mmea_calc.fast.head_mask import HeadedReadout, remove_head_masks, use_head_masks
from mmea_calc.mace_bridge import headed_readouts, quiet


def headed(readout: str) -> nn.Module:
    return random_network(**ARCHITECTURES["heads"], readout_cls=readout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("readout", ["NonLinearReadoutBlock", "NonLinearBiasReadoutBlock"])
def test_values_and_gradients_are_maces_for_every_head(readout: str, dtype: torch.dtype) -> None:
    network = headed(readout).to(dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    now = Stage(arrange(batch_of(ethanol(), crystal()).tensors), {})
    (block,) = headed_readouts(network)
    use_head_masks(network)
    assert isinstance(block.__dict__["forward"], HeadedReadout)
    x = torch.randn(6, block.linear_1.irreps_in.dim, dtype=dtype, requires_grad=True)
    for heads in ([0] * 6, [1] * 6, [0, 1, 1, 0, 1, 0]):
        of = torch.tensor(heads)
        expected = type(block).forward(block, x, of)
        with arranged(now):
            found = block(x, of)
        assert found.shape == (6, 2)
        assert torch.equal(found, expected)
        # of a mask that leaves all of one head's channels
        other = type(block).forward(block, x, 1 - of)
        assert not torch.equal(found, other)
        of_them, own = (torch.autograd.grad(y.square().sum(), x)[0] for y in (expected, found))
        assert torch.equal(own, of_them)


def test_elsewhere_and_for_one_head_the_stock_form_is_called() -> None:
    network = headed("NonLinearReadoutBlock")
    (block,) = headed_readouts(network)
    x, of = torch.randn(5, block.linear_1.irreps_in.dim, dtype=torch.float64), torch.ones(5, dtype=torch.int64)
    before = block(x, of), block(x)
    use_head_masks(network)
    assert all(torch.equal(a, b) for a, b in zip((block(x, of), block(x)), before, strict=True))
    with quiet():
        twin = copy.deepcopy(network)
    copied: Any = headed_readouts(twin)[0]
    assert copied.__dict__["forward"].stock is copied is not block
    remove_head_masks(network)
    assert "forward" not in block.__dict__
    with borrowed("agnostic") as one:
        assert headed_readouts(one) == []
