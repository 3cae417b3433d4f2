"""Pictures are written whole, show what they are given, and leave matplotlib's global state alone."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mmea_calc import files, plots
from mmea_calc.errors import MMEAError

ROWS = [
    {
        "epoch": epoch,
        "loss": 2.0 / epoch,
        "energy_loss": 0.5 / epoch,
        "forces_loss": 1.5 / epoch,
        "valid_energy_mae_meV_per_atom": 8.0 / epoch if epoch % 2 else "",
        "valid_forces_mae_meV_per_A": 90.0 / epoch if epoch % 2 else "",
    }
    for epoch in range(1, 11)
]


def series(label: str, error: float, n: int = 6) -> plots.ParitySeries:
    rng = np.random.default_rng(0)
    energy, forces = -838.0 + 0.02 * rng.normal(size=n), rng.normal(size=(n, 4, 3))
    return plots.ParitySeries(label, energy + error, energy, forces + error, forces)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, for a look at their axes."""
    figures: list[Any] = []
    save = plots.save_figure

    def keep(figure: Any, path: Path) -> Path:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def test_learning_curve_is_the_same_from_rows_and_from_the_csv_file(tmp_path: Path) -> None:
    with open(tmp_path / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)
    a = plots.learning_curve(ROWS, tmp_path / "rows.png")
    b = plots.learning_curve(tmp_path / "log.csv", tmp_path / "csv.png")
    assert np.array_equal(pixels(a), pixels(b))
    assert pixels(a).std() > 0


def test_learning_curve_names_the_best_epoch_and_the_backbone(tmp_path: Path, drawn: list[Any]) -> None:
    plots.learning_curve(ROWS, tmp_path / "a.png", zero_shot={"valid_forces_mae_meV_per_A": 1234.5})
    texts = [t.get_text() for t in drawn[0].axes[2].get_legend().get_texts()]
    assert texts == ["validation (best: 10)", "backbone alone (1234)"]


def test_learning_curve_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MMEAError, match="at least one epoch"):
        plots.learning_curve([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_parity_axes_are_equal_and_legends_state_the_errors(tmp_path: Path, drawn: list[Any]) -> None:
    plots.parity([series("backbone alone", 0.05), series("adapter", 0.002)], tmp_path / "p.png")
    for axes, unit, errors in zip(drawn[0].axes, ("meV/atom", "meV/Å"), (("50", "2"), ("50", "2")), strict=True):
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_aspect() == 1.0
        texts = [t.get_text() for t in axes.get_legend().get_texts()]
        assert texts == [f"backbone alone: MAE {errors[0]} {unit}", f"adapter: MAE {errors[1]} {unit}"]


def test_parity_counts_what_lies_outside_when_a_model_is_far_off(tmp_path: Path, drawn: list[Any]) -> None:
    plots.parity([series("backbone alone", 50.0), series("adapter", 0.002)], tmp_path / "p.png")
    energy, _ = drawn[0].axes
    assert "(6 outside)" in energy.get_legend().get_texts()[0].get_text()
    assert energy.get_xlim()[1] < 1000


def test_parity_refuses_shapes_that_differ(tmp_path: Path) -> None:
    good = series("adapter", 0.0)
    bad = plots.ParitySeries("adapter", good.energy[:-1], good.reference_energy, good.forces, good.reference_forces)
    with pytest.raises(MMEAError, match=r"adapter: predicted energies have shape \(5,\), labels \(6,\)"):
        plots.parity([bad], tmp_path / "p.png")


def test_dynamics_draws_energy_from_its_start_and_the_thermostat(tmp_path: Path, drawn: list[Any]) -> None:
    path = plots.dynamics(
        [0, 5, 10], [-17.0, -16.5, -16.8], [300, 280, 320], tmp_path / "d.png", target_temperature_K=300
    )
    top, bottom = drawn[0].axes
    assert np.allclose(top.lines[0].get_ydata(), [0.0, 0.5, 0.2])
    assert "running mean (last: 300 K)" in [t.get_text() for t in bottom.get_legend().get_texts()]
    assert pixels(path).std() > 0


def test_dynamics_refuses_arrays_of_different_lengths(tmp_path: Path) -> None:
    with pytest.raises(MMEAError, match="one value per frame"):
        plots.dynamics([0, 1], [0.0], [300.0, 300.0], tmp_path / "d.png")


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    assert plots.parity([series("a", 0.1)], tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    assert [p.name for p in tmp_path.iterdir()] == ["p.pdf"]


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = plots.parity([series("a", 0.1)], tmp_path / "p.png").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.parity([series("a", 0.2)], tmp_path / "p.png")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == old


def test_plots_change_no_global_setting_of_matplotlib(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plots.learning_curve(ROWS, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
