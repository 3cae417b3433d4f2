"""Replicas as one batch: neighbours, watching, independence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from md_potentials import Morse, triatomic

from conftest import ELEMENTS as NETWORK_ELEMENTS
from conftest import ethanol, random_network, randomise
from mmea_calc.adapted import attach
from mmea_calc.backbone import Backbone
from mmea_calc.config import AdapterConfig, MDConfig
from mmea_calc.errors import DataError, DynamicsError
from mmea_calc.graph import Batch
from mmea_calc.md.forces import ReplicaForces
from mmea_calc.md.minimise import minimise
from mmea_calc.md.neighbours import Neighbours, Pairs
from mmea_calc.md.random import Noise
from mmea_calc.md.simulation import GATES_EVERY, Simulation
from mmea_calc.md.stability import quick_check
from mmea_calc.md.state import Layout, replicas_of
from mmea_calc.md.trajectory import OBSERVABLES
from mmea_calc.potential import Potential, Prediction

NAMES = list(OBSERVABLES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def simulate(potential: object, starts: Sequence[Atoms], n_steps: int, **settings: object) -> Simulation:
    config = MDConfig(**{"time_ps": 100.0, **settings})  # type: ignore[arg-type]
    simulation = Simulation(potential, starts, config)  # type: ignore[arg-type]
    simulation.start()
    for _ in range(n_steps):
        simulation.step()
    return simulation


def tiny_potential() -> Potential:
    """A random network in float64."""
    energies = {1: -13.6, 6: -1027.3, 8: -2038.5}
    network = random_network().eval()
    return Potential(
        Backbone(
            name="tiny",
            source="test",
            network=network,
            config={},
            fingerprint="0" * 64,
            elements=NETWORK_ELEMENTS,
            r_max=4.0,
            heads=("Default",),
            head="Default",
            atomic_energies=energies,
        )
    )


def slab() -> Atoms:
    atoms = fcc111("C", (2, 2, 2), a=3.6, vacuum=None, orthogonal=True)
    atoms.cell[2] = [0.3, 0.2, 7.0]
    atoms.pbc = (True, True, False)
    return atoms


def chain() -> Atoms:
    """More atoms than take all pairs."""
    rng = np.random.default_rng(0)
    grid = 1.5 * np.stack(np.meshgrid(*[np.arange(5)] * 3), -1).reshape(-1, 3)[:70]
    return Atoms("C70", grid + rng.normal(0, 0.1, grid.shape) + 300.0)


def diamond() -> Atoms:
    atoms = bulk("C", "diamond", a=3.4)
    atoms.rattle(0.05, seed=1)
    return atoms


def leaning_slab() -> Atoms:
    """One whose third vector leans by as much as puts the middle of the slab on an edge of rounding."""
    atoms = slab()
    atoms.cell[2] = atoms.cell[0] + [0, 0, 7.0]
    atoms.center(axis=2)
    return atoms


STARTS = {
    "molecule": triatomic,
    "leaning slab": leaning_slab,
    "large molecule": chain,
    "slab": slab,
    "crystal": diamond,
}


# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*STARTS, "all"])
@pytest.mark.parametrize("skin", [0.0, 1.2])
def test_forces_agree_with_direct_evaluation_wherever_atoms_go(kind: str, skin: float) -> None:
    starts = [s() for k, s in STARTS.items() if kind in (k, "all")]
    potential = Morse(r_max=2.4)
    layout = Layout(replicas_of(starts, MDConfig()))
    forces = ReplicaForces(potential, layout, skin)  # type: ignore[arg-type]
    noise = Noise(0, layout.names, layout.atoms_per_replica)
    x, edges = layout.start_positions(), set()
    for step in range(40):
        # a random walk across cell boundaries, with atoms entering and leaving the cutoff
        x = x + 0.12 * noise.normals(step)
        energy, all_forces = forces(x)
        graphs = []
        for replica, positions in zip(layout.replicas, layout.split(x), strict=True):
            atoms = replica.atoms.copy()
            atoms.positions = positions.numpy()
            graphs.append(potential.graph(atoms))
        direct = potential.predict(potential.collate(graphs))
        assert direct.forces is not None
        torch.testing.assert_close(energy, direct.energy, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(all_forces, direct.forces, rtol=1e-8, atol=1e-8)
        edges.add(forces.batch.tensors["edge_index"].shape[1])
    assert len(edges) > 1  # they did come and go
    builds = forces.neighbours.n_builds
    assert builds == 0 if kind == "molecule" else builds > 1
    if skin and kind != "molecule":
        assert builds < 40 * len(starts)


def test_edges_do_not_depend_on_when_the_list_was_made() -> None:
    potential = Morse(r_max=3.0)
    layout = Layout(replicas_of([diamond(), slab()], MDConfig()))
    noise = Noise(0, layout.names, layout.atoms_per_replica)
    old = ReplicaForces(potential, layout, 1.0)  # type: ignore[arg-type]
    x = layout.start_positions() + 7.0
    for step in range(12):
        old(x)
        x = x + 0.02 * noise.normals(step)
    new = ReplicaForces(potential, layout, 1.0)  # type: ignore[arg-type]
    for one, other in zip(old(x), new(x), strict=True):
        assert torch.equal(one, other)
    assert old.neighbours.n_builds == 2
    for name, tensor in old.batch.tensors.items():
        assert torch.equal(tensor, new.batch.tensors[name]), name


def test_lists_made_on_the_device_are_those_made_on_the_host() -> None:
    layout = Layout(replicas_of([s() for s in STARTS.values()], MDConfig()))
    noise = Noise(0, layout.names, layout.atoms_per_replica)
    here, there = (Neighbours(layout, 2.4, 0.5, on_device=on_device) for on_device in (False, True))
    x = layout.start_positions()
    for step in range(10):
        one, other = here.candidates(x), there.candidates(x)
        for name in Pairs.__dataclass_fields__:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        x = x + 0.2 * noise.normals(step)
    assert here.n_builds == there.n_builds > 6


def test_network_sees_positions_near_the_origin() -> None:
    # float32 holds 1e-6 A at 10 A, 1e-3 A at 10,000 A
    for start in (triatomic(), diamond(), slab()):
        start.positions += [3000.0, -5000.0, 4000.0]
        layout = Layout(replicas_of([start], MDConfig()))
        forces = ReplicaForces(Morse(r_max=3.0), layout)  # type: ignore[arg-type]
        forces(layout.start_positions())
        assert forces.batch.tensors["positions"].abs().max() < 10


# --- the batch -------------------------------------------------------------------------------------------------------


def test_a_replica_goes_its_way_whoever_else_is_there() -> None:
    # the noise is the same to the bit; a network's matrix products may round differently in another batch
    potential = tiny_potential()
    alone = simulate(potential, [ethanol()], 12, temperatures_K=(600.0,))
    together = simulate(potential, [ethanol(), molecule("H2O")], 12, temperatures_K=(300.0, 600.0), replicas=2)
    index = together.layout.names.index("start0-600K-0")
    one, other = alone.state.positions, together.layout.split(together.state.positions)[index]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert len({tuple(p.flatten().tolist()[:9]) for p in together.layout.split(together.state.positions)}) == 8


def test_positions_stay_double_precision_with_a_single_precision_network() -> None:
    potential = tiny_potential()
    potential.backbone.to(dtype="float32")
    simulation = simulate(potential, [ethanol()], 2)
    assert simulation.forces.batch.tensors["positions"].dtype == torch.float32
    for tensor in (simulation.state.positions, simulation.state.velocities, simulation.state.forces):
        assert tensor.dtype == torch.float64


# --- watching --------------------------------------------------------------------------------------------------------


def test_a_replica_that_fails_is_frozen_and_reported_and_the_others_go_on() -> None:
    settings = dict(temperatures_K=(300.0, 600.0), replicas=2)
    undisturbed = simulate(Morse(), [triatomic()], 40, **settings)
    potential = Morse()
    potential.broken = (21, 2)  # call 1 is the start, so step 20
    simulation = simulate(potential, [triatomic()], 19, **settings)
    last_good = simulation.layout.split(simulation.state.positions)[2].clone()
    for _ in range(21):
        simulation.step()
    simulation.sample()
    assert simulation.monitor.alive.tolist() == [True, True, False, True]
    (event,) = [e for e in simulation.monitor.events if e.kind == "failed"]
    assert (event.replica, event.step) == ("start0-600K-0", 20)
    assert "finite" in event.detail
    positions = simulation.layout.split(simulation.state.positions)
    assert torch.equal(positions[2], last_good)
    for i in (0, 1, 3):
        assert torch.equal(positions[i], undisturbed.layout.split(undisturbed.state.positions)[i])
    assert torch.isfinite(simulation.state.velocities).all()
    assert simulation.any_alive()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(max_temperature_K=400.0, temperatures_K=(2000.0,)), "temperature"),
        (dict(max_force_eV_per_A=0.2), "force"),
        (dict(min_distance_ratio=1.2), "close"),
    ],
)
def test_bounds_freeze_a_replica_with_its_reason(settings: dict[str, object], words: str) -> None:
    simulation = simulate(Morse(), [triatomic()], 8, **settings)
    simulation.sample()
    (event,) = [e for e in simulation.monitor.events if e.kind == "failed"]
    assert words in event.detail
    assert "bound" in event.detail
    assert not simulation.any_alive()


def test_bonds_that_break_and_form_are_told_with_their_atoms() -> None:
    # O-C-H whose H is pushed away from C and towards O
    atoms = Atoms("OCH", [[0, 0, 0], [1.3, 0, 0], [2.3, 0.2, 0]])
    simulation = simulate(Morse(depth=1e-9), [atoms], 0)
    x = simulation.state.positions.clone()
    x[2] = torch.tensor([-0.6, -0.8, 0.0])
    simulation.forces(x)
    state = simulation.state.__class__(**{**vars(simulation.state), "positions": x})
    rows = simulation.monitor.sample(state, [], compare=False)
    assert rows[NAMES.index("broken_bonds"), 0] == 1
    assert rows[NAMES.index("formed_bonds"), 0] == 1
    told = {e.kind: e.detail for e in simulation.monitor.events}
    assert told["bond broken"].startswith("C1-H2")
    assert told["bond formed"].startswith("O0-H2 (1.00 A)")
    assert simulation.any_alive()  # a reaction is no failure


def test_bonds_across_cell_boundaries_are_bonds() -> None:
    simulation = simulate(Morse(depth=1e-9), [diamond()], 30, temperatures_K=(10.0,))
    assert simulation.monitor.state_dict()["bonds.radii"].shape == (4,)  # of a cell of diamond
    rows = simulation.sample()
    assert rows[NAMES.index("broken_bonds"), 0] == 0
    assert rows[NAMES.index("formed_bonds"), 0] == 0


def gated_potential() -> Potential:
    """Strong gates that have seen ethanol."""
    potential = tiny_potential()
    adapter = potential.adapter = attach(potential.backbone.network, AdapterConfig(method="gates", gate_rank=4))
    randomise(adapter, std=0.5)
    with adapter.recording():
        potential.predict_graphs([potential.graph(ethanol())])
    return potential


@pytest.mark.parametrize("merged", [False, True])
def test_gates_outside_their_range_and_the_bare_forces_are_seen(merged: bool) -> None:
    potential = gated_potential()
    adapter = potential.adapter
    assert adapter is not None
    if merged:  # as in a run
        adapter.merge()
    simulation = simulate(
        potential, [ethanol()], 0, temperatures_K=(300.0,), stats_every=2, drift_every=4, traj_every=2
    )
    of_gates = NAMES.index("gate_excess")
    rows = simulation.sample()
    assert rows[of_gates, 0] < 1e-6  # the structure that the range was recorded on
    difference = simulation.forces(simulation.state.positions)[1] - simulation.forces.bare()
    assert float(difference.abs().max()) > 1e-3
    assert float(rows[NAMES.index("adapted_minus_bare"), 0]) == pytest.approx(float((difference**2).mean() ** 0.5))
    watched = []
    for _ in range(2 * GATES_EVERY):
        simulation.advance(2)
        rows = simulation.sample()
        watched.append(not torch.isnan(rows[of_gates, 0]))
        # not every sample
        assert torch.isnan(rows[NAMES.index("adapted_minus_bare"), 0]) == (simulation.state.step % 4 != 0)
    assert watched == 2 * [*[False] * (GATES_EVERY - 1), True]
    assert rows[of_gates, 0] > 0
    assert adapter.enabled


@pytest.mark.parametrize(
    "atoms", [Atoms("H"), Atoms("H2", [[0, 0, 0], [0, 0, 50.0]])], ids=["one atom", "two far apart"]
)
def test_gates_of_atoms_out_of_reach_are_watched_too(atoms: Atoms) -> None:
    potential = gated_potential()
    simulation = simulate(potential, [atoms], 0, temperatures_K=(300.0,), stats_every=2, traj_every=2, drift_every=2)
    seen = []
    for _ in range(2 * GATES_EVERY):
        simulation.advance(2)
        seen.append(float(simulation.sample()[NAMES.index("gate_excess"), 0]))
    assert seen[-1] > 0  # ethanol has no such atoms
    assert simulation.state.step == 4 * GATES_EVERY


def test_gates_are_seen_alike_in_parts_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many replicas are watched some at a time, so that memory does not grow with their number."""
    potential = gated_potential()
    seen, sizes = [], []
    predict = potential.predict

    def counted(batch: Batch, **options: Any) -> Prediction:
        sizes.append(batch.n_atoms)
        return predict(batch, **options)

    for at_once in (10, 1000):
        monkeypatch.setattr("mmea_calc.md.forces.WATCHED_AT_ONCE", at_once)
        simulation = simulate(potential, [ethanol(), molecule("CH3COOH")], 3, temperatures_K=(300.0, 900.0))
        monkeypatch.setattr(potential, "predict", counted)
        with simulation.forces.watching_gates() as found:
            simulation.forces.look()
        monkeypatch.undo()
        seen.append(torch.stack(found).amax(0))
    assert sizes == [9, 9, 8, 8, 34]
    assert seen[0].shape == (4,)
    assert float(seen[0].min()) > 0
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


