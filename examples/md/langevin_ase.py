"""Langevin dynamics at 300, 600 and 1200 K with plain ASE, one temperature after the other.

    python langevin_ase.py aspirin.adapter start.xyz --time 20

Everything else in ASE works in the same way: other thermostats, constraints, optimizers, phonons.
"""

from __future__ import annotations

import argparse

import numpy as np
from ase import units
from ase.io import iread
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta

from mmea_calc import MMEACalculator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file")
parser.add_argument("start", help="a structure, any file that ASE reads")
parser.add_argument("--time", type=float, default=20.0, help="ps")
parser.add_argument("--temperature", type=float, nargs="+", default=[300.0, 600.0, 1200.0], help="K")
parser.add_argument("--seed", type=int, default=0)

TIMESTEP_FS = 0.5


def main() -> None:
    args = parser.parse_args()
    calculator = MMEACalculator(args.adapter)
    for kelvin in args.temperature:
        atoms = next(iread(args.start))
        atoms.calc = calculator
        rng = np.random.default_rng(args.seed)
        thermalize_momenta(atoms, kelvin, rng=rng)
        Stationary(atoms)  # no drift of the centre of mass
        ZeroRotation(atoms)
        langevin = Langevin(
            atoms, TIMESTEP_FS * units.fs, temperature_K=kelvin, friction=0.01 / units.fs, rng=rng, fixcm=False
        )
        temperatures: list[float] = []
        with Trajectory(f"langevin_{kelvin:g}K.traj", "w", atoms) as trajectory:
            langevin.attach(trajectory.write, interval=8)
            langevin.attach(lambda record=temperatures, a=atoms: record.append(a.get_temperature()), interval=8)
            langevin.run(round(1000 * args.time / TIMESTEP_FS))
        print(f"{kelvin:g} K: mean {np.mean(temperatures):.0f} K, {trajectory.filename} written")


if __name__ == "__main__":
    main()
