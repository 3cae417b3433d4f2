"""A run that is interrupted, goes on, is made longer, and is then analysed.

    python restart_and_analyse.py aspirin.adapter start.xyz --time 20 -o RUN

On the command line:

    mmea md aspirin.adapter start.xyz --time 10ps -o RUN
    mmea md aspirin.adapter start.xyz --time 20ps -o RUN --resume     # the time is the total
    mmea analyse RUN --skip 2ps
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from ase.io import read

from mmea_calc.analysis.report import analyse
from mmea_calc.config import MDConfig
from mmea_calc.md import open_potential, run_md

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file, or the name of a backbone")
parser.add_argument("start", help="start structures, any file that ASE reads")
parser.add_argument("--time", type=float, default=20.0, help="ps")
parser.add_argument("-o", "--output", default="RUN")


def main() -> None:
    args = parser.parse_args()
    potential, starts = open_potential(args.adapter), read(args.start, index=":")
    # A crash loses what came after the latest checkpoint, and a resumed run takes those steps again.
    config = MDConfig(temperatures_K=(300.0,), replicas=2, time_ps=args.time / 2, restart_every=200)
    run_md(potential, starts, args.output, config)
    print(f"{args.time / 2:g} ps done; as if this script had been started again:")
    run_md(potential, starts, args.output, replace(config, time_ps=args.time), resume=True)

    result = analyse(args.output)
    for row in result.rows:
        print(f"{row.replica}: {row.length_ps:g} ps, {row.temperature_K:.0f} ± {row.temperature_error_K:.0f} K")
    for remark in result.remarks:
        print(remark)
    print(f"{result.page} written: every plot, and the table")


if __name__ == "__main__":
    main()
