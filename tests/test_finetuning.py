"""From labelled structures to an adapter file: what a run promises."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write

from conftest import ELEMENTS, crystal, ethanol, random_network, randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import read_adapter
from mmea_calc.backbone import Backbone
from mmea_calc.config import AdapterConfig, TrainConfig
from mmea_calc.data.dataset import Dataset, Labelled
from mmea_calc.data.reading import read_dataset, split
from mmea_calc.errors import AdapterError, AdapterFileError, DataError, TrainingError
from mmea_calc.files import alone_in
from mmea_calc.loss import batch_loss, collect_labels
from mmea_calc.potential import Potential
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.trainer import ProgressEvent, Samples, measure

SMALL = AdapterConfig(gate_rank=4, low_rank=4)
QUICK = TrainConfig(
    epochs=6, batch_size=3, lr=0.01, loss="mse", validate_every=1, warmup_steps=2, dtype="float64", device="cpu"
)


def tiny_backbone(seed: int = 0, dtype: torch.dtype = torch.float64) -> Backbone:
    network = random_network(seed).to(dtype).eval()
    return Backbone(
        name="tiny",
        source="test",
        network=network,
        config={},
        fingerprint=f"{seed:064d}",
        elements=ELEMENTS,
        r_max=4.0,
        heads=("Default",),
        head="Default",
        atomic_energies={1: -13.6, 6: -1027.3, 8: -2038.5},
    )


def labelled(n: int = 12, *, seed: int = 0, energies: bool = True, forces: bool = True) -> list[Atoms]:
    """Ethanol, displaced, labelled by another random network: something that can be learnt."""
    teacher = Potential(tiny_backbone(seed=7))
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = ethanol()
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        energy, all_forces = teacher.predict_graphs([teacher.graph(atoms)])
        if energies:
            atoms.info["REF_energy"] = float(energy[0])
        if forces:
            atoms.arrays["REF_forces"] = all_forces[0].numpy()
        frames.append(atoms)
    return frames


def dataset(tmp_path: Path, n: int = 12, name: str = "train.xyz", **options: Any) -> Dataset:
    path = tmp_path / name
    write(path, labelled(n, **options), format="extxyz")
    return read_dataset(path)


def log_without_times(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_training_lowers_the_error_and_the_file_gives_the_same_errors_again(tmp_path: Path) -> None:
    data, valid = dataset(tmp_path), dataset(tmp_path, 4, "valid.xyz", seed=1)
    result = finetune(
        data, tmp_path / "a.adapter", valid=valid, backbone=tiny_backbone(), adapter=SMALL, training=QUICK
    )
    assert result.improved
    assert result.fine_tuned["valid"].forces_mae_meV_per_A < 0.8 * result.zero_shot["valid"].forces_mae_meV_per_A
    potential = Potential(tiny_backbone())
    potential.use(read_adapter(tmp_path / "a.adapter"))
    again = measure(potential, Samples(valid, potential), QUICK)
    assert again.forces_mae_meV_per_A == pytest.approx(result.fine_tuned["valid"].forces_mae_meV_per_A, rel=1e-9)
    assert again.energy_mae_meV == pytest.approx(result.fine_tuned["valid"].energy_mae_meV, rel=1e-6)


def test_zero_shot_errors_are_those_of_the_bare_backbone(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    result = finetune(
        data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK, E0s="backbone"
    )
    potential = Potential(tiny_backbone())
    _, valid = split(data, QUICK.valid_fraction, QUICK.seed)
    bare = measure(potential, Samples(valid, potential), QUICK)
    assert result.zero_shot["valid"].forces_mae_meV_per_A == pytest.approx(bare.forces_mae_meV_per_A, rel=1e-12)
    assert result.zero_shot["valid"].energy_mae_meV == pytest.approx(bare.energy_mae_meV, rel=1e-9)


def test_the_backbone_is_given_back_as_it_was(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    before = {k: v.clone() for k, v in backbone.network.state_dict().items()}
    finetune(dataset(tmp_path), tmp_path / "a.adapter", backbone=backbone, adapter=SMALL, training=QUICK)
    after = backbone.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_every_gate_has_a_range_that_holds_all_training_structures(tmp_path: Path) -> None:
    data, valid = dataset(tmp_path), dataset(tmp_path, 3, "valid.xyz", seed=1)
    finetune(data, tmp_path / "a.adapter", valid=valid, backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    potential = Potential(tiny_backbone())
    potential.use(read_adapter(tmp_path / "a.adapter"))
    assert potential.adapter is not None
    excess: list[float] = []
    for name, gate in potential.adapter.gates.items():
        assert gate.calibrated, name
        linear = potential.backbone.network.get_submodule(name)
        linear.register_forward_hook(lambda _, x, y, gate=gate: excess.append(gate.excess(x[0]).detach().max().item()))
    potential.predict_graphs(Samples(data, potential).graphs)
    assert len(excess) > 0
    assert max(excess) < 1e-9


def test_resuming_from_any_epoch_gives_the_bits_of_the_uninterrupted_run(tmp_path: Path) -> None:
    data, valid = dataset(tmp_path), dataset(tmp_path, 3, "valid.xyz", seed=1)

    def run(name: str, stop_after: int | None = None, resume: bool = False) -> None:
        def progress(event: ProgressEvent) -> None:
            if stop_after is not None and event.epoch == stop_after + 1:
                raise KeyboardInterrupt

        finetune(
            data,
            tmp_path / name,
            valid=valid,
            backbone=tiny_backbone(),
            adapter=SMALL,
            training=QUICK,
            resume=resume,
            progress=progress,
        )

    run("whole.adapter")
    for stop in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(f"parts{stop}.adapter", stop_after=stop)
        assert not (tmp_path / f"parts{stop}.adapter").exists()
        run(f"parts{stop}.adapter", resume=True)
        whole, parts = read_adapter(tmp_path / "whole.adapter"), read_adapter(tmp_path / f"parts{stop}.adapter")
        assert whole.tensors.keys() == parts.tensors.keys()
        assert all(torch.equal(whole.tensors[k], parts.tensors[k]) for k in whole.tensors)
        assert log_without_times(tmp_path / "whole.run") == log_without_times(tmp_path / f"parts{stop}.run")


def test_a_run_killed_outright_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data = tmp_path / "train.xyz"
    write(data, labelled(), format="extxyz")
    script = f"""
