"""Adapters on networks of NequIP and SevenNet; both need another e3nn than mace-torch, so an environment of their own.

docs/other-networks.md says how to make one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from conftest import ethanol, randomise
from mmea_calc._e3nn import o3
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig
from mmea_calc.errors import AdapterError
from mmea_calc.methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchScript.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:nequip.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

SETTINGS: dict[str, Any] = dict(gate_rank=3, low_rank=2, alpha=2.0)
SPECIES = {1: 0, 6: 1, 8: 2}
EQUIVARIANT = ("mmea", "gates", "elora", "full", "sparse")


@dataclass
class Family:
    """A small random network of one package, and how to run it: structure -> energy (eV), forces (eV/A)."""

    network: nn.Module
    run: Callable[[nn.Module, Atoms], tuple[Tensor, Tensor]]

    def __call__(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        return self.run(self.network, atoms)

    def values(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        energy, forces = self(atoms)
        return energy.detach(), forces.detach()


@cache
def nequip_network() -> nn.Module:
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    return NequIPGNNModel(
        **dict(seed=0, model_dtype="float64", compile_mode="eager", r_max=4.0, type_names=["H", "C", "O"]),
        **dict(num_layers=2, l_max=1, num_features=4, radial_mlp_width=8, avg_num_neighbors=5.0),
        **dict(readout_mlp_hidden_layers_depth=1, readout_mlp_hidden_layers_width=4, readout_mlp_nonlinearity=None),
    )


def run_nequip(network: nn.Module, atoms: Atoms) -> tuple[Tensor, Tensor]:
    from nequip.data import compute_neighborlist_, from_dict

    types = torch.tensor([SPECIES[int(z)] for z in atoms.numbers])
    data = from_dict({"pos": torch.tensor(atoms.positions), "atom_types": types})
    output = network(compute_neighborlist_(data, r_max=4.0))
    return output["total_energy"].sum(), output["forces"]


@cache
def sevennet_network() -> nn.Module:
    import sevenn._const as const
    import sevenn._keys as keys
    from sevenn.model_build import build_E3_equivariant_model
    from sevenn.util import chemical_species_preprocess

    config = dict(const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG) | chemical_species_preprocess(["H", "C", "O"])
    config |= {keys.CUTOFF: 4.0, keys.NODE_FEATURE_MULTIPLICITY: 4, keys.LMAX: 1, keys.NUM_CONVOLUTION: 2}
    config |= {keys.CONV_DENOMINATOR: 5.0, keys.SHIFT: 0.0, keys.SCALE: 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_E3_equivariant_model(config)
    network.set_is_batch_data(False)

    def one_hot_in_float64(module: nn.Module, inputs: Any, data: Any) -> None:
        data[keys.NODE_ATTR] = data[keys.NODE_ATTR].double()
        data[keys.NODE_FEATURE] = data[keys.NODE_FEATURE].double()

    network.get_submodule("onehot_idx_to_onehot").register_forward_hook(one_hot_in_float64)
    return network.double()


def run_sevennet(network: nn.Module, atoms: Atoms) -> tuple[Tensor, Tensor]:
    import sevenn._keys as keys
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    data = AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, 4.0))
    # SevenNet's distance vectors are in float32: made anew, so that small steps can be seen.
    positions, (src, dst) = torch.tensor(atoms.positions), data[keys.EDGE_IDX]
    vectors = positions[dst] - positions[src]
    torch.testing.assert_close(vectors.float(), data[keys.EDGE_VEC].float())
    data[keys.EDGE_VEC] = vectors.requires_grad_()
    data[keys.NODE_FEATURE] = torch.tensor([SPECIES[int(z)] for z in atoms.numbers])
    output = network(data)
    return output[keys.PRED_TOTAL_ENERGY].sum(), output[keys.PRED_FORCE]


FAMILIES: dict[str, tuple[str, Callable[[], nn.Module], Any]] = {
    "nequip": ("nequip", nequip_network, run_nequip),
    "sevennet": ("sevenn", sevennet_network, run_sevennet),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    package, make, run = FAMILIES[request.param]
    default = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their imports
            pytest.importorskip(package, reason=f"{package} is not installed; it needs an environment of its own")
            network = make()
        network.eval()
        state = {key: value.clone() for key, value in network.state_dict().items()}
        yield Family(network, run)
        from mmea_calc.adapted import attached

        if adapter := attached(network):
            adapter.detach()
        network.load_state_dict(state)
    finally:
        torch.set_default_dtype(default)  # NequIP sets it too


def test_gates_sit_on_every_linear_layer(family: Family) -> None:
    linears = {name for name, m in family.network.named_modules() if isinstance(m, o3.Linear)}
    adapter = attach(family.network, AdapterConfig(**SETTINGS))
    assert set(adapter.gates) == linears
    assert adapter.skipped == {}
    assert set(adapter.counts()) == {"gates", "tensor_product", "radial_layer"}


def test_elora_and_gates_leave_only_what_is_no_layer(family: Family) -> None:
    """Every matrix of the network is low-rank updated; biases, embeddings, scales and frequencies are not."""
    adapter = attach(family.network, AdapterConfig(method="elora", **SETTINGS))
    rest = [n for n, p in family.network.named_parameters() if n.endswith("weight") and "parametrizations" not in n]
    assert [n for n in rest if "embed_module" not in n] == []
    assert len(adapter.updates) >= 10


@pytest.mark.parametrize("method", [m for m in EQUIVARIANT if METHODS[m].identity])
def test_an_untrained_adapter_changes_nothing(family: Family, method: str) -> None:
    before = family.values(ethanol())
    attach(family.network, AdapterConfig(method=method, **SETTINGS))
    for one, other in zip(family.values(ethanol()), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", EQUIVARIANT)
def test_energy_stays_and_forces_turn_under_rotation_and_reflection(family: Family, method: str) -> None:
    atoms = ethanol()
    bare = family.values(atoms)
    randomise(attach(family.network, AdapterConfig(method=method, **SETTINGS)), std=0.05)
    energy, forces = family.values(atoms)
    assert not torch.allclose(forces, bare[1], rtol=1e-3)
    turn = o3.angles_to_matrix(*torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64))
    for matrix in (turn, -turn):
        turned = atoms.copy()
        turned.positions = atoms.positions @ matrix.numpy().T
        turned_energy, turned_forces = family.values(turned)
        torch.testing.assert_close(turned_energy, energy, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(turned_forces, forces @ matrix.T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["mmea", "elora"])
def test_forces_are_the_negative_gradient_of_the_energy(family: Family, method: str) -> None:
    atoms, step = ethanol(), 1e-4
    randomise(attach(family.network, AdapterConfig(method=method, **SETTINGS)), std=0.05)
    _, forces = family.values(atoms)
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * step
            energies.append(float(family.values(moved)[0]))
        assert float(forces[atom, axis]) == pytest.approx(-np.diff(energies[::-1])[0] / (2 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["mmea", "gates"])
def test_training_lowers_the_loss_and_detaching_brings_the_network_back(family: Family, method: str) -> None:
    atoms, names = ethanol(), list(family.network.state_dict())
    bare = family.values(atoms)
    target_energy, target_forces = 1.3 * bare[0], 1.3 * bare[1]
    adapter = attach(family.network, AdapterConfig(method=method, **SETTINGS))
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    family.network.train()
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        energy, forces = family(atoms)
        loss = (energy - target_energy) ** 2 + ((forces - target_forces) ** 2).sum()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    family.network.eval()
    trained = family.values(atoms)
    with adapter.disabled():
        torch.testing.assert_close(family.values(atoms)[1], bare[1], rtol=1e-12, atol=1e-12)
    state = adapter.state_dict()
    adapter.detach()
    assert list(family.network.state_dict()) == names
    torch.testing.assert_close(family.values(atoms)[1], bare[1], rtol=1e-12, atol=1e-12)
    attach(family.network, AdapterConfig(method=method, **SETTINGS)).load_state_dict(state)
    torch.testing.assert_close(family.values(atoms)[1], trained[1], rtol=1e-12, atol=1e-12)


def test_a_nequip_model_that_compiles_itself_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_module = pytest.importorskip("nequip.nn.compile", reason="nequip is not installed")
    holder = nn.Module()
    model = compile_module.CompileGraphModel.__new__(compile_module.CompileGraphModel)
    nn.Module.__init__(model)
    holder.model = model
    with pytest.raises(AdapterError, match="model: NequIP compiles it: build the model with compile_mode: eager"):
        attach(holder, AdapterConfig())
