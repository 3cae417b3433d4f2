"""One energy-and-forces call for aspirin: MMEACalculator against mace-torch's MACECalculator, on the same backbone.

    python examples/time_one_call.py [ADAPTER] [--threads 2] [--dtype float32]

Calls alternate within one run, so that a drift of the machine's speed meets all alike; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.io import read

from mmea_calc import MMEACalculator, load_backbone
from mmea_calc.config import Precision
from mmea_calc.fast_path import remove_fast_path
from mmea_calc.mace_bridge import mace_calculators, quiet

START = Path(__file__).parent / "data" / "aspirin" / "start.xyz"


def mace_calculator(backbone: str, dtype: Precision) -> Calculator:
    """mace-torch's own calculator and contraction."""
    network = load_backbone(backbone, dtype=dtype).network
    remove_fast_path(network)
    with quiet():
        network = copy.deepcopy(network)  # e3nn's code in a copy is TorchScript, as in a network that mace-torch loads
        return mace_calculators().MACECalculator(models=[network], device="cpu", default_dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", help="without it, the bare default backbone is timed alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--calls", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    bare = MMEACalculator(device="cpu", dtype=options.dtype)
    name = bare.backbone.name
    calculators: dict[str, Calculator] = {}
    if options.adapter:
        adapted = MMEACalculator(options.adapter, device="cpu", dtype=options.dtype)
        name = adapted.backbone.name
        calculators["MMEACalculator, adapter"] = adapted
        bare = MMEACalculator(backbone=name, device="cpu", dtype=options.dtype)
    calculators |= {"MMEACalculator, bare": bare, "MACECalculator": mace_calculator(name, options.dtype)}

    atoms = read(START)
    assert isinstance(atoms, Atoms)
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {key: [] for key in calculators}
    for call in range(options.calls + 5):  # the first five warm up
        moved = atoms.copy()
        moved.positions += rng.normal(0, 0.01, moved.positions.shape)
        for key, calculator in calculators.items():
            began = time.perf_counter()
            calculator.calculate(moved, ["energy", "forces"], ["positions"])
            if call >= 5:
                seconds[key].append(time.perf_counter() - began)
    reference = statistics.median(seconds["MACECalculator"])
    print(f"backbone {name}, {options.dtype}, {options.threads} threads, medians of {options.calls} calls")
    for key, values in seconds.items():
        median = statistics.median(values)
        print(f"{key:26s} {1000 * median:6.1f} ms   {median / reference:.2f} of MACECalculator")


if __name__ == "__main__":
    main()
