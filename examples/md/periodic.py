"""A periodic system: crystalline carbon dioxide, its radial distributions, displacements and vibrations.

    python periodic.py mmea-organic-s --temperature 100 --time 10 -o RUN

Any structure with a cell and pbc works the same way. The cell stays as it is.
"""

from __future__ import annotations

import argparse

from ase import Atoms
from ase.spacegroup import crystal

from mmea_calc.analysis.report import analyse
from mmea_calc.config import MDConfig
from mmea_calc.md import open_potential, run_md

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="an .adapter file, or the name of a backbone")
parser.add_argument("--time", type=float, default=10.0, help="ps")
parser.add_argument("--temperature", type=float, nargs="+", default=[100.0], help="K")
parser.add_argument("--repeat", type=int, default=2, help="unit cells along each edge")
parser.add_argument("-o", "--output", default="RUN")


def dry_ice(repeat: int) -> Atoms:
    """Four molecules in a cubic cell of 5.62 A, space group Pa-3 (Simon and Peters, Acta Cryst. B 36, 2750, 1980)."""
    atoms = crystal(["C", "O"], [(0, 0, 0), (0.1185, 0.1185, 0.1185)], spacegroup=205, cellpar=[5.624] * 3 + [90] * 3)
    return atoms.repeat(repeat)


def main() -> None:
    args = parser.parse_args()
    atoms = dry_ice(args.repeat)
    # Weak friction, so that the thermostat does not blur the spectrum.
    config = MDConfig(temperatures_K=tuple(args.temperature), time_ps=args.time, friction_per_fs=0.001, minimize=True)
    run_md(open_potential(args.adapter), atoms, args.output, config)
    result = analyse(args.output)
    for row in result.rows:
        print(f"{row.replica}: {row.temperature_K:.0f} K over {row.length_ps:g} ps {row.events}")
    for remark in result.remarks:
        print(remark)
    print(f"{result.page} written")


if __name__ == "__main__":
    main()
