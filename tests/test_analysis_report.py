"""The folder of a run -> arrays -> pictures, csv files and a page, for runs whose contents are known."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from typer.testing import CliRunner

from mmea_calc.analysis import vibrations
from mmea_calc.analysis.motion import kinetic_temperature_K, spectrum_peaks_per_cm
from mmea_calc.analysis.quantity import Quantity, Selection
from mmea_calc.analysis.reader import read_run
from mmea_calc.analysis.report import analyse, with_error
from mmea_calc.analysis.table import ReplicaRow
from mmea_calc.errors import DataError, TrajectoryError
from mmea_calc.md.trajectory import OBSERVABLES, Member
from mmea_calc.md.trajectory_writer import Settings, TrajectoryWriter
from mmea_cli.main import app

SPACING_FS = 4.0
PER_CM = 1.0 / 33356.4095


def swinging(atoms: Atoms, kelvin: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every atom swings about its place at 1500/cm along x; observables are noise of known width, and a drift."""
    rng = np.random.default_rng(seed)
    w = 2 * np.pi * 1500.0 * PER_CM
    time_fs = SPACING_FS * np.arange(n)[:, None]
    phase = rng.uniform(0, 2 * np.pi, len(atoms))
    amplitude = np.sqrt(2 * units.kB * kelvin / atoms.get_masses()) * units.fs / w
    x, v = np.tile(atoms.positions, (n, 1, 1)), np.zeros((n, len(atoms), 3))
    x[:, :, 0] += amplitude * np.sin(w * time_fs + phase)
    v[:, :, 0] = w * amplitude * np.cos(w * time_fs + phase)
    temperature = kelvin + rng.normal(scale=20.0, size=n)
    values = {
        "temperature": temperature,
        "potential_energy": -1234.5 + rng.normal(scale=0.1, size=n),
        "kinetic_energy": 1.5 * len(atoms) * units.kB * temperature,
        "conserved_energy": -1234.0 + 2e-6 * len(atoms) * time_fs[:, 0],  # 2 meV per atom and ps
        "adapted_minus_bare": np.full(n, np.nan),
    }
    filler = np.linspace(0.1, 1.0, n)
    return x, v, np.stack([values.get(name, filler) for name in OBSERVABLES])


def make_run(
    folder: Path,
    n: int = 200,
    structures: Sequence[Atoms] | None = None,
    velocities: bool = True,
    spacing: float = 1.0,
    events: Sequence[dict[str, Any]] = (),
    absent: int = 0,
) -> Path:
    """Two replicas at 300 and 900 K of every structure, written as a run writes them; the first few without frames."""
    folder.mkdir(exist_ok=True)
    starts = [molecule("CH3CH2OH")] if structures is None else structures
    config = {"ensemble": "nvt", "friction_per_fs": 0.001, "temperatures_K": [300.0, 900.0]}
    which = [(s, kelvin, k) for s in range(len(starts)) for kelvin in (300.0, 900.0) for k in range(2)]
    members = []
    for s, kelvin, k in which:
        atoms = starts[s]
        cell = np.array(atoms.cell.array)
        name, pbc = f"start{s}-{kelvin:g}K-{k}", tuple(bool(p) for p in atoms.pbc)
        members.append(Member(name, s, kelvin, k, atoms.numbers, atoms.get_masses(), cell, pbc))  # type: ignore[arg-type]
    data = [swinging(starts[s], kelvin, n, k) for s, kelvin, k in which]
    writer = TrajectoryWriter(folder, members, Settings("float32", velocities, n, n, config))
    alive = np.arange(len(members)) >= absent
    for i in range(n):
        time_ps = spacing * SPACING_FS * i / 1000
        positions, speeds = (np.concatenate([d[j][i] for d in data]) for j in (0, 1))
        writer.frame(8 * i, time_ps, positions, speeds, alive)
        writer.sample(8 * i, time_ps, np.stack([d[2][:, i] for d in data], axis=1), alive)
    writer.flush(events)
    writer.close()
    return folder


