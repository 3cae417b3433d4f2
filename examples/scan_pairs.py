"""Two atoms pushed together: the largest force from 0.3 A outwards under an adapter, over the bare backbone's.

python examples/scan_pairs.py ADAPTER [--pairs CH CO CC HH OH OO]
"""

from __future__ import annotations

import argparse

import numpy as np
from ase import Atoms

from mmea_calc.graph import Graph
from mmea_calc.md import open_potential
from mmea_calc.potential import Potential


def largest_force(potential: Potential, graphs: list[Graph]) -> float:
    """Largest component, eV/A."""
    _, forces = potential.predict_graphs(graphs, batch_size=200)
    return max(float(f.abs().max()) for f in forces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--pairs", nargs="+", default=["CH", "CO", "CC", "HH", "OH", "OO"])
    options = parser.parse_args()
    potential = open_potential(options.adapter, device="cpu", dtype="float64")
    for pair in options.pairs:
        distances = np.arange(0.3, 3.01, 0.02)
        graphs = [potential.graph(Atoms(pair, [[0, 0, 0], [0, 0, r]])) for r in distances]
        adapted = largest_force(potential, graphs)
        with potential.adapter_disabled():
            bare = largest_force(potential, graphs)
        print(f"{pair}  adapter {adapted:6.0f} eV/A   backbone {bare:6.0f} eV/A   ratio {adapted / bare:.2f}")


if __name__ == "__main__":
    main()
