"""Methods that are there to be compared with: a network from scratch, and adapters that are not equivariant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import borrowed
from ase.io import write
from scipy.spatial.transform import Rotation
from test_adapted import toy
from test_cli import mmea
from test_finetuning import QUICK, dataset, tiny_backbone
from torch import Tensor, nn

from conftest import batch_of, ethanol, network_config, random_network, randomise, run
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile, read_adapter, write_adapter
from mmea_calc.backbone import save_backbone
from mmea_calc.calculator import MMEACalculator
from mmea_calc.config import AdapterConfig, MDConfig
from mmea_calc.errors import BackboneError, DynamicsError
from mmea_calc.md import quick_check, run_md
from mmea_calc.methods import METHODS
from mmea_calc.potential import Potential
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.trainer import ProgressEvent

# e3nn 0.4 scripts its layers when they are built outside of mmea; torch finds fault with its annotations.
pytestmark = pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")

SCRATCH = AdapterConfig(method="scratch")
BOTTLENECK = AdapterConfig(method="bottleneck", gate_rank=4)
SHORT = MDConfig(time_ps=0.004, timestep_fs=0.5, traj_every=4, stats_every=4, drift_every=0, device="cpu")


@pytest.fixture
def network() -> Iterator[nn.Module]:
    with borrowed("agnostic") as network:
        yield network


def forces(network: nn.Module) -> Tensor:
    return run(network, batch_of(ethanol()))["forces"]


def energies_of_orientations(network: nn.Module) -> Tensor:
    structures = [ethanol() for _ in range(4)]
    for i, atoms in enumerate(structures):
        atoms.positions = atoms.positions @ Rotation.random(random_state=i).as_matrix().T
    return run(network, batch_of(*structures))["energy"]


def stored(config: AdapterConfig, path: Path, **fields: Any) -> AdapterFile:
    """An adapter of the tiny backbone with random values."""
    backbone = tiny_backbone()
    adapter = attach(backbone.network, config)
    randomise(adapter, std=0.02)
    file = AdapterFile(
        config=config, tensors=adapter.state_dict(), backbone="tiny", fingerprint=backbone.fingerprint, **fields
    )
    write_adapter(path, file)
    return read_adapter(path)


def bottlenecked(path: Path) -> Potential:
    potential = Potential(tiny_backbone())
    potential.use(stored(BOTTLENECK, path))
    return potential


# -- scratch ---------------------------------------------------------------------------------------------------------


def test_scratch_starts_as_a_fresh_network_of_the_seed_and_shape(network: nn.Module) -> None:
    global_state = torch.random.get_rng_state()
    adapter = attach(network, replace(SCRATCH, seed=5))
    assert torch.equal(torch.random.get_rng_state(), global_state)
    fresh = random_network(seed=5)
    assert torch.equal(forces(network), forces(fresh))
    state = fresh.state_dict()
    assert all(torch.equal(site.value, state[path]) for path, site in adapter.sites.items())
    assert {name for name, _ in fresh.named_parameters()} <= set(adapter.sites)


def test_a_scratch_network_does_not_depend_on_the_backbone_s_weights() -> None:
    one, other = random_network(0), random_network(1)
    assert not torch.allclose(forces(one), forces(other))
    for network in (one, other):
        attach(network, SCRATCH)
    assert torch.equal(forces(one), forces(other))
    assert bool(forces(one).any())


def test_a_scratch_file_holds_every_tensor_and_needs_no_random_start(tmp_path: Path) -> None:
    file = stored(SCRATCH, tmp_path / "a.adapter")
    made, other = Potential(tiny_backbone()), Potential(tiny_backbone())
    made.use(file)
    # a seed that was never drawn from: all that counts is in the file
    other.use(replace(file, config=replace(SCRATCH, seed=99)))
    assert torch.equal(forces(made.backbone.network), forces(other.backbone.network))
    adapter = attach(random_network(), SCRATCH)
    randomise(adapter, std=0.02)
    assert torch.equal(forces(made.backbone.network), forces(adapter.network))


def test_scratch_needs_a_network_that_can_be_built_anew() -> None:
    network, scalars, vectors = toy()
    bare = network(scalars, vectors)
    with pytest.raises(BackboneError, match="networks of class Toy are not supported"):
        attach(network, SCRATCH)
    assert torch.equal(network(scalars, vectors), bare)


# -- the bottleneck --------------------------------------------------------------------------------------------------


def test_a_bottleneck_follows_its_equation_on_every_linear_layer(network: nn.Module) -> None:
    layer = network.get_submodule("products.0.linear")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = layer(x)
    adapter = attach(network, BOTTLENECK)
    assert torch.equal(layer(x), y)
    randomise(adapter, std=0.5)
    part = adapter.on_linears["products.0.linear"]
    down, up = part.down, part.up
    assert isinstance(down, nn.Parameter)
    assert isinstance(up, nn.Parameter)
    expected = y + torch.nn.functional.silu(y @ down.T) @ up.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_a_trained_bottleneck_breaks_equivariance_and_no_other_method_does(network: nn.Module) -> None:
    bare = energies_of_orientations(network)
    assert float(bare.max() - bare.min()) < 1e-10
    for name, method in METHODS.items():
        adapter = attach(network, AdapterConfig(method=name, gate_rank=4, low_rank=2))
        assert adapter.equivariant == method.equivariant == (name != "bottleneck")
        randomise(adapter, std=0.1)
        energies = energies_of_orientations(network)
        assert not torch.allclose(energies, bare, atol=1e-6)
        spread = float(energies.max() - energies.min()) / float(energies.abs().max())
        assert spread < 1e-10 if method.equivariant else spread > 1e-4
        adapter.detach()


def test_dynamics_refuses_a_bottleneck_unless_forced(tmp_path: Path) -> None:
    potential = bottlenecked(tmp_path / "a.adapter")
    atoms = ethanol()
    with pytest.raises(DynamicsError, match=r"'bottleneck' of this adapter is not equivariant.*force"):
        run_md(potential, atoms, tmp_path / "RUN", SHORT)
    assert not (tmp_path / "RUN").exists()
    with pytest.raises(DynamicsError, match="not equivariant"):
        quick_check(potential, atoms)
    assert run_md(potential, atoms, tmp_path / "RUN", SHORT, force=True).steps == 8
    assert quick_check(potential, atoms, time_ps=0.004, force=True)["time_ps"] == pytest.approx(0.004)
    with potential.adapter_disabled():  # the backbone itself is sound
        run_md(potential, atoms, tmp_path / "BARE", SHORT)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A bottleneck adapter, its backbone and a structure as files."""
    folder = tmp_path_factory.mktemp("files")
    network, backbone = random_network(), folder / "tiny.safetensors"
    fingerprint = save_backbone(backbone, network_config(), network.state_dict())
    adapter = attach(network, BOTTLENECK)
    file = AdapterFile(
        config=BOTTLENECK, tensors=adapter.state_dict(), backbone=str(backbone), fingerprint=fingerprint, elements=(1,)
    )
    write_adapter(folder / "a.adapter", file)
    write(folder / "start.xyz", ethanol())
    return folder / "a.adapter", backbone, folder / "start.xyz"


