"""Prepared data are the data they were made of: structures, graphs, training, reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import fcc111
from ase.io import write
from test_cli import mmea
from test_finetuning import QUICK, SMALL, labelled, tiny_backbone

from conftest import crystal, ethanol
from mmea_calc.adapter_file import read_adapter
from mmea_calc.data import prepared as prepared_module
from mmea_calc.data.dataset import LabelCounts, Labelled
from mmea_calc.data.preflight import preflight
from mmea_calc.data.prepared import open_dataset, open_prepared
from mmea_calc.data.preparing import prepare, writing
from mmea_calc.data.reading import read_dataset, split
from mmea_calc.errors import DataError
from mmea_calc.graph import build_graph, charge_of, spin_of
from mmea_calc.potential import Potential
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.trainer import Samples


def mixed(tmp_path: Path) -> list[Path]:
    """A molecule, a drifted one, a crystal, a slab, a molecule in a box; labels of all kinds; isolated atoms."""
    slab = fcc111("C", (2, 2, 2), a=3.6, vacuum=5.0)
    slab.info.clear()
    slab.pbc = (True, True, False)
    boxed, drifted = ethanol(), ethanol()
    boxed.set_cell([20.0, 21.0, 22.0])
    drifted.positions += [300.0, -40.0, 7.0]
    frames = [ethanol(), drifted, crystal(), slab, boxed]
    rng = np.random.default_rng(0)
    for k, atoms in enumerate(frames):
        if k != 1:
            atoms.info["REF_energy"] = -100.0 - k
        if k != 3:
            atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        atoms.info["config_type"] = f"kind {k % 2}"
    frames[2].info["REF_stress"] = [0.1, 0.2, 0.3, 0.04, 0.05, 0.06]
    alone = [Atoms("H", info={"energy": -13.5}), Atoms("O", info={"energy": -2040.0})]
    write(tmp_path / "train.xyz", frames, format="extxyz")
    write(tmp_path / "alone.xyz", alone, format="extxyz")
    return [tmp_path / "train.xyz", tmp_path / "alone.xyz"]


def same(one: Labelled, other: Labelled) -> None:
    assert np.array_equal(one.atoms.numbers, other.atoms.numbers)
    assert np.array_equal(one.atoms.positions, other.atoms.positions)
    assert np.array_equal(one.atoms.cell.array, other.atoms.cell.array)
    assert np.array_equal(one.atoms.pbc, other.atoms.pbc)
    assert one.energy == other.energy
    for name in ("forces", "stress"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a, b)
    assert (one.config_type, one.index, one.source) == (other.config_type, other.index, other.source)


def test_structures_labels_and_what_is_said_of_them_come_back(tmp_path: Path) -> None:
    files = mixed(tmp_path)
    known, data = read_dataset(files), prepare(files, tmp_path / "train.h5", r_max=4.0)
    assert len(data) == len(known) == 5
    for one, other in zip(known.structures, data.structures, strict=True):
        same(one, other)
    for name in ("hash", "elements", "counts", "keys", "isolated_atoms", "name"):
        assert getattr(data, name) == getattr(known, name), name
    assert {k: v for k, v in data.indices.items() if v} == known.indices
    part, known_part = data.subset([3, 0]), known.subset([3, 0])
    for one, other in zip(known_part.structures, part.structures, strict=True):
        same(one, other)
    assert (part.elements, part.counts) == (known_part.elements, known_part.counts)
    assert part.hash not in (data.hash, data.subset([0, 3]).hash)


def test_stored_neighbour_lists_give_the_graphs_of_the_structures_to_the_bit(tmp_path: Path) -> None:
    data = prepare(mixed(tmp_path), tmp_path / "train.h5", r_max=4.0)
    edges = 0
    for item, graph in zip(data.structures, data.graphs(4.0), strict=True):
        expected = build_graph(item.atoms, 4.0)
        for name in ("numbers", "positions", "cell", "pbc", "edge_index", "unit_shifts"):
            one, other = getattr(expected, name), getattr(graph, name)
            assert one.dtype == other.dtype, name
            assert np.array_equal(one, other), name
        edges += int(np.abs(graph.unit_shifts).sum() > 0)
    assert edges == 2  # the crystal and the slab have some that cross their cells


def test_label_counts_are_those_of_the_structures(tmp_path: Path) -> None:
    data = prepare(mixed(tmp_path), tmp_path / "train.h5", r_max=4.0)
    for rows in ([0, 1, 2, 3, 4], [1, 3], [2]):
        assert data.label_counts(rows) == LabelCounts.of([data.structures[i] for i in rows])
    assert data.label_counts([1, 3, 2]) == LabelCounts(2, 3 * (9 + 2), 9)


def test_training_on_prepared_data_is_training_on_the_data_to_the_bit(tmp_path: Path) -> None:
    write(tmp_path / "train.xyz", labelled(8), format="extxyz")
    prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=4.0)
    for name, data in (("a", read_dataset(tmp_path / "train.xyz")), ("b", open_dataset([tmp_path / "train.h5"]))):
        common: dict[str, Any] = dict(backbone=tiny_backbone(), adapter=SMALL, training=replace(QUICK, epochs=2))
        finetune(data, tmp_path / f"{name}.adapter", test=data, **common)
    one, other = read_adapter(tmp_path / "a.adapter"), read_adapter(tmp_path / "b.adapter")
    assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors | other.tensors)
    assert one.reference_energies == other.reference_energies
    assert one.metrics["fine_tuned"] == other.metrics["fine_tuned"]
    assert other.data["train"]["structures"] == 7


def test_another_cutoff_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "train.xyz", labelled(4), format="extxyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=5.0)
    before = sorted(p.name for p in tmp_path.iterdir())
    cases: list[dict[str, Any]] = [{}, {"report": preflight(data, backbone_elements=(1, 6, 8))}]
    for options in cases:
        with pytest.raises(DataError, match=r"cutoff of 5 A, the backbone has 4 A: prepare the data again"):
            finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), training=QUICK, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_report_on_large_data_looks_at_some_of_every_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "SAMPLE", 3)
    monkeypatch.setattr(prepared_module, "SAMPLE_PER_ELEMENT", 1)
    frames = labelled(12)
    frames[4].numbers[0] = 7
    write(tmp_path / "train.xyz", frames, format="extxyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=4.0)
    some = data.sample()
    assert some.elements == data.elements == (1, 6, 7, 8)
    assert some.rows.tolist() == [0, 4, 5, 11]
    report = preflight(data, backbone_elements=(1, 6, 7, 8), r_max=4.0)
    assert report.sets["train"]["structures"] == 12
    assert report.sets["train"]["looked_at"] == 4
    assert report.sets["train"]["hash"] == data.hash
    assert any("looks at 4 of 12" in note for note in report.notes)
    with pytest.raises(DataError, match=r"has N; the backbone knows H, C, O: choose another"):
        preflight(data, backbone_elements=(1, 6, 8), r_max=4.0)


def test_a_split_of_prepared_data_holds_every_structure_once(tmp_path: Path) -> None:
    write(tmp_path / "train.xyz", labelled(10), format="extxyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=4.0)
    train, valid = split(data, 0.3, seed=1)
    whole = read_dataset(tmp_path / "train.xyz")
    for part, expected in zip((train, valid), split(whole, 0.3, seed=1), strict=True):
        assert part.indices == expected.indices


def test_wrong_data_leave_no_file(tmp_path: Path) -> None:
    frames = labelled(3)
    frames[2].positions[1] = frames[2].positions[0] + 0.1
    write(tmp_path / "close.xyz", frames, format="extxyz")
    frames[2].positions[1] += 1.0
    frames[2].numbers[0] = 35
    write(tmp_path / "bromine.xyz", frames, format="extxyz")
    write(tmp_path / "bare.xyz", [ethanol()], format="extxyz")
    (tmp_path / "broken.xyz").write_text("3\n\nH 0 0\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, message in (
        ("close", r"structure 2 of close\.xyz: atom 0 .* 0\.\d+ A apart"),
        ("bromine", r"structure 2 of bromine\.xyz has Br \(35\)"),
        ("bare", "no structure has an energy"),
        ("broken", "cannot be read"),
        ("absent", "there is no such file"),
    ):
        with pytest.raises(DataError, match=message):
            prepare([tmp_path / f"{name}.xyz"], tmp_path / "out.h5", r_max=4.0, elements=(1, 6, 8))
    with pytest.raises(DataError, match=r"ends in \.h5"):
        prepare([tmp_path / "close.xyz"], tmp_path / "out.dat", r_max=4.0)
    with pytest.raises(DataError, match=r"energy_key 'dft' is in no structure .* REF_energy"):
        prepare([tmp_path / "close.xyz"], tmp_path / "out.h5", r_max=4.0, energy_key="dft")
    with pytest.raises(DataError, match="is no folder"):
        prepare([tmp_path / "close.xyz"], tmp_path / "no" / "out.h5", r_max=4.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_file_that_is_no_prepared_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    write(tmp_path / "train.xyz", labelled(2), format="extxyz")
    prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=4.0)
    with pytest.raises(DataError, match="one file, got"):
        open_dataset([tmp_path / "train.h5", tmp_path / "train.xyz"])
    with pytest.raises(DataError, match="give energy_key to mmea prepare"):
        open_dataset([tmp_path / "train.h5"], energy_key="dft")
    with pytest.raises(DataError, match="is prepared data already"):
        prepare([tmp_path / "train.h5"], tmp_path / "again.h5", r_max=4.0)
    for name, version in (("old", 1), ("train", 99)):
        if name == "old":
            (tmp_path / "old.h5").write_bytes((tmp_path / "train.h5").read_bytes())
        with h5py.File(tmp_path / f"{name}.h5", "a") as file:
            file.attrs["version"] = version
    for name, message in (
        ("old", "has version 1 of the format, .* make it again with mmea prepare"),
        ("text", "cannot be read as HDF5"),
        ("other", "no prepared data"),
        ("train", "has version 99 of the format, this mmea knows 2: upgrade"),
        ("absent", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            open_prepared(tmp_path / f"{name}.h5")


def test_keys_are_chosen_and_mixtures_told_as_for_data_in_memory(tmp_path: Path) -> None:
    frames = labelled(3)
    frames[1].info["energy"] = frames[1].info.pop("REF_energy")
    write(tmp_path / "train.xyz", frames, format="extxyz")
    known = read_dataset(tmp_path / "train.xyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=4.0)
    assert (data.counts, data.keys, data.notes) == (known.counts, known.keys, known.notes)
    assert data.counts["energy"] == 2


def test_structures_are_written_by_the_thousand_and_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.data.preparing._TOGETHER", 4)
    frames = labelled(11)
    write(tmp_path / "train.xyz", frames, format="extxyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "train.h5", r_max=4.0)
    for one, other in zip(read_dataset(tmp_path / "train.xyz").structures, data.structures, strict=True):
        same(one, other)
    with writing(tmp_path / "b.h5", r_max=4.0) as writer:
        for item in data.structures:
            writer.add(item)
    assert open_prepared(tmp_path / "b.h5").hash == data.hash


def test_the_command_prepares_and_a_file_of_another_cutoff_fails_with_one_line(tmp_path: Path) -> None:
    write(tmp_path / "train.xyz", labelled(3), format="extxyz")
    result = mmea("prepare", tmp_path / "train.xyz", "-o", tmp_path / "train.h5")
    assert result.exit_code == 0, result.output
    assert "holds 3 structures, 3 with energy (REF_energy), 3 with forces (REF_forces)" in result.stdout
    data = open_prepared(tmp_path / "train.h5")
    assert data.file.r_max == 4.5
    with writing(tmp_path / "other.h5", r_max=6.0) as writer:
        for item in data.structures:
            writer.add(item)
    result = mmea("finetune", tmp_path / "other.h5", "-o", tmp_path / "a.adapter")
    assert result.exit_code == 1
    assert "was prepared for a cutoff of 6 A, the backbone has 4.5 A: prepare the data again" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a.run").exists()


def test_copies_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    frames = labelled(4)
    write(tmp_path / "train.xyz", [a for _ in range(4) for a in frames], format="extxyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "a.h5", r_max=4.0)
    assert list(data.first_of_its_geometry()) == [0, 1, 2, 3] * 4
    assert list(data.subset([5, 9, 2, 6]).first_of_its_geometry()) == [0, 0, 2, 2]
    train, valid = split(data, 0.3, 0)
    memory = split(read_dataset(tmp_path / "train.xyz"), 0.3, 0)
    assert (train.indices, valid.indices) == (memory[0].indices, memory[1].indices)
    places = [{i % 4 for rows in part.indices.values() for i in rows} for part in (train, valid)]
    assert not places[0] & places[1]


def test_charges_and_spins_are_kept_and_looked_at(tmp_path: Path) -> None:
    frames = labelled(4)
    frames[2].info.update(charge=-1, spin=2)
    write(tmp_path / "train.xyz", frames, format="extxyz")
    data = prepare([tmp_path / "train.xyz"], tmp_path / "a.h5", r_max=4.0)
    assert [charge_of(s.atoms) for s in data.structures] == [0, 0, -1, 0]
    assert [spin_of(s.atoms) for s in data.structures] == [1, 1, 2, 1]
    with pytest.warns(UserWarning, match="total charge of -1"):
        Samples(data, Potential(tiny_backbone()))
    assert any("total charge" in text for text in preflight(data, backbone_elements=(1, 6, 8)).warnings)
