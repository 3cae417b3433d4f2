"""`mmea check`: its table, its exit codes, and the verdict in the adapter's header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write
from commands import mmea
from typer.testing import Result

from mmea_calc import adapter_file
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile, read_adapter, write_adapter
from mmea_calc.backbone import load_backbone
from mmea_calc.check import forgetting, measure
from mmea_calc.config import AdapterConfig
from mmea_calc.data.dataset import Labelled
from mmea_calc.errors import AdapterFileError
from mmea_calc.potential import Potential

SHORT = ["--ramp-time", "8fs", "--nve-time", "12fs", "--replicas", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, a few of the package's molecules, and constant energy from the start as it is."""
    torch.set_num_threads(1)
    few = {level: items[:3] for level, items in forgetting.other_molecules().items()}

    def some() -> dict[str, tuple[Labelled, ...]]:
        return few

    def at_once(potential: Potential, atoms: Atoms, *rest: object) -> list[Atoms]:
        return [atoms]

    monkeypatch.setattr(forgetting, "other_molecules", some)
    monkeypatch.setattr(measure, "thermal_frames", at_once)


@pytest.fixture
def water(tmp_path: Path) -> Path:
    write(path := tmp_path / "water.xyz", molecule("H2O"))
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that changes nothing yet."""
    backbone = load_backbone()
    config = AdapterConfig(method="gates", gate_rank=2)
    tensors = attach(backbone.network, config).state_dict()
    file = AdapterFile(config, tensors, backbone.name, backbone.fingerprint, checks={"dynamics": {"passed": True}})
    return write_adapter(tmp_path / "tiny.adapter", file)


def only(result: Result) -> dict[str, Any]:
    """The JSON document on standard output."""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_verdict_is_printed_and_kept_beside_other_checks(adapter: Path, water: Path, tmp_path: Path) -> None:
    result = mmea("check", adapter, water, *SHORT, "--plot", tmp_path / "page.png", "--level", "PBE/def2-SVP")
    assert result.exit_code == 0, result.output
    words = ("ramp 300 to 2000 K", "H-O at 0.4", "backbone alone", "NVE drift", "is sound for H2O", "page.png written")
    for word in words:
        assert word in result.stdout
    assert "FAILS" not in result.stdout
    assert "adapter: temperature ramp" in result.stderr
    assert (tmp_path / "page.png").stat().st_size > 50_000
    checks = read_adapter(adapter).checks
    assert checks["dynamics"] == {"passed": True}
    assert checks["soundness"]["passed"] is True
    assert checks["soundness"]["forgetting"]["own_difference_meV_per_A"] == 0
    shown = mmea("info", adapter).stdout
    assert "check of soundness" in shown
    assert "passed" in shown


def test_a_fault_is_a_sentence_and_exit_code_one(adapter: Path, water: Path) -> None:
    result = mmea("check", adapter, water, *SHORT, "--max-hole-rim", "inf", "--max-forgetting", "0.5",
                  "--level", "PBE/def2-SVP")  # fmt: skip
    assert result.exit_code == 1
    assert "FAILS" in result.stdout
    assert "Forgetting: on PBE/def2-SVP molecules the error of the forces is" in " ".join(result.stdout.split())
    assert "is not sound for H2O" in result.stdout
    verdict = read_adapter(adapter).checks["soundness"]
    assert verdict["passed"] is False
    assert any(f.startswith("Forgetting") for f in verdict["failures"])


def test_a_backbone_is_checked_and_nothing_is_written(water: Path, tmp_path: Path) -> None:
    result = mmea("check", "mmea-organic-s", water, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    found = only(result)
    assert found["potential"] == "mmea-organic-s"
    assert found["passed"] is True
    assert found["forgetting"] is None
    assert [p["label"] for p in found["backbone"]["pairs"]] == ["H-H", "H-O", "O-O"]
    assert [p.name for p in tmp_path.iterdir()] == ["water.xyz"]


def test_a_verdict_that_cannot_be_kept_is_told_all_the_same(
    adapter: Path, water: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, file: AdapterFile) -> Path:
        raise AdapterFileError(f"{path} cannot be written")

    monkeypatch.setattr(adapter_file, "write_adapter", refuse)
    result = mmea("check", adapter, water, *SHORT, "--level", "PBE/def2-SVP", "--plot", tmp_path / "page.png")
    assert result.exit_code == 0, result.output
    assert "is sound for H2O" in result.stdout
    assert "the verdict is in" not in result.stdout
    assert "warning: the verdict is not kept in the adapter" in result.stderr
    assert (tmp_path / "page.png").exists()


def test_an_adapter_of_the_package_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match="comes with mmea and stays as it is"):
        adapter_file.update_adapter("gfn2-to-pbe.adapter", checks={})
    assert list(tmp_path.iterdir()) == []


def test_a_drift_that_is_not_measured_has_no_verdict(water: Path) -> None:
    few = ["--ramp-time", "8fs", "--nve-time", "7fs", "--replicas", "1", "--device", "cpu"]
    result = mmea("check", "mmea-organic-s", water, *few)
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stdout.splitlines() if "NVE drift" in line)
    assert not line.split("meV/atom/ps")[1].strip(" │|")


def test_what_is_wrong_with_the_input_is_one_line(adapter: Path, water: Path, tmp_path: Path) -> None:
    write(close := tmp_path / "close.xyz", Atoms("H2", [[0, 0, 0], [0, 0, 0.2]]))
    for arguments, words in (
        ((adapter, tmp_path / "no.xyz"), "no such file with a start structure"),
        ((adapter, adapter), "cannot be read as a structure"),
        ((adapter, water, "--ramp-time", "0fs"), "ramp_ps must be positive"),
        ((adapter, close), "H0 and H1 of the start structure are 0.20 Å apart: relax it first"),
        ((adapter, water, "--labels", water), "no structure has an energy, forces or a stress"),
    ):
        result = mmea("check", *arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert "soundness" not in read_adapter(adapter).checks
    assert mmea("check", adapter, water, "--ramp-time", "2").exit_code == 2
