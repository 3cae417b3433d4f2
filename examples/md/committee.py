"""The uncertainty of a committee along a trajectory: adapters of several seeds on one backbone.

    for seed in 1 2 3; do mmea finetune train.xyz --seed $seed -o seed$seed.adapter; done
    python committee.py seed1.adapter seed2.adapter seed3.adapter --start start.xyz --temperature 600 --time 5

The mean of the members drives the dynamics. Where they disagree, the training data had nothing to say: structures to
label next. They are written to uncertain.xyz.
"""

from __future__ import annotations

import argparse

import numpy as np
from ase import units
from ase.io import iread, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

from mmea_calc import MMEACalculator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapters", nargs="+", help=".adapter files of one backbone, two or more")
parser.add_argument("--start", required=True, help="a structure, any file that ASE reads")
parser.add_argument("--time", type=float, default=5.0, help="ps")
parser.add_argument("--temperature", type=float, default=600.0, help="K")
parser.add_argument("--keep", type=int, default=10, help="how many structures to write")


def main() -> None:
    args = parser.parse_args()
    atoms = next(iread(args.start))
    atoms.calc = calculator = MMEACalculator(args.adapters)
    rng = np.random.default_rng(0)
    thermalize_momenta(atoms, args.temperature, rng=rng)
    settings = dict(temperature_K=args.temperature, friction=0.01 / units.fs, fixcm=False, rng=rng)
    dynamics = Langevin(atoms, 0.5 * units.fs, **settings)
    frames = []

    def record() -> None:
        forces = calculator.get_property("forces_comm", atoms)  # (n_members, n_atoms, 3), eV/A
        energies = calculator.get_property("energy_comm", atoms)  # (n_members,), eV
        frame = atoms.copy()
        # Energies of adapters may differ by a constant that means nothing; forces may not.
        frame.info["force_deviation"] = float(np.sqrt(forces.var(axis=0).sum(axis=1)).max())
        frame.info["energy_deviation"] = float(energies.std())
        frame.info["time_fs"] = dynamics.nsteps * 0.5
        frames.append(frame)

    dynamics.attach(record, interval=20)
    dynamics.run(round(2000 * args.time))
    worst = sorted(frames, key=lambda f: -f.info["force_deviation"])[: args.keep]
    for f in worst:
        print(f"{f.info['time_fs']:8.1f} fs  largest deviation of a force {1000 * f.info['force_deviation']:.0f} meV/A")
    write("uncertain.xyz", worst)


if __name__ == "__main__":
    main()