def test_watching_changes_nothing() -> None:
    often = simulate(Morse(), [triatomic()], 20, stats_every=1, traj_every=1, drift_every=1)
    rarely = simulate(Morse(), [triatomic()], 20, stats_every=100, traj_every=100, drift_every=0)
    assert torch.equal(often.state.positions, rarely.state.positions)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_without_friction_temperatures_are_those_of_constant_energy() -> None:
    """What velocities lack at the start, drift and rotation, no thermostat brings back."""
    free, energy, bath = (
        Simulation(Morse(), [triatomic()], MDConfig(**options))  # type: ignore[arg-type]
        for options in ({"friction_per_fs": 0.0}, {"ensemble": "nve"}, {})
    )
    assert free.layout.degrees_of_freedom.tolist() == energy.layout.degrees_of_freedom.tolist() == [3.0]
    assert bath.layout.degrees_of_freedom.tolist() == [9.0]
    assert torch.equal(free.monitor.bounds_after(0), energy.monitor.bounds_after(0))


def test_a_bath_that_cools_ends_at_zero() -> None:
    """A run goes on to the sample at or beyond its end."""
    cooled = dict(temperatures_K=(300.0,), time_ps=0.01, heating_K_per_ps=-300.0 / 0.01)
    atoms = Atoms("C3", [[0, 0, 0], [1.4, 0, 0], [0.7, 1.2, 0]])
    run = simulate(Morse(depth=4.0), [atoms], 30, **cooled)
    assert bool(torch.isfinite(run.state.velocities).all())
    assert bool(run.monitor.alive.all())


