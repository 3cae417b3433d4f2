"""Method "auto": the gap between backbone and data is measured, and decides whether other molecules are replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from test_finetuning import QUICK, tiny_backbone

from conftest import ELEMENTS, ethanol
from mmea_calc.adapter_file import read_adapter
from mmea_calc.config import REPLAY_STEPS, AdapterConfig, TrainConfig
from mmea_calc.data.dataset import Dataset
from mmea_calc.data.reading import read_dataset
from mmea_calc.potential import Potential
from mmea_calc.training import replay as module
from mmea_calc.training.auto import NEAR, REPLAY, decide
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.samples import Samples


def off_by(tmp_path: Path, factor: float, *, forces: bool = True) -> Dataset:
    """Structures whose forces are `factor` times those of the backbone."""
    teacher, rng, frames = Potential(tiny_backbone()), np.random.default_rng(0), list[Atoms]()
    for _ in range(6):
        atoms = ethanol()
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        energy, all_forces = teacher.predict_graphs([teacher.graph(atoms)])
        atoms.info["REF_energy"] = float(energy[0])
        if forces:
            atoms.arrays["REF_forces"] = factor * all_forces[0].numpy()
        frames.append(atoms)
    path = tmp_path / f"{factor}.xyz"
    write(path, frames, format="extxyz")
    return read_dataset(path)


@pytest.mark.parametrize(("factor", "gap", "replay"), [(1.25, 0.2, REPLAY), (2.0, 0.5, 0), (0.5, 1.0, 0)])
def test_the_gap_is_the_error_over_the_size_of_the_forces(
    tmp_path: Path, factor: float, gap: float, replay: int
) -> None:
    potential = Potential(tiny_backbone())
    training, decision = decide(potential, Samples(off_by(tmp_path, factor), potential), TrainConfig())
    assert decision.gap == pytest.approx(gap, rel=1e-6)
    assert training.replay == decision.replay == replay
    assert f"{gap:.0%}" in decision.why
    assert (gap < NEAR) == ("near" in decision.why)


def test_what_was_asked_for_is_done_and_without_forces_nothing_is_replayed(tmp_path: Path) -> None:
    potential = Potential(tiny_backbone())
    near = Samples(off_by(tmp_path, 1.1), potential)
    for asked in (0, 3):
        training, decision = decide(potential, near, TrainConfig(replay=asked))
        assert training.replay == decision.replay == asked
        assert "given" in decision.why
    energies = Samples(off_by(tmp_path, 1.1, forces=False), potential)
    training, decision = decide(potential, energies, TrainConfig())
    assert (decision.gap, training.replay) == (None, 0)


def test_the_decision_and_its_reason_stand_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = module._molecules
    monkeypatch.setattr(module, "_molecules", lambda: [a for a in everything() if set(a.numbers) <= set(ELEMENTS)][:4])
    config, told = AdapterConfig(method="auto", gate_rank=2, low_rank=2), list[str]()
    for factor, replay in ((1.1, REPLAY), (2.0, 0)):
        result = finetune(
            off_by(tmp_path, factor),
            tmp_path / "a.adapter",
            backbone=tiny_backbone(),
            adapter=config,
            training=replace(QUICK, epochs=1, valid_fraction=0.34),
            run_dir=tmp_path / f"{factor}.run",
            progress=lambda event: told.append(event.message),
        )
        header = read_adapter(tmp_path / "a.adapter").training
        assert header["auto"]["replay"] == header["replay"] == replay
        assert header["auto"]["gap"] == pytest.approx(abs(1 - 1 / factor), rel=1e-6)
        assert header["auto"]["why"] in told
        assert (result.run_dir / "replay.npz").exists() == bool(replay)
    # The same where an adapter is the start: it is the backbone that is near or far.
    finetune(
        off_by(tmp_path, 1.1),
        tmp_path / "b.adapter",
        backbone=tiny_backbone(),
        adapter=config,
        init=tmp_path / "a.adapter",
        training=replace(QUICK, epochs=1, valid_fraction=0.34),
    )
    again = read_adapter(tmp_path / "b.adapter").training
    assert again["auto"]["replay"] == again["replay"] == REPLAY
    assert again["init"]["name"] == "a.adapter"


def test_with_replay_training_takes_more_steps() -> None:
    plain, replayed = (TrainConfig(replay=n).for_structures(50).epochs for n in (None, 10))
    assert plain == 60
    assert replayed == round(REPLAY_STEPS * plain)
    few, few_replayed = (TrainConfig(replay=n).for_structures(10).epochs for n in (None, 10))
    assert (few, few_replayed) == (300, round(REPLAY_STEPS * 300))
    assert TrainConfig(replay=10, epochs=7).for_structures(50).epochs == 7
