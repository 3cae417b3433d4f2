"""Radial functions as splines: as accurate as rounding, smooth, and of the weights that are there."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from test_compiled import inputs_of

from conftest import batch_of, ethanol, random_network, randomise
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig
from mmea_calc.fast import radial_table
from mmea_calc.fast.pair_radial import PairRadial, radial_forms
from mmea_calc.fast.switch import remove_fast_path, use_fast_path
from mmea_calc.fast.tracing import evaluator
from mmea_calc.mace_bridge import radial_networks

R_MAX = 4.5


def waves(r: torch.Tensor) -> torch.Tensor:
    """Functions as they are in networks: some waves within the cutoff, one of them with a steep wall."""
    r = r.unsqueeze(1)
    k = torch.arange(1, 9, dtype=torch.float64) * torch.pi / R_MAX
    return torch.cat([torch.sin(k * r), torch.exp(-3 * r) * torch.cos(k * r)], dim=1)


def values_of(u: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return radial_table.evaluate(u, coefficients, coefficients.new_tensor(len(coefficients) - radial_table.DEGREE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_splines_are_the_functions_to_rounding_and_their_derivatives_nearly(dtype: torch.dtype) -> None:
    coefficients = radial_table.fit(waves, R_MAX, dtype)
    assert coefficients is not None
    n = len(coefficients) - radial_table.DEGREE
    r = torch.linspace(0.0, R_MAX, 7919, dtype=torch.float64)
    u = (r * n / R_MAX).requires_grad_()
    found = values_of(u, coefficients)
    torch.testing.assert_close(found.detach(), waves(r), rtol=0, atol=2 * radial_table.ACCURACY[dtype])
    exact = r.clone().requires_grad_()
    (expected,) = torch.autograd.grad(waves(exact).sum(), exact)
    (slope,) = torch.autograd.grad(found.sum(), u)
    # At the end of the last interval there are two slopes.
    torch.testing.assert_close(
        slope[:-1] * n / R_MAX, expected[:-1], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-10
    )


def test_derivatives_of_any_order_are_those_of_the_polynomials() -> None:
    coefficients = radial_table.fit(waves, R_MAX, torch.float32)
    assert coefficients is not None
    u = torch.tensor([0.3, 17.9, 100.0, 511.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: values_of(x, coefficients), u)
    assert torch.autograd.gradgradcheck(lambda x: values_of(x, coefficients), u)


def test_a_spline_of_the_highest_power_is_exact() -> None:
    """Of degree five, so that five powers can be told apart from six."""
    coefficients = radial_table.fit(lambda r: (r / R_MAX).unsqueeze(1) ** torch.arange(6), R_MAX, torch.float64)
    assert coefficients is not None
    x = torch.tensor([0.1234, 0.5, 0.98765], dtype=torch.float64)
    found = values_of(x * (len(coefficients) - radial_table.DEGREE), coefficients)
    torch.testing.assert_close(found, x.unsqueeze(1) ** torch.arange(6), rtol=0, atol=1e-13)


def test_beyond_the_cutoff_functions_stay_as_they_are_there() -> None:
    coefficients = radial_table.fit(waves, R_MAX, torch.float64)
    assert coefficients is not None
    n = len(coefficients) - radial_table.DEGREE
    u = torch.tensor([n, n + 0.5, 7.0 * n], dtype=torch.float64, requires_grad=True)
    found = values_of(u, coefficients)
    torch.testing.assert_close(found[1:].detach(), found[:1].detach().expand(2, -1), rtol=0, atol=0)
    (slope,) = torch.autograd.grad(found[1:].sum(), u)
    assert not slope.any()


def test_what_is_no_number_stays_none() -> None:
    coefficients = radial_table.fit(waves, R_MAX, torch.float32)
    assert coefficients is not None
    assert values_of(torch.tensor([torch.nan], dtype=torch.float64), coefficients).isnan().all()


def test_functions_that_are_too_steep_or_not_finite_are_refused() -> None:
    assert radial_table.fit(lambda r: (r > 2).double().unsqueeze(1), R_MAX, torch.float32) is None
    assert radial_table.fit(lambda r: torch.full((len(r), 1), torch.nan, dtype=r.dtype), R_MAX, torch.float32) is None


def test_finer_functions_get_more_intervals() -> None:
    wide = radial_table.fit(waves, R_MAX, torch.float32)
    fine = radial_table.fit(lambda r: torch.sin(60 * r).unsqueeze(1), R_MAX, torch.float32)
    assert wide is not None
    assert fine is not None
    assert len(fine) > len(wide)


def fast_network() -> torch.nn.Module:
    network = random_network()
    use_fast_path(network)
    return network


def test_a_network_that_is_not_trained_calls_no_radial_mlp() -> None:
    network, called = fast_network(), list[int]()
    for module, _ in radial_networks(network):
        first = next(child for child in module.modules() if child is not module)
        first.register_forward_pre_hook(lambda _, inputs: called.append(len(inputs[0])))
    batch = batch_of(ethanol())
    inputs = inputs_of(network, batch)
    called.clear()  # of the fit
    evaluator(network, inputs, 0)(*inputs.tensors())
    assert not called


def test_a_table_is_of_the_weights_that_are_there() -> None:
    network = fast_network()
    form = radial_forms(network)[0]
    before = form.table()
    assert form.table() is before
    with torch.no_grad():
        next(form.stock.parameters()).mul_(1.5)
    after = form.table()
    assert before is not None
    assert after is not None
    assert not torch.equal(before[0], after[0])
    batch = batch_of(ethanol())
    own = network(batch.tensors, compute_force=False)["node_energy"]
    inputs = inputs_of(network, batch)
    torch.testing.assert_close(evaluator(network, inputs, 0)(*inputs.tensors())[0], own.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["full", "mmea", "sparse"])
def test_a_table_follows_an_adapter_on_the_mlp(method: Any) -> None:
    network = fast_network()
    batch = batch_of(ethanol())

    def of_network() -> tuple[torch.Tensor, torch.Tensor]:
        own = network(batch.tensors, compute_force=False)["node_energy"].detach()
        inputs = inputs_of(network, batch)
        return own, evaluator(network, inputs, 0)(*inputs.tensors())[0]

    bare, bare_by_table = of_network()
    adapter = attach(network, AdapterConfig(method=method))
    randomise(adapter, std=0.02)
    adapter.merge()
    own, by_table = of_network()
    adapter.unmerge()
    adapter.detach()
    again, again_by_table = of_network()
    assert float((own - bare).abs().max()) > 1e-4
    for found, expected in ((bare_by_table, bare), (by_table, own), (again_by_table, again), (again, bare)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_copy_has_tables_of_its_own() -> None:
    network = fast_network()
    before = radial_forms(network)[0].table()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's of annotations in mace
        other = copy.deepcopy(network)
    with torch.no_grad():
        next(radial_forms(other)[0].stock.parameters()).mul_(1.5)
    changed = radial_forms(other)[0].table()
    kept = radial_forms(network)[0].table()
    assert before is not None
    assert changed is not None
    assert kept is before
    assert not torch.equal(changed[0], before[0])


def test_the_forms_come_off() -> None:
    network = fast_network()
    assert radial_forms(network)
    remove_fast_path(network)
    assert not radial_forms(network)
    assert not any(isinstance(module.__dict__.get("forward"), PairRadial) for module in network.modules())
    assert "forward" not in network.get_submodule("radial_embedding").__dict__