def test_quick_check_tells_stable_from_unstable() -> None:
    atoms = Atoms("C3", [[0, 0, 0], [1.4, 0, 0], [0.7, 1.2, 0]])
    good = quick_check(Morse(depth=4.0), atoms, temperatures_K=(100.0, 200.0), time_ps=0.02)  # type: ignore[arg-type]
    assert good["passed"]
    assert good["time_ps"] == good["asked_ps"] == 0.02
    assert [r["target_K"] for r in good["replicas"]] == [100.0, 200.0]
    potential = Morse(depth=4.0)
    potential.broken = (9, 0)
    bad = quick_check(potential, atoms, temperatures_K=(100.0, 200.0), time_ps=0.02)  # type: ignore[arg-type]
    assert not bad["passed"]
    assert bad["replicas"][0]["stable_ps"] == 0.004
    assert "failed" in bad["replicas"][0]["events"][0]
    assert bad["replicas"][1]["events"] == []


def test_quick_check_keeps_to_its_time() -> None:
    result = quick_check(Morse(depth=4.0), triatomic(), temperatures_K=(100.0,), time_ps=1e6, seconds=0.2)  # type: ignore[arg-type]
    assert 0 < result["time_ps"] < 1e6


def test_quick_check_tells_how_far_it_is() -> None:
    told: list[float] = []
    atoms = Atoms("C3", [[0, 0, 0], [1.4, 0, 0], [0.7, 1.2, 0]])
    quick_check(Morse(depth=4.0), atoms, temperatures_K=(100.0,), time_ps=0.02, progress=told.append)  # type: ignore[arg-type]
    assert told == pytest.approx([0.0, 0.004, 0.008, 0.012, 0.016])


