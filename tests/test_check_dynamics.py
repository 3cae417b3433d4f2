"""Temperature ramps in the engine, runs in memory, and what a check makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from md_potentials import Morse, triatomic
from torch import Tensor

from mmea_calc.check.dynamics import constant_energy, ramp, thermal_frames
from mmea_calc.config import CheckConfig, MDConfig
from mmea_calc.errors import DynamicsError
from mmea_calc.graph import Batch
from mmea_calc.md.integrators import BAOAB
from mmea_calc.md.minimise import minimise
from mmea_calc.md.record import record
from mmea_calc.md.simulation import Simulation, check_settings
from mmea_calc.md.state import Layout, replicas_of
from mmea_calc.potential import Prediction

SHORT = CheckConfig(
    ramp_from_K=50.0, ramp_to_K=150.0, ramp_ps=0.1, ramp_replicas=2, nve_K=50.0, nve_ps=0.1, equilibration_ps=0.02
)


def morse() -> Any:
    return Morse(depth=4.0)


@pytest.fixture(scope="module")
def relaxed() -> Atoms:
    """A triatomic molecule at its minimum: a strained start would heat itself."""
    (atoms,), messages = minimise(morse(), [triatomic()])
    assert not messages
    return atoms


# -- the thermostat's temperature over time --------------------------------------------------------------------------


def test_the_bath_follows_the_ramp() -> None:
    config = MDConfig(temperatures_K=(300.0,))
    layout = Layout(replicas_of([triatomic()], config))
    dt, friction, per_step = 0.5 * units.fs, 0.01 / units.fs, 0.25

    def noise(step: int | Tensor) -> Tensor:
        return torch.zeros(3, 3)

    heated = BAOAB(layout, dt, friction, noise, heating=per_step)
    for step in (0, 100, 6800):
        kT = units.kB * (300.0 + per_step * step)
        expected = torch.sqrt((1 - heated.c**2) * kT / layout.masses)
        torch.testing.assert_close(heated.spread(step), expected, rtol=1e-12, atol=0)
    constant = BAOAB(layout, dt, friction, noise)
    assert torch.equal(constant.spread(6800), heated.spread(0))


def test_atoms_reach_the_temperature_at_the_end_of_the_ramp() -> None:
    free = Atoms("H8", 100.0 * np.arange(24).reshape(8, 3))  # no forces: the thermostat alone
    config = MDConfig(
        temperatures_K=(300.0,), replicas=30, time_ps=0.4, friction_per_fs=0.2, heating_K_per_ps=2500.0, drift_every=0
    )
    run = record(Morse(), [free], config)  # type: ignore[arg-type]
    temperature = run.values["temperature"].mean(1)
    asked = 300.0 + 2500.0 * run.time_ps
    # 30 replicas of 24 degrees of freedom: 5 % for one sample
    np.testing.assert_allclose(temperature[:20].mean(), asked[:20].mean(), rtol=0.08)
    np.testing.assert_allclose(temperature[-20:].mean(), asked[-20:].mean(), rtol=0.08)


def test_the_bound_of_the_temperature_rises_with_the_ramp() -> None:
    config = MDConfig(temperatures_K=(300.0,), heating_K_per_ps=1000.0, time_ps=1.0)
    monitor = Simulation(Morse(), [triatomic()], config).monitor  # type: ignore[arg-type]
    assert float(monitor.bounds_after(2000)[1, 0] / monitor.bounds_after(0)[1, 0]) == pytest.approx(1300 / 300)


def test_heating_needs_a_thermostat_and_ends_above_zero() -> None:
    with pytest.raises(DynamicsError, match="thermostat"):
        check_settings(MDConfig(ensemble="nve", heating_K_per_ps=10.0))
    with pytest.raises(DynamicsError, match="at the end must be >= 0 K, got -200 K"):
        check_settings(MDConfig(temperatures_K=(300.0,), time_ps=1.0, heating_K_per_ps=-500.0))
    check_settings(MDConfig(temperatures_K=(300.0,), time_ps=1.0, heating_K_per_ps=-300.0))


# -- the ramp --------------------------------------------------------------------------------------------------------


def test_a_sound_potential_survives_the_ramp(relaxed: Atoms) -> None:
    done: list[float] = []
    found = ramp(morse(), relaxed, SHORT, done.append)
    assert (found.n_failed, found.survived_ps, found.changed_K) == (0, 0.1, None)
    assert found.temperature_K.shape == (len(found.time_ps), 2)
    assert done[-1] == 1.0
    assert done == sorted(done)


def test_a_failure_is_reported_with_its_time_temperature_and_reason(relaxed: Atoms) -> None:
    potential = morse()
    potential.broken = (101, 1)  # the second replica, in step 100
    found = ramp(potential, relaxed, SHORT)
    whole, failed = found.replicas
    assert (whole.survived_ps, whole.failed_K) == (0.1, None)
    assert failed.survived_ps == pytest.approx(0.05)
    assert failed.failed_K == pytest.approx(100.0)
    assert "not finite" in failed.events[-1]
    assert np.isnan(found.temperature_K[-1, 1])
    assert np.isfinite(found.temperature_K[:, 0]).all()
    assert found.survived_ps == pytest.approx(0.075)


def test_bonds_that_break_are_told_and_fail_nothing() -> None:
    weak = Atoms("CO", [[0, 0, 0], [0, 0, 1.4]])
    found = ramp(Morse(depth=0.2), weak, replace(SHORT, ramp_from_K=3000.0, ramp_to_K=4000.0))  # type: ignore[arg-type]
    assert found.n_failed == 0
    assert found.changed_K is not None
    assert 3000 < found.changed_K < 4000
    assert any("bond broken" in e for r in found.replicas for e in r.events)


# -- constant energy -------------------------------------------------------------------------------------------------


class Leaking(Morse):
    """Forces that are not the slope of the energy: all atoms are pushed along x."""

    def predict(self, batch: Batch, **options: Any) -> Prediction:
        found = super().predict(batch, **options)
        assert found.forces is not None
        push = torch.zeros_like(found.forces)
        push[:, 0] = 0.02
        return replace(found, forces=found.forces + push)


def test_energy_is_conserved_where_forces_are_the_slope_of_the_energy(relaxed: Atoms) -> None:
    potential = morse()
    frames = thermal_frames(potential, relaxed, SHORT)
    assert len(frames) == SHORT.nve_replicas
    assert not np.allclose(frames[0].positions, frames[1].positions)
    found = constant_energy(potential, frames, SHORT)
    assert found.drift_meV_per_atom_ps is not None
    assert found.drift_error_meV_per_atom_ps is not None
    assert abs(found.drift_meV_per_atom_ps) < 3 * found.drift_error_meV_per_atom_ps + 0.05
    assert len(found.frames) >= 10 * SHORT.nve_replicas
    assert found.temperature_K == pytest.approx(50, abs=30)

    leaking = constant_energy(Leaking(depth=4.0), frames, SHORT)  # type: ignore[arg-type]
    assert leaking.drift_meV_per_atom_ps is not None
    assert abs(leaking.drift_meV_per_atom_ps) > 100 * abs(found.drift_meV_per_atom_ps) + 1


def test_a_failure_at_constant_energy_leaves_no_drift(relaxed: Atoms) -> None:
    potential = morse()
    potential.broken = (20, 0)
    found = constant_energy(potential, [relaxed, relaxed], SHORT)
    assert (found.drift_meV_per_atom_ps, found.drift_error_meV_per_atom_ps) == (None, None)
    assert len(found.events) == 1


def test_a_run_in_memory_keeps_frames_of_the_living(relaxed: Atoms) -> None:
    potential = morse()
    potential.broken = (18, 1)  # in step 17, seen at step 24
    config = MDConfig(temperatures_K=(50.0,), replicas=2, time_ps=0.02, drift_every=0)
    run = record(potential, [relaxed], config, frames_every=1)
    assert run.length_ps == pytest.approx(0.02)
    assert [i for i, _ in run.frames] == [0, 1, 0, 1, 0, 0, 0]
    assert np.isnan(run.values["potential_energy"][3:, 1]).all()
    assert np.isfinite(np.stack(run.final)).all()
