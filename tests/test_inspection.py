"""What `inspect` says of an adapter is what the adapter does; the picture is drawn for every method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import borrowed
from ase import Atoms
from ase.io import write
from test_finetuning import tiny_backbone
from test_folding import trained
from torch import nn
from typer.testing import CliRunner

from conftest import ethanol, randomise
from mmea_calc import AdapterConfig, attach
from mmea_calc.adapted import Adapter
from mmea_calc.errors import AdapterError, DataError
from mmea_calc.inspection import gate_activity, inspect, weight_changes
from mmea_calc.inspection_picture import draw
from mmea_calc.mace_bridge import convolution_paths
from mmea_calc.potential import Potential
from mmea_calc.sparsity import sparsity
from mmea_cli.main import app


@pytest.fixture
def network() -> Iterator[nn.Module]:
    with borrowed("agnostic") as found:
        yield found


@pytest.fixture(scope="module")
def potential() -> Potential:
    return Potential(tiny_backbone())


@pytest.fixture(autouse=True)
def _bare(potential: Potential) -> Iterator[None]:
    yield
    potential.use(None)


def adapted(potential: Potential, **settings: object) -> Adapter:
    config = AdapterConfig(**{"gate_rank": 2, "low_rank": 2, **settings})  # type: ignore[arg-type]
    potential.adapter = attach(potential.backbone.network, config)
    randomise(potential.adapter)
    return potential.adapter


def molecules() -> list[Atoms]:
    moved = ethanol()
    moved.rattle(0.1, seed=8)
    return [ethanol(), moved]


# Weights


@pytest.mark.parametrize("method", ["elora", "full", "sparse", "scratch", "mmea"])
@pytest.mark.parametrize("merged", [False, True])
def test_changes_of_weights_are_those_that_the_network_has(network: nn.Module, method: str, merged: bool) -> None:
    before = {name: p.detach().clone() for name, p in network.state_dict().items()}
    adapter = attach(network, AdapterConfig(method=method, low_rank=2, gate_rank=2))
    randomise(adapter, std=0.01)
    if merged:
        adapter.merge()
    found = {c.tensor: c for c in weight_changes(adapter)}
    adapter.merge()
    assert set(found) == set(adapter.updates)
    for path, change in found.items():
        difference = adapter.sites[path].value.detach() - before[path]
        total = change.total
        assert total.entries == difference.numel()
        assert total.rms_change == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-9)
        assert total.rms_weight == pytest.approx(float(before[path].square().mean().sqrt()), rel=1e-9)
        assert total.changed == int((difference.abs() > 1e-14).sum())
        assert total.entries == sum(p.entries for p in change.by_order().values())


def test_survivors_of_a_sparse_adapter_are_those_that_its_sparsity_counts(network: nn.Module) -> None:
    adapter = attach(network, AdapterConfig(method="sparse"))
    with torch.no_grad():
        for number, update in enumerate(adapter.updates.values()):
            dict(update.named_parameters())["tau"].fill_(-5.0 + 0.1 * number)
    totals = [c.total for c in weight_changes(adapter)]
    expected = sparsity(adapter)
    assert 0 < expected.n_changed < expected.n_entries
    assert sum(t.changed for t in totals) == expected.n_changed
    assert sum(t.entries for t in totals) == expected.n_entries


def test_a_change_of_one_path_is_reported_for_that_path_alone(network: nn.Module) -> None:
    linear, radial = "interactions.1.linear.weight", "interactions.1.conv_tp_weights.layer2.weight"
    orders = [label for label, _, _ in convolution_paths(network)[radial]]
    widths = [width for _, _, width in convolution_paths(network)[radial]]
    assert sum(widths) == network.get_parameter(radial).shape[1]
    adapter = attach(network, AdapterConfig(method="full"))
    chosen = orders.index("1o x 1o -> 2e")
    with torch.no_grad():
        delta = dict(adapter.updates[linear].named_parameters())["D"]
        delta[: 4 * 4] = 0.5
        columns = dict(adapter.updates[radial].named_parameters())["D"]
        columns[:, sum(widths[:chosen]) : sum(widths[: chosen + 1])] = -0.25
    for change in weight_changes(adapter):
        moved = {p.path: p for p in change.paths if p.changed}
        if change.tensor == radial:
            assert set(moved) == {"1o x 1o -> 2e"}
            (path,) = moved.values()
            assert (path.order, path.changed, path.rms_change) == (2, path.entries, 0.25)
        elif change.tensor == linear:
            assert set(moved) == {"0e -> 0e"}
            assert change.by_order()[1].changed == 0
            assert moved["0e -> 0e"].changed == 16
        else:
            assert not moved


# Gates


@pytest.mark.parametrize("phi", ["exp", "residual"])
def test_gains_and_shifts_are_the_means_of_what_the_gates_compute(potential: Potential, phi: str) -> None:
    adapter = adapted(potential, method="gates", phi=phi)
    shifts: dict[str, list[torch.Tensor]] = {}
    gains: dict[str, list[torch.Tensor]] = {}
    for name, gate in adapter.gates.items():
        for layer, record in ((gate.shift, shifts), (gate.gain, gains)):
            if layer is not None:
                keep = record.setdefault(name, [])
                layer.register_forward_hook(lambda m, i, o, keep=keep: keep.append(o.detach()))
    found = gate_activity(potential, [potential.graph(a) for a in molecules()], batch_size=1)
    assert [g.layer for g in found] == list(adapter.gates)
    for activity in found:
        if activity.shift.size:
            np.testing.assert_allclose(activity.shift, torch.cat(shifts[activity.layer]).mean(0).numpy(), atol=1e-12)
            assert activity.scalar_rms is not None
        if activity.gains:
            g = torch.cat(gains[activity.layer])
            factors = torch.exp(g) if phi == "exp" else 1 + g
            together = np.concatenate(list(activity.gains.values()))
            np.testing.assert_allclose(together, factors.mean(0).numpy(), rtol=1e-9)
            spread = np.concatenate(list(activity.gain_spreads.values()))
            np.testing.assert_allclose(spread, factors.std(0, correction=0).numpy(), rtol=1e-6, atol=1e-9)
    assert {tuple(g.gains) for g in found} == {(), ("1o",), ("1o", "2e")}


def test_gates_that_do_nothing_have_gain_one_and_shift_zero(potential: Potential) -> None:
    potential.adapter = attach(potential.backbone.network, AdapterConfig(method="gates", gate_rank=2))
    for gate in inspect(potential, molecules()).gates:
        assert not gate.shift.any()
        for gains in gate.gains.values():
            np.testing.assert_allclose(gains, 1, rtol=1e-14)


def test_features_that_are_zero_everywhere_have_no_gain(potential: Potential) -> None:
    adapted(potential, method="gates")
    gates = {g.layer: g for g in inspect(potential, [Atoms("C")]).gates}
    assert np.isnan(gates["interactions.1.linear_up"].gains["1o"]).all()
    assert json.dumps(inspect(potential, [Atoms("C")]).to_dict())


def test_gates_without_structures_and_strange_ones_are_refused(potential: Potential) -> None:
    with pytest.raises(AdapterError, match="there is no adapter"):
        inspect(potential)
    adapter = adapted(potential, method="mmea")
    with pytest.raises(DataError, match=r"give structures to measure them on"):
        inspect(potential)
    with pytest.raises(DataError, match=r"structure 1 has Xe"):
        inspect(potential, [ethanol(), Atoms("Xe")])
    with adapter.disabled(), pytest.raises(AdapterError, match="switched off"):
        inspect(potential, [ethanol()])
    adapter.merge()
    with pytest.raises(AdapterError, match="merged"):
        inspect(potential, [ethanol()])
    adapter.detach()
    adapted(potential, method="bottleneck")
    with pytest.raises(AdapterError, match="method 'bottleneck' has neither"):
        inspect(potential, [ethanol()])


def test_looking_leaves_the_adapter_as_it_was(potential: Potential) -> None:
    adapter = adapted(potential, method="mmea")
    before = adapter.state_dict()
    inspect(potential, molecules())
    assert adapter.enabled
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())
    assert not any(gate._forward_hooks for gate in adapter.gates.values())


# Picture and command


@pytest.mark.parametrize(("method", "panels"), [("gates", 1), ("elora", 1), ("sparse", 2), ("mmea", 2), ("readout", 1)])
def test_the_picture_has_a_part_for_each_thing_there_is_to_see(
    potential: Potential, tmp_path: Path, method: str, panels: int
) -> None:
    import matplotlib.image

    adapted(potential, method=method)
    path = draw(inspect(potential, molecules()), tmp_path / "a.png", title="title [1]")
    height, width, _ = matplotlib.image.imread(path).shape
    assert width == panels * 8 * 150
    assert height > 300


def test_the_command_prints_draws_and_asks_for_structures(tmp_path: Path) -> None:
    path = trained(tmp_path, "mmea")
    write(tmp_path / "data.xyz", [ethanol()] * 5)

    def mmea(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["inspect", str(path), *map(str, arguments)])
        return result.exit_code, result.output

    options = ["--max-structures", 2, "--device", "cpu"]
    code, text = mmea(tmp_path / "data.xyz", *options)
    assert code == 0, text
    assert (tmp_path / "mmea.inspect.png").is_file()
    assert "interactions.1.skip_tp.weight" in text
    assert "18 atoms of 2 structures" in text
    code, text = mmea(tmp_path / "data.xyz", *options, "--json", "-o", tmp_path / "b.png")
    assert code == 0, text
    assert len(json.loads(text)["gates"]) == 10
    assert (tmp_path / "b.png").is_file()
    code, text = mmea(*options, "-o", tmp_path / "c.png")
    assert code == 1
    assert "structures" in text
    assert not (tmp_path / "c.png").exists()
