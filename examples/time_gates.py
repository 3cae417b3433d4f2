"""What gates cost in a call for aspirin: a backbone with its adapter, folded and unfolded, against the bare backbone.

    python examples/time_gates.py [--method gates] [--rank 16] [--threads 1] [--dtype float32] [--device cpu]

Calls alternate within one run, so that a drift of the machine's speed meets all alike; the medians over all calls of
times and of ratios to the bare backbone's call beside them are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from ase import Atoms
from ase.io import read

from mmea_calc import AdapterConfig, attach, load_backbone
from mmea_calc.adapted import Adapter
from mmea_calc.graph import Batch
from mmea_calc.potential import Potential

START = Path(__file__).parent / "data" / "aspirin" / "start.xyz"


def adapted(potential: Potential, config: AdapterConfig) -> Adapter:
    """An adapter with small random values and recorded ranges: what it is trained to does not change its time."""
    adapter = potential.adapter = attach(potential.backbone.network, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
            parameter.requires_grad_(False)
    return adapter


def seconds(potential: Potential, batch: Batch) -> float:
    began = time.perf_counter()
    potential.predict(batch)
    if potential.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mmea-organic-s")
    parser.add_argument("--method", default="gates")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--copies", type=int, default=1, help="molecules in one call")
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    atoms = read(START)
    assert isinstance(atoms, Atoms)
    potentials = {
        name: Potential(load_backbone(options.backbone, device=options.device, dtype=options.dtype))
        for name in ("bare", "unfolded", "folded")
    }
    batches = {name: p.collate([p.graph(atoms)] * options.copies) for name, p in potentials.items()}
    config = AdapterConfig(method=options.method, gate_rank=options.rank)
    for name in ("unfolded", "folded"):
        with adapted(potentials[name], config).recording():
            potentials[name].predict(batches[name])
    handle = potentials["folded"].adapter
    assert handle is not None
    handle.merge()

    times: dict[str, list[float]] = {name: [] for name in potentials}
    for call in range(options.calls + 5):  # the first five warm up
        for name, potential in potentials.items():
            spent = seconds(potential, batches[name])
            if call >= 5:
                times[name].append(spent)
    print(
        f"{options.method}, rank {options.rank}, on {options.backbone}; {options.copies} x aspirin, {options.dtype}, "
        f"{options.device}, {options.threads} threads, {options.calls} calls"
    )
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["bare"], strict=True))
        print(f"{name:10s} {1000 * statistics.median(values):7.2f} ms   {100 * (ratio - 1):+6.1f} %")


if __name__ == "__main__":
    main()
