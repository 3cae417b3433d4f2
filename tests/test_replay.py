"""Replayed molecules: labelled by the model that training starts from, dealt to the batches, and not forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import mmea
from test_finetuning import QUICK, SMALL, dataset, log_without_times, tiny_backbone

from conftest import ELEMENTS
from mmea_calc.adapter_file import read_adapter
from mmea_calc.errors import TrainingError
from mmea_calc.potential import Potential
from mmea_calc.pretrain.choose import composition, compositions_left_out
from mmea_calc.pretrain.dataset import read_arrays, spans
from mmea_calc.training import replay as module
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.replay import Replay, replay_structures
from mmea_calc.training.trainer import ProgressEvent

PBE = Path(__file__).resolve().parents[1] / "data" / "pbe"


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight molecules are enough."""
    everything = module._molecules
    monkeypatch.setattr(module, "_molecules", lambda: [a for a in everything() if set(a.numbers) <= set(ELEMENTS)][:8])


def test_an_epoch_draws_as_many_as_asked_each_at_most_once_and_spreads_them() -> None:
    replay = Replay(first=50, pool=20, per_epoch=13)
    parts = replay.deal(np.random.default_rng(0), 5)
    drawn = [i for part in parts for i in part]
    assert len(drawn) == len(set(drawn)) == 13
    assert set(drawn) <= set(range(50, 70))
    assert {len(part) for part in parts} == {2, 3}
    assert parts != replay.deal(np.random.default_rng(1), 5)


def test_a_pool_smaller_than_the_draw_is_gone_through_more_than_once() -> None:
    drawn = [i for part in Replay(first=3, pool=4, per_epoch=10).deal(np.random.default_rng(0), 2) for i in part]
    counts = np.bincount(drawn, minlength=7)[3:]
    assert counts.sum() == 10
    assert counts.min() >= 2
    assert counts.max() <= 3


@pytest.mark.usefixtures("_few")
def test_labels_are_the_potentials_own(tmp_path: Path) -> None:
    potential = Potential(tiny_backbone())
    found = replay_structures(potential, tmp_path / "replay.npz")
    assert len(found) == 8
    energies, forces = potential.predict_graphs([potential.graph(s.atoms) for s in found])
    assert [s.energy for s in found] == pytest.approx(energies.tolist(), rel=1e-15)
    for item, expected in zip(found, forces, strict=True):
        assert item.forces is not None
        np.testing.assert_allclose(item.forces, expected.numpy(), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("_few")
def test_labels_are_kept_to_the_bit_and_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "replay.npz"
    first = replay_structures(Potential(tiny_backbone()), kept)
    other = Potential(tiny_backbone(seed=1))  # would label them differently
    again = replay_structures(other, kept, resume=True)
    assert [s.energy for s in again] == [s.energy for s in first]
    assert all(np.array_equal(a.forces, b.forces) for a, b in zip(again, first, strict=True))  # type: ignore[arg-type]
    assert replay_structures(other, kept)[0].energy != first[0].energy
    np.savez(kept, energies=np.zeros(3), forces=np.zeros((5, 3)))
    with pytest.raises(TrainingError, match="holds 3 energies and 5 forces, expected 8 and"):
        replay_structures(other, kept, resume=True)
    kept.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="cannot be read"):
        replay_structures(other, kept, resume=True)


def test_only_molecules_of_elements_that_the_backbone_knows_are_replayed(tmp_path: Path) -> None:
    backbone, kept = tiny_backbone(), tmp_path / "replay.npz"
    found = replay_structures(Potential(backbone), kept)
    assert 50 < len(found) < len(module._molecules())
    assert {int(z) for s in found for z in s.atoms.numbers} == set(ELEMENTS)
    with pytest.raises(TrainingError, match="tiny knows the elements of none"):
        replay_structures(Potential(replace(backbone, elements=(2, 10))), kept)


