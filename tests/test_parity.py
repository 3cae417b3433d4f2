"""A small adapted network gives the forces of the authors' own code.

tests/data/mmea_parity.npz: weights, random adapter values, two geometries of aspirin, and the energies and forces that
the code published with arXiv 2511.06696 gives for them (float64). Constants that a network rebuilds are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from conftest import batch_of, network_config, run
from mmea_calc.adapted import Adapter, attach
from mmea_calc.config import AdapterConfig
from mmea_calc.fast.contraction import remove_table_contraction, use_table_contraction
from mmea_calc.mace_bridge import build_network

FILE = Path(__file__).parent / "data" / "mmea_parity.npz"
GATE_PARTS = {"down": "adapter_tensor_head.0", "shift": "adapter_scalar.0", "gain": "adapter_scale.0"}


def stored_value(data: Any, name: str, like: torch.Tensor) -> torch.Tensor:
    """The authors' value of one trained tensor; tensors trained directly are part of their network, so D = 0."""
    kind, _, path = name.partition(".")
    if kind == "gates":
        layer, part, key = path.rsplit(".", 2)
        return torch.as_tensor(data[f"w/{layer}.{GATE_PARTS[part]}.{key}"])
    if path.endswith(".D"):
        return torch.zeros_like(like)
    tensor, letter, index = path.rsplit(".", 2)
    layer = tensor.rpartition(".")[0]
    return torch.as_tensor(data[f"w/{layer}.LoRA_weight.{2 * int(index) + (letter == 'B')}"])


@pytest.fixture(scope="module")
def data() -> Any:
    with np.load(FILE) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def adapter(data: Any) -> Adapter:
    network = build_network(
        network_config(
            hidden_irreps=str(data["hidden"]),
            max_ell=int(data["max_ell"]),
            correlation=int(data["correlation"]),
            MLP_irreps="16x0e",
            radial_MLP=[64, 64, 64],
            r_max=5.0,
            avg_num_neighbors=14.3,
            atomic_inter_scale=1.088,
            atomic_inter_shift=0.1,
            atomic_energies=[-13.6, -1029.0, -2041.0],
        )
    )
    state = network.state_dict()
    stored = {name: torch.as_tensor(data[f"w/{name}"]) for name in state if f"w/{name}" in data}
    assert {name for name, _ in network.named_parameters()} <= set(stored)
    network.load_state_dict({**state, **stored})
    settings = AdapterConfig(phi=str(data["phi"]), gate_rank=int(data["rank"]), saturate=False)  # type: ignore[arg-type]
    adapter = attach(network, settings)
    adapter.load_state_dict({name: stored_value(data, name, p) for name, p in adapter.named_parameters()})
    return adapter


def assert_parity(data: Any, adapter: Adapter) -> None:
    batch = batch_of(*(Atoms(data["numbers"], positions) for positions in data["positions"]), r_max=5.0)
    output = run(adapter.network, batch)
    assert np.abs(output["forces"].numpy() - data["forces"]).max() < 1e-12
    assert np.abs(output["energy"].numpy() - data["energy"]).max() < 1e-9


def test_energies_and_forces_of_the_published_code(data: Any, adapter: Adapter) -> None:
    assert_parity(data, adapter)
    with adapter.disabled():
        batch = batch_of(*(Atoms(data["numbers"], positions) for positions in data["positions"]), r_max=5.0)
        bare = run(adapter.network, batch)["forces"].numpy()
    assert np.abs(bare - data["forces"]).max() > 1e-3  # the adapter matters


def test_the_same_with_the_table_contraction_and_with_merged_weights(data: Any, adapter: Adapter) -> None:
    adapter.merge()
    assert_parity(data, adapter)
    assert use_table_contraction(adapter.network) == 2
    assert_parity(data, adapter)
    adapter.unmerge()
    assert_parity(data, adapter)
    remove_table_contraction(adapter.network)