def read_csv(path: Path) -> dict[str, list[str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [row[key] for row in rows] for key in rows[0]}


@pytest.fixture(scope="module")
def molecular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "mol")
    analyse(folder, skip_ps=0.1)
    return folder / "analysis"


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which cost most of the time."""

    def draw(_: Quantity, path: Path) -> Path:
        path.write_bytes(b"no picture")
        return path

    monkeypatch.setattr("mmea_calc.analysis.report.draw", draw)


class Page(HTMLParser):
    """Tags that are left open, and every address in the page."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_is_read_in_the_units_of_the_package(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "r", n=20))
    assert [r.name for r in run.replicas] == ["start0-300K-0", "start0-300K-1", "start0-900K-0", "start0-900K-1"]
    replica = run.replicas[2]
    assert (replica.target_K, replica.start_index, run.config["ensemble"]) == (900.0, 0, "nvt")
    assert replica.time_fs == pytest.approx(SPACING_FS * np.arange(20))
    assert replica.masses_amu == pytest.approx(molecule("CH3CH2OH").get_masses())
    frames = run.frames(replica, skip_fs=8.0)
    assert frames.time_fs == pytest.approx(SPACING_FS * np.arange(2, 20))
    assert frames.positions_A.shape == (18, 9, 3)
    assert frames.velocities_A_per_fs is not None
    kinetic = kinetic_temperature_K(frames.velocities_A_per_fs, replica.masses_amu, 9)
    assert kinetic.mean() == pytest.approx(900.0, rel=0.25)


@pytest.mark.usefixtures("unpainted")
def test_events_are_shown(tmp_path: Path) -> None:
    event = {"replica": "start0-900K-1", "step": 8, "time_ps": 0.004, "kind": "failed", "detail": "too hot"}
    folder = make_run(tmp_path / "r", n=20, events=[event])
    result = analyse(folder)
    assert [row.events for row in result.rows] == ["", "", "", "failed at 0.004 ps: too hot"]
    assert "failed at 0.004 ps: too hot" in result.page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("unpainted")
