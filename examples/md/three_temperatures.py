"""Langevin dynamics at 300, 600 and 1200 K, four replicas each, all of them as one batch.

    python three_temperatures.py aspirin.adapter start.xyz --time 20 -o RUN

The same as `mmea md aspirin.adapter start.xyz --temperature 300 600 1200 --replicas 4 --time 20ps -o RUN`.
"""

from __future__ import annotations

import argparse

from ase.io import read

from mmea_calc.config import MDConfig
from mmea_calc.md import MDProgress, open_potential, run_md

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file, or the name of a backbone")
parser.add_argument("start", help="start structures, any file that ASE reads")
parser.add_argument("--time", type=float, default=20.0, help="ps")
parser.add_argument("--temperature", type=float, nargs="+", default=[300.0, 600.0, 1200.0], help="K")
parser.add_argument("--replicas", type=int, default=4)
parser.add_argument("-o", "--output", default="RUN")


def report(event: MDProgress) -> None:
    """Called after every sample; a message is something that happened to a replica."""
    if event.message:
        print(event.message)
    elif event.step % 4000 == 0:
        print(f"step {event.step} of {event.n_steps}, {event.replica_steps_per_s:.0f} replica-steps/s")


def main() -> None:
    args = parser.parse_args()
    config = MDConfig(temperatures_K=tuple(args.temperature), replicas=args.replicas, time_ps=args.time)
    potential = open_potential(args.adapter)
    summary = run_md(potential, read(args.start, index=":"), args.output, config, progress=report)
    for r in summary.replicas:
        reached = "" if r.temperature_K is None else f"{r.temperature_K:.0f} K, "
        print(f"{r.replica:16s} {reached}stable for {r.stable_ps:g} of {r.length_ps:g} ps")
    print(f"{args.output}/trajectory.h5 written; `mmea analyse {args.output}` draws it")


if __name__ == "__main__":
    main()
