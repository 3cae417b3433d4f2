"""A gate in its form for inference is the same function as the gate, and sees whatever changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import batch_of, ethanol
from mmea_calc._e3nn import o3
from mmea_calc.fast.arrangement import Stage, arrange, arranged
from mmea_calc.fast.frozen_gates import FrozenGate
from mmea_calc.gates import MagnitudeGate

# e3nn 0.4 scripts its layers when they are built outside of mmea; torch finds fault with its annotations.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")

F64 = torch.float64
# Scalars apart and first, last, between; odd scalars; a block left out; neither head missing, one, or the other.
IRREPS = [
    ("3x0e+2x1o", "3x0e+2x1o"),
    ("2x0e+2x1o+2x0e+1x0o", "2x1o+3x0e+1x0o+2x0e+1x2e"),
    ("4x0e+1x1o", "5x0e"),
    ("4x0e+1x1o", "2x1o+1x2e"),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"phi": "residual"},
    {"saturate": False},
    {"nonlinearity": False},
    {"separate_bottlenecks": True},
    {"shift": False},
    {"gains": "order"},
    {"gains": "none"},
]


def random_gate(irreps_in: str, irreps_out: str, **options: Any) -> tuple[MagnitudeGate, Tensor, Tensor]:
    """A gate that knows a range, and features within it."""
    source = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        layer = o3.Linear(irreps_in, irreps_out).to(F64)
    gate = MagnitudeGate(layer, rank=5, generator=source, **options)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=source, dtype=F64))
    x = torch.randn(7, layer.irreps_in.dim, generator=source, dtype=F64)
    y = torch.randn(7, layer.irreps_out.dim, generator=source, dtype=F64)
    gate.start_recording()
    gate(x, y)
    gate.stop_recording()
    return gate, x, y


def cases() -> list[Any]:
    return [
        pytest.param(i, o, id=f"{number}-{next(iter(o), 'published')}")
        for number, i in enumerate(IRREPS)
        for o in OPTIONS
        if (number, o) not in [(2, {"shift": False}), (3, {"gains": "none"})]  # nothing left to do
    ]


@pytest.mark.parametrize(("irreps", "options"), cases())
def test_results_and_gradients_are_the_gates(irreps: tuple[str, str], options: dict[str, Any]) -> None:
    gate, x, y = random_gate(*irreps, **options)
    frozen = FrozenGate(gate)
    for factor in (1.0, 30.0):  # inside the range seen in training, and far outside
        one, other = (factor * x).requires_grad_(), y.clone().requires_grad_()
        expected, found = gate(one, other), frozen(one, other)
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
        for a, b in zip(gradients(found, weight, one, other), gradients(expected, weight, one, other), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(found, y)


def gradients(result: Tensor, weight: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, inputs, weight, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("factor", [1.0, 30.0])
@pytest.mark.parametrize(("irreps", "options"), cases())
def test_the_forms_of_compiled_networks_are_the_gate(
    irreps: tuple[str, str], options: dict[str, Any], factor: float
) -> None:
    """With its weights trained and frozen: results, their gradients, and the gradients of those."""
    gate, x, y = random_gate(*irreps, **options)
    one, other = (factor * x).requires_grad_(), y.requires_grad_()
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    parameters = list(gate.parameters())

    def derivatives(result: Tensor, *weights: Tensor) -> list[Tensor]:
        inputs = (one, other, *weights)
        first = torch.autograd.grad(
            (result * weight).sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return [result, *first, *gradients(first[0], torch.ones_like(one), *inputs)]

    with arranged(Stage(arrange(batch_of(ethanol()).tensors), {})):
        trained, frozen = gate(one, other), FrozenGate(gate)(one, other)
    for found, weights in ((trained, parameters), (frozen, [])):
        expected = derivatives(gate(one, other), *weights)
        torch.testing.assert_close(derivatives(found, *weights), expected, atol=1e-11, rtol=1e-11)


def test_second_derivatives_are_right() -> None:
    gate, x, y = random_gate(*IRREPS[1])
    frozen = FrozenGate(gate)
    assert torch.autograd.gradgradcheck(frozen, (x.requires_grad_(), y.requires_grad_()))


def test_no_gradient_reaches_the_values() -> None:
    gate, x, y = random_gate(*IRREPS[0])
    result = FrozenGate(gate)(x.requires_grad_(), y)
    result.sum().backward()
    assert all(p.requires_grad and p.grad is None for p in gate.parameters())
    assert x.grad is not None


def test_a_value_changed_in_place_replaced_or_converted_is_seen() -> None:
    gate, x, y = random_gate(*IRREPS[0])
    frozen = FrozenGate(gate)
    frozen(x, y)
    with torch.no_grad():
        assert gate.gain is not None
        gate.gain.weight.mul_(2)
    torch.testing.assert_close(frozen(x, y), gate(x, y), atol=1e-13, rtol=1e-13)
    gate.down.weight.data = -gate.down.weight.data
    torch.testing.assert_close(frozen(x, y), gate(x, y), atol=1e-13, rtol=1e-13)
    gate.float()
    single = frozen(x.float(), y.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, gate(x.float(), y.float()), atol=1e-5, rtol=1e-5)


def test_a_recording_gate_records() -> None:
    gate, x, y = random_gate(*IRREPS[0])
    frozen = FrozenGate(gate)
    gate.start_recording()
    frozen(x, y)
    gate.stop_recording()
    torch.testing.assert_close(gate.z_high, gate.bottleneck(x).amax(0), atol=0, rtol=0)


def test_what_inference_mode_leaves_behind_does_not_enter_a_later_gradient() -> None:
    gate, x, y = random_gate(*IRREPS[0])
    frozen = FrozenGate(gate)
    with torch.inference_mode():
        before = frozen(x, y)
    after = frozen(x.requires_grad_(), y)
    torch.testing.assert_close(after.detach(), before.clone(), atol=1e-13, rtol=1e-13)
    (gradient,) = torch.autograd.grad(after.sum(), x)
    assert torch.isfinite(gradient).all()


def test_a_nan_passes_and_touches_no_other_atom() -> None:
    gate, x, y = random_gate(*IRREPS[1])
    expected = FrozenGate(gate)(x, y)
    x[0] = torch.nan
    found = FrozenGate(gate)(x, y)
    assert torch.isnan(found[0]).any()
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-13, rtol=1e-13)


def test_there_may_be_no_atoms_and_more_dimensions() -> None:
    gate, x, y = random_gate(*IRREPS[0])
    frozen = FrozenGate(gate)
    assert frozen(x[:0], y[:0]).shape == y[:0].shape
    torch.testing.assert_close(frozen(x[None], y[None])[0], gate(x, y), atol=1e-13, rtol=1e-13)
