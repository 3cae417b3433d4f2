"""What `make demo` runs: fine-tune, evaluate and run a potential for aspirin; results in the folder demo/.

Every command is printed before it runs, as it would be typed. About two minutes on two CPU cores.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("examples/data/aspirin")
DEMO = Path("demo")
ADAPTER = DEMO / "aspirin.adapter"

TIMESTEP_FS = 0.5
TEMPERATURE_K = 300.0
RELAXATION_FS = 100.0
STEPS = 1000
STATS_EVERY = 5


def mmea(*arguments: object) -> None:
    """Print a command as a user types it, and run it; a failure ends the demo with the command's exit code."""
    words = [str(a) for a in arguments]
    print(f"\n$ mmea {shlex.join(words)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "mmea_cli", *words], cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def run_dynamics() -> None:
    """Langevin dynamics with the new potential, as a script of one's own would do it."""
    import numpy as np
    from ase import units
    from ase.io import iread
    from ase.io.trajectory import Trajectory
    from ase.md.langevinbaoab import LangevinBAOAB
    from ase.md.velocitydistribution import thermalize_momenta

    from mmea_calc import MMEACalculator
    from mmea_calc.plots import dynamics

    print(f"\n# {STEPS * TIMESTEP_FS:g} fs of Langevin dynamics at {TEMPERATURE_K:g} K, MMEACalculator('{ADAPTER}')")
    (atoms,) = iread(ROOT / DATA / "start.xyz")
    atoms.calc = MMEACalculator(ROOT / ADAPTER)
    rng = np.random.default_rng(0)
    thermalize_momenta(atoms, temperature_K=TEMPERATURE_K, rng=rng)
    langevin = LangevinBAOAB(
        atoms, TIMESTEP_FS * units.fs, temperature_K=TEMPERATURE_K, T_tau=RELAXATION_FS * units.fs, rng=rng
    )
    rows: list[tuple[float, float, float]] = []

    def record() -> None:
        rows.append((langevin.nsteps * TIMESTEP_FS, atoms.get_potential_energy(), atoms.get_temperature()))
        if langevin.nsteps % 200 == 0:
            print(f"{rows[-1][0]:6.0f} fs   {rows[-1][1]:.4f} eV   {rows[-1][2]:4.0f} K", flush=True)

    began = time.perf_counter()
    with Trajectory(ROOT / DEMO / "aspirin_300K.traj", "w", atoms) as trajectory:
        langevin.attach(record, interval=STATS_EVERY)
        langevin.attach(trajectory.write, interval=STATS_EVERY)
        langevin.run(STEPS)
    seconds = time.perf_counter() - began
    print(f"{1000 * seconds / STEPS:.1f} ms per step, {STEPS * TIMESTEP_FS * 86.4 / seconds:.0f} ps per day")
    times, energies, temperatures = zip(*rows, strict=True)
    title = f"Aspirin, Langevin dynamics at {TEMPERATURE_K:g} K"
    dynamics(
        times,
        energies,
        temperatures,
        ROOT / DEMO / "dynamics.png",
        target_temperature_K=TEMPERATURE_K,
        title=title,
    )


def main() -> None:
    """All of it, in order."""
    began = time.perf_counter()
    (ROOT / DEMO).mkdir(exist_ok=True)
    train = (DATA / "train.xyz", DATA / "isolated_atoms.xyz")
    valid, level = DATA / "valid.xyz", "PBE/def2-SVP"
    mmea("finetune", *train, "--valid", valid, "--level-of-theory", level, "-o", ADAPTER)
    mmea("evaluate", ADAPTER, DATA / "test.xyz", "--plot", DEMO / "parity.png")
    mmea("info", ADAPTER)
    run_dynamics()
    print(f"\nIn {DEMO}/ after {(time.perf_counter() - began) / 60:.1f} minutes:")
    for path in sorted((ROOT / DEMO).iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")


if __name__ == "__main__":
    main()
