"""Steps taken in a row give what steps one by one give, whatever happens in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from small_adapter import ENERGIES, trained
from torch import Tensor
from waiting import Nothing, watched_recording

from conftest import batch_of, crystal, ethanol, random_network, randomise, run, small_backbone_around
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig, MDConfig
from mmea_calc.fast.full_table import WIDTHS, width_of
from mmea_calc.fast.recorded import Recording
from mmea_calc.md.blocks import LONGEST, Blocks, pays_off
from mmea_calc.md.integrators import BAOAB
from mmea_calc.md.record import record
from mmea_calc.md.simulation import GATES_EVERY, Simulation
from mmea_calc.md.trajectory import OBSERVABLES
from mmea_calc.potential import Potential

SETTINGS: dict[str, Any] = dict(
    temperatures_K=(300.0, 1200.0), stats_every=8, traj_every=8, drift_every=0, max_force_eV_per_A=1e9, time_ps=1.0,
    max_temperature_K=1e9, min_distance_ratio=0.0,
)  # fmt: skip


def potential(method: str | None = "mmea", **network: Any) -> Potential:
    """A tiny network in float64, with an adapter whose gates level off outside of their range.

    It has seen atoms closer than they come here.
    """
    made = Potential(small_backbone_around(random_network(**network), ENERGIES))
    if method is not None:
        adapter = made.adapter = attach(made.backbone.network, AdapterConfig(method=method, gate_rank=2, low_rank=2))
        randomise(adapter, std=0.05)
        seen = ethanol()
        seen.positions *= 0.3
        with adapter.recording():
            run(made.backbone.network, batch_of(seen))
        adapter.merge()
    return made


def carbon() -> Atoms:
    """More atoms than take all pairs: a list with a skin."""
    atoms = bulk("C", "diamond", a=3.6, cubic=True).repeat((2, 2, 3))
    atoms.rattle(0.05, seed=2)
    return atoms


def simulate(
    starts: Sequence[Atoms], n_steps: int, *, blocks: bool, of: Potential | None = None, skin: float = 1.0, **more: Any
) -> Simulation:
    config = MDConfig(**{**SETTINGS, **more})
    simulation = Simulation(of or potential(), starts, config, skin=skin, blocks=blocks)
    simulation.start()
    simulation.advance(n_steps)
    return simulation


def assert_the_same(one: Simulation, other: Simulation, tolerance: float = 1e-9) -> None:
    assert one.state.step == other.state.step
    for name in ("positions", "velocities", "forces", "potential_energy", "heat"):
        torch.testing.assert_close(getattr(one.state, name), getattr(other.state, name), rtol=0, atol=tolerance)
    assert torch.equal(one.monitor.alive, other.monitor.alive)


STARTS: dict[str, tuple[Atoms, ...]] = {
    "molecule": (ethanol(),),
    "molecules": (ethanol(), molecule("CH3COOH")),
    "crystal": (crystal(),),
    "molecule and crystal": (ethanol(), crystal()),
}


@pytest.mark.parametrize("ensemble", ["nvt", "nve"])
@pytest.mark.parametrize("kind", STARTS)
def test_blocks_go_where_single_steps_go(kind: str, ensemble: str) -> None:
    one = simulate(STARTS[kind], 20, blocks=False, ensemble=ensemble)
    row = simulate(STARTS[kind], 20, blocks=True, ensemble=ensemble)
    assert row.blocks is not None
    assert row.blocks.n_taken == 20
    assert_the_same(row, one)
    assert float((one.state.positions - one.layout.start_positions()).abs().max()) > 0.01


def test_the_list_is_renewed_and_pairs_enter_and_leave() -> None:
    # a narrow skin: the list changes every few steps
    settings: dict[str, Any] = dict(skin=0.3, temperatures_K=(1500.0,), stats_every=2, traj_every=2)
    one = simulate((carbon(),), 32, blocks=False, **settings)
    row = simulate((carbon(),), 32, blocks=True, **settings)
    assert row.blocks is not None
    assert row.forces.neighbours.n_builds >= 3
    assert row.blocks.n_taken >= 16
    assert_the_same(row, one)


def test_a_block_in_which_an_atom_leaves_the_skin_is_taken_step_by_step() -> None:
    settings: dict[str, Any] = dict(skin=0.02, temperatures_K=(3000.0,), timestep_fs=1.0)
    row = simulate((carbon(),), 8, blocks=True, **settings)
    assert row.blocks is not None
    assert row.blocks.n_taken == 0
    assert_the_same(row, simulate((carbon(),), 8, blocks=False, **settings))


def test_a_replica_that_fails_fails_in_the_same_step() -> None:
    settings: dict[str, Any] = dict(max_temperature_K=900.0, temperatures_K=(100.0, 800.0), replicas=2)
    one = simulate((ethanol(),), 40, blocks=False, **settings)
    row = simulate((ethanol(),), 40, blocks=True, **settings)
    assert row.blocks is not None
    assert 0 < int(one.monitor.alive.sum()) < 4
    assert 0 < row.blocks.n_taken < 40  # those in which it happened were taken step by step, others not
    assert_the_same(row, one)
    row.sample()
    one.sample()
    assert row.monitor.events == one.monitor.events != []


def test_where_atoms_are_closer_than_in_training_the_plain_path_is_asked() -> None:
    found = []
    for blocks in (True, False):
        made = Potential(small_backbone_around(random_network(), ENERGIES))
        made.use(trained(made.backbone))  # has seen the molecule stretched
        assert made.adapter is not None
        made.adapter.merge()
        found.append(simulate((ethanol(),), 8, blocks=blocks, of=made, temperatures_K=(10.0,)))
    row, one = found
    assert row.blocks is not None
    assert row.blocks.n_taken == 0
    assert_the_same(row, one)
    assert row.blocks.usable  # it may come apart


@pytest.mark.parametrize(("size", "bound", "n_taken"), [(0.25, 0.26, 40), (0.28, 0.22, 24)])
def test_a_failed_replica_closer_than_in_training_stops_no_blocks(size: float, bound: float, n_taken: int) -> None:
    """One that failed at the start, and one that fails within the first block."""
    squeezed = ethanol()
    squeezed.positions *= size  # 0.3 in training
    starts = ethanol(), squeezed, crystal()
    settings: dict[str, Any] = dict(temperatures_K=(300.0,), min_distance_ratio=bound)
    row, one = (simulate(starts, 40, blocks=blocks, **settings) for blocks in (True, False))
    assert row.blocks is not None
    assert one.monitor.alive.tolist() == [True, False, True]
    assert row.blocks.n_taken == n_taken
    assert_the_same(row, one)
    row.sample()
    one.sample()
    assert [e.step > 0 for e in one.monitor.events if e.kind == "failed"] == [n_taken < 40]
    assert row.monitor.events == one.monitor.events


def test_a_failed_replica_without_finite_forces_stops_no_blocks() -> None:
    together = ethanol()
    together.positions[1] = together.positions[0]
    settings: dict[str, Any] = dict(temperatures_K=(300.0,))
    row, one = (simulate((ethanol(), together), 16, blocks=blocks, **settings) for blocks in (True, False))
    assert row.blocks is not None
    assert one.monitor.alive.tolist() == [True, False]
    assert row.blocks.n_taken == 16
    assert torch.equal(one.state.forces.isnan(), row.state.forces.isnan())
    assert one.state.forces.isnan().any()
    for name in ("positions", "velocities", "forces"):
        found, expected = (getattr(s.state, name)[: len(ethanol())] for s in (row, one))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_recorded_steps_of_failed_replicas_alone_are_not_doubted() -> None:
    row = simulate((ethanol(),), 24, blocks=True, max_temperature_K=1.0)
    assert row.blocks is not None
    assert not row.any_alive()
    assert row.blocks.n_taken == 0
    assert row.blocks.usable


def test_widths_that_go_back_and_forth_are_not_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Recording[None]):
        def __init__(self, function: Callable[[], None], device: torch.device) -> None:
            super().__init__(function, device)
            made.append(function)

    more = [0, WIDTHS, 2 * WIDTHS, 0, WIDTHS, 0, 2 * WIDTHS, WIDTHS]
    wider = iter(more)
    monkeypatch.setattr("mmea_calc.md.blocks.Recording", Counted)
    monkeypatch.setattr("mmea_calc.md.blocks.width_of", lambda *of: width_of(*of) + next(wider))
    # gates are not watched, which would be a recording more
    settings: dict[str, Any] = dict(temperatures_K=(300.0,), stats_every=1000, traj_every=1000)
    row = simulate((carbon(),), 0, blocks=True, **settings)
    for _ in more:
        row.advance(2)
    assert row.blocks is not None
    assert row.blocks.n_taken == 2 * len(more)
    assert len(made) == 2 * 3  # steps and what is ahead of them, for each width
    assert_the_same(row, simulate((carbon(),), 2 * len(more), blocks=False, **settings))


def test_a_run_that_has_ended_has_given_its_recordings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[Recording[None]] = []

    class Counted(Recording[None]):
        def __init__(self, function: Callable[[], None], device: torch.device) -> None:
            super().__init__(function, device)
            there.append(self)

        def close(self) -> None:
            super().close()
            there.remove(self)

    monkeypatch.setattr("mmea_calc.md.blocks.Recording", Counted)
    row = simulate((ethanol(),), 4, blocks=True)
    assert len(there) == 2
    row.close()
    assert there == []
    row.advance(2)  # it may go on all the same
    assert_the_same(row, simulate((ethanol(),), 6, blocks=False))
    row.close()
    simulate((ethanol(),), 2, blocks=False).close()  # nothing to give back
    monkeypatch.setattr("mmea_calc.md.simulation.pays_off", lambda potential: True)
    seen: list[int] = []

    def look(step: int) -> bool:
        seen.append(len(there))
        return True

    config = MDConfig(**{**SETTINGS, "time_ps": 0.02, "stats_every": 2, "traj_every": 2})
    record(potential(), [ethanol()], config, go_on=look)
    assert max(seen) >= 2
    assert there == []


def test_samples_are_the_same_gates_included() -> None:
    n = 2 * GATES_EVERY  # samples every two steps
    one, row = (simulate((ethanol(),), n, blocks=b, stats_every=2, traj_every=2, drift_every=2) for b in (False, True))
    assert row.blocks is not None
    assert row.blocks.n_taken == n
    found, expected = row.sample(), one.sample()
    assert not torch.isnan(expected).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    one.advance(2)
    row.advance(2)
    found, expected = row.sample(), one.sample()
    assert torch.isnan(expected[list(OBSERVABLES).index("gate_excess")]).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, equal_nan=True)


def test_a_change_of_the_adapter_is_seen() -> None:
    row = simulate((ethanol(),), 8, blocks=True)
    one = simulate((ethanol(),), 8, blocks=False)
    for simulation in (row, one):
        adapter = simulation.forces.potential.adapter
        assert adapter is not None
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.1)
        simulation.advance(8)
    assert_the_same(row, one)


def test_single_precision_differs_by_its_rounding() -> None:
    found = []
    for blocks in (False, True):
        made = potential()
        made.backbone.to(None, "float32")
        found.append(simulate((ethanol(),), 8, blocks=blocks, of=made))
    assert found[0].forces.potential.dtype == torch.float32
    assert_the_same(found[1], found[0], 1e-4)


def test_a_network_that_does_not_end_at_its_cutoff_keeps_single_steps_and_says_so() -> None:
    network = dict(
        interaction_cls_first="RealAgnosticResidualNonLinearInteractionBlock",
        interaction_cls="RealAgnosticResidualNonLinearInteractionBlock",
    )
    # two molecules far apart are no pair within the cutoff, and all pairs are candidates
    pair = ethanol()
    other = ethanol()
    other.positions += [6.0, 0, 0]
    with pytest.warns(UserWarning, match="one by one.*does not end at its cutoff"):
        row = simulate((pair + other,), 8, blocks=True, of=potential(None, **network))
    assert row.blocks is not None
    assert not row.blocks.usable
    assert_the_same(row, simulate((pair + other,), 8, blocks=False, of=potential(None, **network)))


def test_the_bath_is_heated_in_recorded_steps_too() -> None:
    heated: dict[str, Any] = dict(heating_K_per_ps=20000.0, time_ps=0.05)
    row = simulate((ethanol(), crystal()), 24, blocks=True, **heated)
    assert row.blocks is not None
    assert row.blocks.n_taken == 24
    assert_the_same(row, simulate((ethanol(), crystal()), 24, blocks=False, **heated))
    for step in (0, 7, 2**33):
        several = torch.arange(step, step + 20)
        assert isinstance(row.integrator, BAOAB)
        for function in (row.integrator.kick, row.monitor.bounds_after):
            assert torch.equal(function(several), torch.stack([function(k) for k in several.tolist()]))
    # 240 K more at the end than without: another run
    assert not torch.allclose(row.state.velocities, simulate((ethanol(), crystal()), 24, blocks=True).state.velocities)


@pytest.mark.parametrize("heating", [0.0, 1e6])
def test_bounds_rise_with_the_bath_in_recorded_steps_too(heating: float) -> None:
    """1000 K and more are too hot in a cold bath, not in one that is heated."""
    asked: dict[str, Any] = dict(max_temperature_K=None, temperatures_K=(30.0,), heating_K_per_ps=heating, time_ps=0.02)
    both = []
    for blocks in (True, False):
        config = MDConfig(**{**SETTINGS, **asked})
        simulation = Simulation(potential(), (ethanol(),), config, skin=1.0, blocks=blocks)
        simulation.start()
        simulation.state = replace(simulation.state, velocities=12 * simulation.state.velocities)
        simulation.advance(8)
        both.append(simulation)
    row, single = both
    assert row.blocks is not None
    assert bool(row.monitor.alive) == bool(single.monitor.alive) == (heating > 0)
    assert row.blocks.n_taken == (8 if heating else 0)
    assert_the_same(row, single)


def test_the_plain_path_is_taken_where_it_is_asked_for() -> None:
    def on(device: str, *, fast: bool) -> Any:
        return SimpleNamespace(device=torch.device(device), backbone=SimpleNamespace(fast=fast))

    assert pays_off(on("cuda", fast=True))
    assert not pays_off(on("cuda", fast=False))
    assert not pays_off(on("cpu", fast=True))


def test_many_edges_are_not_worth_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.md.blocks.MOST_EDGES", 50)
    row = simulate((ethanol(),), 8, blocks=True)
    assert row.blocks is not None
    assert row.blocks.n_taken == 0


def test_nothing_in_a_recorded_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    Watched, watched = watched_recording()
    monkeypatch.setattr("mmea_calc.md.blocks.Recording", Watched)
    row = simulate((ethanol(), crystal()), 16, blocks=True, heating_K_per_ps=1000.0)
    assert row.blocks is not None
    assert row.blocks.n_taken == 16
    assert len(watched) == 16 + 2  # two blocks, each with noise and bounds once
    assert set().union(*watched) == set()


def test_noise_in_recorded_steps_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of a block is made for a step that the host names, once the first one was compared."""
    row = simulate((ethanol(),), 8, blocks=True, heating_K_per_ps=1000.0)
    normals, asked = row.noise.normals, []

    def seen(step: int | Tensor, stream: int = 0) -> Tensor:
        asked.append(step)
        return normals(step, stream)

    monkeypatch.setattr(row.integrator, "noise", seen)
    row.advance(16)
    assert row.blocks is not None
    assert row.blocks.n_taken == 24
    assert [t.tolist() for t in asked if isinstance(t, Tensor)] == [[*range(8, 24)], [*range(16, 32)]]
    assert len(asked) == 2
    assert_the_same(row, simulate((ethanol(),), 24, blocks=False, heating_K_per_ps=1000.0))


