"""Replica-steps per second of Langevin dynamics of aspirin: one batch against one replica after the other.

    python examples/time_dynamics.py [ADAPTER] [--temperatures 300 600 1200] [--replicas 4] [--threads 2]

Timed in turns within one run, so that a drift of the machine's speed meets all alike; medians over the rounds and
ratios are printed. One after the other means ASE's Langevin with MMEACalculator, and with mace-torch's own
MACECalculator on the same backbone (without adapter). Watching the replicas is part of the batch; writing files is not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin

from mmea_calc import MMEACalculator
from mmea_calc.benchmark.speed_setup import SpeedConfig, aspirin, mace_calculator
from mmea_calc.config import DEFAULT_BACKBONE, MDConfig
from mmea_calc.md import open_potential
from mmea_calc.md.simulation import Simulation


def langevin(atoms: Atoms, calculator: Calculator) -> Callable[[int], object]:
    moving = atoms.copy()
    moving.calc = calculator
    rng = np.random.default_rng(0)
    return Langevin(moving, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False, rng=rng).run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", default=DEFAULT_BACKBONE, help="without it, the bare default backbone")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 600.0, 1200.0])
    parser.add_argument("--replicas", type=int, default=4, help="per temperature")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16, help="of every contestant in a round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    atoms = aspirin()
    potential = open_potential(options.adapter, device="cpu")
    config = MDConfig(temperatures_K=tuple(options.temperatures), replicas=options.replicas)
    simulation = Simulation(potential, [atoms], config)
    n = len(options.temperatures) * options.replicas

    def batch(steps: int) -> None:
        for step in range(steps):
            simulation.step()
            if (step + 1) % config.stats_every == 0:
                simulation.sample()

    adapter = None if potential.adapter is None else options.adapter
    own = MMEACalculator(adapter, backbone=None if adapter else options.adapter, device="cpu")
    theirs = mace_calculator(SpeedConfig(backbone=own.backbone.name, device="cpu"))
    contestants: dict[str, tuple[int, Callable[[int], object]]] = {
        f"mmea, {n} replicas in one batch": (n, batch),
        "ASE Langevin, MMEACalculator": (1, langevin(atoms, own)),
        "ASE Langevin, MACECalculator, bare": (1, langevin(atoms, theirs)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with potential.folded():
        simulation.start()
        for turn in range(options.rounds + 1):  # the first one warms up
            for name, (replicas, run) in contestants.items():
                began = time.perf_counter()
                run(options.steps)
                if turn:
                    rates[name].append(replicas * options.steps / (time.perf_counter() - began))
    reference = statistics.median(rates["ASE Langevin, MACECalculator, bare"])
    print(f"aspirin, {options.adapter}, float32, {options.threads} threads: replica-steps per second")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:36s} {median:7.1f}   {median / reference:.2f} of MACECalculator")


if __name__ == "__main__":
    main()
