"""A benchmark trains every cell once, goes on where it was interrupted, and never mixes settings."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.io import write
from test_finetuning import labelled as make_labelled
from test_finetuning import tiny_backbone as make_backbone

from mmea_calc.adapter_file import read_adapter
from mmea_calc.backbone import Backbone
from mmea_calc.benchmark import BenchmarkEvent, plan, published_task, run, runner, training, write_tables
from mmea_calc.benchmark.cells import CellResult, read_results
from mmea_calc.benchmark.method_spec import parse_methods
from mmea_calc.benchmark.results_folder import other_reference_energies, reference_energies_of
from mmea_calc.benchmark.table import Column
from mmea_calc.benchmark.tasks import VALID, Task
from mmea_calc.config import DEFAULT_BACKBONE, BenchmarkConfig
from mmea_calc.data.reading import read_dataset
from mmea_calc.errors import AdapterError, DataError, MMEAError, TrainingError
from mmea_calc.evaluation import evaluate
from mmea_calc.potential import Potential

CONFIG = BenchmarkConfig(
    methods=("gates:gate_rank=2", "readout"), seeds=(1,), epochs=2, dtype="float64", device="cpu", E0s="backbone"
)


@cache
def labelled(n: int, seed: int = 0, forces: bool = True) -> list[Atoms]:
    """Made once: these structures are only written to files."""
    return make_labelled(n, seed=seed, forces=forces)


@cache
def tiny_backbone(seed: int = 0) -> Backbone:
    """One for all tests: what trains on it gives it back as it was."""
    return make_backbone(seed)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny backbone, and no pictures of single trainings."""
    monkeypatch.setattr(runner, "load_backbone", lambda *args, **options: tiny_backbone())
    for name in ("learning_curve", "parity"):
        monkeypatch.setattr(f"mmea_calc.plots.{name}", lambda *args, **options: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two molecules in the layout of rMD17."""
    folder = tmp_path / "rmd17"
    for seed, name in enumerate(("one", "two")):
        (folder / name).mkdir(parents=True)
        write(folder / name / "train.xyz", labelled(8, seed=seed), format="extxyz")
        write(folder / name / "test.xyz", labelled(4, seed=10 + seed), format="extxyz")
    return folder


@pytest.fixture
def task(data: Path) -> Task:
    return published_task("rmd17", data, ["one"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Trained:
    """Counts the cells that begin, and interrupts one of them at an epoch."""

    def __init__(self, stop_in: str = "", at_epoch: int = 1) -> None:
        self.begun: list[str] = []
        self.what: list[str] = []
        self.stop_in, self.at_epoch = stop_in, at_epoch

    def __call__(self, event: BenchmarkEvent) -> None:
        if event.what != "training":
            self.what.append(event.what)
        if event.cell is None:
            return
        if event.what == "begin":
            self.begun.append(event.cell.title)
        if event.training and event.cell.method.label == self.stop_in and event.training.epoch == self.at_epoch:
            raise KeyboardInterrupt


# Cells


def test_every_cell_is_trained_and_the_same_call_again_trains_nothing(task: Task, tmp_path: Path) -> None:
    first, second = Trained(), Trained()
    results = run(task, tmp_path / "R", CONFIG, progress=first)
    assert first.begun == ["one, gates:gate_rank=2, seed 1", "one, readout, seed 1"]
    assert all(r.finished for r in results)
    before = files(tmp_path / "R")
    assert {Path(name).suffix for name in before} >= {".adapter", ".json"}
    assert run(task, tmp_path / "R", CONFIG, progress=second) == results
    assert second.begun == []
    assert second.what == ["kept", "kept"]
    assert files(tmp_path / "R") == before


def test_a_cell_is_what_evaluate_says_of_its_adapter(task: Task, tmp_path: Path, data: Path) -> None:
    result = run(task, tmp_path / "R", CONFIG)[0]
    potential = Potential(make_backbone())
    potential.use(read_adapter(tmp_path / "R" / "cells" / "one-gates_gate_rank=2-seed1.adapter"))
    assert potential.adapter is not None
    evaluation = evaluate(potential, read_dataset(data / "one" / "test.xyz"))
    assert evaluation.adapter is not None
    for measured, model in (
        (result.errors[""].fine_tuned, evaluation.adapter),
        (result.errors[""].zero_shot, evaluation.backbone),
    ):
        errors = model.overall
        assert measured.energy_mae == pytest.approx(errors.energy.mae_meV, rel=1e-9)
        assert measured.energy_rmse == pytest.approx(errors.energy.rmse_meV, rel=1e-9)
        assert measured.forces_mae == pytest.approx(errors.forces.mae_meV_per_A, rel=1e-9)
        assert measured.forces_rmse == pytest.approx(errors.forces.rmse_meV_per_A, rel=1e-9)
    assert result.parameters == potential.adapter.n_parameters
    assert result.errors[VALID].structures == 4
    assert result.errors[VALID].fine_tuned != result.errors[""].fine_tuned


def test_an_interrupted_cell_goes_on_to_the_same_bits_and_finished_ones_are_kept(task: Task, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=4)
    run(task, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path / "parts", config, progress=Trained(stop_in="readout", at_epoch=3))
    assert [cell.state() for cell in plan(task, tmp_path / "parts", config)] == ["finished", "interrupted"]
    again, epochs = Trained(), []

    def watch(event: BenchmarkEvent) -> None:
        again(event)
        if event.training and event.training.epoch:
            epochs.append(event.training.epoch)

    run(task, tmp_path / "parts", config, progress=watch)
    assert again.begun == ["one, readout, seed 1"]
    assert epochs[0] > 1
    name = "cells/one-readout-seed1.adapter"
    whole, parts = read_adapter(tmp_path / "whole" / name), read_adapter(tmp_path / "parts" / name)
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(whole.tensors[k], parts.tensors[k]) for k in whole.tensors)
    assert not list((tmp_path / "parts").rglob("checkpoint.pt"))


@pytest.mark.parametrize(
    ("text", "unused"), [("elora:gate_rank=4,shift=false", "gate_rank, shift"), ("gates:low_rank=4", "low_rank"),
                         ("full:alpha=2", "alpha"), ("bottleneck:gains=order", "gains")],
)  # fmt: skip
def test_settings_that_a_method_does_nothing_with_are_refused(
    task: Task, tmp_path: Path, text: str, unused: str
) -> None:
    with pytest.raises(AdapterError, match=f"has no use for {unused}; leave it out"):
        plan(task, tmp_path / "R", replace(CONFIG, methods=("mmea", text)))
    used = ("mmea:gate_rank=4,shift=false,low_rank=4", "elora:alpha=2", "bottleneck:gate_rank=4", "gates:gains=order")
    assert len(plan(task, tmp_path / "R", replace(CONFIG, methods=used))) == 4 * len(task.systems)


@pytest.mark.parametrize("damage", ["nothing to read", "another run"])
def test_a_checkpoint_that_is_of_no_use_does_not_stop_its_cell(task: Task, tmp_path: Path, damage: str) -> None:
    config = replace(CONFIG, methods=("readout",), epochs=3)
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path / "R", config, progress=Trained(stop_in="readout", at_epoch=2))
    (checkpoint,) = (tmp_path / "R").rglob("checkpoint.pt")
    if damage == "nothing to read":
        checkpoint.write_bytes(b"bad")
    else:
        content = torch.load(checkpoint, weights_only=True)
        content["identity"]["training data"] = "f" * 64
        torch.save(content, checkpoint)
    (result,) = run(task, tmp_path / "R", config)
    assert result.finished
    assert not checkpoint.exists()


def test_auto_is_left_its_number_of_epochs_until_it_knows_whether_it_replays(task: Task, tmp_path: Path) -> None:
    methods = ("mmea", "auto", "auto:replay=0", "auto:replay=10", "auto:epochs=7")
    cells = plan(task, tmp_path / "R", replace(CONFIG, methods=methods, epochs=None))
    epochs = {cell.method.label: cell.training.epochs for cell in cells}
    assert epochs["auto"] == 0
    assert epochs["auto:replay=0"] == epochs["mmea"] > 20
    assert epochs["auto:replay=10"] > 5 * epochs["mmea"]
    assert epochs["auto:epochs=7"] == 7


def test_the_seed_draws_the_split_and_is_the_same_for_all_methods(data: Path, tmp_path: Path) -> None:
    cells = plan(published_task("rmd17", data), tmp_path / "R", replace(CONFIG, seeds=(1, 2)))
    assert len(cells) == 2 * 2 * 2
    drawn = {(c.system.name, c.seed, c.method.label): c.system.split(0.5, c.seed)[1].hash for c in cells}
    assert len({key[:2] for key in drawn}) == len(set(drawn.values()))
    assert all(c.adapter_config.seed == c.training.seed == c.seed for c in cells)
    assert all(c.training.valid_fraction == 0.5 for c in cells)


def test_methods_seeds_and_molecules_may_be_added_to_a_folder(data: Path, task: Task, tmp_path: Path) -> None:
    one = replace(CONFIG, methods=("readout",))
    run(task, tmp_path / "R", one)
    more = Trained()
    run(published_task("rmd17", data, ["one", "two"]), tmp_path / "R", replace(one, seeds=(1, 2)), progress=more)
    assert more.begun == ["two, readout, seed 1", "one, readout, seed 2", "two, readout, seed 2"]
    assert len(read_results(tmp_path / "R" / "cells")) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs was 2, is 3"),
        ({"recipe": "paper"}, "recipe was not given, is paper"),
        ({"compile": True}, "compile was not given, is True"),
        ({"backbone": "other"}, f"backbone was {DEFAULT_BACKBONE}, is other"),
        ({"E0s": None}, "E0s was backbone, is not given"),
        ({"valid_fraction": 0.25}, r"valid_fraction was 0\.5, is 0\.25"),
    ],
)
def test_other_settings_than_the_folder_was_begun_with_are_refused(
    task: Task, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = replace(CONFIG, methods=("readout",), epochs=2)
    settings = tmp_path / "R" / "settings.json"
    settings.parent.mkdir()
    runner.keep_settings(settings.parent, runner.shared_settings(task, config, tiny_backbone()))
    before = files(tmp_path / "R")
    with pytest.raises(TrainingError, match=message):
        run(task, tmp_path / "R", replace(config, **change))
    assert files(tmp_path / "R") == before


def begun_by_an_earlier_version(folder: Path) -> None:
    """Settings that were not given were written as such."""
    content = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**content, "head": None}))


@pytest.mark.parametrize("given", [{"compile": False}, {"dtype": "float32"}, {"head": "Default"}])
@pytest.mark.parametrize("earlier", [False, True])
def test_defaults_may_be_given_and_left_out(task: Task, tmp_path: Path, given: dict[str, Any], earlier: bool) -> None:
    left_out = replace(CONFIG, methods=("readout",), epochs=1, dtype=None)
    explicit = replace(left_out, **given)
    for number, calls in enumerate(((left_out, explicit), (explicit, left_out))):
        folder = tmp_path / f"R{number}"
        (first,) = run(task, folder, calls[0])
        if earlier and calls[0] is left_out:
            begun_by_an_earlier_version(folder)
        before, seen = files(folder), Trained()
        assert run(task, folder, calls[1], progress=seen) == [first]
        assert seen.what == ["kept"]
        assert files(folder) == before


def test_a_precision_that_is_another_for_one_of_the_methods_is_refused(task: Task, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("readout", "readout:recipe=paper"), dtype=None)
    (tmp_path / "R").mkdir()
    runner.keep_settings(tmp_path / "R", runner.shared_settings(task, config, tiny_backbone()))
    with pytest.raises(TrainingError, match="dtype was not given, is float32"):
        plan(task, tmp_path / "R", replace(config, dtype="float32"))
    assert len(plan(task, tmp_path / "R", replace(config, methods=("readout",), dtype="float32"))) == 1


@pytest.mark.parametrize("earlier", [False, True])
def test_another_head_than_the_default_one_is_refused(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    def load(*args: object, head: str | None = None, **options: object) -> Backbone:
        return replace(tiny_backbone(), heads=("Default", "other"), head=head or "Default")

    monkeypatch.setattr(runner, "load_backbone", load)
    config, folder = replace(CONFIG, methods=("readout",), epochs=1), tmp_path / "R"
    run(task, folder, config)
    if earlier:
        begun_by_an_earlier_version(folder)
    assert len(run(task, folder, replace(config, head="Default"))) == 1
    with pytest.raises(TrainingError, match=f"head was {'not given' if earlier else 'Default'}, is other"):
        run(task, folder, replace(config, head="other"))


def test_another_backbone_of_the_same_name_is_refused(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, methods=("readout",))
    run(task, tmp_path / "R", config)
    monkeypatch.setattr(runner, "load_backbone", lambda *args, **options: tiny_backbone(seed=3))
    with pytest.raises(TrainingError, match="fingerprint was"):
        run(task, tmp_path / "R", config)


def test_data_that_have_changed_are_refused(data: Path, task: Task, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("readout",))
    run(task, tmp_path / "R", config)
    write(data / "one" / "train.xyz", labelled(8, seed=5), format="extxyz")
    with pytest.raises(TrainingError, match="the data of one have changed"):
        run(published_task("rmd17", data, ["one"]), tmp_path / "R", config)


def test_a_cell_of_other_settings_is_refused_and_new_settings_have_their_defaults(task: Task, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("readout",))
    run(task, tmp_path / "R", config)
    path = tmp_path / "R" / "cells" / "one-readout-seed1.json"
    content = json.loads(path.read_text())
    del content["training"]["weight_decay"]
    path.write_text(json.dumps(content))
    assert plan(task, tmp_path / "R", config)[0].state() == "finished"
    content["training"]["lr"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match=r"training\.lr was 0\.5"):
        plan(task, tmp_path / "R", config)
    content["training"]["no_such_setting"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match="another version"):
        plan(task, tmp_path / "R", config)
    path.write_text("{}")
    with pytest.raises(TrainingError, match="delete it"):
        plan(task, tmp_path / "R", config)


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(task: Task, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("gates:gate_rank=2,init_std=1e200", "readout"))
    broken, sound = run(task, tmp_path / "R", config)
    assert not broken.finished
    assert broken.reason is not None
    assert "the loss is" in broken.reason
    assert sound.finished
    kept = {r.method: r for r in read_results(tmp_path / "R" / "cells")}
    assert kept[broken.method] == broken
    again = Trained()
    run(task, tmp_path / "R", config, progress=again)
    assert again.begun == [f"one, {broken.method}, seed 1"]
    assert again.what == ["report", "begin", "failed", "kept"]


def test_a_mistake_in_the_program_is_no_failed_cell(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(training, "finetune", fail)
    with pytest.raises(ZeroDivisionError):
        run(task, tmp_path / "R", CONFIG)
    assert read_results(tmp_path / "R" / "cells") == []


def test_a_cell_that_another_process_trains_is_left_to_it(task: Task, tmp_path: Path) -> None:
    first, _ = plan(task, tmp_path / "R", CONFIG)
    first.run_dir.mkdir(parents=True)
    with (first.run_dir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        seen = Trained()
        results = run(task, tmp_path / "R", CONFIG, progress=seen)
    assert [r.method for r in results] == ["readout"]
    assert seen.what == ["report", "elsewhere", "begin", "finished"]
    seen = Trained()
    run(task, tmp_path / "R", CONFIG, progress=seen)
    assert seen.begun == [first.title]


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": ()},
        {"seeds": (-1,)},
        {"methods": ()},
        {"methods": ("nonsense",)},
        {"epochs": 0},
        {"valid_fraction": 1.5},
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    task: Task, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(MMEAError):
        run(task, tmp_path / "R", replace(CONFIG, **change))
    assert not (tmp_path / "R").exists()


def test_nothing_is_written_where_the_backbone_lacks_an_element(data: Path, tmp_path: Path) -> None:
    frames = [atoms.copy() for atoms in labelled(4)]
    frames[1].numbers[0] = 35
    for atoms in frames:
        atoms.info["REF_energy"] = -1.0
    write(data / "two" / "train.xyz", frames, format="extxyz")
    with pytest.raises(DataError, match="Br"):
        run(published_task("rmd17", data), tmp_path / "R", CONFIG)
    assert not (tmp_path / "R").exists()


# Data sets


@pytest.fixture
def acac(tmp_path: Path) -> Path:
    folder = tmp_path / "acac"
    folder.mkdir()
    write(folder / "train_300K.xyz", labelled(8), format="extxyz")
    write(folder / "test_MD_600K.xyz", labelled(3, seed=1), format="extxyz")
    write(folder / "test_dihedral.xyz", labelled(2, seed=2, forces=False), format="extxyz")
    return folder


def test_test_files_that_are_missing_are_noted_and_left_out(acac: Path) -> None:
    task = published_task("acac", acac)
    assert list(task.systems[0].tests) == ["600 K", "dihedral"]
    notes = "\n".join(task.notes)
    assert "test_MD_300K.xyz is missing: its column is left out" in notes
    assert "test_H_transfer.xyz is missing" in notes
    assert "isolated_atoms.xyz is missing: reference energies are estimated" in notes
    assert len(task.notes) == 3


def test_isolated_atoms_beside_the_training_file_are_read(acac: Path) -> None:
    (acac / "isolated_atoms.xyz").write_text(
        "".join(f'1\nenergy={e} pbc="F F F"\n{s} 0 0 0\n' for s, e in (("H", -13.5), ("C", -1027.0), ("O", -2038.0)))
    )
    task = published_task("acac", acac)
    assert task.systems[0].train.isolated_atoms == {1: -13.5, 6: -1027.0, 8: -2038.0}
    assert len(task.systems[0].train) == 8


def test_a_test_that_comes_later_is_measured_without_training(acac: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("readout",))
    (before,) = run(published_task("acac", acac), tmp_path / "R", config)
    write(acac / "test_MD_300K.xyz", labelled(3, seed=4), format="extxyz")
    epochs = []

    def watch(event: BenchmarkEvent) -> None:
        if event.training:
            epochs.append(event.training.epoch)

    (after,) = run(published_task("acac", acac), tmp_path / "R", config, progress=watch)
    assert epochs == []
    assert set(after.errors) - set(before.errors) == {"300 K"}
    assert {k: after.errors[k] for k in before.errors} == dict(before.errors)
    assert after.seconds == before.seconds


def test_all_cells_of_the_folder_are_measured_on_a_test_that_has_changed(
    data: Path, task: Task, tmp_path: Path
) -> None:
    readout, gates = (replace(CONFIG, methods=(method,)) for method in ("readout", "gates:gate_rank=2"))
    (before,) = run(task, tmp_path / "R", readout)
    write(data / "one" / "test.xyz", labelled(3, seed=20), format="extxyz")
    changed, seen = published_task("rmd17", data, ["one"]), Trained()
    (fresh,) = run(changed, tmp_path / "R", gates, progress=seen)
    assert seen.what == ["report", "measured", "begin", "finished"]
    after = {r.method: r for r in read_results(tmp_path / "R" / "cells")}["readout"]
    assert after.errors[""].sha256 == fresh.errors[""].sha256 == changed.systems[0].tests[""].hash
    assert after.errors[""].zero_shot == fresh.errors[""].zero_shot != before.errors[""].zero_shot
    assert after == replace(before, errors={**before.errors, "": after.errors[""]})
    table = write_tables(changed, tmp_path / "R", gates)
    assert [row.entries[Column("one", "")].forces is None for row in table.rows] == [False] * 3
    assert table.notes == ()


@pytest.mark.parametrize("adapter", ["gone", "damaged"])
def test_what_cannot_be_measured_on_the_changed_test_is_left_out_of_its_column_and_named(
    data: Path, task: Task, tmp_path: Path, adapter: str
) -> None:
    readout, gates = (replace(CONFIG, methods=(method,)) for method in ("readout", "gates:gate_rank=2"))
    (before,) = run(task, tmp_path / "R", readout)
    path = tmp_path / "R" / "cells" / "one-readout-seed1.adapter"
    if adapter == "gone":
        path.unlink()
    else:
        path.write_bytes(b"bad")
    write(data / "one" / "test.xyz", labelled(3, seed=20), format="extxyz")
    changed = published_task("rmd17", data, ["one"])
    run(changed, tmp_path / "R", gates)
    assert before in read_results(tmp_path / "R" / "cells")
    table = write_tables(changed, tmp_path / "R", gates)
    forces = {row.method: row.entries[Column("one", "")].forces for row in table.rows}
    assert forces["readout"] is None
    assert forces["gates:gate_rank=2"] is not None
    (note,) = table.notes
    assert note.startswith("Left out of one, since measured on other test structures: readout seed 1.")
    assert note in (tmp_path / "R" / "results.md").read_text()


def test_a_training_file_that_is_missing_is_an_error_that_names_those_there(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"three/train\.xyz; those that are there: one, two"):
        published_task("rmd17", data, ["three"])
    with pytest.raises(DataError, match="no such folder"):
        published_task("rmd17", tmp_path / "nowhere")
    with pytest.raises(DataError, match="revised MD17"):
        published_task("rmd17", tmp_path)


def test_the_published_recipe_fits_reference_energies_where_there_are_no_isolated_atoms(data: Path, acac: Path) -> None:
    paper = BenchmarkConfig(recipe="paper")
    for task, expected in ((published_task("rmd17", data), "average"), (published_task("acac", acac), None)):
        assert runner.shared_settings(task, paper)["E0s"] == expected
        assert runner.shared_settings(task, BenchmarkConfig())["E0s"] is None
        assert runner.shared_settings(task, replace(paper, E0s="estimated"))["E0s"] == "estimated"
        # of one method among others
        (own, plain) = parse_methods(BenchmarkConfig(methods=("mmea:recipe=paper", "mmea")))
        assert reference_energies_of(task, BenchmarkConfig(), own.recipe) == expected
        assert reference_energies_of(task, BenchmarkConfig(), plain.recipe) is None
        assert other_reference_energies(task, BenchmarkConfig()) == expected
        assert other_reference_energies(task, paper) is None
        assert other_reference_energies(task, BenchmarkConfig(E0s="estimated")) is None


@pytest.mark.shared
def test_the_development_data_have_the_expected_layout() -> None:
    from conftest import SHARED

    task = published_task("rmd17", SHARED / "data" / "rmd17")
    assert [s.name for s in task.systems] == ["aspirin", "ethanol", "malonaldehyde", "toluene", "uracil"]
    assert {(len(s.train), len(s.tests[""])) for s in task.systems} == {(100, 1000)}
    assert task.notes == ()
    acac = published_task("acac", SHARED / "data" / "acac").systems[0]
    assert (len(acac.train), sorted(acac.train.isolated_atoms)) == (500, [1, 6, 8])
    assert {name: len(test) for name, test in acac.tests.items()} == {
        "300 K": 650, "600 K": 650, "dihedral": 45, "H transfer": 15,
    }  # fmt: skip
    three = published_task("3bpa", SHARED / "data" / "3bpa")
    assert three.systems[0].tests == {}
    assert any("no test file is there" in note for note in three.notes)


def test_a_result_survives_its_file(tmp_path: Path, task: Task) -> None:
    results = run(task, tmp_path / "R", replace(CONFIG, methods=("readout",)))
    (kept,) = read_results(tmp_path / "R" / "cells")
    assert isinstance(kept, CellResult)
    assert kept == results[0]
