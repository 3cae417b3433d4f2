"""Every script of examples/md runs, with shortened settings."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile, write_adapter
from mmea_calc.backbone import load_backbone
from mmea_calc.config import DEFAULT_BACKBONE, AdapterConfig
from mmea_calc.md.trajectory import read_replica, replica_names

SCRIPTS = ROOT / "examples" / "md"
START = """\
3
Properties=species:S:1:pos:R:3 pbc="F F F"
O 0.00 0.00 0.12
H 0.00 0.76 -0.48
H 0.00 -0.76 -0.48
"""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small adapters for the embedded backbone that change it a little."""
    folder = tmp_path_factory.mktemp("adapters")
    backbone = load_backbone()
    paths = []
    for seed in (1, 2):
        adapter = attach(backbone.network, AdapterConfig(method="gates", gate_rank=2, seed=seed))
        randomise(adapter, seed, std=0.01)
        tensors = {name: t.clone() for name, t in adapter.state_dict().items()}
        adapter.detach()
        file = AdapterFile(
            adapter.config, tensors, DEFAULT_BACKBONE, backbone.fingerprint, backbone.head, elements=(1, 6, 8)
        )
        paths.append(write_adapter(folder / f"seed{seed}.adapter", file))
    return paths


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A molecule of water in the folder that the script works in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "start.xyz"
    path.write_text(START)
    return path


def run(name: str, *arguments: object) -> None:
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = [name, *(str(a) for a in arguments)]
    try:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    finally:
        sys.argv = before
    assert torch.get_num_threads() == threads


def test_every_script_is_short_and_has_a_test() -> None:
    scripts = sorted(p.name for p in SCRIPTS.glob("*.py"))
    assert len(scripts) == 6
    text = Path(__file__).read_text()
    for script in scripts:
        assert len((SCRIPTS / script).read_text().splitlines()) < 60
        assert f'run("{script}"' in text


def test_three_temperatures_in_one_batch(start: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("three_temperatures.py", adapters[0], start, "--time", 0.008, "--replicas", 2, "-o", "out")
    assert len(replica_names("out")) == 6
    assert capsys.readouterr().out.count("stable for") == 6


def test_langevin_with_ase(start: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("langevin_ase.py", adapters[0], start, "--time", 0.008, "--temperature", 300, 600)
    assert sorted(p.name for p in start.parent.glob("*.traj")) == ["langevin_300K.traj", "langevin_600K.traj"]
    assert "600 K: mean" in capsys.readouterr().out


def test_restart_and_analyse(start: Path, adapters: list[Path]) -> None:
    run("restart_and_analyse.py", adapters[0], start, "--time", 0.08, "-o", "out")
    assert read_replica("out", "start0-300K-1").times_ps[-1] == pytest.approx(0.08)
    assert Path("out/analysis/index.html").is_file()


def test_committee_writes_the_structures_that_it_is_least_sure_of(start: Path, adapters: list[Path]) -> None:
    from ase.io import read

    run("committee.py", *adapters, "--start", start, "--time", 0.03, "--keep", 2)
    first, second = read("uncertain.xyz", index=":")
    assert first.info["force_deviation"] >= second.info["force_deviation"] > 0


def test_adapter_on_and_off(start: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("adapter_on_off.py", adapters[0], start, "--time", 0.04, "-o", "out")
    assert "meV/A (RMS)" in capsys.readouterr().out
    on, off = (read_replica(f"out/{name}", "start0-300K-0").positions for name in ("on", "off"))
    assert (on[0] == off[0]).all()
    assert (on[-1] != off[-1]).any()


def test_a_periodic_system(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("periodic.py", DEFAULT_BACKBONE, "--time", 0.024, "--repeat", 1, "-o", "out")
    assert {"rdf.png", "msd.png"} <= {p.name for p in Path("out/analysis").iterdir()}
    assert "failed" not in capsys.readouterr().out
