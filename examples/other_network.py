"""An adapter on a network that is not MACE: e3nn's own SimpleNetwork, taken from one level of theory to another.

The backbone is trained on energies and forces of the embedded MACE backbone. An adapter on it then learns those of
density functional theory (PBE/def2-SVP) from 50 structures of aspirin, and is written, read and switched off.

python examples/other_network.py [--backbone-steps 300] [--steps 200]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from ase.io import iread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmea_calc import AdapterConfig, attach  # before e3nn: it lets torch's safe loading pass e3nn's own constants
from mmea_calc.md import open_potential

DATA = Path(__file__).resolve().parent / "data/aspirin"
ELEMENTS = torch.tensor([1, 6, 8])
CUTOFF = 4.0
BATCH = 5


@dataclass
class Labelled:
    """Structures of one molecule: positions (n, atoms, 3) in A, energies (n,) in eV, forces (n, atoms, 3) in eV/A."""

    numbers: Tensor
    positions: Tensor
    energies: Tensor
    forces: Tensor


def read_labelled(path: Path) -> Labelled:
    structures = list(iread(path))
    forces = torch.stack([torch.tensor(a.arrays["REF_forces"]) for a in structures])
    energies = torch.tensor([a.info["REF_energy"] for a in structures], dtype=torch.float64)
    positions = torch.stack([torch.tensor(a.positions) for a in structures])
    return Labelled(torch.tensor(structures[0].numbers), positions, energies, forces)


def simple_network() -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e3nn's TorchScript annotations
        from e3nn.nn.models.v2106.gate_points_networks import SimpleNetwork

        return SimpleNetwork(
            irreps_in=f"{len(ELEMENTS)}x0e", irreps_out="0e", max_radius=CUTOFF, num_neighbors=14.0, num_nodes=1.0,
            mul=12, layers=2, lmax=1,
        )  # fmt: skip


def predict(network: nn.Module, data: Labelled, which: Tensor, mean: Tensor, train: bool) -> tuple[Tensor, Tensor]:
    """Energies (n,) and forces (n, atoms, 3) of the structures `which`."""
    n, n_atoms = len(which), len(data.numbers)
    positions = data.positions[which].float().reshape(-1, 3).requires_grad_()
    one_hot = (data.numbers[:, None] == ELEMENTS).float().repeat(n, 1)
    graph = {"pos": positions, "x": one_hot, "batch": torch.arange(n).repeat_interleave(n_atoms)}
    energies = network(graph).squeeze(1)
    (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=train)
    return energies.double() + mean, -gradient.view(n, n_atoms, 3)


def train(network: nn.Module, parameters: Iterable[nn.Parameter], data: Labelled, steps: int, lr: float) -> Tensor:
    """Fit energies and forces; returns the mean energy, which stands for reference energies here."""
    mean, generator = data.energies.mean(), torch.Generator().manual_seed(1)
    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        which = torch.randperm(len(data.energies), generator=generator)[:BATCH]
        energies, forces = predict(network, data, which, mean, train=True)
        error = (energies - data.energies[which]) / len(data.numbers)
        loss = 10 * (error**2).mean() + 100 * ((forces - data.forces[which]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()
        schedule.step()
    return mean


def errors(network: nn.Module, data: Labelled, mean: Tensor) -> str:
    energies, forces = predict(network, data, torch.arange(len(data.energies)), mean, train=False)
    off = 1000 * (energies - data.energies).abs().mean()
    return f"E {off:.0f} meV, F {1000 * (forces - data.forces).abs().mean():.0f} meV/A"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("simple_network.safetensors"))
    options = parser.parse_args()

    dft, test = read_labelled(DATA / "train.xyz"), read_labelled(DATA / "test.xyz")
    potential = open_potential("mmea-organic-s", device="cpu")
    energies, forces = potential.predict_graphs([potential.graph(a) for a in iread(DATA / "train.xyz")], batch_size=25)
    cheap = Labelled(dft.numbers, dft.positions, torch.as_tensor(energies), torch.stack(list(forces)).cpu().double())

    network, start = simple_network(), time.perf_counter()
    train(network, network.parameters(), cheap, options.backbone_steps, lr=5e-3)
    print(f"backbone: {sum(p.numel() for p in network.parameters())} parameters, {time.perf_counter() - start:.0f} s")
    mean = dft.energies.mean()
    print("backbone on the DFT test set:", errors(network, test, mean))

    adapter = attach(network, AdapterConfig(method="mmea", gate_rank=8, low_rank=4, alpha=4.0))
    print(adapter, adapter.counts())
    for name, reason in adapter.skipped.items():
        print(f"stays as it is: {name}: {reason}")
    start = time.perf_counter()
    mean = train(network, adapter.parameters(), dft, options.steps, lr=5e-3)
    with adapter.recording():  # gates level off beyond what they see here
        predict(network, dft, torch.arange(len(dft.energies)), mean, train=False)
    trained = errors(network, test, mean)
    print(f"adapter on the DFT test set: {trained}, {time.perf_counter() - start:.0f} s")
    with adapter.disabled():
        print("switched off:", errors(network, test, mean))

    save_file(adapter.state_dict(), options.output)
    adapter.detach()
    again = attach(network, adapter.config)
    again.load_state_dict(load_file(options.output))
    print(f"read from {options.output} ({options.output.stat().st_size / 1000:.0f} kB):", errors(network, test, mean))


if __name__ == "__main__":
    main()
