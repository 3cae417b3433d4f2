"""The magnitude gate: its equations, its symmetry, and how it levels off (arXiv 2511.06696, eqs. 3-8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmea_calc._e3nn import o3
from mmea_calc.gates import MARGIN, MIN_RANGE_WIDTH, MagnitudeGate, reason_not_gatable

# e3nn 0.4 scripts its layers when they are built outside of mmea; torch finds fault with its annotations.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")

F64 = torch.float64


def linear(irreps_in: str, irreps_out: str, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return o3.Linear(irreps_in, irreps_out, **options).double().requires_grad_(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_gate(layer: Any, *, rank: int = 5, std: float = 0.7, **options: Any) -> MagnitudeGate:
    gate = MagnitudeGate(layer, rank=rank, generator=generator(), **options)
    with torch.no_grad():
        for i, parameter in enumerate(gate.parameters()):
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator(i + 1), dtype=F64))
    return gate


def features(irreps: Any, n: int = 7, seed: int = 9) -> Tensor:
    return torch.randn(n, o3.Irreps(irreps).dim, generator=generator(seed), dtype=F64)


def test_a_fresh_gate_is_the_identity_to_the_bit() -> None:
    layer = linear("6x0e + 4x1o + 2x2e", "3x0e + 5x1o + 2x2e")
    x = features(layer.irreps_in)
    for phi in ("exp", "residual"):
        gate = MagnitudeGate(layer, rank=4, phi=phi, generator=generator())
        assert torch.equal(gate(x, layer(x)), layer(x))
        assert bool(gate.down.weight.any())


def test_init_std_spreads_the_shift_head_alone() -> None:
    layer = linear("400x0e + 4x1o", "300x0e + 5x1o")
    gate = MagnitudeGate(layer, rank=16, init_std=0.001, generator=generator())
    assert gate.shift is not None
    assert gate.gain is not None
    assert float(gate.shift.weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    assert not bool(gate.shift.bias.any())
    assert not bool(gate.gain.weight.any())


def test_the_bottleneck_starts_like_a_torch_linear_layer() -> None:
    layer = linear("100x0e", "4x0e")
    weight = MagnitudeGate(layer, rank=64, generator=generator()).down.weight.detach()
    bound = 100**-0.5
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("phi", ["exp", "residual"])
def test_output_follows_the_published_equations(phi: Any) -> None:
    layer = linear("3x0e + 2x1o", "2x0e + 2x1o + 1x2e")
    gate = random_gate(layer, rank=4, phi=phi)
    assert gate.shift is not None
    assert gate.gain is not None
    x = features(layer.irreps_in)
    y = layer(x)
    z = torch.nn.functional.silu(x[:, :3] @ gate.down.weight.T + gate.down.bias)
    shift, g = z @ gate.shift.weight.T + gate.shift.bias, z @ gate.gain.weight.T + gate.gain.bias
    factor = torch.exp(g) if phi == "exp" else 1 + g
    expected = torch.cat(
        [y[:, :2] + shift, y[:, 2:5] * factor[:, :1], y[:, 5:8] * factor[:, 1:2], y[:, 8:] * factor[:, 2:]], dim=1
    )
    torch.testing.assert_close(gate(x, y), expected, rtol=1e-14, atol=1e-14)


def test_every_block_of_even_scalars_feeds_the_gate() -> None:
    layer = linear("3x0e + 2x0e + 2x1o + 2x0o + 4x0e", "2x0e + 1x1o")
    gate = random_gate(layer)
    assert gate.down.in_features == 3 + 2 + 4
    x = features(layer.irreps_in, 1)[0]
    dependence = torch.autograd.functional.jacobian(gate.bottleneck, x).abs().sum(0)
    even = torch.tensor([True] * 5 + [False] * 6 + [False] * 2 + [True] * 4)
    assert torch.equal(dependence > 0, even)


def test_odd_scalars_are_scaled_and_not_shifted() -> None:
    layer = linear("3x0e + 2x0o", "2x0e + 3x0o")
    gate = random_gate(layer)
    assert gate.shift is not None
    assert gate.gain is not None
    assert (gate.shift.out_features, gate.gain.out_features) == (2, 3)
    y = torch.zeros(1, 5, dtype=F64)
    assert not bool(gate(features(layer.irreps_in, 1), y)[:, 2:].any())


def test_heads_without_an_output_are_absent() -> None:
    assert MagnitudeGate(linear("3x0e + 2x1o", "4x0e"), rank=2).gain is None
    assert MagnitudeGate(linear("3x0e + 2x1o", "4x1o"), rank=2).shift is None


@pytest.mark.parametrize("phi", ["exp", "residual"])
@pytest.mark.parametrize("improper", [False, True])
def test_gated_layer_is_equivariant(phi: Any, improper: bool) -> None:
    layer = linear("3x0e + 2x0o + 2x1o + 2x1e + 1x2e + 2x0e", "2x0e + 3x0o + 2x1o + 1x1e + 2x2e + 1x0e")
    gate = random_gate(layer, phi=phi)
    gate.set_range(torch.full((5,), -0.1, dtype=F64), torch.full((5,), 0.2, dtype=F64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        rotation = o3.rand_matrix(dtype=F64)
    rotation = -rotation if improper else rotation
    d_in = o3.Irreps(layer.irreps_in).D_from_matrix(rotation).to(F64)
    d_out = o3.Irreps(layer.irreps_out).D_from_matrix(rotation).to(F64)
    x = features(layer.irreps_in)
    out = gate(x, layer(x))
    turned = gate(x @ d_in.T, layer(x @ d_in.T))
    assert not torch.allclose(out, layer(x), atol=1e-2)
    torch.testing.assert_close(turned, out @ d_out.T, rtol=0, atol=1e-10 * float(out.detach().abs().max()))


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out", "options", "reason"),
    [
        ("2x1o", "3x1o", {}, "no even scalar"),
        ("2x0o + 1x1o", "3x1o", {}, "no even scalar"),
        ("2x0e", "3x0e", dict(internal_weights=False, shared_weights=False), "no weights of its own"),
        ("2x0e", "3x0e", dict(f_in=2, f_out=2), "several features"),
        ("2x0e", "0x0e", {}, "empty"),
    ],
)
def test_a_layer_that_cannot_be_gated_says_why(
    irreps_in: str, irreps_out: str, options: dict[str, Any], reason: str
) -> None:
    layer = linear(irreps_in, irreps_out, **options)
    assert reason in str(reason_not_gatable(layer))
    with pytest.raises(ValueError, match=reason):
        MagnitudeGate(layer, rank=2)


def test_initial_values_come_from_the_generator_alone() -> None:
    layer = linear("6x0e", "3x0e")
    before = torch.random.get_rng_state()
    one, two, other = (MagnitudeGate(layer, rank=4, init_std=0.1, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.down.weight, other.down.weight)


# -- ablations -------------------------------------------------------------------------------------------------------

ABLATIONS: dict[str, dict[str, Any]] = {
    "no nonlinearity": dict(nonlinearity=False),
    "separate bottlenecks": dict(separate_bottlenecks=True),
    "no shift": dict(shift=False),
    "no gains": dict(gains="none"),
    "one gain per order": dict(gains="order"),
    "all at once": dict(nonlinearity=False, separate_bottlenecks=True, gains="order"),
}
# with unlike blocks of one irrep, and irreps of one order with both parities
IN, OUT = "3x0e + 2x1o + 2x0o + 1x1e", "2x0e + 2x1o + 3x0o + 1x1e + 2x1o + 1x0e"


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_an_ablated_gate_starts_as_the_identity_and_is_equivariant(options: dict[str, Any]) -> None:
    layer = linear(IN, OUT)
    x = features(IN)
    assert torch.equal(MagnitudeGate(layer, rank=4, generator=generator(), **options)(x, layer(x)), layer(x))
    gate = random_gate(layer, **options)
    gate.set_range(torch.full_like(gate.z_low, -0.1), torch.full_like(gate.z_high, 0.2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        rotation = -o3.rand_matrix(dtype=F64)
    d_in, d_out = (o3.Irreps(irreps).D_from_matrix(rotation).to(F64) for irreps in (IN, OUT))
    out = gate(x, layer(x))
    assert not torch.allclose(out, layer(x), atol=1e-2)
    torch.testing.assert_close(gate(x @ d_in.T, layer(x @ d_in.T)), out @ d_out.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # m0 = 3 scalars in; k0 = 3 scalars out, k1 = 2 + 3 + 1 + 2 other multiplicities out, of three irreps
        ({}, (3 + 1) * 5 + (5 + 1) * (3 + 8)),
        (ABLATIONS["no nonlinearity"], (3 + 1) * 5 + (5 + 1) * (3 + 8)),
        (ABLATIONS["separate bottlenecks"], 2 * (3 + 1) * 5 + (5 + 1) * (3 + 8)),
        (ABLATIONS["no shift"], (3 + 1) * 5 + (5 + 1) * 8),
        (ABLATIONS["no gains"], (3 + 1) * 5 + (5 + 1) * 3),
        (ABLATIONS["one gain per order"], (3 + 1) * 5 + (5 + 1) * (3 + 3)),
        (dict(separate_bottlenecks=True, shift=False), (3 + 1) * 5 + (5 + 1) * 8),
    ],
)
def test_number_of_parameters_of_an_ablated_gate(options: dict[str, Any], count: int) -> None:
    assert sum(p.numel() for p in MagnitudeGate(linear(IN, OUT), rank=5, **options).parameters()) == count


def test_without_the_nonlinearity_the_bottleneck_is_affine() -> None:
    gate = random_gate(linear(IN, OUT), nonlinearity=False)
    x = features(IN)
    torch.testing.assert_close(gate.bottleneck(x), x[:, :3] @ gate.down.weight.T + gate.down.bias)


def test_each_head_follows_its_own_bottleneck() -> None:
    layer = linear("3x0e + 2x1o", "2x0e + 2x1o")
    gate = random_gate(layer, rank=4, separate_bottlenecks=True)
    assert gate.shift is not None
    assert gate.gain is not None
    assert gate.gain_down is not None
    x = features(layer.irreps_in)
    y, h0 = layer(x), x[:, :3]
    one, two = (torch.nn.functional.silu(down(h0)) for down in (gate.down, gate.gain_down))
    factor = torch.exp(gate.gain(two))
    expected = torch.cat([y[:, :2] + gate.shift(one), y[:, 2:5] * factor[:, :1], y[:, 5:8] * factor[:, 1:]], dim=1)
    torch.testing.assert_close(gate(x, y), expected, rtol=1e-14, atol=1e-14)
    # and one shared bottleneck is the case of two equal ones
    shared = random_gate(layer, rank=4)
    with torch.no_grad():
        for down in (gate.down, gate.gain_down):
            down.load_state_dict(shared.down.state_dict())
        gate.shift.load_state_dict(shared.shift.state_dict())  # type: ignore[union-attr]
        gate.gain.load_state_dict(shared.gain.state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(gate(x, y), shared(x, y), rtol=1e-14, atol=1e-14)


def test_a_missing_head_leaves_its_channels_alone_to_the_bit() -> None:
    layer = linear(IN, OUT)
    x = features(IN)
    y = layer(x)
    even = torch.tensor([True] * 2 + [False] * (6 + 3 + 3 + 6) + [True])
    for options, untouched in ((dict(shift=False), even), (dict(gains="none"), ~even)):
        out = random_gate(layer, **options)(x, y)
        assert torch.equal(out[:, untouched], y[:, untouched])
        assert bool((out[:, ~untouched] != y[:, ~untouched]).all())


def test_one_gain_serves_every_channel_of_an_irrep() -> None:
    layer = linear(IN, OUT)
    x = features(IN)
    y = layer(x)
    ratio = (random_gate(layer, gains="order")(x, y) / y)[:, 2:-1]
    vectors, odd, axial = torch.cat([ratio[:, :6], ratio[:, 12:]], dim=1), ratio[:, 6:9], ratio[:, 9:12]
    for group in (vectors, odd, axial):
        torch.testing.assert_close(group, group[:, :1].expand_as(group), rtol=1e-12, atol=0)
    assert not torch.allclose(vectors[:, 0], odd[:, 0], rtol=1e-3)
    assert not torch.allclose(vectors[:, 0], axial[:, 0], rtol=1e-3)


@pytest.mark.parametrize(("irreps_out", "options"), [("4x0e", dict(shift=False)), ("4x1o + 2x0o", dict(gains="none"))])
def test_a_layer_left_without_a_head_carries_no_gate(irreps_out: str, options: dict[str, Any]) -> None:
    layer = linear("3x0e + 2x1o", irreps_out)
    assert reason_not_gatable(layer) is None
    assert "has nothing that a gate" in str(reason_not_gatable(layer, **options))
    with pytest.raises(ValueError, match="has nothing that a gate"):
        MagnitudeGate(layer, rank=2, **options)


def test_separate_bottlenecks_have_a_range_each_and_level_off_apart() -> None:
    layer = linear("4x0e + 3x1o", "3x0e + 3x1o")
    gate = random_gate(layer, separate_bottlenecks=True)
    free = random_gate(layer, separate_bottlenecks=True, saturate=False)
    assert gate.gain_down is not None
    x = features(layer.irreps_in, 200)
    gate.start_recording()
    gate(x, layer(x))
    gate.stop_recording()
    one, two = (torch.nn.functional.silu(down(x[:, :4])) for down in (gate.down, gate.gain_down))
    assert torch.equal(gate.z_low, torch.cat([one.amin(0), two.amin(0)]))
    assert torch.equal(gate.z_high, torch.cat([one.amax(0), two.amax(0)]))
    assert torch.equal(gate(x, layer(x)), free(x, layer(x)))
    far = 1e3 * x
    assert bool((gate.excess(far) > 1).any())
    z, margin = gate.level_off(gate.bottleneck(far)), MARGIN * (gate.z_high - gate.z_low)
    assert bool((z <= gate.z_high + margin).all())
    assert bool((z >= gate.z_low - margin).all())
    # narrowing the range of the gains leaves the shifts as they are
    before = gate(x, layer(x))
    gate.set_range(gate.z_low, torch.cat([gate.z_high[:5], gate.z_low[5:] + 1e-2]))
    after = gate(x, layer(x))
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])


# -- saturation ------------------------------------------------------------------------------------------------------


def recorded_pair() -> tuple[Any, MagnitudeGate, MagnitudeGate, Tensor]:
    """A layer, a saturating gate with a recorded range, the same gate without saturation, the recorded features."""
    layer = linear("4x0e + 3x1o", "3x0e + 3x1o")
    gate, unbounded = random_gate(layer), random_gate(layer, saturate=False)
    x = features(layer.irreps_in, 200)
    for g in (gate, unbounded):
        g.start_recording()
        g(x[:120], layer(x[:120]))
        g(x[120:], layer(x[120:]))
        g.stop_recording()
    return layer, gate, unbounded, x


def test_recording_keeps_the_range_of_all_that_passed() -> None:
    _, gate, _, x = recorded_pair()
    z = gate.bottleneck(x)
    assert torch.equal(gate.z_low, z.amin(0))
    assert torch.equal(gate.z_high, z.amax(0))
    assert not bool(gate.excess(x).any())
    assert bool((gate.excess(10 * x) >= 0).all())
    assert bool((gate.excess(10 * x) > 1.0).any())


def test_a_gate_that_saw_nothing_stays_unbounded() -> None:
    layer = linear("4x0e", "3x0e")
    gate, unbounded = random_gate(layer), random_gate(layer, saturate=False)
    gate.start_recording()
    gate.stop_recording()
    x = 100 * features(layer.irreps_in)
    assert not gate.calibrated
    assert torch.equal(gate(x, layer(x)), unbounded(x, layer(x)))


def test_inside_the_recorded_range_saturation_changes_no_bit_of_values_or_gradients() -> None:
    layer, gate, unbounded, x = recorded_pair()
    results = []
    for g in (gate, unbounded):
        leaf = x.clone().requires_grad_()
        out = g(leaf, layer(leaf))
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((out, first, second))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_outside_the_recorded_range_the_bottleneck_goes_no_further_than_its_margin() -> None:
    layer, gate, unbounded, x = recorded_pair()
    assert gate.shift is not None
    far = 1e4 * x
    z = gate.level_off(gate.bottleneck(far))
    margin = MARGIN * (gate.z_high - gate.z_low)
    assert bool((z <= gate.z_high + margin).all())
    assert bool((z >= gate.z_low - margin).all())
    shift = (gate(far, layer(far)) - layer(far))[:, :3]
    middle, reach = (gate.z_low + gate.z_high) / 2, (gate.z_high - gate.z_low) / 2 + margin
    centre = middle @ gate.shift.weight.T + gate.shift.bias
    assert bool(((shift - centre).abs() <= reach @ gate.shift.weight.abs().T + 1e-9).all())
    runaway = (unbounded(far, layer(far)) - layer(far))[:, :3]
    assert bool(runaway.abs().max() > 100 * shift.abs().max())


@pytest.mark.parametrize("edge", ["z_low", "z_high"])
def test_levelling_off_is_twice_differentiable_across_the_edge(edge: str) -> None:
    layer = linear("1x0e", "1x0e")
    gate = random_gate(layer, rank=1)
    assert gate.shift is not None
    with torch.no_grad():
        for head in (gate.down, gate.shift):
            head.weight.fill_(1.0)
            head.bias.zero_()
    gate.set_range(torch.tensor([0.5], dtype=F64), torch.tensor([1.5], dtype=F64))
    # the scalar at which z = SiLU(x) meets the edge
    inside = torch.tensor(0.0 if edge == "z_low" else 3.0, dtype=F64)
    at = inside
    for _ in range(60):  # Newton
        s = torch.sigmoid(at)
        at = at - (at * s - float(getattr(gate, edge))) / (s * (1 + at * (1 - s)))

    def derivatives(x: Tensor) -> tuple[float, float, float]:
        leaf = x.detach().reshape(1, 1).requires_grad_()
        value = gate(leaf, torch.zeros_like(leaf)).sum()
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
        return float(value.detach()), float(first.detach()), float(second)

    below, above = derivatives(at - 1e-7), derivatives(at + 1e-7)
    for one, other in zip(below, above, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    # and it does bend further out, so the edge was really crossed
    outside = at - 0.4 if edge == "z_low" else at + 0.8
    unbounded = outside * torch.sigmoid(outside)
    assert abs(derivatives(outside)[0] - float(unbounded)) > 1e-3


def test_a_component_that_never_moved_still_levels_off_smoothly() -> None:
    layer = linear("1x0e", "1x0e")
    gate = random_gate(layer, rank=1)
    gate.set_range(torch.tensor([0.3], dtype=F64), torch.tensor([0.3], dtype=F64))
    z = gate.level_off(torch.tensor([[-50.0], [0.3], [50.0]], dtype=F64)).flatten()
    margin = MARGIN * MIN_RANGE_WIDTH
    torch.testing.assert_close(z, torch.tensor([0.3 - margin, 0.3, 0.3 + margin], dtype=F64), rtol=0, atol=1e-12)


def test_leaving_z_alone_inside_its_range_is_levelling_it_off_to_the_last_bit() -> None:
    gate = MagnitudeGate(o3.Linear("3x0e", "3x0e").double(), rank=2)
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gate.set_range(z.detach().amin(0), z.detach().amax(0))
    far = torch.full((1, 2), 100.0, dtype=torch.float64)
    inside = gate.level_off(z)
    with_another = gate.level_off(torch.cat([z, far]))  # one row outside: all are computed
    assert inside is z
    assert torch.equal(with_another[:5], z)
    (slope,) = torch.autograd.grad(with_another[:5].sum(), z, create_graph=True)
    assert torch.equal(slope, torch.ones_like(z))
    assert float(with_another[5].detach().max()) < 100