def test_the_commands_say_that_it_is_not_equivariant(on_disk: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter, _, start = on_disk
    shown = mmea("info", adapter)
    assert shown.exit_code == 0
    assert "not equivariant" in " ".join(shown.output.split())
    refused = mmea("md", adapter, start, "--time", "2fs", "-o", tmp_path / "RUN", "--device", "cpu")
    assert refused.exit_code == 1
    assert "not equivariant" in refused.stderr
    assert "--force" in refused.stderr
    assert not (tmp_path / "RUN").exists()
    refused = mmea("check", adapter, start, "--device", "cpu")
    assert refused.exit_code == 1
    assert "not equivariant" in refused.stderr
    assert "--force" in refused.stderr
    assert read_adapter(adapter).checks == {}
    options = ["--time", "2fs", "--stats-every", 1, "--traj-every", 1, "--drift-every", 0, "--device", "cpu"]
    forced = mmea("md", adapter, start, *options, "-o", tmp_path / "RUN", "--force")
    assert (tmp_path / "RUN" / "summary.json").exists(), forced.output
    refused = mmea("finetune", start, "--method", "bottleneck", "--check-md")
    assert refused.exit_code == 1
    assert "leave --check-md out" in refused.stderr


def test_the_calculator_warns_of_it(on_disk: tuple[Path, Path, Path]) -> None:
    with pytest.warns(UserWarning, match="is not equivariant: its energies change when a structure is turned"):
        MMEACalculator(on_disk[0], device="cpu")


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "lr", "epochs"),
    [
        (SCRATCH, 0.03, 16),
        (BOTTLENECK, 0.01, 6),
        (AdapterConfig(gate_rank=4, low_rank=4, nonlinearity=False, separate_bottlenecks=True, gains="order"), 0.01, 6),
    ],
    ids=["scratch", "bottleneck", "three ablations"],
)
def test_training_improves_resumes_to_the_same_bits_and_comes_back_from_its_file(
    tmp_path: Path, config: AdapterConfig, lr: float, epochs: int
) -> None:
    data, valid = dataset(tmp_path, 6), dataset(tmp_path, 3, "valid.xyz", seed=1)
    training = replace(QUICK, lr=lr, epochs=epochs, validate_every=2)
    messages: list[str] = []

    def trained(name: str, stop_after: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        def progress(event: ProgressEvent) -> None:
            messages.append(event.message)
            if stop_after is not None and event.epoch == stop_after + 1:
                raise KeyboardInterrupt

        options: dict[str, Any] = dict(valid=valid, adapter=config, training=training, progress=progress)
        result = finetune(data, tmp_path / name, backbone=tiny_backbone(), resume=resume, **options)
        assert result.improved
        potential = Potential(tiny_backbone())
        potential.use(read_adapter(tmp_path / name))
        again = potential.predict_graphs([potential.graph(s.atoms) for s in valid.structures])[1]
        errors = torch.cat(again) - torch.cat([torch.as_tensor(s.forces) for s in valid.structures])
        expected = result.fine_tuned["valid"].forces_mae_meV_per_A
        assert 1e3 * float(errors.abs().mean()) == pytest.approx(expected, rel=1e-9)
        return result.adapter.tensors

    whole = trained("whole.adapter")
    with pytest.raises(KeyboardInterrupt):
        trained("parts.adapter", stop_after=3)
    parts = trained("parts.adapter", resume=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any("not equivariant" in m for m in messages) == (config.method == "bottleneck")
