"""Train on a data set larger than one would keep in memory: structures per second, and memory.

Packed sets (train-*.npz: numbers, n_atoms, positions, forces, energy; see mmea_calc.pretrain.dataset) become one
prepared file, as `mmea prepare` writes it; then steps of training are taken from the whole file and from a part of it,
each in a process of its own, and their speed and largest memory are printed.

    python examples/time_large_data.py FOLDER --work large --steps 40
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from mmea_calc.backbone import load_backbone
from mmea_calc.config import AdapterConfig, TrainConfig
from mmea_calc.data.dataset import Labelled
from mmea_calc.data.prepared import open_prepared
from mmea_calc.data.preparing import writing
from mmea_calc.pretrain.dataset import read_arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="packed sets train-*.npz")
    parser.add_argument("--work", type=Path, default=Path("large"), help="where prepared data go")
    parser.add_argument("--structures", type=int, help="take so many structures only")
    parser.add_argument("--parts", type=int, nargs="+", default=[1000, 10000], help="sizes beside the whole")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backbone", default="mmea-organic-s-xtb")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    whole = options.work / "all.h5"
    if not whole.exists():
        write(whole, options)
    n = len(open_prepared(whole))
    print("structures  file, MB  opened, s  structures/s  structures/CPU s  reading, %  memory, MB")
    for size in sorted({*(p for p in options.parts if p < n), n}):
        path = whole if size == n else part(whole, size, options.work)
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(path)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"{size:10,} {path.stat().st_size / 1e6:9.1f} {row['opened']:10.2f} {row['rate']:13.1f} "
            f"{row['cpu_rate']:17.1f} {100 * row['reading']:11.1f} {row['memory']:11.0f}",
            flush=True,
        )


def packed(folder: Path, limit: int | None) -> Iterator[Labelled]:
    """The structures of all packed sets, one file in memory at a time."""
    done = 0
    for file in sorted(folder.glob("train-*.npz")):
        arrays = read_arrays([file])
        ends = np.cumsum(arrays["n_atoms"].astype(np.int64))
        for k, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if done == limit:
                return
            atoms = Atoms(arrays["numbers"][start:end].astype(int), arrays["positions"][start:end].astype(float))
            forces = arrays["forces"][start:end].astype(float)
            yield Labelled(atoms, float(arrays["energy"][k]), forces, index=k, source=str(file))
            done += 1


def write(path: Path, options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    started, computed = time.perf_counter(), time.process_time()
    with writing(path, r_max=backbone.r_max, elements=backbone.elements) as writer:
        n = 0
        for item in packed(options.folder, options.structures):
            writer.add(item)
            n += 1
            if n % 10000 == 0:
                print(f"{n:,} prepared", flush=True)
        writer.describe(name=path.name, keys={"energy": "energy", "forces": "forces", "stress": None})
    seconds, cpu = time.perf_counter() - started, time.process_time() - computed
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"prepared {n:,} structures in {seconds:.0f} s, {cpu:.0f} s of CPU, {memory:.0f} MB of memory")


def part(whole: Path, size: int, work: Path) -> Path:
    """The first structures of a file as a file of its own."""
    path, data = work / f"first-{size}.h5", open_prepared(whole)
    if not path.exists():
        with writing(path, r_max=data.file.r_max) as writer:
            for k in range(size):
                writer.add(data.structures[k])
            writer.describe(name=path.name, keys=data.keys)
    return path


def measure(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Steps of the trainer, as `mmea finetune` takes them, with batches from all of the file."""
    from mmea_calc.adapted import attach
    from mmea_calc.potential import Potential
    from mmea_calc.training.samples import Samples
    from mmea_calc.training.trainer import Trainer

    started = time.perf_counter()
    config = TrainConfig(batch_size=options.batch_size, epochs=1)
    potential = Potential(load_backbone(options.backbone))
    adapter = potential.adapter = attach(potential.backbone.network, AdapterConfig())
    loaded = time.perf_counter()
    samples = Samples(open_prepared(path), potential)
    trainer = Trainer(potential, adapter, samples, samples, config)
    opened = time.perf_counter() - loaded
    batches = list(islice(trainer._batches(), options.steps + 2))
    for rows in batches[:2]:  # the first steps compile and allocate
        trainer._step(rows, 1)
    started, computed = time.perf_counter(), time.process_time()
    for rows in batches[2:]:
        trainer._step(rows, 1)
    seconds, cpu = time.perf_counter() - started, time.process_time() - computed
    fresh = Samples(open_prepared(path), potential)
    computed = time.process_time()
    for rows in batches[2:]:
        [fresh.graphs[i] for i in rows]
        fresh.labels(rows, potential)
    reading = time.process_time() - computed
    n = sum(len(rows) for rows in batches[2:])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rates = {"rate": n / seconds, "cpu_rate": n / cpu, "reading": reading / cpu}
    return {"opened": opened, **rates, "memory": memory}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
