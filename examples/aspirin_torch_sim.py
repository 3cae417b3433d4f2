"""Aspirin in TorchSim: structures relaxed in one batch, then dynamics of them all. docs/torch-sim.md explains it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch_sim as ts
from ase.io import read

from mmea_calc import MMEACalculator
from mmea_calc.torchsim import MMEAModel

DATA = Path(__file__).resolve().parent / "data" / "aspirin"


def main(adapter: str) -> None:
    structures = read(DATA / "test.xyz", index=":4")
    model = MMEAModel(adapter, memory_scales_with="n_atoms")

    # The same energies as in ASE.
    energies = model(ts.initialize_state(structures, model.device, model.dtype))["energy"]
    calculator = MMEACalculator(adapter)
    for atoms, energy in zip(structures, energies, strict=True):
        atoms.calc = calculator
        print(f"{float(energy):.5f} eV, {float(energy) - atoms.get_potential_energy():+.1e} from ASE's")

    # Two structures of 21 atoms at a time; on a GPU, autobatcher=True finds out how many fit.
    batcher = ts.InFlightAutoBatcher(model=model, memory_scales_with="n_atoms", max_memory_scaler=42)
    relaxed = ts.optimize(
        system=structures,
        model=model,
        optimizer=ts.optimizers.fire,
        autobatcher=batcher,
        convergence_fn=ts.generate_force_convergence_fn(force_tol=0.05, include_cell_forces=False),
    )
    print("relaxed:", *(f"{energy:.4f}" for energy in relaxed.energy.tolist()), "eV")

    final = ts.integrate(
        system=relaxed,
        model=model,
        integrator=ts.nvt_langevin,
        n_steps=200,
        timestep=0.0005,
        temperature=300,
        gamma=torch.tensor(10.0 / ts.units.MetalUnits.time, dtype=model.dtype),
        seed=0,
    )
    kT = ts.calc_kT(masses=final.masses, momenta=final.momenta, system_idx=final.system_idx)
    print("after 100 fs:", *(f"{t:.0f}" for t in (kT / ts.units.MetalUnits.temperature).tolist()), "K")


if __name__ == "__main__":
    main(sys.argv[1])
