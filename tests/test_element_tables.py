"""Gated layers that see the element alone become tables while an adapter is merged: exact, and safe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from torch import Tensor, nn

from conftest import batch_of, crystal, ethanol, random_network, randomise, run
from mmea_calc import AdapterConfig, attach
from mmea_calc.adapted import Adapter
from mmea_calc.fast.element_tables import ElementTables
from mmea_calc.fast.frozen_gates import FrozenGate
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.graph import Batch
from mmea_calc.mace_bridge import element_layers
from mmea_calc.mace_networks import accept_neutral_graphs

CHAIN = ["node_embedding.linear", "interactions.0.linear_up"]


@pytest.fixture
def network() -> Iterator[nn.Module]:
    with borrowed("agnostic") as found:
        yield found


def gated(network: nn.Module, method: str = "gates", seed: int = 1) -> Adapter:
    """Random gates with ranges that most of what they see lies outside of."""
    adapter = attach(network, AdapterConfig(method=method, gate_rank=4, low_rank=2))
    randomise(adapter, seed)
    with adapter.recording():
        run(network, batch_of(ethanol()))
    for gate in adapter.gates.values():
        middle, width = (gate.z_low + gate.z_high) / 2, gate.z_high - gate.z_low
        gate.set_range(middle - width / 8, middle + width / 8)
    return adapter


def calls_of_gates(adapter: Adapter, batch: Batch) -> set[str]:
    """Names of the gates that compute something in a call of the network."""
    seen: set[str] = set()

    def watch(name: str) -> Any:
        return lambda *_: seen.add(name)

    handles = [gate.register_forward_hook(watch(name)) for name, gate in adapter.gates.items()]
    frozen = FrozenGate.__call__
    names = {id(gate): name for name, gate in adapter.gates.items()}

    def frozen_and_seen(self: FrozenGate, x: Tensor, y: Tensor) -> Tensor:
        seen.add(names[id(self.gate)])
        return frozen(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenGate, "__call__", frozen_and_seen)
        run(adapter.network, batch)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-12) -> None:
    for key in ("energy", "node_energy", "forces"):
        torch.testing.assert_close(one[key], other[key], atol=atol, rtol=1e-12)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_adapter_gives_the_energies_and_forces_of_the_unmerged_one(name: str, fast: bool) -> None:
    with borrowed(name) as network:
        if fast:
            use_fast_path(network)
        adapter, batch = gated(network, "mmea"), batch_of(ethanol(), crystal())
        before = run(network, batch)
        adapter.merge()
        run(network, batch)
        assert calls_of_gates(adapter, batch) == set(adapter.gates) - set(CHAIN)
        assert_same(run(network, batch), before)
        with adapter.disabled():
            assert not torch.allclose(run(network, batch)["energy"], before["energy"])


def test_unmerging_gives_the_same_bits_and_the_same_calls_as_before(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    before, names = run(network, batch), set(adapter.gates)
    adapter.merge()
    run(network, batch)
    adapter.unmerge()
    assert not adapter.merged
    after = run(network, batch)
    assert torch.equal(after["energy"], before["energy"])
    assert torch.equal(after["forces"], before["forces"])
    assert calls_of_gates(adapter, batch) == names
    assert all("forward" not in network.get_submodule(n).__dict__ for n in CHAIN)


def test_a_merged_adapter_that_is_off_or_detached_leaves_the_backbone_to_the_bit(network: nn.Module) -> None:
    batch = batch_of(ethanol())
    bare = run(network, batch)
    adapter = gated(network)
    adapter.merge()
    run(network, batch)
    with adapter.disabled():
        off = run(network, batch)
    adapter.detach()
    detached = run(network, batch)
    for key in ("energy", "forces"):
        assert torch.equal(off[key], bare[key])
        assert torch.equal(detached[key], bare[key])


def test_tables_follow_loaded_values_ranges_and_edits_in_place(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    first = adapter.state_dict()
    randomise(adapter, seed=5)
    second, expected = adapter.state_dict(), run(network, batch)
    adapter.load_state_dict(first)
    adapter.merge()
    run(network, batch)
    adapter.load_state_dict(second)
    assert_same(run(network, batch), expected)

    gate = adapter.gates[CHAIN[1]]
    gate.set_range(0.01 * gate.z_low, 0.01 * gate.z_high)
    with torch.no_grad():
        network.get_parameter(f"{CHAIN[0]}.weight").mul_(1.1)
    merged = run(network, batch)
    assert not torch.allclose(merged["energy"], expected["energy"])
    adapter.unmerge()
    assert_same(merged, run(network, batch))


def test_tables_follow_a_change_of_precision(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    expected = run(network, batch)
    adapter.merge()
    run(network, batch)
    network.float()
    single = run(network, batch_of(ethanol(), dtype=torch.float32))
    assert single["energy"].dtype == torch.float32
    torch.testing.assert_close(single["energy"].double(), expected["energy"], rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_one_hot_are_computed(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    mixed = 0.7 * batch.tensors["node_attrs"] + 0.1
    plain = Batch(batch.tensors | {"node_attrs": mixed}, batch.numbers, batch.atoms_per_graph)
    expected = run(network, plain)
    adapter.merge()
    run(network, batch)
    assert calls_of_gates(adapter, plain) == set(adapter.gates)
    assert_same(run(network, plain), expected, atol=1e-13)


def test_one_hot_rows_changed_in_place_are_seen(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    adapter.merge()
    run(network, batch)
    batch.tensors["node_attrs"].copy_(batch.tensors["node_attrs"].roll(1, dims=0))
    merged = run(network, batch)
    adapter.unmerge()
    assert_same(merged, run(network, batch))


def test_embedded_charges_are_added_to_the_embedding_and_not_lost() -> None:
    specs = {"total_charge": {"type": "continuous", "emb_dim": 4, "per": "graph", "in_dim": 1}}
    network = random_network(embedding_specs=specs)
    assert element_layers(network) == CHAIN[:1]
    accept_neutral_graphs(network)
    adapter, batch, energies = gated(network), batch_of(ethanol()), []
    for merge in (False, True):
        for charge in (0.0, 1.0):
            batch.tensors["total_charge"] = torch.full((1,), charge, dtype=torch.float64)
            if merge:
                adapter.merge()
            energies.append(run(network, batch)["energy"])
    assert calls_of_gates(adapter, batch) == set(adapter.gates) - set(CHAIN[:1])
    torch.testing.assert_close(torch.stack(energies[2:]), torch.stack(energies[:2]), atol=1e-12, rtol=1e-13)
    assert abs(float(energies[0] - energies[1])) > 1e-6


def test_a_later_layer_looks_up_only_what_the_one_before_gave_untouched(network: nn.Module) -> None:
    adapter = gated(network)
    layers = [network.get_submodule(n) for n in CHAIN]
    one_hot = torch.eye(3, dtype=torch.float64)[[0, 2, 2, 1]]
    features = layers[0](one_hot)
    expected = [layers[1](f) for f in (features, features.clone(), 2 * features)]
    adapter.merge()
    seen: list[int] = []
    gate = adapter.gates[CHAIN[1]]
    gate.register_forward_hook(lambda *_: seen.append(1))
    embedded = layers[0](one_hot)
    results = [layers[1](embedded)]
    assert len(seen) == 1  # when the table was made
    results.append(layers[1](embedded.clone()))
    assert len(seen) == 2
    results.append(layers[1](embedded.mul_(2)))
    assert len(seen) == 3
    torch.testing.assert_close(results, expected, atol=1e-13, rtol=1e-13)


def test_ranges_recorded_while_merged_are_those_recorded_unmerged(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    with adapter.recording():
        run(network, batch)
    expected = adapter.state_dict()
    adapter.merge()
    run(network, batch)
    with adapter.recording():
        run(network, batch)
    state = adapter.state_dict()
    assert any(key.startswith(f"ranges.{CHAIN[1]}") for key in expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("target", CHAIN)
def test_a_gate_on_one_of_the_layers_alone_is_folded_too(network: nn.Module, target: str) -> None:
    adapter, batch = attach(network, AdapterConfig(method="gates", targets=(target,))), batch_of(ethanol())
    randomise(adapter)
    before = run(network, batch)
    adapter.merge()
    run(network, batch)
    assert not calls_of_gates(adapter, batch)
    assert_same(run(network, batch), before)


def test_inference_mode_computes_and_spoils_no_later_gradient(network: nn.Module) -> None:
    adapter, batch = gated(network), batch_of(ethanol())
    expected = run(network, batch)
    adapter.merge()
    with torch.inference_mode():
        inside = network(dict(batch.tensors), compute_force=False)["energy"]
    torch.testing.assert_close(inside, expected["energy"], atol=1e-12, rtol=1e-13)
    assert_same(run(network, batch), expected)


def test_tables_can_be_taken_off_by_themselves(network: nn.Module) -> None:
    linear: Any = network.get_submodule(CHAIN[0])
    one_hot = torch.eye(3, dtype=torch.float64)
    expected = linear(one_hot)
    tables = ElementTables([(linear, None)])
    torch.testing.assert_close(linear(one_hot), expected)
    tables.remove()
    assert torch.equal(linear(one_hot), expected)