def test_minimisation_reaches_the_minimum() -> None:
    (relaxed,), messages = minimise(Morse(), [triatomic()])  # type: ignore[arg-type]
    potential = Morse()
    forces = potential.predict(potential.collate([potential.graph(relaxed)])).forces
    assert forces is not None
    assert float(forces.norm(dim=1).max()) < 0.02
    assert messages == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(temperatures_K=()), "temperatures"),
        (dict(temperatures_K=(300.0, 300.0)), "repeat"),
        (dict(temperatures_K=(float("nan"),)), "temperatures"),
        (dict(replicas=0), "replicas"),
        (dict(timestep_fs=0.0), "timestep_fs"),
        (dict(time_ps=1e-9), "less than one step"),
        (dict(friction_per_fs=-1.0), "friction"),
        (dict(traj_every=10, stats_every=4), "must divide"),
        (dict(stats_every=8, drift_every=12), "multiple"),
        (dict(restart_every=0), "restart_every"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(DynamicsError, match=words):
        Simulation(Morse(), [triatomic()], MDConfig(**settings))  # type: ignore[arg-type]


def test_structures_that_cannot_be_used_are_refused() -> None:
    from ase.constraints import FixAtoms

    fixed = triatomic()
    fixed.set_constraint(FixAtoms([0]))
    for starts, words in (
        ([], "at least one"),
        ([fixed], "constraints"),
        ([Atoms("H", masses=[0.0])], "mass"),
        ([Atoms()], "no atoms"),
    ):
        with pytest.raises(DataError, match=words):
            Simulation(Morse(), starts, MDConfig())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Au"):
        Simulation(Morse(), [triatomic(), Atoms("Au")], MDConfig())  # type: ignore[arg-type]
