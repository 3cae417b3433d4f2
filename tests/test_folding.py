"""Folded adapters: the same energies and forces from a plain file, which needs nothing of this package."""

from __future__ import annotations

import json
import pickletools
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from typer.testing import CliRunner

from conftest import crystal, ethanol, network_config, random_network, randomise
from mmea_calc import AdapterConfig, MMEACalculator, attach, load_backbone
from mmea_calc.adapter_file import AdapterFile, write_adapter
from mmea_calc.backbone import save_backbone
from mmea_calc.errors import AdapterError, AdapterFileError, BackboneError, MMEAError
from mmea_calc.folding import fold
from mmea_calc.mace_bridge import mace_calculators, quiet
from mmea_cli.main import app

ENERGIES = {1: -13.6, 6: -1029.123456789012, 8: -2041.75}
CHARGED = {"total_charge": {"type": "continuous", "emb_dim": 4, "per": "graph", "in_dim": 1}}
TWO_HEADS: dict[str, Any] = dict(
    heads=["low", "high"],
    atomic_energies=[[-10.0, -1000.0, -2000.0], [-11.0, -1001.0, -2001.0]],
    atomic_inter_scale=[1.1, 0.9],
    atomic_inter_shift=[0.1, -0.1],
)


@cache
def _stored(changes: str) -> bytes:
    """The file of a tiny random backbone; written once, which takes several constructions."""
    values = json.loads(changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        save_backbone(path, network_config(**values), random_network(**values).state_dict())
        return path.read_bytes()


def trained(folder: Path, method: str = "elora", head: str | None = None, **changes: Any) -> Path:
    """An adapter with random values, on a tiny random backbone beside it."""
    path = folder / "tiny.safetensors"
    path.write_bytes(_stored(json.dumps(changes)))
    backbone = load_backbone(path, head=head, dtype="float64")
    adapter = attach(backbone.network, AdapterConfig(method=method, gate_rank=2, low_rank=2))
    randomise(adapter, std=0.03)
    file = AdapterFile(
        adapter.config,
        adapter.state_dict(),
        str(path),
        backbone.fingerprint,
        head=backbone.head,
        elements=(1, 6, 8),
        reference_energies=ENERGIES,
        level_of_theory="PBE/test",
    )
    return write_adapter(folder / f"{method}.adapter", file)


def mace_calculator(path: Path, **options: Any) -> Any:
    with quiet():
        network = torch.load(path, weights_only=False)
        options = {"default_dtype": "float64", **options}
        return mace_calculators().MACECalculator(models=[network], device="cpu", **options)


def globals_of(path: Path) -> set[str]:
    """Names of modules, classes and functions that a torch file makes its reader import."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        operations = list(pickletools.genops(archive.read(name)))
    return {str(argument) for code, argument, _ in operations if code.name in ("GLOBAL", "INST")}


def assert_same(atoms: Atoms, one: Any, other: Any, atol: float = 1e-10) -> None:
    results = []
    for calculator in (one, other):
        copy = atoms.copy()
        copy.calc = calculator
        stress = [copy.get_stress()] if atoms.pbc.all() else []
        results.append([copy.get_potential_energy(), copy.get_forces(), *stress])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["elora", "full", "sparse", "scratch"])
def test_a_folded_model_in_mace_torch_gives_the_adapters_energies_and_forces(tmp_path: Path, method: str) -> None:
    adapter = trained(tmp_path, method)
    model = fold(adapter, tmp_path / "folded.model")
    assert model.reference_energies == ENERGIES
    plain, ours = mace_calculator(model.path), MMEACalculator(adapter, dtype="float64", device="cpu")
    for atoms in (ethanol(), crystal()):
        assert_same(atoms, plain, ours)
    bare, adapted = ethanol(), ethanol()
    adapted.calc = ours
    forces = adapted.get_forces()
    bare.calc = MMEACalculator(backbone=tmp_path / "tiny.safetensors", dtype="float64", device="cpu")
    assert np.abs(bare.get_forces() - forces).max() > 1e-3


def test_pair_repulsion_is_in_a_folded_model(tmp_path: Path) -> None:
    adapter = trained(tmp_path, pair_repulsion=True)
    plain = mace_calculator(fold(adapter, tmp_path / "folded.model").path)
    ours = MMEACalculator(adapter, dtype="float64", device="cpu")
    squeezed = ethanol()
    squeezed.positions *= 0.8  # C-O at 1.14 A, within the sum of the covalent radii, 1.42 A
    for atoms in (squeezed, crystal()):
        assert_same(atoms, plain, ours)
    squeezed.calc = ours
    without = squeezed.copy()
    (tmp_path / "without").mkdir()
    without.calc = MMEACalculator(trained(tmp_path / "without"), dtype="float64", device="cpu")
    assert squeezed.get_potential_energy() > without.get_potential_energy() + 1


@pytest.mark.parametrize("changes", [{}, TWO_HEADS, {"embedding_specs": CHARGED}], ids=["plain", "heads", "charged"])
def test_nothing_of_this_package_is_in_a_folded_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = trained(tmp_path, head="high" if "heads" in changes else None, **changes)
    fold(adapter, tmp_path / "folded.model")
    used = load_backbone(tmp_path / "tiny.safetensors", head="high" if "heads" in changes else None).network
    with quiet():
        torch.save(used, tmp_path / "used.model")
    assert any(name.startswith("mmea") for name in globals_of(tmp_path / "used.model"))
    found = globals_of(tmp_path / "folded.model")
    assert any(name.startswith("mace.") for name in found)
    assert not [name for name in found if "mmea" in name]


def test_a_folded_model_opens_where_this_package_is_not_installed(tmp_path: Path) -> None:
    fold(trained(tmp_path), tmp_path / "folded.model")
    script = (
        "import sys; sys.modules['mmea_calc'] = None\n"
        "from mace.calculators import MACECalculator\n"
        "from ase.build import molecule\n"
        "atoms = molecule('CH3CH2OH')\n"
        f"atoms.calc = MACECalculator(model_paths={str(tmp_path / 'folded.model')!r}, device='cpu')\n"
        "print('energy', repr(float(atoms.get_potential_energy())))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    energy = float(done.stdout.split("energy")[1])
    assert energy == pytest.approx(2 * ENERGIES[6] + 6 * ENERGIES[1] + ENERGIES[8], abs=200)


@pytest.mark.parametrize("head", ["low", "high"])
def test_of_several_heads_the_adapters_own_has_its_energies(tmp_path: Path, head: str) -> None:
    adapter = trained(tmp_path, head=head, **TWO_HEADS)
    model = fold(adapter, tmp_path / "folded.model")
    assert (model.heads, model.head) == (("low", "high"), head)
    plain = mace_calculator(model.path, head=head)
    assert_same(ethanol(), plain, MMEACalculator(adapter, dtype="float64", device="cpu"))
    other = 1 - model.heads.index(head)
    e0 = plain.models[0].atomic_energies_fn.atomic_energies
    assert e0[other].tolist() == TWO_HEADS["atomic_energies"][other]

    safe = fold(adapter, tmp_path / "folded.safetensors")
    assert load_backbone(safe.path, head=model.heads[other]).atomic_energies[1] == e0[other][0]
    alone = MMEACalculator(backbone=safe.path, head=head, dtype="float64", device="cpu")
    assert_same(ethanol(), alone, plain)


def test_the_safe_format_gives_the_same_and_says_what_it_is(tmp_path: Path) -> None:
    adapter = trained(tmp_path)
    fold(adapter, tmp_path / "folded.safetensors")
    backbone = load_backbone(tmp_path / "folded.safetensors", dtype="float64")
    assert backbone.atomic_energies == ENERGIES
    assert backbone.level_of_theory == "PBE/test"
    assert backbone.notes is not None
    assert "elora" in backbone.notes
    ours = MMEACalculator(adapter, dtype="float64", device="cpu")
    assert_same(crystal(), MMEACalculator(backbone=backbone), ours)
    assert backbone.fingerprint != load_backbone(tmp_path / "tiny.safetensors").fingerprint


def test_a_folded_model_can_be_taken_as_a_backbone(tmp_path: Path) -> None:
    adapter = trained(tmp_path)
    fold(adapter, tmp_path / "folded.model")
    again = MMEACalculator(backbone=tmp_path / "folded.model", dtype="float64", device="cpu")
    assert_same(ethanol(), again, MMEACalculator(adapter, dtype="float64", device="cpu"))


def test_single_precision_is_written_on_request(tmp_path: Path) -> None:
    adapter = trained(tmp_path)
    fold(adapter, tmp_path / "folded.model", dtype="float32")
    plain = mace_calculator(tmp_path / "folded.model", default_dtype="float32")
    assert {p.dtype for p in plain.models[0].parameters()} == {torch.float32}
    atoms = ethanol()
    assert_same(atoms, plain, MMEACalculator(adapter, dtype="float64", device="cpu"), atol=0.01)


@pytest.mark.parametrize(
    ("method", "part", "places"),
    [
        ("mmea", "gates", "MMEACalculator and `mmea md`"),
        ("gates", "gates", "MMEACalculator and `mmea md`"),
        ("bottleneck", "bottlenecks", "MMEACalculator"),  # no dynamics with what is not equivariant
    ],
)
def test_gates_are_refused_with_the_reason_and_nothing_is_written(
    tmp_path: Path, method: str, part: str, places: str
) -> None:
    adapter = trained(tmp_path, method)
    with pytest.raises(AdapterError, match=rf"{part} depend on the features of each atom.*{places}, which"):
        fold(adapter, tmp_path / "folded.model")
    assert not list(tmp_path.glob("*folded*"))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("folded.pt", BackboneError, "should end in .model"),
        ("absent/folded.model", BackboneError, "no folder"),
    ],
)
def test_a_place_that_will_not_do_is_refused_first(tmp_path: Path, name: str, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        fold(tmp_path / "absent.adapter", tmp_path / name)
    with pytest.raises(AdapterFileError, match="no such adapter file"):
        fold(tmp_path / "absent.adapter", tmp_path / "folded.model")


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    adapter = trained(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(_stored(json.dumps({"num_polynomial_cutoff": 6, "r_max": 5.0})))
    with pytest.raises(MMEAError, match="fingerprint"):
        fold(adapter, tmp_path / "folded.model", backbone=tmp_path / "other.safetensors")
    assert not (tmp_path / "folded.model").exists()


def test_the_command_folds_and_explains_what_it_cannot(tmp_path: Path) -> None:
    adapter = trained(tmp_path, head="high", **TWO_HEADS)
    result = CliRunner().invoke(app, ["fold", str(adapter), "-o", str(tmp_path / "folded.model")])
    assert result.exit_code == 0, result.output
    assert "head='high'" in result.output
    assert mace_calculator(tmp_path / "folded.model", head="high").r_max == pytest.approx(4.0)
    gates = trained(tmp_path, "gates")
    refused = CliRunner().invoke(app, ["fold", str(gates), "-o", str(tmp_path / "gates.model")])
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output
    assert not (tmp_path / "gates.model").exists()
