"""Runs with their files: trajectories, checkpoints, crashes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.io import read
from md_potentials import Morse, triatomic

from conftest import ROOT
from mmea_calc.config import AdapterConfig, MDConfig, to_dict
from mmea_calc.errors import DataError, DynamicsError, TrajectoryError
from mmea_calc.files import alone_in
from mmea_calc.md import checkpoint as checkpoint_module
from mmea_calc.md import run_md, trajectory_writer
from mmea_calc.md.checkpoint import read_checkpoint
from mmea_calc.md.convert import convert_trajectory
from mmea_calc.md.run import MDProgress
from mmea_calc.md.summary import Summary, conserved_drift
from mmea_calc.md.trajectory import OBSERVABLES, read_events, read_replica, read_settings, replica_names
from mmea_calc.md.trajectory_writer import Settings, TrajectoryWriter
from mmea_calc.statistics import block_average, drift

CONFIG = MDConfig(
    temperatures_K=(300.0, 600.0),
    replicas=2,
    time_ps=0.05,  # 100 steps
    traj_every=4,
    stats_every=2,
    drift_every=0,
    restart_every=20,
    positions_dtype="float64",
    seed=5,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def crystal() -> Atoms:
    return Atoms("C2", [[0.1, 0, 0], [0.9, 0.8, 0.85]], cell=[[0, 1.7, 1.7], [1.7, 0, 1.7], [1.7, 1.7, 0]], pbc=True)


def start(
    folder: Path,
    config: MDConfig = CONFIG,
    *,
    starts: Sequence[Atoms] = (),
    potential: Morse | None = None,
    **options: object,
) -> Summary:
    return run_md(potential or Morse(), list(starts) or [triatomic(), crystal()], folder, config, **options)  # type: ignore[arg-type]


def changed(**changes: object) -> MDConfig:
    return MDConfig(**{**vars(CONFIG), **changes})


class InterruptedRunError(Exception):
    pass


def interrupt_at(step: int):  # type: ignore[no-untyped-def]
    def progress(event: MDProgress) -> None:
        if event.message is None and event.step >= step:
            raise InterruptedRunError

    return progress


def assert_same_runs(one: Path, other: Path) -> None:
    """Bit for bit: every frame, every observable, the last checkpoint."""
    assert replica_names(one) == replica_names(other)
    for name in replica_names(one):
        a, b = read_replica(one, name), read_replica(other, name)
        for key in ("steps", "times_ps", "positions", "velocities", "sample_steps", "sample_times_ps"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key), err_msg=f"{name} {key}")
        for key in OBSERVABLES:
            np.testing.assert_array_equal(a.observables[key], b.observables[key], err_msg=f"{name} {key}")
    first, second = (checkpoint_module.read_checkpoint(folder / "checkpoint.safetensors") for folder in (one, other))
    for key in ("positions", "velocities", "forces", "potential_energy", "heat"):
        assert torch.equal(getattr(first.state, key), getattr(second.state, key)), key
    assert first.events == second.events


# --- trajectories ----------------------------------------------------------------------------------------------------


def test_a_run_writes_what_its_description_says(tmp_path: Path) -> None:
    summary = start(tmp_path / "RUN")
    with h5py.File(tmp_path / "RUN/trajectory.h5") as file:
        assert file["h5md"].attrs["version"].tolist() == [1, 1]
        assert set(file["particles"]) == set(replica_names(tmp_path / "RUN"))
        group = file["particles/start1-600K-1"]
        assert group["position/value"].attrs["unit"] == "Angstrom"
        assert group["velocity/value"].attrs["unit"] == "Angstrom fs-1"
        assert group["position/time"].attrs["unit"] == "ps"
        assert group["position/value"].dtype == np.float64
        assert group["position/value"].chunks is not None
        assert group["position/value"].compression == "gzip"
        assert group["position/step"][:].tolist() == list(range(0, 101, 4))
        np.testing.assert_allclose(group["position/time"][:], group["position/step"][:] * 0.5e-3)
        np.testing.assert_array_equal(group["box/edges/value"][3], crystal().cell.array)
        assert "edges" not in file["particles/start0-300K-0/box"]
        for name, unit in OBSERVABLES.items():
            assert file[f"observables/start0-300K-0/{name}/value"].attrs["unit"] == unit
            assert file[f"observables/start0-300K-0/{name}/step"][:].tolist() == list(range(0, 101, 2))

        def has_unit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset) and name.rsplit("/", 1)[-1] not in ("step", "species", "events"):
                assert "unit" in item.attrs, name

        file.visititems(has_unit)
    assert read_settings(tmp_path / "RUN")["seed"] == 5
    replica = read_replica(tmp_path / "RUN", "start0-300K-1")
    values = replica.observables
    total = values["potential_energy"] + values["kinetic_energy"] - values["heat"]
    np.testing.assert_allclose(values["conserved_energy"], total, rtol=0, atol=1e-12)
    velocities = (replica.velocities[-1] / units.fs)[:, :]  # type: ignore[index]
    kinetic = 0.5 * (replica.member.masses[:, None] * velocities**2).sum()
    assert kinetic == pytest.approx(values["kinetic_energy"][-1], rel=1e-12)
    assert json.loads((tmp_path / "RUN/summary.json").read_text())["steps"] == summary.steps == 100
    assert not list((tmp_path / "RUN").glob(".*"))


def test_single_precision_frames_without_velocities(tmp_path: Path) -> None:
    start(tmp_path / "RUN", changed(positions_dtype="float32", velocities=False))
    replica = read_replica(tmp_path / "RUN", "start0-300K-0")
    assert replica.positions.dtype == np.float32
    assert replica.velocities is None


def writer(folder: Path, **options: int) -> TrajectoryWriter:
    member = trajectory_writer.Member(
        "start0-300K-0", 0, 300.0, 0, np.array([1]), np.array([1.008]), np.zeros((3, 3)), (False, False, False)
    )
    return TrajectoryWriter(folder, [member], Settings("float32", True, 5, 5, {}), **options)


def frame(trajectory: TrajectoryWriter, step: int) -> None:
    trajectory.frame(step, step * 1e-3, np.full((1, 3), float(step)), np.zeros((1, 3)), np.array([True]))


def test_steps_that_do_not_increase_are_refused(tmp_path: Path) -> None:
    trajectory = writer(tmp_path)
    frame(trajectory, 0)
    frame(trajectory, 5)
    for step in (5, 4):
        with pytest.raises(TrajectoryError, match="increase"):
            frame(trajectory, step)
    trajectory.flush([])
    with pytest.raises(TrajectoryError, match=r"step 5 after step 5"):
        frame(trajectory, 5)
    resumed = writer(tmp_path, resume_at=5)
    with pytest.raises(TrajectoryError, match="increase"):
        frame(resumed, 5)
    frame(resumed, 6)


def test_resuming_cuts_off_later_frames(tmp_path: Path) -> None:
    trajectory = writer(tmp_path)
    for step in range(0, 50, 5):
        frame(trajectory, step)
        trajectory.flush([])
    resumed = writer(tmp_path, resume_at=22)
    assert read_replica(tmp_path, "start0-300K-0").steps.tolist() == [0, 5, 10, 15, 20]
    frame(resumed, 25)
    resumed.flush([])
    assert read_replica(tmp_path, "start0-300K-0").positions[:, 0, 0].tolist() == [0, 5, 10, 15, 20, 25]


def test_the_visible_file_is_complete_while_a_reader_holds_it(tmp_path: Path) -> None:
    trajectory = writer(tmp_path)
    path = str(tmp_path / "trajectory.h5")
    code = (
        "import h5py, sys; file = h5py.File(sys.argv[1]); print('open', flush=True); input(); assert file['particles']"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        for step in range(5):
            frame(trajectory, step)
            trajectory.flush([])
            assert read_replica(tmp_path, "start0-300K-0").steps.tolist() == list(range(step + 1))
        reader.communicate("done\n", timeout=30)
    assert reader.returncode == 0


@pytest.mark.parametrize("moment", ["append", "link", "first rename", "second rename"])
def test_the_file_is_complete_wherever_writing_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    trajectory = writer(tmp_path)
    frame(trajectory, 0)
    trajectory.flush([])
    frame(trajectory, 1)
    renames = []

    def append(*arguments: object) -> None:
        with h5py.File(tmp_path / ".trajectory.twin.h5", "r+") as file:
            file["particles/start0-300K-0/position/value"].resize(1, axis=0)
            raise InterruptedRunError

    def stop(*arguments: object) -> None:
        raise InterruptedRunError

    def rename(source: object, destination: object, real=os.replace) -> None:  # type: ignore[no-untyped-def]
        renames.append(source)
        if len(renames) == (1 if moment == "first rename" else 2):
            raise InterruptedRunError
        real(source, destination)

    with monkeypatch.context() as patch:
        if moment == "append":
            patch.setattr(trajectory_writer, "_append", append)
        elif moment == "link":
            patch.setattr(os, "link", stop)
        else:
            patch.setattr(os, "replace", rename)
        with pytest.raises(InterruptedRunError):
            trajectory.flush([])
    expected = [0, 1] if moment == "second rename" else [0]
    assert read_replica(tmp_path, "start0-300K-0").steps.tolist() == expected
    resumed = writer(tmp_path, resume_at=0)
    frame(resumed, 1)
    resumed.flush([])
    assert read_replica(tmp_path, "start0-300K-0").steps.tolist() == [0, 1]


# MDAnalysis guesses elements and masses from names, which a universe without a topology lacks.
@pytest.mark.filterwarnings("ignore:there is no reference attributes:UserWarning")
def test_mdanalysis_reads_every_replica(tmp_path: Path) -> None:
    mda = pytest.importorskip("MDAnalysis", reason="MDAnalysis is not installed")
    start(tmp_path / "RUN")
    for name in replica_names(tmp_path / "RUN"):
        mine = read_replica(tmp_path / "RUN", name)
        universe = mda.Universe(str(tmp_path / f"RUN/replicas/{name}.h5md"))
        assert len(universe.trajectory) == len(mine.steps)
        for k, step in enumerate(universe.trajectory):
            assert step.time == pytest.approx(mine.times_ps[k])
            np.testing.assert_allclose(universe.atoms.positions, mine.positions[k], atol=1e-5)
            assert mine.velocities is not None
            np.testing.assert_allclose(universe.atoms.velocities, mine.velocities[k] * 1000, atol=1e-3)


def test_views_show_one_replica_each(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    moved = (tmp_path / "RUN").rename(tmp_path / "elsewhere")  # links are relative
    for name in replica_names(moved):
        with h5py.File(moved / f"replicas/{name}.h5md") as file:
            np.testing.assert_array_equal(
                file["particles/trajectory/position/value"][:], read_replica(moved, name).positions
            )


def test_conversion_keeps_frames_velocities_and_cells(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    assert convert_trajectory(tmp_path / "RUN", tmp_path / "out.xyz", every=5) == (8 * 6, 8)
    frames = read(tmp_path / "out.xyz", index=":")
    mine = read_replica(tmp_path / "RUN", "start1-600K-0")
    theirs = [a for a in frames if a.info["replica"] == "start1-600K-0"]
    assert [a.info["step"] for a in theirs] == [0, 20, 40, 60, 80, 100]
    np.testing.assert_allclose(theirs[2].positions, mine.positions[10], atol=1e-7)
    np.testing.assert_allclose(theirs[2].get_velocities() * units.fs, mine.velocities[10], atol=1e-8)  # type: ignore[index]
    np.testing.assert_allclose(theirs[2].cell.array, crystal().cell.array)
    assert convert_trajectory(tmp_path / "RUN", tmp_path / "one.traj", replicas=["start0-300K-0"]) == (26, 1)
    assert len(read(tmp_path / "one.traj", index=":")) == 26
    with pytest.raises(TrajectoryError, match="no replica 'x'"):
        convert_trajectory(tmp_path / "RUN", tmp_path / "out.xyz", replicas=["x"])
    for name in ("out.nonsense", "out"):
        with pytest.raises(TrajectoryError, match="ending"):
            convert_trajectory(tmp_path / "RUN", tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrajectoryError, match=r"is a folder.*folder\.xyz"):
        convert_trajectory(tmp_path / "RUN", tmp_path / "folder")
    assert not list(tmp_path.glob(".part*"))


def test_files_that_are_no_trajectory_are_explained(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="there is no trajectory"):
        replica_names(tmp_path)
    (tmp_path / "trajectory.h5").write_bytes(b"no HDF5")
    with pytest.raises(TrajectoryError, match="no HDF5 file"):
        replica_names(tmp_path)


# --- restart ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ["nvt", "nve"])
def test_interrupted_anywhere_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, ensemble: str) -> None:
    config = changed(ensemble=ensemble)
    start(tmp_path / "whole", config)
    for k, step in enumerate((2, 20, 38, 96)):
        with pytest.raises(InterruptedRunError):
            start(tmp_path / "parts", config, resume=k > 0, progress=interrupt_at(step))
    start(tmp_path / "parts", config, resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_longer_time_goes_on_with_a_finished_run(tmp_path: Path) -> None:
    start(tmp_path / "whole")
    start(tmp_path / "parts", changed(time_ps=0.0235))  # 47 steps: no multiple of anything
    start(tmp_path / "parts", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert read_settings(tmp_path / "parts")["time_ps"] == CONFIG.time_ps


def test_a_run_that_is_told_to_stop_loses_no_step(tmp_path: Path) -> None:
    start(tmp_path / "whole")
    summary = start(tmp_path / "parts", go_on=lambda step: step < 38)
    assert summary.steps == read_checkpoint(tmp_path / "parts/checkpoint.safetensors").state.step == 38
    assert json.loads((tmp_path / "parts/summary.json").read_text())["steps"] == 38
    start(tmp_path / "parts", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_failed_replica_stays_failed_when_resumed(tmp_path: Path) -> None:
    potential = Morse()
    potential.broken = (31, 1)
    whole = start(tmp_path / "whole", potential=potential)
    assert whole.failed == ("start0-300K-1",)
    again = Morse()
    again.broken = (31, 1)
    with pytest.raises(InterruptedRunError):
        start(tmp_path / "parts", potential=again, progress=interrupt_at(62))
    assert [e["replica"] for e in read_events(tmp_path / "parts") or ()] == ["start0-300K-1"]  # without any summary
    resumed = start(tmp_path / "parts", resume=True)  # the potential is sound again
    assert resumed.failed == whole.failed
    row = next(r for r in resumed.replicas if r.failed)
    assert row.events[0].step == 30
    assert row.stable_ps == 0.014
    assert row.length_ps == 0.014
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_failure_after_the_last_sample_is_told(tmp_path: Path) -> None:
    potential, lines = Morse(), list[str]()
    potential.broken = (48, 1)  # in step 47, the last one; samples are every second step

    def progress(event: MDProgress) -> None:
        lines.extend([event.message] if event.message else [])

    summary = start(tmp_path / "RUN", changed(time_ps=0.0235), potential=potential, progress=progress)
    assert summary.failed == ("start0-300K-1",)
    assert [e["step"] for e in read_events(tmp_path / "RUN") or ()] == [47]
    assert any("start0-300K-1: failed" in line for line in lines)
    again = start(tmp_path / "RUN", resume=True)
    assert again.failed == ("start0-300K-1",)


def test_a_run_of_failed_replicas_ends_where_it_would_if_it_were_resumed(tmp_path: Path) -> None:
    alone = changed(temperatures_K=(300.0,), replicas=1, stats_every=8, traj_every=8, restart_every=14)
    steps = []
    for name in ("whole", "parts"):
        potential = Morse()
        potential.broken = (13, 0)  # in step 12, between a sample and a checkpoint
        folder = tmp_path / name
        summary = start(folder, alone, starts=[triatomic()], potential=potential)
        assert summary.failed == ("start0-300K-0",)
        steps.append(summary.steps)
        if name == "parts":
            summary = start(folder, alone, starts=[triatomic()], resume=True)
            steps.append(summary.steps)
    assert steps == [14, 14, 14]
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_start_that_cannot_be_relaxed_leaves_the_run_that_is_there(tmp_path: Path) -> None:
    start(tmp_path / "RUN", changed(time_ps=0.001))
    before = sorted((p.name, p.stat().st_size) for p in (tmp_path / "RUN").iterdir())
    same = triatomic()
    same.positions[1] = same.positions[0]
    with pytest.raises(DataError, match="start structure 0 cannot be relaxed: forces are not finite"):
        start(tmp_path / "RUN", changed(minimize=True), starts=[same], overwrite=True)
    assert sorted((p.name, p.stat().st_size) for p in (tmp_path / "RUN").iterdir()) == before


def test_a_run_ends_when_all_replicas_have_failed(tmp_path: Path) -> None:
    summary = start(tmp_path / "RUN", changed(max_force_eV_per_A=1e-9))
    assert len(summary.failed) == 8
    assert summary.steps == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(seed=6), "seed was 5, now 6"),
        (dict(timestep_fs=0.25), "timestep_fs was 0.5, now 0.25"),
        (dict(temperatures_K=(300.0,)), "temperatures_K"),
        (dict(friction_per_fs=0.1, traj_every=8), "friction_per_fs was 0.01, now 0.1; traj_every was 4, now 8"),
    ],
)
def test_resuming_with_other_settings_names_them_and_changes_nothing(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    start(tmp_path / "RUN")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "RUN").iterdir()) if p.is_file()}
    with pytest.raises(DynamicsError, match=words):
        start(tmp_path / "RUN", changed(**changes), resume=True)
    with pytest.raises(DynamicsError, match="start_structures"):
        start(tmp_path / "RUN", starts=[triatomic(seed=1), crystal()], resume=True)
    with pytest.raises(DynamicsError, match="holds a run already"):
        start(tmp_path / "RUN")
    assert before == {p: p.read_bytes() for p in sorted((tmp_path / "RUN").iterdir()) if p.is_file()}


def test_whole_numbers_are_the_same_settings(tmp_path: Path) -> None:
    """As a script writes them; the command line reads 300.0."""
    start(tmp_path / "RUN", changed(temperatures_K=(300, 600)))
    start(tmp_path / "RUN", changed(temperatures_K=(300.0, 600.0)), resume=True)


def test_numbers_of_numpy_and_single_values_are_settings_too() -> None:
    given = MDConfig(temperatures_K=np.int64(300), replicas=np.int64(2), time_ps=np.float32(0.5))
    assert given == MDConfig(temperatures_K=(300,), replicas=2, time_ps=0.5)
    assert json.loads(json.dumps(to_dict(given)))["temperatures_K"] == [300]
    assert MDConfig(temperatures_K=np.array([300.0, 600.0])).temperatures_K == (300.0, 600.0)  # type: ignore[arg-type]
    assert AdapterConfig(targets="products.*").targets == ("products.*",)  # type: ignore[arg-type]
    assert AdapterConfig().targets is None


def test_overwriting_starts_anew_and_leaves_foreign_files(tmp_path: Path) -> None:
    start(tmp_path / "RUN", changed(seed=9))
    (tmp_path / "RUN/notes.txt").write_text("mine")
    start(tmp_path / "RUN", overwrite=True)
    start(tmp_path / "fresh")
    assert_same_runs(tmp_path / "RUN", tmp_path / "fresh")
    assert (tmp_path / "RUN/notes.txt").read_text() == "mine"
    with pytest.raises(DynamicsError, match="no run to resume"):
        start(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_the_folder_of_a_training_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DynamicsError, match="folder of a training"):
        start(tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "data.json"]


def test_overwriting_takes_the_old_analysis_along(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    (tmp_path / "RUN/analysis").mkdir()
    (tmp_path / "RUN/analysis/rdf.png").write_text("old")
    start(tmp_path / "RUN", overwrite=True)
    assert not (tmp_path / "RUN/analysis").exists()


def test_a_run_is_not_resumed_to_less_than_it_has(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    config = (tmp_path / "RUN/config.json").read_bytes()
    with pytest.raises(DynamicsError, match=r"has \d+ steps already, more than the 10 that are asked for"):
        start(tmp_path / "RUN", changed(time_ps=0.005), resume=True)
    assert (tmp_path / "RUN/config.json").read_bytes() == config


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    start(tmp_path / "RUN", changed(time_ps=0.02))
    before = (tmp_path / "RUN/trajectory.h5").read_bytes()
    with alone_in(tmp_path / "RUN", DynamicsError):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(DynamicsError, match="another process is writing into"):
                start(tmp_path / "RUN", **how)  # type: ignore[arg-type]
    assert (tmp_path / "RUN/trajectory.h5").read_bytes() == before
    start(tmp_path / "RUN", resume=True)
    start(tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", tmp_path / "RUN")


def test_damage_within_a_trajectory_is_explained(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    file = tmp_path / "RUN/trajectory.h5"
    with h5py.File(file, "r") as opened:
        data = opened[f"particles/{next(iter(opened['particles']))}/position/value"]
        info = data.id.get_chunk_info(0)
    content = bytearray(file.read_bytes())
    content[info.byte_offset : info.byte_offset + info.size] = bytes(info.size)
    file.write_bytes(content)
    with pytest.raises(TrajectoryError, match="no HDF5 file that can be read"):
        [read_replica(tmp_path / "RUN", name) for name in replica_names(tmp_path / "RUN")]


def test_conversion_writes_databases_too(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    frames, _ = convert_trajectory(tmp_path / "RUN", tmp_path / "out.db")
    assert len(read(tmp_path / "out.db", index=":")) == frames > 0


def test_a_damaged_checkpoint_is_explained(tmp_path: Path) -> None:
    start(tmp_path / "RUN")
    (tmp_path / "RUN/checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(DynamicsError, match="damaged"):
        start(tmp_path / "RUN", resume=True)


def test_velocities_of_a_start_structure_are_not_ignored_in_silence(tmp_path: Path) -> None:
    atoms, messages = triatomic(), []
    atoms.set_velocities(np.ones((3, 3)))
    start(tmp_path / "RUN", starts=[atoms], progress=lambda e: messages.append(e.message))
    assert "velocities" in str(messages[0])


def test_minimised_starts_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    config = changed(minimize=True, time_ps=0.02)
    start(tmp_path / "whole", config, starts=[triatomic()])
    with pytest.raises(InterruptedRunError):
        start(tmp_path / "parts", config, starts=[triatomic()], progress=interrupt_at(24))
    start(tmp_path / "parts", config, starts=[triatomic()], resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    moved = read_replica(tmp_path / "whole", "start0-300K-0").positions[0] - triatomic().positions
    assert np.abs(moved).max() > 0.01


def test_a_run_at_constant_energy_that_relaxed_to_a_line_has_its_temperature_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A molecule on a line has one rotation less than the bent one that was given."""
    line = triatomic()
    line.positions = [[0, 0, 0], [1.4, 0, 0], [-1.4, 0, 0]]
    monkeypatch.setattr("mmea_calc.md.run.minimise", lambda potential, starts: ([line], []))
    config = changed(minimize=True, ensemble="nve", time_ps=0.02)
    start(tmp_path / "whole", config, starts=[triatomic()])
    with pytest.raises(InterruptedRunError):
        start(tmp_path / "parts", config, starts=[triatomic()], progress=interrupt_at(24))
    start(tmp_path / "parts", config, starts=[triatomic()], resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


# --- crashes ---------------------------------------------------------------------------------------------------------

# A process that forks: its children run and are killed, the imports are made once.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_md_run as t
folder, config = Path(sys.argv[2]), t.changed(time_ps=0.1)
chance = random.Random(int(sys.argv[3]))
killed = 0
while True:
    child = os.fork()
    if child == 0:
        try:
            # slow enough for the first one to be killed on any machine
            t.start(folder, config, resume=(folder / "config.json").exists(), progress=lambda e: time.sleep(4e-3))
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    time.sleep(chance.uniform(0.05, 0.35))
    if killed < 6:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if (folder / "trajectory.h5").exists():
        t.replica_names(folder)
    if os.WIFSIGNALED(status):
        killed += 1
        continue
    assert os.WEXITSTATUS(status) == 0
    break
assert killed
print("killed", killed)
"""


def test_killed_at_random_moments_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    start(tmp_path / "whole", changed(time_ps=0.1))
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT / "tests"), str(tmp_path / "RUN"), "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "killed" in result.stdout
    assert_same_runs(tmp_path / "whole", tmp_path / "RUN")


def test_a_disk_that_fills_up_leaves_the_file_of_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "whole")
    real, calls = trajectory_writer._append, []

    def append(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 4:  # the checkpoints of steps 0, 20 and 40 are through
            with h5py.File(tmp_path / "RUN/.trajectory.twin.h5", "r+") as file:
                file["particles/start0-300K-0/position/value"].resize(7, axis=0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(trajectory_writer, "_append", append)
        with pytest.raises(TrajectoryError, match=r"trajectory\.h5 cannot be written: No space left on device"):
            start(tmp_path / "RUN")
    assert read_replica(tmp_path / "RUN", "start0-300K-0").steps[-1] == 40
    assert not (tmp_path / "RUN/.trajectory.twin.h5").exists()  # the space it took is free again
    start(tmp_path / "RUN", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "RUN")


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_md_run as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    t.start(Path(sys.argv[2]), t.changed(time_ps=0.25), starts=[t.triatomic()])
except t.TrajectoryError as error:
    print(error)
    sys.exit(3)
"""


def test_a_write_that_the_system_refuses_leaves_the_file_of_the_last_checkpoint(tmp_path: Path) -> None:
    config = changed(time_ps=0.25)
    start(tmp_path / "whole", config, starts=[triatomic()])
    with pytest.raises(InterruptedRunError):
        start(tmp_path / "short", config, starts=[triatomic()], progress=interrupt_at(50))
    # more than the short run needs, what is reserved for a checkpoint included, and less than the whole run
    room = 8192 * 4 * (len(OBSERVABLES) + 7)
    limit = (tmp_path / "short/trajectory.h5").stat().st_size + room + 40_000
    assert limit < (tmp_path / "whole/trajectory.h5").stat().st_size + room
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(ROOT / "tests"), str(tmp_path / "RUN"), str(limit)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert result.returncode == 3, result.stdout + result.stderr
    assert "trajectory.h5 cannot be written: File too large" in result.stdout
    assert 20 <= read_replica(tmp_path / "RUN", "start0-300K-0").steps[-1] < 500
    start(tmp_path / "RUN", config, starts=[triatomic()], resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "RUN")


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_errors_from_enough_samples_on(tmp_path: Path) -> None:
    short = start(tmp_path / "short", changed(time_ps=0.014)).replicas[0]  # 15 samples
    assert short.temperature_K is not None
    assert short.temperature_error_K is short.drift_meV_per_atom_ps is short.drift_error_meV_per_atom_ps is None
    row = start(tmp_path / "RUN").replicas[0]
    stored = read_replica(tmp_path / "RUN", row.replica)
    half = block_average(stored.observables["temperature"][25:])
    assert (row.temperature_K, row.temperature_error_K) == (half.mean, half.error)
    conserved = 1000 * stored.observables["conserved_energy"] / 3
    line = drift(stored.sample_times_ps, conserved, walks=True)
    assert row.drift_meV_per_atom_ps == pytest.approx(line.slope)
    assert row.drift_error_meV_per_atom_ps == pytest.approx(line.error)


def test_the_conserved_energy_walks_where_there_are_random_forces() -> None:
    rng = np.random.default_rng(0)
    t, walk = np.arange(100.0), np.cumsum(rng.normal(size=100))
    for settings, walks in (
        (dict(ensemble="nvt", friction_per_fs=0.01), True),
        (dict(ensemble="nvt", friction_per_fs=0.0), False),
        (dict(ensemble="nve", friction_per_fs=0.01), False),
    ):
        assert conserved_drift(t, walk, settings) == drift(t, walk, walks=walks)
    assert drift(t, walk, walks=True) != drift(t, walk)
    assert np.isnan(conserved_drift(t[:15], walk[:15], dict(ensemble="nve")).slope)
