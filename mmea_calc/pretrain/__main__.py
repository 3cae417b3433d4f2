"""The command line of the recipe: arguments -> one call."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import MMEAError
from ..fast.memory import keep_freed_memory

_SWITCHES = {
    "compile": "compile the training steps first",
    "zbl": "add mace's pair repulsion to the network, or to the start's",
}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    from .train import PretrainConfig

    defaults = PretrainConfig()
    top = argparse.ArgumentParser(prog="python -m mmea_calc.pretrain", description="Make a backbone of one's own.")
    commands = top.add_subparsers(dest="command", required=True)

    choose = commands.add_parser("choose", help="the structures on which two potentials disagree, for label --order")
    choose.add_argument("--data", type=Path, required=True, help="folder with train-*.npz to choose from")
    choose.add_argument("--by", nargs=2, required=True, metavar="POTENTIAL", help="adapters or backbones, two")
    choose.add_argument("--out", type=Path, required=True, help=".npz file to write")
    choose.add_argument("--pool", type=int, default=4000, help="structures that are compared")
    choose.add_argument("--min-heavy", type=int, default=3, help="smallest number of heavy atoms")
    choose.add_argument("--max-heavy", type=int, default=12, help="largest number of heavy atoms")
    choose.add_argument("--skip", type=Path, nargs="*", default=[], help="packed sets whose structures are left out")

    sample = commands.add_parser("sample", help="frames of dynamics of small molecules and of pairs, for label --data")
    sample.add_argument("--by", required=True, metavar="POTENTIAL", help="adapter or backbone that moves them")
    sample.add_argument("--out", type=Path, required=True, help="folder to write")
    sample.add_argument("--seed", type=int, default=0)

    small = commands.add_parser("small", help="very small molecules, pairs and clusters by GFN2-xTB, for label --data")
    small.add_argument("--out", type=Path, required=True, help="folder to write")
    small.add_argument("--seed", type=int, default=0)

    label = commands.add_parser("label", help="PBE/def2-SVP labels with PySCF, one file per structure; resumable")
    label.add_argument("--data", type=Path, required=True, help="folder with train-*.npz to draw geometries from")
    label.add_argument("--out", type=Path, required=True, help="folder for the labelled structures")
    label.add_argument("--worker", type=int, default=0, help="number of this process, from 0")
    label.add_argument("--of", type=int, default=1, help="number of processes that share the work")
    label.add_argument("--minutes", type=float, default=None, help="stop after so long")
    label.add_argument("--limit", type=int, default=None, help="stop after so many structures")
    label.add_argument("--max-heavy", type=int, default=7, help="largest number of heavy atoms")
    label.add_argument("--skip", type=Path, nargs="*", default=[], help="packed sets whose structures are left out")
    label.add_argument("--order", type=Path, default=None, help="structures to label: a file of `choose` or `sample`")
    label.add_argument("--first-index", type=int, default=0, help="added to the numbers of the structures")
    label.add_argument(
        "--grid", type=int, choices=(1, 2, 3), default=3, help="PySCF's grid level; 1 takes half the time"
    )
    label.add_argument("--atoms", action="store_true", help="label isolated atoms instead: writes OUT/e0.json")

    pack = commands.add_parser("pack", help="labelled structures -> train-0.npz, valid.npz, e0.json, level.txt")
    pack.add_argument("raw", type=Path, help="folder that `label` filled")
    pack.add_argument("--out", type=Path, required=True)
    pack.add_argument("--e0", type=Path, default=None, help="energies of isolated atoms (default: RAW/e0.json)")
    pack.add_argument("--valid-fraction", type=float, default=0.1)
    pack.add_argument("--number", type=int, default=0, help="1 and more: add train-1.npz and valid-1.npz to the set")
    pack.add_argument("--xtb", action="store_true", help="keep GFN2-xTB's energies and forces beside the labels")

    unpack = commands.add_parser("unpack", help="a packed set -> train.xyz (with isolated atoms) and valid.xyz")
    unpack.add_argument("data", type=Path, help="folder with train-*.npz, valid.npz and e0.json")
    unpack.add_argument("--out", type=Path, required=True)

    pool = commands.add_parser("pool", help="the molecules that fine-tuning replays")
    pool.add_argument("sets", type=Path, nargs="+", help="packed sets that are taken whole")
    pool.add_argument("--broad", type=Path, required=True, help="packed set that some more are drawn from")
    pool.add_argument("--number", type=int, default=500, help="how many are drawn")
    pool.add_argument("--seed", type=int, default=0)
    pool.add_argument("--out", type=Path, required=True, help=".npz file to write")

    references = commands.add_parser("references", help="geometries, vibrations, a torsion, a dimer at PBE/def2-SVP")
    references.add_argument("--out", type=Path, required=True, help=".json file; what is in it is not made again")

    report = commands.add_parser("report", help="what a backbone is like: walls, vibrations, dynamics; json and plots")
    report.add_argument("backbone", help="name or path")
    report.add_argument("--data", type=Path, required=True, help="folder with valid*.npz and references.json")
    report.add_argument("--references", type=Path, default=None, help="default: DATA/references.json")
    report.add_argument("--out", type=Path, required=True, help="files to write, without endings")
    report.add_argument("--md-ps", type=float, default=0.0, help="dynamics of ten larger molecules at 300 and 600 K")
    report.add_argument("--device", default="auto")

    differences = commands.add_parser("differences", help="a set labelled at two levels -> their differences")
    differences.add_argument("--data", type=Path, required=True, help="packed with --xtb")
    differences.add_argument("--cheap", type=Path, required=True, help="folder with e0.json of the cheap level")
    differences.add_argument("--out", type=Path, required=True)

    relabel = commands.add_parser("relabel", help="a broad, cheap set nearly at the better level")
    relabel.add_argument("--data", type=Path, required=True, help="folder of the broad set")
    relabel.add_argument("--by", required=True, metavar="BACKBONE", help="trained on differences")
    relabel.add_argument("--beside", type=Path, required=True, help="folder of the set at the better level")
    relabel.add_argument("--out", type=Path, required=True)
    relabel.add_argument("--number", type=int, default=30000, help="structures that are drawn")
    relabel.add_argument("--seed", type=int, default=0)

    walls = commands.add_parser("walls", help="two atoms alone from their bond inwards, for all pairs of elements")
    walls.add_argument("--data", type=Path, required=True, help="folder with e0.json of the better level")
    walls.add_argument("--cheap", type=Path, required=True, help="folder with e0.json of GFN2-xTB")
    walls.add_argument("--out", type=Path, required=True, help=".npz file to write")

    average = commands.add_parser("average", help="the mean of the weights of several stages")
    average.add_argument("stages", type=Path, nargs="+", metavar="STAGE.safetensors", help="two or more")
    average.add_argument("--out", type=Path, required=True, help=".safetensors file to write")

    train = commands.add_parser("train", help="one stage of training; time-boxed and resumable")
    train.add_argument(
        "--data", type=Path, required=True, help="folder with train-*.npz, valid.npz, e0.json, level.txt"
    )
    train.add_argument("--out", type=Path, required=True, help="folder for NAME.safetensors, NAME.json and resume.pt")
    train.add_argument("--name", required=True, help="of the backbone that is made")
    train.add_argument("--start", default=None, help="backbone to start from (second stage); default: random weights")
    train.add_argument("--walls", type=Path, default=None, help="packed set of `walls`: one structure of every batch")
    train.add_argument("--resume", action="store_true", help="go on from OUT/resume.pt")
    for setting in fields(defaults):
        value = getattr(defaults, setting.name)
        if isinstance(value, bool):
            train.add_argument(f"--{setting.name}", action="store_true", help=_SWITCHES[setting.name])
            continue
        kind: Any = {"steps": int, "device": str}.get(setting.name, type(value))
        train.add_argument(f"--{setting.name.replace('_', '-')}", type=kind, default=value, help=f"default: {value}")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 for a failure told in one line."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "train":
            from .train import PretrainConfig, pretrain

            settings = PretrainConfig(**{f.name: options.pop(f.name) for f in fields(PretrainConfig)})
            print(pretrain(settings=settings, progress=lambda line: print(line, flush=True), **options))
        elif command == "average":
            from .average import average

            print(average(options["stages"], options["out"]))
        elif command == "choose":
            from ..md import open_potential
            from .choose import choose

            one, other = (open_potential(name) for name in options.pop("by"))
            count = choose(by=(one, other), progress=lambda line: print(line, flush=True), **options)
            print(f"{options['out']}: {count} structures")
        elif command == "differences":
            from .relabel import differences

            for name, count in differences(**options).items():
                print(f"{name}: {count} structures")
        elif command == "relabel":
            from ..md import open_potential
            from .relabel import relabel

            by = open_potential(options.pop("by"))
            count = relabel(by=by, **options, progress=lambda line: print(line, flush=True))
            print(f"{options['out']}: {count} structures relabelled")
        elif command == "sample":
            from ..md import open_potential
            from .sample import sample

            count = sample(open_potential(options.pop("by")), **options, progress=lambda line: print(line, flush=True))
            print(f"{options['out']}: {count} structures")
        elif command == "small":
            from .small import small

            print(f"{options['out']}: {small(**options, progress=lambda line: print(line, flush=True))} structures")
        elif command == "pool":
            from .pool import pool

            print(f"{options['out']}: {pool(options.pop('sets'), **options)} structures")
        elif command == "references":
            from .references import make_references

            print(make_references(options["out"], progress=lambda line: print(line, flush=True)), "items")
        elif command == "report":
            from .soundness import measure_soundness, write_soundness

            out = options.pop("out")
            found = measure_soundness(**options, progress=lambda line: print(line, flush=True))
            for name, value in found.figures().items():
                print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
            print(*write_soundness(found, out))
        elif command == "walls":
            from .walls import walls

            print(f"{options['out']}: {walls(**options)} structures")
        elif command == "unpack":
            from .unpack import unpack

            for name, count in unpack(options["data"], out=options["out"]).items():
                print(f"{name}: {count} structures")
        else:
            from . import label

            if command == "pack":
                for name, count in label.pack(options.pop("raw"), **options).items():
                    print(f"{name}: {count} structures")
            elif options.pop("atoms"):
                print(label.label_atoms(options["out"]))
            else:
                label.label(progress=lambda line: print(line, flush=True), **options)
    except MMEAError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