import sys
from dataclasses import replace
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_finetuning import *
finetune(read_dataset({str(data)!r}), sys.argv[1], backbone=tiny_backbone(), adapter=SMALL, training=QUICK,
         resume=len(sys.argv) > 2, progress=lambda e: print("epoch", e.epoch, flush=True))
"""

    command = [sys.executable, "-c", script]
    subprocess.run([*command, str(tmp_path / "whole.adapter")], check=True, stdout=subprocess.DEVNULL, timeout=300)
    with subprocess.Popen([*command, str(tmp_path / "parts.adapter")], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.strip() == "epoch 3":
                os.kill(killed.pid, signal.SIGKILL)
                break
    assert not (tmp_path / "parts.adapter").exists()
    resumed = [*command, str(tmp_path / "parts.adapter"), "resume"]
    subprocess.run(resumed, check=True, stdout=subprocess.DEVNULL, timeout=300)
    whole, parts = read_adapter(tmp_path / "whole.adapter"), read_adapter(tmp_path / "parts.adapter")
    assert all(torch.equal(whole.tensors[k], parts.tensors[k]) for k in whole.tensors)


def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    other = TrainConfig(**{**QUICK.__dict__, "lr": 0.02})
    with pytest.raises(TrainingError, match=r"lr was 0\.01, is 0\.02"):
        finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=other, resume=True)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_best_adapter(tmp_path: Path) -> None:
    data, valid = dataset(tmp_path), dataset(tmp_path, 3, "valid.xyz", seed=1)
    backbone = tiny_backbone()

    def poison(event: ProgressEvent) -> None:
        if event.epoch == 3:  # from the fourth epoch on the network gives NaN
            with torch.no_grad():
                backbone.network.get_submodule("readouts.0.linear").get_parameter("weight").fill_(math.nan)

    with pytest.raises(TrainingError, match=r"nan.*epoch 4.*structure \d+ of train.xyz.*a\.adapter"):
        finetune(
            data,
            tmp_path / "a.adapter",
            valid=valid,
            backbone=backbone,
            adapter=AdapterConfig(method="gates", gate_rank=4),
            training=QUICK,
            progress=poison,
        )
    kept = read_adapter(tmp_path / "a.adapter")
    assert kept.training["best_epoch"] <= 3


def test_what_was_learnt_is_judged_on_validation_and_a_failure_is_reported(tmp_path: Path) -> None:
    useless = TrainConfig(**{**QUICK.__dict__, "lr": 1e-10, "epochs": 1})
    hopeless = AdapterConfig(gate_rank=4, low_rank=4, init_std=50.0)
    result = finetune(
        dataset(tmp_path), tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=hopeless, training=useless
    )
    assert not result.improved


def test_nothing_is_written_when_the_data_are_wrong(tmp_path: Path) -> None:
    frames = labelled(4)
    frames[2].numbers[0] = 35
    write(tmp_path / "bad.xyz", frames, format="extxyz")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DataError, match="Br"):
        finetune(read_dataset(tmp_path / "bad.xyz"), tmp_path / "a.adapter", backbone=tiny_backbone(), training=QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("energies", "forces"), [(True, False), (False, True)])
def test_structures_may_lack_energies_or_forces(tmp_path: Path, energies: bool, forces: bool) -> None:
    data = dataset(tmp_path, energies=energies, forces=forces)
    training = TrainConfig(**{**QUICK.__dict__, "epochs": 15, "energy_weight": 100.0, "valid_fraction": 0.3})
    result = finetune(
        data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=training, E0s="backbone"
    )
    assert math.isnan(result.fine_tuned["valid"].energy_mae_meV) == (not energies)
    assert math.isnan(result.fine_tuned["valid"].forces_mae_meV_per_A) == (not forces)
    assert result.improved


def test_stress_is_learnt_where_it_is_labelled_and_weighted(tmp_path: Path) -> None:
    teacher = Potential(tiny_backbone(seed=7))
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(8):
        atoms = crystal()
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.02, (3, 3))), scale_atoms=True)
        prediction = teacher.predict(teacher.collate([teacher.graph(atoms)]), stress=True)
        assert prediction.forces is not None
        assert prediction.stress is not None
        atoms.info |= {"REF_energy": float(prediction.energy[0]), "REF_stress": prediction.stress[0].numpy().ravel()}
        atoms.arrays["REF_forces"] = prediction.forces.numpy()
        frames.append(atoms)
    write(tmp_path / "crystal.xyz", frames, format="extxyz")
    data = read_dataset(tmp_path / "crystal.xyz")
    assert data.counts["stress"] == 8

    def stress_error(potential: Potential) -> float:
        prediction = potential.predict(potential.collate([potential.graph(f) for f in frames]), stress=True)
        assert prediction.stress is not None
        labels = np.array([s.stress for s in data.structures])
        return float(np.abs(prediction.stress.numpy() - labels).mean())

    training = TrainConfig(**{**QUICK.__dict__, "epochs": 12, "stress_weight": 1000.0, "energy_weight": 0.0})
    finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=training, E0s="backbone")
    potential = Potential(tiny_backbone())
    bare = stress_error(potential)
    potential.use(read_adapter(tmp_path / "a.adapter"))
    assert stress_error(potential) < 0.7 * bare


def test_the_run_folder_tells_what_the_run_was(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    finetune(
        data,
        tmp_path / "a.adapter",
        backbone=tiny_backbone(),
        adapter=SMALL,
        training=QUICK,
        level_of_theory="PBE/def2-SVP",
    )
    assert read_adapter(tmp_path / "a.adapter").level_of_theory == "PBE/def2-SVP"
    run = tmp_path / "a.run"
    config = json.loads((run / "config.json").read_text())
    assert config["adapter"]["gate_rank"] == 4
    assert config["training"]["lr"] == 0.01
    recorded = json.loads((run / "data.json").read_text())["split"]
    used = [i for part in ("train", "valid") for rows in recorded[part].values() for i in rows]
    assert sorted(used) == list(range(12))
    assert {p.name for p in run.iterdir()} >= {"log.csv", "checkpoint.pt", "learning_curve.png", "parity_valid.png"}


def test_the_loss_is_the_weighted_mean_of_squared_errors_over_what_is_labelled(tmp_path: Path) -> None:
    data = dataset(tmp_path, 3)
    potential = Potential(tiny_backbone())
    structures = [data.structures[0], *(s for s in dataset(tmp_path, 2, "e.xyz", forces=False).structures)]
    batch = potential.collate([potential.graph(s.atoms) for s in structures])
    prediction = potential.predict(batch)
    labels = collect_labels(structures, dtype=torch.float64, device=torch.device("cpu"))
    loss = batch_loss(prediction, labels, QUICK, energy_weight=2.0, forces_weight=3.0)
    de = (prediction.energy - torch.tensor([s.energy for s in structures], dtype=torch.float64)) / 9
    assert prediction.forces is not None
    df = prediction.forces[:9] - torch.tensor(structures[0].forces)
    assert float(loss.total) == pytest.approx(float(2 * (de**2).mean() + 3 * (df**2).mean()), rel=1e-10)


def test_the_gradient_of_the_loss_is_that_of_finite_differences(tmp_path: Path) -> None:
    data = dataset(tmp_path, 2)
    potential = Potential(tiny_backbone())
    adapter = potential.adapter = attach(potential.backbone.network, SMALL)
    randomise(adapter)
    samples = Samples(data, potential)
    parameters = adapter.parameters()

    def loss() -> torch.Tensor:
        prediction = potential.predict(potential.collate(samples.graphs), training=True)
        labels = samples.labels([0, 1], potential)
        return batch_loss(prediction, labels, QUICK, energy_weight=1.0, forces_weight=10.0).total

    gradients = torch.autograd.grad(loss(), parameters)
    rng = np.random.default_rng(0)
    for k in rng.choice(len(parameters), 8, replace=False):
        parameter, i, step = parameters[k], int(rng.integers(parameters[k].numel())), 1e-5
        before = parameter.detach().clone()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(before)
                parameter.view(-1)[i] += sign * step
            ends.append(float(loss().detach()))
        with torch.no_grad():
            parameter.copy_(before)
        numerical = (ends[0] - ends[1]) / (2 * step)
        assert float(gradients[k].reshape(-1)[i]) == pytest.approx(numerical, rel=1e-5, abs=1e-6)


# -- from an earlier adapter -----------------------------------------------------------------------------------------


def test_training_goes_on_from_an_earlier_adapter(tmp_path: Path) -> None:
    data, valid = dataset(tmp_path), dataset(tmp_path, 4, "valid.xyz", seed=1)
    common: dict[str, Any] = dict(valid=valid, backbone=tiny_backbone())
    first = finetune(data, tmp_path / "a.adapter", adapter=SMALL, training=QUICK, **common)
    common["backbone"] = tiny_backbone()
    second = finetune(data, tmp_path / "b.adapter", init=tmp_path / "a.adapter", training=QUICK, **common)
    start = second.initial["valid"]
    assert start.forces_mae_meV_per_A == pytest.approx(first.fine_tuned["valid"].forces_mae_meV_per_A, rel=1e-9)
    assert second.fine_tuned["valid"].forces_mae_meV_per_A < start.forces_mae_meV_per_A
    assert second.zero_shot["valid"].forces_mae_meV_per_A == first.zero_shot["valid"].forces_mae_meV_per_A
    header = read_adapter(tmp_path / "b.adapter").header()
    assert header["training"]["init"]["name"] == "a.adapter"
    assert header["metrics"]["initial"]["valid"] == start.to_dict()


def test_without_training_the_earlier_adapter_is_written_again_with_what_it_saw(tmp_path: Path) -> None:
    data, other = dataset(tmp_path, 6), dataset(tmp_path, 6, "other.xyz", seed=5)
    finetune(data, tmp_path / "a.adapter", valid=other, backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    none = replace(QUICK, epochs=1, lr=1e-12)
    finetune(
        other, tmp_path / "b.adapter", valid=data, backbone=tiny_backbone(), init=tmp_path / "a.adapter", training=none
    )
    before, after = read_adapter(tmp_path / "a.adapter").tensors, read_adapter(tmp_path / "b.adapter").tensors
    wider = 0
    for name, value in before.items():
        if not name.startswith("ranges."):
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-8)
        elif name.endswith(".high"):
            assert (after[name] >= value).all()
            wider += int((after[name] > value).sum())
        else:
            assert (after[name] <= value).all()
    assert wider


@pytest.mark.parametrize(("smaller", "larger"), [("gates", "mmea"), ("gates", "auto"), ("elora", "auto")])
def test_a_method_that_does_more_starts_from_what_the_other_has_learnt(
    smaller: str, larger: str, tmp_path: Path
) -> None:
    data, valid = dataset(tmp_path), dataset(tmp_path, 4, "valid.xyz", seed=1)
    common: dict[str, Any] = dict(valid=valid, training=QUICK)
    first = finetune(
        data, tmp_path / "a.adapter", adapter=replace(SMALL, method=smaller), backbone=tiny_backbone(), **common
    )
    second = finetune(
        data,
        tmp_path / "b.adapter",
        adapter=replace(SMALL, method=larger),
        init=tmp_path / "a.adapter",
        backbone=tiny_backbone(),
        **common,
    )
    start = second.initial["valid"].forces_mae_meV_per_A
    assert start == pytest.approx(first.fine_tuned["valid"].forces_mae_meV_per_A, rel=1e-9)
    assert second.fine_tuned["valid"].forces_mae_meV_per_A < start
    assert second.adapter.n_parameters > first.adapter.n_parameters
    with pytest.raises(AdapterError, match=f"method is '{larger}' there, '{smaller}' here"):
        finetune(
            data,
            tmp_path / "c.adapter",
            adapter=replace(SMALL, method=smaller),
            init=tmp_path / "b.adapter",
            backbone=tiny_backbone(),
            **common,
        )


def test_an_earlier_adapter_of_another_backbone_or_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = dataset(tmp_path, 6)
    finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    with pytest.raises(AdapterError, match="gate_rank is 4 there, 3 here"):
        finetune(
            data,
            tmp_path / "b.adapter",
            backbone=tiny_backbone(),
            adapter=replace(SMALL, gate_rank=3),
            init=tmp_path / "a.adapter",
            training=QUICK,
        )
    with pytest.raises(AdapterFileError, match="this adapter was made for backbone"):
        finetune(
            data, tmp_path / "b.adapter", backbone=tiny_backbone(seed=9), init=tmp_path / "a.adapter", training=QUICK
        )
    assert not (tmp_path / "b.adapter").exists()
    assert not (tmp_path / "b.run").exists()


def test_a_checkpoint_that_started_elsewhere_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, 6)
    finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    options: dict[str, Any] = dict(training=QUICK, E0s="backbone")
    finetune(data, tmp_path / "b.adapter", backbone=tiny_backbone(), adapter=SMALL, **options)
    with pytest.raises(TrainingError, match="weights at the start"):
        finetune(
            data,
            tmp_path / "b.adapter",
            backbone=tiny_backbone(),
            init=tmp_path / "a.adapter",
            resume=True,
            **options,
        )


def test_what_is_no_adapter_is_not_written_over(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    before = (tmp_path / "train.xyz").read_bytes()
    with pytest.raises(TrainingError, match=r"train.xyz is there and no adapter"):
        finetune(data, tmp_path / "train.xyz", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    assert (tmp_path / "train.xyz").read_bytes() == before
    (tmp_path / "md.run").mkdir()
    (tmp_path / "md.run/trajectory.h5").write_bytes(b"frames")
    with pytest.raises(TrainingError, match="folder of a run of dynamics"):
        finetune(data, tmp_path / "md.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    with pytest.raises(TrainingError, match="seed must be at least 0"):
        finetune(data, tmp_path / "a", backbone=tiny_backbone(), adapter=SMALL, training=replace(QUICK, seed=-1))


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {who: f".checkpoint.pt.{who}.part" for who in (str(ended.pid), str(os.getpid()), "notes", "9" * 30)}
    for name in (*names.values(), "own.part"):
        (tmp_path / name).write_bytes(b"half")
    with alone_in(tmp_path, TrainingError):
        left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {*names.values(), "own.part"} - {names[str(ended.pid)]}


def test_two_processes_do_not_train_into_one_folder(tmp_path: Path) -> None:
    data, run = dataset(tmp_path), tmp_path / "a.run"
    run.mkdir()
    with alone_in(run, TrainingError), pytest.raises(TrainingError, match=r"another process is writing into .*a\.run"):
        finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    assert not (tmp_path / "a.adapter").exists()
    finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=QUICK)
    assert not (run / ".lock").exists()


def test_settings_of_no_use_to_the_method_are_told(tmp_path: Path) -> None:
    write(tmp_path / "train.xyz", labelled(6), format="extxyz")
    told: list[str] = []
    for method in ("elora", "mmea"):
        finetune(
            read_dataset(tmp_path / "train.xyz"), tmp_path / "a.adapter", backbone=tiny_backbone(),
            adapter=replace(SMALL, method=method, gains="order"), training=replace(QUICK, epochs=1),
            progress=lambda event: told.append(event.message),
        )  # fmt: skip
    assert [text for text in told if "has no use for" in text] == [
        "method elora has no use for gate_rank, gains: this changes nothing"
    ]


def test_stresses_that_are_not_trained_are_told(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    structures = [replace(s, stress=np.zeros((3, 3))) for s in data.structures]
    told: list[str] = []
    finetune(
        replace(data, structures=structures), tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL,
        training=QUICK, progress=lambda event: told.append(event.message),
    )  # fmt: skip
    assert any("stress_weight is 0" in text for text in told)
    assert "stress_loss" not in log_without_times(tmp_path / "a.run")[0]


def test_the_log_has_the_stresses_that_are_trained(tmp_path: Path) -> None:
    atoms = crystal()
    item = Labelled(atoms, energy=-5.0, forces=np.zeros((len(atoms), 3)), stress=0.02 * np.eye(3))
    moved = replace(item, atoms=atoms.copy())
    moved.atoms.rattle(0.05, seed=1)
    data = Dataset((item, moved), "crystals", {"energy": "energy", "forces": "forces", "stress": "stress"})
    training = replace(QUICK, stress_weight=10.0, valid_fraction=0.5, epochs=2)
    finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SMALL, training=training)
    for row in log_without_times(tmp_path / "a.run"):
        parts = [float(row[f"{name}_loss"]) for name in ("energy", "forces", "stress")]
        assert min(parts) > 0
        assert float(row["loss"]) == pytest.approx(sum(parts), rel=1e-5)


def test_reference_energies_of_elements_outside_the_training_part_are_in_the_file(tmp_path: Path) -> None:
    """Else the file gives other energies for them than those that the run has told."""
    data = dataset(tmp_path, 6)
    cyanide = Atoms("CN", [[0, 0, 0], [0, 0, 1.16]], info={"REF_energy": -2510.0})
    cyanide.arrays["REF_forces"] = np.zeros((2, 3))
    write(tmp_path / "other.xyz", cyanide, format="extxyz")
    test = read_dataset(tmp_path / "other.xyz")
    given = {"H": -13.0, "C": -1027.0, "O": -2038.0, "N": -1480.0}

    def backbone() -> Backbone:
        energies = {1: -13.6, 6: -1027.3, 7: -1485.0, 8: -2038.5}
        network = random_network(0, atomic_numbers=[*energies], atomic_energies=[0.0] * 4).double().eval()
        return replace(tiny_backbone(), network=network, elements=tuple(energies), atomic_energies=energies)

    result = finetune(
        data, tmp_path / "a.adapter", test=test, backbone=backbone(), adapter=SMALL, training=replace(QUICK, epochs=1),
        E0s=given,
    )  # fmt: skip
    file = read_adapter(tmp_path / "a.adapter")
    assert file.reference_energies == {1: -13.0, 6: -1027.0, 7: -1480.0, 8: -2038.0}
    assert file.elements == (1, 6, 8)
    potential = Potential(backbone())
    potential.use(file)
    again = measure(potential, Samples(test, potential), QUICK)
    assert again.energy_mae_meV == pytest.approx(result.fine_tuned["test"].energy_mae_meV, rel=1e-6)


def test_sets_that_nothing_can_be_compared_with_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = dataset(tmp_path, 6)
    stressed = Dataset((Labelled(crystal(), stress=np.eye(3)),) * 2, "stressed.xyz", {"stress": "stress"})
    sets: tuple[dict[str, Any], ...] = ({"valid": stressed}, {"test": stressed})
    for named in sets:
        with pytest.raises(DataError, match=r"stressed\.xyz: expected structures with energies or forces to compare"):
            finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), training=QUICK, **named)
    one = Dataset((data.structures[0], Labelled(data.structures[1].atoms)), "one.xyz", data.keys)
    with pytest.raises(DataError, match=r"nothing to learn|fewer than two have an energy or forces"):
        finetune(one, tmp_path / "a.adapter", backbone=tiny_backbone(), training=QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.xyz"]


def test_energies_of_the_backbone_are_those_of_the_backbone_whatever_training_starts_from(tmp_path: Path) -> None:
    data, once = dataset(tmp_path, 6), replace(QUICK, epochs=1)
    given = {"H": -13.0, "C": -1027.0, "O": -2038.0}
    first, second = tmp_path / "a.adapter", tmp_path / "b.adapter"
    finetune(data, first, backbone=tiny_backbone(), adapter=SMALL, training=once, E0s=given)
    finetune(data, second, backbone=tiny_backbone(), init=first, training=once, E0s="backbone")
    assert read_adapter(second).reference_energies == tiny_backbone().atomic_energies


def test_runs_of_names_with_a_dot_have_folders_of_their_own(tmp_path: Path) -> None:
    data, once = dataset(tmp_path, 6), replace(QUICK, epochs=1)
    for name in ("m_lr0.01", "m_lr0.003", "m.adapter"):
        finetune(data, tmp_path / name, backbone=tiny_backbone(), adapter=SMALL, training=once)
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["m.run", "m_lr0.003.run", "m_lr0.01.run"]


@pytest.mark.parametrize("change", [{"lr": math.nan}, {"lr": math.inf}, {"energy_weight": math.nan}])
def test_settings_that_are_no_numbers_are_refused(tmp_path: Path, change: dict[str, float]) -> None:
    data = dataset(tmp_path, 4)
    with pytest.raises(TrainingError, match=r"finite|at least"):
        finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), training=replace(QUICK, **change))  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.xyz"]
