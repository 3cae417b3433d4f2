"""What an adapter changes: the same dynamics with and without it, and its forces beside the bare backbone's.

    python adapter_on_off.py aspirin.adapter start.xyz --time 5 -o COMPARE

Both runs begin with the same positions, velocities and random numbers.
"""

from __future__ import annotations

import argparse

import numpy as np
from ase.io import read

from mmea_calc.analysis.report import analyse
from mmea_calc.config import MDConfig
from mmea_calc.md import open_potential, run_md
from mmea_calc.md.trajectory import read_replica, replica_names

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file")
parser.add_argument("start", help="start structures, any file that ASE reads")
parser.add_argument("--time", type=float, default=5.0, help="ps")
parser.add_argument("-o", "--output", default="COMPARE")


def main() -> None:
    args = parser.parse_args()
    potential, starts = open_potential(args.adapter), read(args.start, index=":")
    config = MDConfig(temperatures_K=(300.0,), time_ps=args.time, drift_every=40)
    on, off = f"{args.output}/on", f"{args.output}/off"
    run_md(potential, starts, on, config)
    potential.use(None)  # the bare backbone from here on
    run_md(potential, starts, off, config)

    for name in replica_names(on):
        with_adapter, without = read_replica(on, name), read_replica(off, name)
        difference = with_adapter.observables["adapted_minus_bare"]  # RMS, eV/A; NaN where it was not measured
        apart = np.linalg.norm(with_adapter.positions[-1] - without.positions[-1], axis=1).mean()
        print(f"{name}: adapted minus bare forces {1000 * np.nanmean(difference):.0f} meV/A (RMS)")
        print(f"{name}: after {with_adapter.times_ps[-1]:g} ps atoms are {apart:.2f} A apart")
    for folder in (on, off):
        print(f"{analyse(folder).page} written")


if __name__ == "__main__":
    main()