def test_events_of_a_run_of_an_early_version_are_in_its_summary(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", n=20)
    with h5py.File(folder / "trajectory.h5", "r+") as file:
        del file["parameters/events"]
    event = {"replica": "start0-900K-1", "step": 8, "time_ps": 0.004, "kind": "failed", "detail": "too hot"}
    (folder / "summary.json").write_text(json.dumps({"replicas": [{"events": [event]}, {"events": []}]}))
    assert [row.events for row in analyse(folder).rows] == ["", "", "", "failed at 0.004 ps: too hot"]


@pytest.mark.parametrize("content", [None, b"text"])
def test_a_folder_without_a_trajectory_is_refused_and_nothing_is_written(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "trajectory.h5").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TrajectoryError, match=r"trajectory\.h5"):
        analyse(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_molecule_has_one_picture_and_one_csv_per_quantity(molecular: Path) -> None:
    names = ["temperature", "energies", "conserved", "monitor", "blocking", "bonds", "angles", "dihedrals", "vacf"]
    names.append("spectrum")
    assert sorted(p.name for p in molecular.glob("*.png")) == sorted(f"{n}.png" for n in names)
    assert sorted(p.stem for p in molecular.glob("*.csv")) == sorted([*names, "table"])
    for name in names:
        assert (molecular / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in molecular.iterdir() if p.name.startswith(".")]


def test_the_page_is_whole_and_needs_nothing_from_outside(molecular: Path) -> None:
    text = (molecular / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) == 10
    assert all(a.startswith("data:image/png;base64,iVBOR") for a in page.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "script" not in page.tags
    assert page.tags.count("tr") == 5
    for words in ("C2H6O, 9 atoms", "start0-900K-1", "Vibrational density of states", "friction_per_fs 0.001"):
        assert words in text


def test_the_table_has_means_errors_and_drift(molecular: Path) -> None:
    table = read_csv(molecular / "table.csv")
    assert table["replica"] == ["start0-300K-0", "start0-300K-1", "start0-900K-0", "start0-900K-1"]
    for column, values in (("temperature_K", [300, 300, 900, 900]), ("potential_eV", [-1234.5] * 4)):
        assert [float(v) for v in table[column]] == pytest.approx(values, rel=0.02)
    # white noise of 20 K over the 175 samples that are not left out
    assert [float(v) for v in table["temperature_error_K"]] == pytest.approx([20 / np.sqrt(175)] * 4, rel=0.6)
    assert [float(v) for v in table["drift_meV_per_atom_ps"]] == pytest.approx([2.0] * 4, rel=1e-6)


def test_the_spectrum_of_a_run_peaks_where_its_atoms_vibrate(molecular: Path) -> None:
    columns = {k: np.array(v, dtype=float) for k, v in read_csv(molecular / "spectrum.csv").items()}
    for kelvin in (300.0, 900.0):
        of = columns["target_K"] == kelvin
        best = np.argmax(columns["density_cm"][of])
        assert columns["wavenumber_per_cm"][of][best] == pytest.approx(1500.0, abs=15)


def test_hotter_bonds_are_distributed_more_widely(molecular: Path) -> None:
    columns = read_csv(molecular / "bonds.csv")
    assert set(columns["group"]) == {"C-H", "C-C", "C-O", "H-O"}
    width = {}
    for kelvin in ("300", "900"):
        rows = [i for i, g in enumerate(columns["group"]) if g == "C-H" and columns["target_K"][i] == kelvin]
        x = np.array([float(columns["length_A"][i]) for i in rows])
        p = np.array([float(columns["density_per_A"][i]) for i in rows])
        assert p.sum() * (x[1] - x[0]) == pytest.approx(1.0, rel=1e-6)
        width[kelvin] = np.sqrt(np.average((x - np.average(x, weights=p)) ** 2, weights=p))
    assert width["900"] > width["300"]


def test_without_velocities_the_spectrum_is_that_of_differences(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", velocities=False)
    run = read_run(folder)
    for spectrum in vibrations.spectra(Selection(run, run.replicas, 0.0)).values():
        assert spectrum_peaks_per_cm(spectrum) == pytest.approx([1500.0], abs=5)


def test_what_happened_does_not_hide_that_errors_are_lower_bounds() -> None:
    row = ReplicaRow("a", 300.0, 1.0, *(0.0,) * 6, converged=False, events="gate out of range at 0 ps")
    assert row.remark == "gate out of range at 0 ps; too short: errors are lower bounds"
    assert replace(row, events="").remark == "too short: errors are lower bounds"
    assert replace(row, events="", converged=True).remark == ""


def test_a_replica_that_ended_early_does_not_blur_the_spectrum_of_the_others(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "r"))
    whole, broken = (Selection(run, run.replicas, 0.0) for _ in range(2))
    first = run.replicas[0]
    frames = broken.frames(first)
    n = len(frames.time_fs) // 3
    assert frames.velocities_A_per_fs is not None
    broken._frames[first.name] = replace(
        frames,
        time_fs=frames.time_fs[:n],
        positions_A=frames.positions_A[:n],
        velocities_A_per_fs=frames.velocities_A_per_fs[:n],
    )
    before, after = vibrations.spectra(whole)[first.target_K], vibrations.spectra(broken)[first.target_K]
    assert after.resolution_per_cm == before.resolution_per_cm
    assert spectrum_peaks_per_cm(after) == pytest.approx([1500.0], abs=5)
    (remark,) = broken.remarks
    assert remark.startswith("1 of 2 replicas at 300 K are less than half as long as the longest")
    assert not whole.remarks
    assert vibrations.vacf(broken) is not None
    assert len(broken.remarks) == 1


@pytest.mark.usefixtures("unpainted")
def test_a_crystal_has_radial_distributions_and_displacements(tmp_path: Path) -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    result = analyse(make_run(tmp_path / "r", 60, [atoms]), tmp_path / "out")
    stems = {p.stem for p in result.files}
    assert {"rdf", "msd", "spectrum"} <= stems
    assert set(read_csv(tmp_path / "out" / "rdf.csv")["pair"]) == {"all", "Na-Na", "Na-Cl", "Cl-Cl"}
    assert set(read_csv(tmp_path / "out" / "msd.csv")["element"]) == {"Na", "Cl"}
    assert "half the height of the cell" in result.page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("atoms", [molecule("CH3CH2OH"), bulk("C", "diamond", a=3.567, cubic=True)])
def test_bonds_and_cell_are_those_of_a_replica_that_has_frames(tmp_path: Path, atoms: Atoms) -> None:
    one, other = (
        {p.stem for p in analyse(make_run(tmp_path / f"r{n}", 60, [atoms], absent=n)).files if p.suffix == ".csv"}
        for n in (0, 1)
    )
    assert one == other >= {"bonds"}


@pytest.mark.usefixtures("unpainted")
def test_several_start_structures_are_kept_apart(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", n=12, structures=[molecule("CH3CH2OH"), molecule("H2O")])
    result = analyse(folder)
    names = {p.name for p in result.files}
    assert {"bonds-start0.csv", "bonds-start1.png", "index.html", "table.csv"} <= names
    assert set(read_csv(folder / "analysis" / "bonds-start1.csv")["group"]) == {"H-O"}
    assert len(result.rows) == 8


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("n", [1, 3])
def test_a_run_of_a_few_frames_gives_what_it_can_and_says_what_not(tmp_path: Path, n: int) -> None:
    result = analyse(make_run(tmp_path / "r", n=n, structures=[bulk("C", "diamond", a=3.567)]))
    stems = {p.stem for p in result.files}
    assert {"temperature", "bonds", "rdf"} <= stems
    assert not {"spectrum", "msd"} & stems
    assert any("run for longer" in remark for remark in result.remarks)
    assert json.loads(json.dumps(result.to_dict()))["replicas"][0]["temperature_error_K"] is None


@pytest.mark.usefixtures("unpainted")
def test_frames_too_far_apart_for_hydrogen_are_remarked_upon(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", n=50, spacing=2.0)
    assert any("ends at 2085 cm" in remark for remark in analyse(folder).remarks)


@pytest.mark.parametrize("skip", [-0.1, 5.0])
def test_a_part_to_skip_beyond_the_run_is_refused(tmp_path: Path, skip: float) -> None:
    with pytest.raises(DataError, match="between 0 and the length of the run"):
        analyse(make_run(tmp_path / "r", n=10), skip_ps=skip)
    assert not (tmp_path / "r" / "analysis").exists()


@pytest.mark.usefixtures("unpainted")
def test_names_in_the_page_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run", n=8)
    text = analyse(folder).page.read_text(encoding="utf-8")
    assert "<b>run" not in text
    assert "&lt;b&gt;run" in text


@pytest.mark.usefixtures("unpainted")
def test_the_command_prints_the_table_and_where_the_page_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", n=40)
    result = CliRunner().invoke(app, ["analyse", str(folder), "-o", str(tmp_path / "out"), "--skip", "0.02ps"])
    assert result.exit_code == 0, result.output
    assert "start0-900K-1" in result.output
    assert "index.html" in result.output
    assert (tmp_path / "out" / "index.html").is_file()
    printed = CliRunner().invoke(app, ["analyse", str(folder), "--json", "--skip", "20fs"])
    assert json.loads(printed.stdout)["skip_ps"] == pytest.approx(0.02)


@pytest.mark.usefixtures("unpainted")
def test_an_analysis_leaves_nothing_of_an_earlier_one_beside_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", n=20)
    (folder / "analysis").mkdir()
    for name in ("msd.png", "msd-start1.csv", "notes.txt", "mine.png"):
        (folder / "analysis" / name).write_text("old")
    written = {f.name for f in analyse(folder).files}
    assert "msd.png" not in written
    assert {p.name for p in (folder / "analysis").iterdir()} == written | {"notes.txt", "mine.png"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.png").write_text("mine")
    analyse(folder, tmp_path / "own")
    assert (tmp_path / "own" / "mine.png").exists()


def test_the_command_explains_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["analyse", str(tmp_path)])
    assert result.exit_code == 1
    assert "there is no trajectory" in result.stderr


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (301.234, 3.4, "301.2 ± 3.4"),
        (-17612.345678, 0.00123, "-17612.3457 ± 0.0012"),
        (5.0, float("nan"), "5"),
        (1234.0, 250.0, "1234 ± 250"),
        (0.0, 0.0, "0"),
    ],
)
def test_values_are_shown_to_the_second_digit_of_their_error(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text