def departure(path: Path, forces: list[np.ndarray]) -> float:
    """Root mean square change of the forces on the pool, eV/A."""
    potential = Potential(tiny_backbone())
    potential.use(read_adapter(path))
    _, adapted = potential.predict_graphs([potential.graph(a) for a in module._molecules()])
    return float(np.sqrt(np.mean(np.concatenate([a.numpy() - b for a, b in zip(adapted, forces, strict=True)]) ** 2)))


@pytest.mark.usefixtures("_few")
def test_replayed_molecules_keep_the_forces_of_the_backbone(tmp_path: Path) -> None:
    data, potential = dataset(tmp_path), Potential(tiny_backbone())
    _, tensors = potential.predict_graphs([potential.graph(a) for a in module._molecules()])
    forces = [f.numpy() for f in tensors]
    found = {}
    for n in (0, 8):
        path = tmp_path / f"{n}.adapter"
        result = finetune(
            data, path, backbone=tiny_backbone(), adapter=SMALL, training=replace(QUICK, epochs=30, replay=n)
        )
        found[n] = departure(path, forces)
        assert result.improved
        assert len(log_without_times(result.run_dir)) == 30
        assert result.adapter.training["replay"] == n
        assert result.adapter.data["train"]["structures"] == len(data) - 1  # the user's own
    assert found[8] < 0.5 * found[0]


@pytest.mark.usefixtures("_few")
def test_a_resumed_run_with_replay_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    data, training = dataset(tmp_path), replace(QUICK, epochs=4, replay=3)

    def stop_after_two(event: ProgressEvent) -> None:
        if event.epoch == 3:
            raise KeyboardInterrupt

    def run(name: str, **options: Any) -> dict[str, torch.Tensor]:
        finetune(data, tmp_path / name, backbone=tiny_backbone(), adapter=SMALL, training=training, **options)
        return read_adapter(tmp_path / name).tensors

    whole = run("whole.adapter")
    with pytest.raises(KeyboardInterrupt):
        run("parts.adapter", progress=stop_after_two)
    parts = run("parts.adapter", resume=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_negative_number_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    with pytest.raises(TrainingError, match="replay must be at least 0, got -1"):
        finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), training=replace(QUICK, replay=-1))
    assert not (tmp_path / "a.adapter").exists()


# --- the pool --------------------------------------------------------------------------------------------------------


def test_the_shipped_pool_holds_no_isomer_of_a_benchmark_molecule() -> None:
    shipped, left_out = module._molecules(), compositions_left_out()
    assert not [a for a in shipped if composition(a.numbers) in left_out]
    assert max(sum(a.numbers > 1) for a in shipped) > 12
    # all others of the labelled sets are in it, then 500 more
    sets = read_arrays([PBE / "train-0.npz", PBE / "train-1.npz"])
    numbers = [sets["numbers"][span] for span in spans(sets)]
    kept = [n for n in numbers if composition(n) not in left_out]
    assert len(shipped) == len(kept) + 500
    assert all(np.array_equal(a.numbers, n) for a, n in zip(shipped, kept, strict=False))


def test_a_pool_is_made_of_whole_sets_and_some_of_another(tmp_path: Path) -> None:
    sets = [PBE / "valid-1.npz", "--broad", PBE / "valid.npz"]
    words = ["pretrain", "pool", *sets, "--out", tmp_path / "pool.npz"]
    assert mmea(*words, "--number", 7).exit_code == 0
    with np.load(tmp_path / "pool.npz") as made:
        assert sorted(made) == ["n_atoms", "numbers", "positions"]
        assert len(made["n_atoms"]) == 17 + 7
        assert len(made["positions"]) == len(made["numbers"]) == made["n_atoms"].sum()
    (tmp_path / "pool.npz").unlink()
    result = mmea(*words, "--number", 100)
    assert result.exit_code == 1
    assert "valid.npz has 62 structures" in result.stderr
    assert not (tmp_path / "pool.npz").exists()
