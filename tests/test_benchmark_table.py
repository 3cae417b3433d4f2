"""The table against figures worked out by hand, methods as they are typed, and the rule that recommends one."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmea_calc.benchmark import choice as choosing
from mmea_calc.benchmark import parse_method, recommend
from mmea_calc.benchmark.cells import CellResult, Measured, SetErrors, stem_of, write_result
from mmea_calc.benchmark.choice import Candidate, choose
from mmea_calc.benchmark.method_spec import parse_methods
from mmea_calc.benchmark.picture import draw
from mmea_calc.benchmark.published import ACAC, FAR, RMD17, THREE_BPA, Figures, published
from mmea_calc.benchmark.report import markdown, write_tables
from mmea_calc.benchmark.table import ZERO_SHOT, Column, ResultTable, Statistic, build_table
from mmea_calc.benchmark.tasks import VALID, Task
from mmea_calc.config import AdapterConfig, BenchmarkConfig, TrainConfig, to_dict
from mmea_calc.errors import AdapterError, TrainingError
from mmea_calc.methods import METHODS
from mmea_calc.training.recipes import RECIPES

BARE = SetErrors(30.0, 40.0, 60.0, 80.0)


def measured(energy: float | None, forces: float | None, bare: SetErrors = BARE) -> Measured:
    """Errors whose RMSE is 1.5 times the MAE."""
    energy_rmse = None if energy is None else 1.5 * energy
    forces_rmse = None if forces is None else 1.5 * forces
    return Measured("0", 10, bare, SetErrors(energy, energy_rmse, forces, forces_rmse))


def cell(
    method: str, seed: int, energy: float | None = 1.0, forces: float | None = 2.0, *, system: str = "aspirin",
    test: str = "", parameters: int = 100, minutes: float = 1.0, reason: str | None = None,
) -> CellResult:  # fmt: skip
    errors = {} if reason else {VALID: measured(energy, forces), test: measured(energy, forces)}
    settings = to_dict(AdapterConfig()), to_dict(TrainConfig())
    return CellResult(
        system, method, seed, *settings, reason, errors, parameters, 10 * parameters, 60 * minutes, hardware="a machine"
    )  # fmt: skip


def table(*results: CellResult, benchmark: str = "rmd17", measure: str = "mae", **options: object) -> ResultTable:
    return build_table(
        results, benchmark=benchmark, title="T", measure=measure, backbone="mmea-organic-s", **options  # type: ignore[arg-type]
    )  # fmt: skip


ASPIRIN = Column("aspirin", "")


# The table


def test_means_and_standard_deviations_are_those_over_seeds() -> None:
    result = table(
        cell("mmea", 1, 7.0, 15.0, minutes=2.0), cell("mmea", 2, 8.0, 17.0, minutes=4.0), cell("mmea", 3, 9.0, 16.0)
    )
    row = next(row for row in result.rows if row.label == "mmea")
    energy, forces = row.entries[ASPIRIN].energy, row.entries[ASPIRIN].forces
    assert energy is not None
    assert forces is not None
    assert (energy.mean, energy.std, energy.n) == (8.0, 1.0, 3)
    assert (forces.mean, forces.std) == (16.0, 1.0)
    assert row.minutes is not None
    assert row.minutes.mean == pytest.approx(7 / 3)
    assert (row.finished, row.failed) == (3, 0)


def test_a_method_that_breaks_equivariance_is_marked() -> None:
    result = table(cell("mmea", 1), cell("bottleneck:gate_rank=4", 1, 0.5, 0.5))
    assert {row.label: row.method for row in result.rows if row.kind == "method"} == {
        "mmea": "mmea",
        "bottleneck:gate_rank=4 (not equivariant)": "bottleneck:gate_rank=4",
    }
    assert ("bottleneck:gate_rank=4 (not equivariant)", ASPIRIN, "forces") in result.best


def test_rmse_is_shown_where_the_published_table_shows_it() -> None:
    result = table(cell("mmea", 1, 2.0, 4.0, system="300K", test="600 K"), benchmark="acac", measure="rmse")
    entry = result.rows[1].entries[Column("300K", "600 K")]
    assert (entry.energy, entry.forces) == (Statistic(3.0, None, 1), Statistic(6.0, None, 1))
    bare = result.rows[0].entries[Column("300K", "600 K")]
    assert (bare.energy, bare.forces) == (Statistic(40.0, None, 1), Statistic(80.0, None, 1))


def test_the_bare_backbone_comes_first_and_counts_once_per_seed() -> None:
    other = replace(BARE, energy_mae=34.0)
    second = [
        replace(cell(method, 2), errors={VALID: measured(1, 2), "": measured(1, 2, other)})
        for method in ("full", "mmea")
    ]
    result = table(cell("mmea", 1), cell("full", 1), *second)
    assert result.rows[0].label == ZERO_SHOT
    energy = result.rows[0].entries[ASPIRIN].energy
    assert energy is not None
    assert (energy.mean, energy.n) == (32.0, 2)


def test_the_bare_backbone_has_the_reference_energies_of_the_folder_wherever_some_cell_has() -> None:
    far = measured(1, 2, replace(BARE, energy_mae=35000.0))
    paper = [replace(cell("elora:recipe=paper", seed), errors={VALID: far, "": far}) for seed in (1, 2)]
    both = table(*paper, cell("mmea", 1), paper_E0s="average")
    assert both.rows[0].entries[ASPIRIN].energy == Statistic(30.0, None, 1)
    assert both.notes == ()
    alone = table(*paper, cell("mmea", 1, system="zinc"), paper_E0s="average")
    assert alone.rows[0].entries[ASPIRIN].energy == Statistic(35000.0, 0.0, 2)
    sentence = "Energies of the backbone alone of aspirin are with the reference energies of recipe=paper: average."
    assert alone.notes == (sentence,)
    assert sentence in markdown(alone, [])
    # where the published recipe has no reference energies of its own, there is nothing to say
    assert table(*paper).notes == ()


def test_a_column_is_of_one_set_of_structures() -> None:
    def on(structures: str, method: str, forces: float) -> CellResult:
        errors = {VALID: measured(1.0, 2.0), "": replace(measured(1.0, forces), sha256=structures)}
        return replace(cell(method, 1), errors=errors)

    results = on("old", "elora", 5.0), on("new", "full", 6.0), on("old", "mmea", 7.0)

    def shown(result: ResultTable) -> dict[str, float]:
        rows = [row for row in result.rows if row.kind == "method"]
        return {row.method: forces.mean for row in rows if (forces := row.entries[ASPIRIN].forces) is not None}

    asked = table(*results, tests={("aspirin", ""): "new"})
    assert shown(asked) == {"full": 6.0}
    assert "Left out of aspirin, since measured on other test structures: elora seed 1, mmea seed 1." in asked.notes[0]
    unknown = table(*results)
    assert shown(unknown) == {"elora": 5.0, "mmea": 7.0}
    assert "full seed 1" in unknown.notes[0]
    assert table(results[0], results[2]).notes == ()


def test_the_lowest_of_every_column_is_the_best_and_published_figures_do_not_compete() -> None:
    result = table(cell("mmea", 1, 8.0, 100.0), cell("full", 1, 40.0, 20.0), cell("mmea", 1, 90.0, 90.0, system="zinc"))
    assert result.best == {
        ("mmea", ASPIRIN, "energy"),
        ("full", ASPIRIN, "forces"),
        (ZERO_SHOT, Column("zinc", ""), "energy"),
        (ZERO_SHOT, Column("zinc", ""), "forces"),
    }
    assert "mmea, published" in [row.label for row in result.rows]


def test_published_figures_stand_below_their_method() -> None:
    result = table(cell("full", 1), cell("mmea", 1), cell("mmea:gate_rank=32", 1), methods=["mmea", "full"])
    assert [row.label for row in result.rows] == [
        ZERO_SHOT, "mmea", "mmea, published", "full", "full, published", "mmea:gate_rank=32",
    ]  # fmt: skip
    entry = result.rows[2].entries[ASPIRIN]
    assert (entry.energy, entry.forces) == (Statistic(7.3, None, 1), Statistic(16.4, None, 1))
    assert result.published_backbone == "MACE-OFF23 medium"


def test_published_figures_stand_below_the_published_recipe_where_it_is_there() -> None:
    alone = table(cell("mmea:recipe=paper", 1))
    assert [row.label for row in alone.rows] == [ZERO_SHOT, "mmea:recipe=paper", "mmea, published"]
    energy = alone.rows[2].entries[ASPIRIN].energy
    assert energy == Statistic(7.3, None, 1)
    both = table(cell("mmea", 1), cell("mmea:recipe=paper", 1), cell("full", 1), methods=["mmea"])
    assert [(row.label, row.method) for row in both.rows] == [
        (ZERO_SHOT, ""), ("mmea", "mmea"), ("full", "full"), ("full, published", "full"),
        ("mmea:recipe=paper", "mmea:recipe=paper"), ("mmea, published", "mmea:recipe=paper"),
    ]  # fmt: skip
    other = table(cell("mmea:recipe=paper,lr=0.1", 1), cell("mmea:recipe=sparse", 1))
    assert "published" not in {row.kind for row in other.rows}


def test_published_figures_at_300_k_are_not_shown_for_other_training_data() -> None:
    cool = table(cell("mmea", 1, system="300K", test="600 K"), benchmark="acac")
    hot = table(cell("mmea", 1, system="600K", test="600 K"), benchmark="acac")
    assert [row.kind for row in cool.rows] == ["zero-shot", "method", "published"]
    assert [row.kind for row in hot.rows] == ["zero-shot", "method"]


@pytest.mark.parametrize("figures", [RMD17, THREE_BPA, ACAC, FAR])
def test_published_figures_stand_under_the_labels_that_methods_have(figures: Figures) -> None:
    labels = {label for column in figures.values() for label in column}
    assert labels
    assert {parse_method(label, BenchmarkConfig()).label for label in labels} == labels


def test_published_figures_are_complete_and_those_of_the_chosen_backbone() -> None:
    assert len(RMD17) == 10
    assert all(
        {"full", "elora", "mmea"} <= set(rows) for rows in (*RMD17.values(), *THREE_BPA.values(), *ACAC.values())
    )
    assert published("rmd17", "mace-off23-medium")[0] is RMD17
    figures, source = published("rmd17", "mace-mp-0-medium")
    assert (figures["aspirin"]["mmea"], source) == ((13.3, 31.9), "MACE-MP")
    assert published("comparison", "mace-off23-medium")[0] == {}


def test_validation_is_shown_where_there_is_no_test_or_where_it_is_asked_for() -> None:
    only = replace(cell("mmea", 1), errors={VALID: measured(1.0, 2.0)})
    assert table(only).headings == ("validation",)
    assert table(cell("mmea", 1)).headings == ("aspirin",)
    both = table(cell("mmea", 1, test="test"), with_validation=True)
    assert both.headings == ("validation", "test")


def test_columns_are_in_the_order_of_the_published_table() -> None:
    one = cell("mmea", 1, system="300K")
    errors = {name: measured(1.0, 2.0) for name in ("dihedral", "600 K", VALID, "300 K")}
    result = table(replace(one, errors=errors), benchmark="acac")
    assert result.headings == ("300 K", "600 K", "dihedral")
    two = table(replace(one, errors=errors), replace(one, system="600K", errors=errors), benchmark="acac")
    assert two.headings[0] == "300K → 300 K"
    assert len(two.headings) == 6


def test_labels_that_are_missing_leave_a_gap() -> None:
    result = table(cell("mmea", 1, 2.0, None))
    assert result.rows[1].entries[ASPIRIN].forces is None
    assert "2.0 / - |" in markdown(result, []).replace("*", "")


def test_markdown_has_bold_bests_sizes_and_failures() -> None:
    result = table(
        cell("mmea", 1, 7.0, 15.0, parameters=110362), cell("mmea", 2, 8.0, 17.0, parameters=110362),
        cell("full", 1, 9.0, 14.0), cell("full", 2, reason="the loss is nan"),
    )  # fmt: skip
    lines = markdown(result, ["A sentence."], "Recommended: mmea.").splitlines()
    assert lines[:3] == ["# T", "", "Recommended: mmea."]
    assert "| `mmea` | **7.5 ± 0.7** / 16.0 ± 1.4 | 110,362 | 1,104 | 1.0 | 2 |" in lines
    assert "| `full` | 9.0 / **14.0** | 100 | 1 | 1.0 | 1, 1 failed |" in lines
    assert "| *mmea, published* | 7.3 / 16.4 |  |  |  |  |" in lines
    assert "- aspirin, full, seed 2: the loss is nan" in lines


def test_small_errors_keep_two_digits() -> None:
    assert str(Statistic.of([0.21, 0.25])) == "0.23 ± 0.03"
    assert str(Statistic.of([29.23])) == "29.2"


def test_a_folder_gives_csv_of_the_table_and_of_every_cell(tmp_path: Path) -> None:
    results = [cell("mmea", 1, 7.0, 15.0), cell("mmea", 2, 8.0, 17.0), cell("full", 1, reason="nan")]
    (tmp_path / "cells").mkdir()
    for r in results:
        write_result(tmp_path / "cells" / f"{stem_of(r.system, r.method, r.seed)}.json", r)
    task, config = Task("rmd17", "rMD17", "mae", (), 0.5), BenchmarkConfig(methods=("full", "mmea"))
    result = write_tables(task, tmp_path, config)
    assert [row.method for row in result.rows if row.kind == "method"] == ["full", "mmea"]
    with (tmp_path / "results.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert float(rows["mmea"]["energy_mean_meV"]) == 7.5
    assert float(rows["mmea"]["forces_std_meV_per_A"]) == pytest.approx(2**0.5)
    assert float(rows["mmea, published"]["forces_mean_meV_per_A"]) == 16.4
    with (tmp_path / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["set"]) for line in lines] == [
        ("full", ""), ("mmea", "valid"), ("mmea", "test"), ("mmea", "valid"), ("mmea", "test"),
    ]  # fmt: skip
    assert lines[0]["failed"] == "nan"
    assert float(lines[2]["fine_tuned_energy_rmse"]) == 10.5
    assert (tmp_path / "results.md").read_text().startswith("# rMD17\n")


def test_the_picture_shows_every_method_and_is_left_out_where_there_is_nothing(tmp_path: Path) -> None:
    assert draw(table(), tmp_path / "none.png") is None
    assert not list(tmp_path.iterdir())
    path = draw(table(cell("mmea", 1), cell("mmea", 2), cell("full", 1)), tmp_path / "some.png")
    assert path is not None
    with Image.open(path) as image:
        assert {(0, 114, 178), (213, 94, 0)} <= {colour for _, colour in image.convert("RGB").getcolors(10**6)}


# Methods as they are typed


def test_fields_are_read_by_their_types_and_the_label_is_the_shortest() -> None:
    config = BenchmarkConfig()
    spec = parse_method("mmea: saturate=false, gate-rank=32, init_std=1e-3,low_rank=16", config)
    assert (spec.adapter.gate_rank, spec.adapter.saturate, spec.adapter.init_std) == (32, False, 1e-3)
    assert spec.label == "mmea:gate_rank=32,init_std=0.001,saturate=false"
    assert parse_method(spec.label, config) == spec
    assert parse_method("mmea:gate_rank=16", config).label == "mmea"
    targets = parse_method("gates:targets=readouts.*,products.*,phi=residual", config)
    assert targets.adapter.targets == ("readouts.*", "products.*")
    assert targets.adapter.phi == "residual"
    assert parse_method(targets.label, config) == targets


def test_a_method_that_is_named_twice_is_trained_once() -> None:
    config = BenchmarkConfig(methods=("mmea", "mmea:gate_rank=16", "mmea:gate_rank=8"))
    assert [spec.label for spec in parse_methods(config)] == ["mmea", "mmea:gate_rank=8"]


def test_every_method_of_the_table_can_be_benchmarked_with_its_recipe() -> None:
    for name in METHODS:
        spec = parse_method(name, BenchmarkConfig(device="cpu"))
        assert (spec.label, spec.adapter.method) == (name, name)
        assert {k: v for k, v in to_dict(spec.training).items() if k in RECIPES.get(name, {})} == dict(
            RECIPES.get(name, {})
        )


def test_recipes_settings_of_all_and_fields_follow_in_this_order() -> None:
    config = BenchmarkConfig(recipe="paper", epochs=7, dtype="float32", device="cpu")
    paper = parse_method("full", config).training
    assert (paper.lr, paper.batch_size, paper.epochs, paper.dtype) == (0.005, 5, 7, "float32")
    own = parse_method("full:lr=0.02,epochs=9", config)
    assert (own.training.lr, own.training.batch_size, own.training.epochs) == (0.02, 5, 9)
    assert own.label == "full:epochs=9,lr=0.02"
    compiled = BenchmarkConfig(compile=True)
    assert parse_method("mmea", compiled).training.compile
    assert not parse_method("mmea:compile=false", compiled).training.compile
    assert not parse_method("mmea", BenchmarkConfig()).training.compile
    other = parse_method("mmea:recipe=paper", BenchmarkConfig())
    assert other.training.batch_size == 5
    assert other.label == "mmea:recipe=paper"
    assert parse_method("mmea:recipe=paper", config).label == "mmea"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "unknown method 'nonsense'"),
        ("mmea:gate_rank=many", r"gate_rank must be an integer, got 'many'"),
        ("mmea:gate_rank=1.5", "gate_rank must be an integer"),
        ("mmea:phi=sin", "phi must be one of 'exp', 'residual'"),
        ("mmea:saturate=3", "saturate must be true or false"),
        ("mmea:colour=blue", "unknown field 'colour'; expected one of recipe, gate_rank"),
        ("mmea:seed=3", "unknown field 'seed'"),
        ("mmea:method=full", "unknown field 'method'"),
        ("mmea:gate_rank", "expected NAME:field=value"),
        ("mmea:recipe=pasta", "unknown recipe 'pasta'"),
    ],
)
def test_methods_that_are_wrongly_written_are_refused(text: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse_method(text, BenchmarkConfig())


# The choice


def candidate(method: str, error: float, parameters: int, std: float | None = None) -> Candidate:
    return Candidate(method, Statistic(error, std, 1 if std is None else 3), parameters, 4 * parameters)


MMEA, ELORA, FULL = candidate("mmea", 42.0, 110), candidate("elora", 43.0, 130), candidate("full", 41.5, 325)


def test_the_smallest_within_the_tolerance_is_recommended() -> None:
    choice = choose([MMEA, ELORA, FULL], 100.0, tolerance=0.02)
    assert choice.method == "mmea"
    assert [c.method for c in choice.equal] == ["full", "mmea"]
    for figure in ("42.0", "41.5", "100.0", "110 trained", "325 trained", "2 %", "One seed"):
        assert figure in choice.reason


def test_a_clear_lead_is_worth_its_size() -> None:
    choice = choose([MMEA, ELORA, candidate("full", 38.0, 325)], 100.0, tolerance=0.02)
    assert choice.method == "full"
    assert "no other is within 2 % of it, the next is mmea (42.0" in choice.reason


def test_a_lead_within_the_spread_over_seeds_is_none() -> None:
    wide = candidate("full", 38.0, 325, std=5.0)
    assert choose([candidate("mmea", 42.0, 110, std=0.1), wide], 100.0, tolerance=0.02).method == "mmea"
    narrow = candidate("full", 38.0, 325, std=1.0)
    assert choose([candidate("mmea", 42.0, 110, std=9.0), narrow], 100.0, tolerance=0.02).method == "full"


def test_the_best_may_be_the_smallest() -> None:
    choice = choose([candidate("gates", 41.0, 24), MMEA], 100.0, tolerance=0.05)
    assert choice.method == "gates"
    assert "smaller than those within 5 % of it: mmea (42.0" in choice.reason


def test_equal_numbers_of_values_are_told_apart_by_the_file_then_by_the_error() -> None:
    small, large = replace(MMEA, method="small", file_bytes=1), candidate("large", 41.9, 110)
    assert choose([large, small], 100.0, tolerance=0.02).method == "small"
    assert choose([MMEA, candidate("better", 41.9, 110)], 100.0, tolerance=0.02).method == "better"


def test_the_bare_backbone_is_recommended_where_nothing_beats_it() -> None:
    choice = choose([MMEA, FULL], 41.5, tolerance=0.02)
    assert choice.method is None
    assert "the backbone alone (forces 41.5 meV/Å); the best is full (41.5" in choice.reason


def test_validation_decides_and_the_test_set_has_no_say() -> None:
    def tested(method: str, valid: float, test: float, parameters: int) -> CellResult:
        errors = {VALID: measured(1.0, valid), "test": measured(1.0, test)}
        return replace(cell(method, 1, parameters=parameters), errors=errors)

    results = [tested("full", 30.0, 50.0, 300), tested("mmea", 40.0, 20.0, 100)]
    choice = recommend(results, tolerance=0.02)
    assert (choice.method, choice.stem) == ("full", "aspirin-full-seed1")
    swapped = [replace(r, errors={**r.errors, "test": measured(1.0, 1.0)}) for r in results]
    assert recommend(swapped, tolerance=0.02) == choice


def test_energies_decide_where_there_are_no_forces() -> None:
    results = [cell("mmea", 1, 9.0, None), cell("full", 1, 4.0, None, parameters=900)]
    choice = recommend(results, tolerance=0.02)
    assert (choice.method, choice.quantity) == ("full", "energy")
    assert "validation error of the energy of 4.0 meV" in choice.reason


def test_the_bare_backbone_that_energies_are_judged_by_is_that_of_the_table() -> None:
    far = measured(35.0, None, SetErrors(35000.0, 35000.0, None, None))
    paper = [replace(cell("elora:recipe=paper", seed), errors={VALID: far}) for seed in (1, 2)]
    results = [*paper, cell("mmea", 1, 31.0, None), cell("mmea", 2, 31.0, None)]
    choice = recommend(results, tolerance=0.02)
    assert choice.method is None
    assert "the backbone alone (energy 30.0 meV)" in choice.reason


def test_energies_decide_where_some_validation_parts_have_no_forces() -> None:
    results = [cell("mmea", 1, 9.0), cell("mmea", 2, 9.0, None), cell("full", 1, 4.0), cell("full", 2, 4.0, None)]
    choice = recommend(results, tolerance=0.02)
    assert (choice.method, choice.quantity) == ("full", "energy")
    nothing_in_common = [cell("mmea", 1, None, 2.0), cell("mmea", 2, 9.0, None)]
    with pytest.raises(TrainingError, match="give validation structures with --valid"):
        recommend(nothing_in_common, tolerance=0.02)


def test_a_method_without_all_its_seeds_is_not_considered() -> None:
    results = [cell("mmea", 1), cell("mmea", 2), cell("full", 1, 0.1, 0.1), cell("full", 2, reason="nan")]
    choice = recommend(results, tolerance=0.02)
    assert choice.method == "mmea"
    assert "full is not considered: 1 of 2 trainings finished" in choice.reason
    with pytest.raises(TrainingError, match="full is not considered: 0 of 1"):
        recommend([cell("full", 1, reason="nan")], tolerance=0.02)


def test_a_method_that_breaks_equivariance_is_not_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_is_equivariant", lambda label: label != "full:lr=1")
    results = [cell("mmea", 1), cell("full:lr=1", 1, 0.1, 0.1)]
    choice = recommend(results, tolerance=0.02)
    assert choice.method == "mmea"
    assert "full:lr=1 is not considered: turning a structure" in choice.reason