@pytest.mark.parametrize("what", ["kick", "bounds_after"])
def test_recorded_noise_of_other_steps_is_found_out(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    row = simulate((ethanol(),), 0, blocks=True, heating_K_per_ps=1e6, max_temperature_K=None, time_ps=0.02)
    of = row.integrator if what == "kick" else row.monitor
    right = getattr(of, what)

    def shifted(step: int | Tensor) -> Tensor:
        return right(step + 1 if isinstance(step, Tensor) else step)

    monkeypatch.setattr(of, what, shifted)
    with pytest.warns(UserWarning, match="one by one .recorded noise or bounds are not"):
        row.advance(8)
    assert row.blocks is not None
    assert row.blocks.n_taken == 0


def test_what_cannot_be_recorded_is_told_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("mmea_calc.md.blocks.Recording", refuse)
    with pytest.warns(UserWarning, match="cannot be recorded: operation not permitted when stream is capturing"):
        row = simulate((ethanol(),), 8, blocks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row.advance(8)
    assert_the_same(row, simulate((ethanol(),), 16, blocks=False))


def test_recorded_steps_that_move_nothing_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.md.blocks.Recording", Nothing)
    with pytest.warns(UserWarning, match="steps are taken one by one .recorded steps moved nothing"):
        row = simulate((ethanol(),), 16, blocks=True)
    assert_the_same(row, simulate((ethanol(),), 16, blocks=False))


def test_by_default_a_processor_takes_single_steps(device: str) -> None:
    made = potential()
    made.backbone.to(device)
    simulation = Simulation(made, (ethanol(),), MDConfig(**SETTINGS))
    assert isinstance(simulation.blocks, Blocks) == (device == "cuda")
    if device == "cuda":
        simulation.start()
        simulation.advance(4 * LONGEST)
        assert simulation.blocks is not None
        assert simulation.blocks.n_taken == 4 * LONGEST
        other = simulate((ethanol(),), 4 * LONGEST, blocks=False, of=made)
        assert_the_same(simulation, other, 1e-6)


def test_recording_takes_steps_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where what is recorded runs before."""

    class Warmed(Recording[None]):
        def __init__(self, function: Callable[[], None], device: torch.device) -> None:
            super().__init__(function, device)
            for _ in range(3):
                function()

    monkeypatch.setattr("mmea_calc.md.blocks.Recording", Warmed)
    # the second kind of step is recorded when the first has used up its noise
    settings: dict[str, Any] = dict(temperatures_K=(300.0,), stats_every=2 * LONGEST, traj_every=2 * LONGEST)
    row = simulate((ethanol(),), 2 * LONGEST, blocks=True, **settings)
    assert row.blocks is not None
    assert row.blocks.n_taken == 2 * LONGEST
    assert_the_same(row, simulate((ethanol(),), 2 * LONGEST, blocks=False, **settings))
