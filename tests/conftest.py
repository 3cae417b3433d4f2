"""Small networks and structures that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import nn

from mmea_calc.adapted import Adapter
from mmea_calc.backbone import Backbone
from mmea_calc.fast import machine_code
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.graph import Batch, build_graph, collate
from mmea_calc.mace_bridge import build_network

# The networks of the tests are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ELEMENTS = (1, 6, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `shared` need development data that is not part of the project; those on a GPU are marked `gpu`."""
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("device") == "cuda":  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.gpu)
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the development data beside the checkout, which is absent"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device present; CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


@pytest.fixture(autouse=True)
def _defaults_stay() -> Iterator[None]:
    """No test, and no code under test, may change torch's defaults for the process."""
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == before


@pytest.fixture(autouse=True, scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of compiled networks: an empty one of the tests' own."""
    folder = tmp_path_factory.mktemp("programs") / "programs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_code, "program_folder", lambda: folder)
        yield folder


def network_config(**changes: Any) -> dict[str, Any]:
    """A tiny MACE: 4x0e + 4x1o, max_ell 2, correlation 3, two interactions, elements H, C, O."""
    config: dict[str, Any] = dict(
        model="ScaleShiftMACE",
        r_max=4.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        num_interactions=2,
        hidden_irreps="4x0e + 4x1o",
        MLP_irreps="4x0e",
        correlation=3,
        gate="silu",
        radial_MLP=[8, 8],
        radial_type="bessel",
        interaction_cls_first="RealAgnosticInteractionBlock",
        interaction_cls="RealAgnosticResidualInteractionBlock",
        atomic_inter_scale=1.1,
        atomic_inter_shift=0.1,
        avg_num_neighbors=8.0,
        atomic_numbers=list(ELEMENTS),
        atomic_energies=[0.0] * len(ELEMENTS),
    )
    return {**config, **changes}


def random_network(seed: int = 0, **changes: Any) -> nn.Module:
    """A network with random weights, float64, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(network_config(**changes))
    return network.requires_grad_(False)


def small_backbone_around(network: nn.Module, atomic_energies: dict[int, float]) -> Backbone:
    """A `random_network` on the fast path as `load_backbone` would give it."""
    use_fast_path(network)
    return Backbone(
        name="small",
        source="built by the tests",
        network=network,
        config=network_config(),
        fingerprint="f" * 64,
        elements=ELEMENTS,
        r_max=4.0,
        heads=("Default",),
        head="Default",
        atomic_energies=dict(atomic_energies),
    )


def randomise(adapter: Adapter, seed: int = 1, std: float = 0.1) -> None:
    """Give every trained tensor random values, so that the adapter changes the network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=3)
    return atoms


def crystal() -> Atoms:
    """Two atoms in a sheared cell smaller than the cutoff, so that edges cross it several times."""
    atoms = bulk("C", "diamond", a=3.4)
    strain = np.array([[0.02, 0.03, 0], [0, -0.01, 0.02], [0.01, 0, 0.03]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.numbers[1] = 8
    atoms.rattle(0.05, seed=4)
    return atoms


def batch_of(*structures: Atoms, r_max: float = 4.0, dtype: torch.dtype = torch.float64, head: int = 0) -> Batch:
    return collate([build_graph(a, r_max) for a in structures], ELEMENTS, head_index=head, dtype=dtype)


def run(network: nn.Module, batch: Batch, **options: bool) -> dict[str, torch.Tensor]:
    """Energy, forces and (on request) stress of a batch."""
    tensors = dict(batch.tensors)
    tensors["positions"] = tensors["positions"].detach().clone()
    output = network(tensors, **options)
    return {k: v.detach() for k, v in output.items() if isinstance(v, torch.Tensor)}
