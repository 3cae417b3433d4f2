"""What an adapter to start from saves: test errors against the number of training structures, with and without it.

    python examples/learning_curves.py TRAIN.xyz TEST.xyz [--init gfn2-to-pbe.adapter] [--sizes 5 10 20 50] [-o RESULTS]

Both fine-tune the backbone of that adapter by the same method. Sizes are nested draws of one seed; the
structures that are left validate, 50 at most. Prints a table and writes errors.csv and errors.png.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from mmea_calc import AdapterConfig, TrainConfig, read_dataset
from mmea_calc.adapter_file import AdapterFile, read_adapter
from mmea_calc.data.dataset import Dataset
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.trainer import Errors


def curve(
    train: Dataset, test: Dataset, init: AdapterFile, options: argparse.Namespace, *, started: bool
) -> list[Errors]:
    """Errors at every size, after those of what training starts from."""
    order = np.random.default_rng(options.seed).permutation(len(train)).tolist()
    name = "init" if started else "backbone"
    found: list[Errors] = []
    for size in sorted(options.sizes):
        result = finetune(
            train.subset(order[:size]),
            options.output / f"{name}-{size}.adapter",
            valid=train.subset(order[max(options.sizes) :][:50]),
            test=test,
            backbone=init.backbone,
            init=init if started else None,
            adapter=replace(init.config, method=options.method) if started else AdapterConfig(method=options.method),
            training=TrainConfig(seed=options.seed, device=options.device),
        )
        if not found:
            found.append((result.initial if started else result.zero_shot)["test"])
        found.append(result.fine_tuned["test"])
        print(f"{name}, {size} structures: forces {found[-1].forces_mae_meV_per_A:.1f} meV/A", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--init", default="gfn2-to-pbe.adapter")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--method", default="mmea", help="does what the adapter to start from does, or more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n-test", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path("learning-curves"))
    options = parser.parse_args()
    train, test = read_dataset(options.train), read_dataset(options.test)
    test = test.subset(np.linspace(0, len(test) - 1, min(options.n_test, len(test))).round().astype(int).tolist())
    init = read_adapter(options.init)
    curves = {
        f"from {init.backbone}, {options.method}": curve(train, test, init, options, started=False),
        f"from {options.init}, {options.method}": curve(train, test, init, options, started=True),
    }
    sizes = [0, *sorted(options.sizes)]
    with (options.output / "errors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["start", "structures", "energy_mae_meV", "forces_mae_meV_per_A"])
        for name, errors in curves.items():
            writer.writerows(
                [name, n, e.energy_mae_meV, e.forces_mae_meV_per_A] for n, e in zip(sizes, errors, strict=True)
            )
    print("energy (meV) / forces (meV/A) after " + ", ".join(map(str, sizes)) + " structures")
    for name, errors in curves.items():
        print(f"{name}: " + ", ".join(f"{e.energy_mae_meV:.1f} / {e.forces_mae_meV_per_A:.1f}" for e in errors))
        plt.plot(sizes[1:], [e.forces_mae_meV_per_A for e in errors[1:]], "o-", label=name)
    plt.xscale("log")
    plt.minorticks_off()
    plt.xticks(sizes[1:], [str(n) for n in sizes[1:]])
    plt.xlabel("training structures")
    plt.ylabel("forces MAE (meV/Å)")
    plt.ylim(bottom=0)
    plt.legend()
    plt.savefig(options.output / "errors.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
