"""Networks of cuEquivariance's layers in the place of e3nn's: the same potential, gates included."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from small_adapter import ENERGIES
from typer.testing import CliRunner

from conftest import random_network, randomise, small_backbone_around
from mmea_calc import MMEACalculator, load_backbone
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig, MDConfig
from mmea_calc.errors import BackboneError, CompilationError
from mmea_calc.fast.converted import ConvertedNetwork
from mmea_calc.md.simulation import Simulation
from mmea_calc.potential import Potential
from mmea_cli.main import app

METHODS = ("mmea", "gates", "elora", "auto", None)


@pytest.fixture(scope="module", autouse=True)
def _package() -> None:
    pytest.importorskip("cuequivariance_torch", reason="cuequivariance-torch is not installed")


def potential(method: str | None, kernels: Any = "cuequivariance") -> Potential:
    """A small network with random values of an adapter that has seen atoms half as far apart as they come here."""
    backbone = small_backbone_around(random_network(correlation=2), ENERGIES).to(dtype="float32")
    backbone.kernels = kernels
    made = Potential(backbone)
    if method is not None:
        adapter = made.adapter = attach(backbone.network, AdapterConfig(method=method, gate_rank=2, low_rank=2))
        randomise(adapter, std=0.1)
        seen = acid()
        seen.positions *= 0.5
        with adapter.recording():
            made.predict(made.collate([made.graph(acid()), made.graph(seen)]))
        adapter.merge()
    return made


def acid() -> Atoms:
    return molecule("CH3COOH")


def diamond() -> Atoms:
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.mark.parametrize("method", METHODS)
def test_energies_forces_and_stresses_are_those_of_the_network(method: str | None) -> None:
    other, own = potential(method), potential(method, "own")
    for structures, stress in (([acid()], False), ([diamond()], True), ([acid(), molecule("CH3OH")], False)):
        batch = own.collate([own.graph(a) for a in structures])
        for _ in range(2):  # the first is compared, the second is not
            found, expected = (p.predict(batch, stress=stress) for p in (other, own))
            scale = float(expected.forces.abs().max())  # type: ignore[union-attr]
            torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=1e-5 * max(1.0, scale))
            torch.testing.assert_close(found.node_energy, expected.node_energy, rtol=0, atol=1e-5)
            if stress:
                torch.testing.assert_close(found.stress, expected.stress, rtol=0, atol=1e-5)
    assert other.stand_in() is not None
    assert own.stand_in() is None


def test_no_kernels_are_used_that_do_not_give_the_networks_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmea_calc.fast.converted

    made = mmea_calc.fast.converted.of_cuequivariance

    def wrong(network: torch.nn.Module) -> torch.nn.Module:
        found = made(network)
        with torch.no_grad():
            found.get_parameter("readouts.0.linear.weight").mul_(1.5)
        return found

    monkeypatch.setattr(mmea_calc.fast.converted, "of_cuequivariance", wrong)
    other, own = potential("mmea"), potential("mmea", "own")
    batch = own.collate([own.graph(acid())])
    with pytest.warns(UserWarning, match="cuEquivariance's layers does not give what its network gives"):
        found = other.predict(batch)
    torch.testing.assert_close(found.forces, own.predict(batch).forces, rtol=0, atol=1e-6)
    assert other.stand_in() is None


def test_a_network_that_cannot_be_converted_goes_on_with_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmea_calc.fast.converted

    def fail(network: torch.nn.Module) -> torch.nn.Module:
        raise BackboneError("mace-torch cannot convert this network")

    monkeypatch.setattr(mmea_calc.fast.converted, "of_cuequivariance", fail)
    other, own = potential(None), potential(None, "own")
    batch = own.collate([own.graph(acid())])
    with pytest.warns(UserWarning, match="no network of cuEquivariance's layers for this one: mace-torch cannot"):
        found = other.predict(batch)
    torch.testing.assert_close(found.forces, own.predict(batch).forces, rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["gate", "weight", "switched off"])
def test_changes_of_values_are_followed(what: str) -> None:
    pair = potential("mmea"), potential("mmea", "own")
    results = []
    for each in pair:
        batch = each.collate([each.graph(acid())])
        before = each.predict(batch).forces
        adapter = each.adapter
        assert adapter is not None
        assert before is not None
        if what == "switched off":
            with adapter.disabled():
                after = each.predict(batch).forces
        else:
            with torch.no_grad():
                if what == "gate":
                    gate = adapter.gates["products.0.linear"]
                    assert gate.shift is not None
                    gate.shift.bias.add_(0.3)
                else:
                    each.backbone.network.get_parameter("readouts.0.linear.weight").mul_(1.2)
            after = each.predict(batch).forces
        assert after is not None
        assert float((after - before).abs().max()) > 1e-3
        results.append(after)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_atoms_closer_than_in_training_are_computed_plainly() -> None:
    """There the radial functions fade to the backbone's, which the other network does not have."""
    other, own = potential("mmea"), potential("mmea", "own")
    other.predict(other.collate([other.graph(acid())]))
    converted = other._programs.proven(other.adapter, stress=False)
    assert isinstance(converted, ConvertedNetwork)
    close = acid()
    close.positions *= 0.4
    batch = own.collate([own.graph(close)])
    assert converted(batch, stress=False) is None
    forces = own.predict(batch).forces
    assert forces is not None
    torch.testing.assert_close(other.predict(batch).forces, forces, rtol=1e-5, atol=1e-5 * float(forces.abs().max()))


