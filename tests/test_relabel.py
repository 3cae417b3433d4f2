"""A cheap set brought to a better level of theory by a network of the difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from commands import mmea

from mmea_calc.backbone import load_backbone
from mmea_calc.errors import DataError
from mmea_calc.md import open_potential
from mmea_calc.pretrain.dataset import read_arrays, read_e0, spans
from mmea_calc.pretrain.relabel import differences, relabel
from mmea_calc.pretrain.train import PretrainConfig, pretrain

PBE = Path(__file__).resolve().parents[1] / "data" / "pbe"


@pytest.fixture(scope="module")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve structures of data/pbe with GFN2-xTB's labels alone."""
    folder = tmp_path_factory.mktemp("cheap")
    with np.load(PBE / "train-0.npz") as whole:
        arrays = dict(whole)
    atoms = int(arrays["n_atoms"][:12].astype(int).sum())
    np.savez(
        folder / "train-0.npz",
        numbers=arrays["numbers"][:atoms],
        positions=arrays["positions"][:atoms],
        forces=arrays["forces_xtb"][:atoms],
        n_atoms=arrays["n_atoms"][:12],
        energy=arrays["energy_xtb"][:12],
    )
    (folder / "e0.json").write_bytes((PBE / "e0.json").read_bytes())
    return folder


def test_differences_and_the_cheap_labels_add_up_to_the_better_ones(cheap: Path, tmp_path: Path) -> None:
    result = mmea("pretrain", "differences", "--data", PBE, "--cheap", cheap, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = read_arrays([tmp_path / "train-0.npz"])
    files = [read_arrays([file], more=("energy_xtb", "forces_xtb")) for file in sorted(PBE.glob("train-*.npz"))]
    for key in ("energy", "forces"):
        whole, lower = (np.concatenate([f[k] for f in files]) for k in (key, f"{key}_xtb"))
        np.testing.assert_allclose(found[key] + lower, whole, rtol=0, atol=1e-4 if key == "forces" else 1e-9)
    assert set(read_e0(tmp_path).values()) == {0.0}  # the same atoms on both sides here
    with pytest.raises(DataError, match="energy_xtb, forces_xtb"):
        differences(data=cheap, cheap=cheap, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_shipped_network_of_differences_brings_the_cheap_forces_near_the_better_ones() -> None:
    by = open_potential(str(PBE / "difference.safetensors"), device="cpu")
    arrays = read_arrays([PBE / "valid-3.npz"], more=("energy_xtb", "forces_xtb"))
    structures = [
        Atoms(arrays["numbers"][where].astype(int), arrays["positions"][where].astype(float)) for where in spans(arrays)
    ]
    _, forces = by.predict_graphs([by.graph(atoms) for atoms in structures])
    wanted = arrays["forces"] - arrays["forces_xtb"]
    # 11.4 of 406 meV/A, measured with the released file
    assert 1e3 * np.abs(np.concatenate([f.numpy() for f in forces]) - wanted).mean() == pytest.approx(11.4, rel=0.01)
    assert 1e3 * np.abs(wanted).mean() == pytest.approx(406.2, rel=0.001)


def test_a_set_is_relabelled_by_what_the_backbone_gives(cheap: Path, tmp_path: Path) -> None:
    by = open_potential("mmea-organic-s", device="cpu", dtype="float64")
    lower = read_arrays([cheap / "train-0.npz"])
    count = relabel(data=cheap, by=by, beside=PBE, out=tmp_path, number=5)
    found = read_arrays([tmp_path / "train-0.npz"])
    assert count == len(found["n_atoms"]) <= 5
    graphs = []
    ends = np.cumsum(found["n_atoms"].astype(int))
    for end, n in zip(ends, found["n_atoms"].astype(int), strict=True):
        span = slice(end - n, end)
        graphs.append(by.graph(Atoms(found["numbers"][span], found["positions"][span].astype(float))))
    energies, forces = by.predict_graphs(graphs)
    before = found["forces"] - torch.cat(forces).numpy()
    # every row is one of the cheap set's
    apart = np.abs(before[:, None] - lower["forces"][None]).max(-1).min(1)
    assert apart.max() < 1e-4
    cheap_energies = found["energy"] - energies.numpy()
    assert np.abs(cheap_energies[:, None] - lower["energy"][None]).min(1).max() < 1e-4
    true = read_arrays([tmp_path / "train-1.npz"])
    assert len(true["n_atoms"]) == 3 * 5256
    assert len(read_arrays([tmp_path / "valid.npz"])["n_atoms"]) == 550
    assert read_e0(tmp_path) == read_e0(PBE)
    assert (tmp_path / "level.txt").read_text() == (PBE / "level.txt").read_text()


def test_scaled_readouts_give_scaled_energies(tmp_path: Path) -> None:
    settings = PretrainConfig(steps=1, batch_size=2, lr=1e-9, device="cpu", readout_scale=0.25)
    made = load_backbone(
        pretrain(data=PBE, out=tmp_path, name="quarter", start="mmea-organic-s", settings=settings), dtype="float64"
    )
    start = load_backbone("mmea-organic-s", dtype="float64")
    for name, weight in made.network.named_parameters():
        factor = 0.25 ** {"readouts.0": 1, "readouts.1": 0.5}.get(name[: len("readouts.0")], 0)
        expected = factor * start.network.get_parameter(name)
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_a_folder_that_holds_a_set_is_not_written_into(cheap: Path, tmp_path: Path) -> None:
    """Labels are dear."""
    (own := tmp_path / "own").mkdir()
    for file in cheap.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    with pytest.raises(DataError, match=r"own holds train-0\.npz already"):
        differences(data=PBE, cheap=own, out=own)
    with pytest.raises(DataError, match=r"own holds train-0\.npz already"):
        relabel(data=own, by=open_potential("mmea-organic-s", device="cpu"), beside=PBE, out=own, number=1)
    assert {file.name: file.read_bytes() for file in own.iterdir()} == before
