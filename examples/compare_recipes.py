"""Recipes of training compared at equal CPU time.

    python examples/compare_recipes.py FOLDER [FOLDER ...] [--recipes default paper] [--epochs 60]

Every FOLDER holds train.xyz, valid.xyz and test.xyz. The first recipe trains for --epochs, or its own
number of them; every other recipe gets as many epochs as fit into the CPU time that the first one took. Each starts
from the same split and seed, in float32, on one thread. Errors are of the best validation weights, on the test set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmea_calc import AdapterConfig, TrainConfig, finetune
from mmea_calc.data import read_dataset
from mmea_calc.dataset import Dataset
from mmea_calc.recipes import RECIPES


def train(recipe: str, data: tuple[Dataset, ...], options: argparse.Namespace, epochs: int | None) -> Any:
    """CPU seconds, epochs, and the result of one training."""
    settings: dict[str, Any] = {**RECIPES[recipe], "dtype": "float32", "device": "cpu", "seed": options.seed}
    if epochs is not None:
        settings["epochs"] = epochs
    training = TrainConfig(**settings).for_structures(len(data[0]))
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = finetune(
            data[0],
            Path(folder) / "one.adapter",
            valid=data[1],
            test=data[2],
            adapter=AdapterConfig(method=options.method),
            training=training,
        )
        return time.process_time() - began, training.epochs, result


def thinned(path: Path, n: int) -> Dataset:
    """`n` structures of a file, evenly spaced."""
    everything = read_dataset(path)
    n = min(n, len(everything))
    return everything.subset([i * len(everything) // n for i in range(n)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["default", "paper"], choices=list(RECIPES))
    parser.add_argument("--method", default="mmea")
    parser.add_argument("--train", type=int, default=50, help="structures of training")
    parser.add_argument("--valid", type=int, default=20)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--epochs", type=int, help="of the first recipe")
    parser.add_argument("--seed", type=int, default=123)
    options = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{'':14s} {'recipe':10s} {'epochs':>6s} {'CPU s':>6s} {'E meV':>8s} {'F meV/A':>8s}   test MAE")
    for folder in options.folders:
        data = tuple(thinned(folder / f"{name}.xyz", getattr(options, name)) for name in ("train", "valid", "test"))
        budget = None
        for recipe in options.recipes:
            epochs = options.epochs
            if budget is not None:  # what does not depend on the number of epochs is told apart by two short runs
                short, long = (train(recipe, data, options, n)[0] for n in (1, 4))
                per_epoch = (long - short) / 3
                epochs = max(1, round((budget - short) / per_epoch) + 1)
            seconds, epochs, result = train(recipe, data, options, epochs)
            budget = budget or seconds
            errors = result.fine_tuned["test"]
            print(
                f"{folder.name:14s} {recipe:10s} {epochs:6d} {seconds:6.0f} "
                f"{errors.energy_mae_meV:8.1f} {errors.forces_mae_meV_per_A:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