@pytest.mark.parametrize("blocks", [False, True])
def test_dynamics_go_the_same_way(blocks: bool) -> None:
    """Also in the steps that a GPU records, here taken without recording."""
    states = []
    for kernels in ("own", "cuequivariance"):
        each = potential("mmea", kernels)
        config = MDConfig(temperatures_K=(300.0,), stats_every=8, drift_every=0, max_force_eV_per_A=1e9, time_ps=1.0)
        simulation = Simulation(each, [acid()], config, blocks=blocks)
        simulation.start()
        simulation.advance(16)
        if blocks:
            assert simulation.blocks is not None
            assert simulation.blocks.n_taken == 16
        assert bool(simulation.monitor.alive.all())
        states.append(simulation.state)
    torch.testing.assert_close(states[0].positions, states[1].positions, rtol=0, atol=1e-4)
    assert not torch.equal(states[0].positions, states[1].positions)  # they are computed differently


def test_a_calculator_has_it_and_keeps_it_in_copies() -> None:
    atoms, calculator = acid(), MMEACalculator(device="cpu", kernels="cuequivariance")
    atoms.calc = calculator
    expected = acid()
    expected.calc = MMEACalculator(device="cpu")
    np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), rtol=0, atol=1e-5)
    assert calculator.potential.stand_in() is not None
    copy = pickle.loads(pickle.dumps(calculator))
    assert copy.backbone.kernels == "cuequivariance"


def test_nothing_of_the_process_is_changed() -> None:
    before = torch.get_default_dtype(), torch.get_rng_state()
    converted = potential(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted.predict(converted.collate([converted.graph(acid())]))
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(BackboneError, match="kernels is 'magic'; expected own or cuequivariance"):
        load_backbone(kernels="magic")  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="fast=False asks for mace-torch's own layers"):
        load_backbone(fast=False, kernels="cuequivariance")
    with pytest.raises(BackboneError, match="computes in float32, and dtype is 'float64'"):
        load_backbone(dtype="float64", kernels="cuequivariance")
    with pytest.raises(CompilationError, match="loaded with kernels='cuequivariance': load it without"):
        potential(None).compile()


def test_without_the_package_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.backbone.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"pip install 'mmea\[cue\]'"):
        load_backbone(kernels="cuequivariance")


def test_molecular_dynamics_take_it_from_the_command_line(tmp_path: Path) -> None:
    acid().write(tmp_path / "start.xyz")
    words = ["md", "mmea-organic-s", str(tmp_path / "start.xyz"), "--temperature", "300", "--time", "8fs"]
    words += ["--output", str(tmp_path / "run"), "--device", "cpu", "--kernels"]
    result = CliRunner().invoke(app, [*words, "magic"], prog_name="mmea")
    assert result.exit_code == 2
    assert not (tmp_path / "run").exists()
    result = CliRunner().invoke(app, [*words, "cuequivariance"], prog_name="mmea")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run").is_dir()
