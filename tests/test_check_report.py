"""A whole check with a tiny network, what it says about forgetting, and every criterion of its verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import molecule
from PIL import Image

from conftest import ELEMENTS, ethanol, network_config, random_network, randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile
from mmea_calc.backbone import Backbone
from mmea_calc.check import CheckReport, check
from mmea_calc.check.dynamics import RampReplica
from mmea_calc.check.forgetting import forgetting, other_molecules, same_level
from mmea_calc.check.plots import page
from mmea_calc.check.scans import Hole, Scan
from mmea_calc.config import AdapterConfig, CheckConfig
from mmea_calc.data.dataset import Dataset, Labelled
from mmea_calc.errors import DataError, DynamicsError
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.potential import Potential

ADAPTER = AdapterConfig(gate_rank=2, low_rank=2)
SHORT = CheckConfig(
    ramp_ps=0.02, ramp_replicas=2, nve_ps=0.02, equilibration_ps=0.004, pair_step_A=0.05, scan_step_A=0.2, max_bonds=2,
    max_approaches=2, max_hole_rim_eV=0.0, wall_rise_eV=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    network = random_network()
    use_fast_path(network)
    return Backbone(
        "small", "tests", network, network_config(), "f" * 64, ELEMENTS, 4.0, ("Default",), "Default",
        dict.fromkeys(ELEMENTS, -1.0),
    )  # fmt: skip


def adapted(backbone: Backbone, std: float) -> Potential:
    """With an adapter of random values of this spread; with none of the backbone's own."""
    adapter = attach(backbone.network, ADAPTER)
    if std:
        randomise(adapter, std=std)
    tensors = adapter.state_dict()
    adapter.detach()
    potential = Potential(backbone)
    potential.use(AdapterFile(ADAPTER, tensors, "small", "f" * 64))
    return potential


@pytest.fixture
def potential(backbone: Backbone) -> Iterator[Potential]:
    loaded = adapted(backbone, 0.02)
    yield loaded
    loaded.use(None)


@pytest.fixture(scope="module")
def measured(backbone: Backbone) -> CheckReport:
    """Of an adapter, judged by labels at its level of theory."""
    loaded = adapted(backbone, 0.02)
    report = check(loaded, ethanol(), SHORT, level_of_theory="PBE/def2-SVP (some program)")
    loaded.use(None)  # other tests share the backbone
    return report


# -- the whole -------------------------------------------------------------------------------------------------------


def test_everything_is_measured_adapted_beside_bare(measured: CheckReport) -> None:
    report = measured
    assert report.bare is not None
    assert (report.subject.label, report.bare.label) == ("adapter", "backbone")
    assert (len(report.subject.pairs), len(report.subject.squeezes), len(report.subject.approaches)) == (6, 2, 2)
    assert report.n_bonds == 8
    for one, other in zip(report.subject.pairs, report.bare.pairs, strict=True):
        assert one.label == other.label
        assert not np.array_equal(one.forces_eV_per_A, other.forces_eV_per_A)
    assert any("2 of the 8 bonds" in r for r in report.remarks)
    assert {"ramp 300 to 2000 K", "H-O at 0.4 Å", "NVE drift, 300 K"} <= {r.quantity for r in report.rows}


def test_a_report_is_plain_values_with_or_without_curves(measured: CheckReport) -> None:
    whole, short = measured.to_dict(), measured.to_dict(curves=False)
    assert json.loads(json.dumps(whole)) == whole
    assert len(json.dumps(short)) < 20_000 < len(json.dumps(whole))
    assert short["passed"] is measured.passed
    assert short["settings"]["ramp_ps"] == 0.02
    assert short["adapter"]["ramp"]["length_ps"] == 0.02
    assert len(whole["adapter"]["pairs"][0]["energies_eV"]) == len(measured.subject.pairs[0].distances_A)


def test_the_potential_is_left_as_it_was(backbone: Backbone) -> None:
    loaded = adapted(backbone, 0.02)
    batch = loaded.collate([loaded.graph(ethanol())])
    before = loaded.predict(batch).energy
    check(loaded, molecule("H2O"), replace(SHORT, ramp_ps=0.004, nve_ps=0.004))
    assert loaded.adapter is not None
    assert not loaded.adapter.merged
    assert loaded.adapter.enabled
    assert loaded.predict(batch).energy.equal(before)
    loaded.use(None)


def test_a_bare_backbone_is_judged_by_itself(backbone: Backbone) -> None:
    report = check(Potential(backbone), molecule("H2O"), replace(SHORT, ramp_ps=0.004, nve_ps=0.004))
    assert (report.subject.label, report.bare, report.forgetting) == ("backbone", None, None)
    assert "adapter" not in report.to_dict()
    assert not any("forces" in r.quantity for r in report.rows)
    assert {r.bare for r in report.rows} == {""}


def test_the_page_of_plots_is_a_picture(measured: CheckReport, backbone: Backbone, tmp_path: Path) -> None:
    with Image.open(page(measured, tmp_path / "page.png", title="a title")) as image:
        assert image.size == (2250, 1350)
        levels = np.asarray(image.convert("L"))
    assert (levels < 128).mean() > 0.003
    assert measured.bare is not None
    bare = replace(measured, subject=measured.bare, bare=None, forgetting=None)
    assert page(bare, tmp_path / "bare.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_used_is_told_before_anything_runs(potential: Potential) -> None:
    def never(stage: str, done: float) -> None:
        raise AssertionError

    with pytest.raises(DataError, match="the start structure has N"):
        check(potential, molecule("NH3"), progress=never)
    with pytest.raises(DynamicsError, match="ramp_ps must be positive, got 0"):
        check(potential, ethanol(), CheckConfig(ramp_ps=0), progress=never)
    with pytest.raises(DynamicsError, match="max_bonds must be at least 1"):
        check(potential, ethanol(), CheckConfig(max_bonds=0), progress=never)
    with pytest.raises(DynamicsError, match=">= 0 K"):
        check(potential, ethanol(), CheckConfig(ramp_to_K=-5.0), progress=never)
    energies = Dataset((Labelled(molecule("H2O"), energy=-3.0),), "energies.xyz", {})
    with pytest.raises(DataError, match=r"energies\.xyz: expected structures with forces"):
        check(potential, ethanol(), labels=energies, progress=never)


# -- forgetting ------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_equivariant_is_refused_unless_forced(backbone: Backbone) -> None:
    config = AdapterConfig(method="bottleneck", gate_rank=2)
    adapter = attach(backbone.network, config)
    tensors = adapter.state_dict()
    adapter.detach()
    potential = Potential(backbone)
    potential.use(AdapterFile(config, tensors, "small", "f" * 64))
    try:
        with pytest.raises(DynamicsError, match="not equivariant"):
            check(potential, ethanol(), SHORT)
        assert check(potential, ethanol(), SHORT, force=True).subject.label == "adapter"
    finally:
        potential.use(None)


def test_the_molecules_of_the_package_are_whole_and_broad() -> None:
    found = other_molecules()
    assert {level: len(items) for level, items in found.items()} == {"GFN2-xTB": 300, "PBE/def2-SVP": 62}
    for items in found.values():
        numbers = np.concatenate([s.atoms.numbers for s in items])
        assert {1, 6, 7, 8, 9, 16, 17, 35, 53} <= set(numbers)
        assert len({s.atoms.get_chemical_formula() for s in items}) > 0.5 * len(items)
        for item in items:
            assert item.forces is not None
            assert item.forces.shape == item.atoms.positions.shape
            assert np.abs(item.forces.sum(0)).max() < 0.1  # forces of a molecule cancel, labels' rounding aside
            distances = item.atoms.get_all_distances()
            assert distances[distances > 0].min() > 0.6


def test_levels_of_theory_are_compared_without_their_programs() -> None:
    assert same_level("PBE/def2-SVP", "pbe/def2-svp (PySCF, density fitting)")
    assert not same_level("PBE/def2-SVP", "PBE/def2-TZVP")
    assert not same_level(None, None)


def test_labels_judge_only_at_the_level_of_the_adapter(potential: Potential) -> None:
    def judged(level: str | None) -> dict[str | None, bool]:
        found = forgetting(potential, [ethanol()], level_of_theory=level)
        return {s.level_of_theory: s.judged for s in found.others}

    assert judged("PBE/def2-SVP") == {"GFN2-xTB": False, "PBE/def2-SVP": True}
    assert judged(None) == {"GFN2-xTB": False, "PBE/def2-SVP": False}


def test_errors_and_differences_are_those_of_the_forces(potential: Potential) -> None:
    own = ethanol()
    graphs = [potential.graph(own)]
    adapted_forces = potential.predict_graphs(graphs)[1][0].numpy()
    with potential.adapter_disabled():
        bare_forces = potential.predict_graphs(graphs)[1][0].numpy()
    labels = Dataset((Labelled(own, forces=adapted_forces),), "own.xyz", {})
    found = forgetting(potential, [own], labels=labels)
    difference = 1000 * np.sqrt(((adapted_forces - bare_forces) ** 2).mean())
    assert found.own_difference_meV_per_A == pytest.approx(difference)
    item = found.others[-1]
    assert (item.name, item.judged) == ("own.xyz", True)
    assert item.ratio == pytest.approx(1.0)
    assert item.adapted_mae_meV_per_A == pytest.approx(0, abs=1e-6)
    assert item.bare_mae_meV_per_A == pytest.approx(1000 * np.abs(adapted_forces - bare_forces).mean())
    # elements that the backbone does not know are left out, and so are molecules of the same composition
    for other in found.others[:-1]:
        assert 0 < other.n_structures < 200


def test_an_adapter_that_changes_nothing_has_no_ratio(backbone: Backbone) -> None:
    loaded = adapted(backbone, 0.0)
    found = forgetting(loaded, [ethanol()])
    assert found.own_difference_meV_per_A == 0
    assert [s.ratio for s in found.others] == [None, None]
    assert [s.difference_meV_per_A for s in found.others] == [0, 0]
    loaded.use(None)


# -- the verdict -----------------------------------------------------------------------------------------------------

WHOLE = RampReplica(2.0, None, None, ())


def sound(report: CheckReport) -> CheckReport:
    """The same without faults, to put one into."""

    def walls(scans: tuple[Scan, ...]) -> tuple[Scan, ...]:
        return tuple(replace(s, largest_force_eV_per_A=100.0, wall_A=0.9, hole=None) for s in scans)

    def clean(model: Any) -> Any:
        nve = replace(model.constant_energy, events=(), drift_meV_per_atom_ps=0.01, drift_error_meV_per_atom_ps=0.01)
        ramp = replace(model.ramp, replicas=(WHOLE, WHOLE))
        names = ("pairs", "squeezes", "approaches")
        return replace(model, constant_energy=nve, ramp=ramp, **{n: walls(getattr(model, n)) for n in names})

    assert report.forgetting is not None
    others = tuple(
        replace(s, adapted_mae_meV_per_A=15.0, bare_mae_meV_per_A=10.0, judged=i > 0)
        for i, s in enumerate(report.forgetting.others)
    )
    return replace(
        report, config=CheckConfig(), subject=clean(report.subject), bare=clean(report.bare),
        forgetting=replace(report.forgetting, others=others),
    )  # fmt: skip


def with_ramp(report: CheckReport, which: str, **changes: Any) -> CheckReport:
    model = getattr(report, which)
    ramp = replace(model.ramp, replicas=(WHOLE, replace(WHOLE, **changes)))
    return replace(report, **{which: replace(model, ramp=ramp)})


def with_wall(report: CheckReport, which: str, **changes: Any) -> CheckReport:
    model = getattr(report, which)
    pairs = (replace(model.pairs[0], **changes), *model.pairs[1:])
    return replace(report, **{which: replace(model, pairs=pairs)})


def the_failure(report: CheckReport) -> str:
    (failure,) = report.failures
    assert not report.passed
    assert [r.failure for r in report.rows if r.failure] == [failure]
    assert failure.endswith(".")
    return failure


def test_a_sound_potential_passes(measured: CheckReport) -> None:
    assert sound(measured).passed


def test_a_replica_that_fails_in_the_ramp_is_a_fault(measured: CheckReport) -> None:
    event = "start0-300K-1: failed at 0.5 ps (step 1000): the force on an atom reached 120 eV/A, bound 100 eV/A"
    failed = with_ramp(sound(measured), "subject", survived_ps=0.5, failed_K=725.0, events=(event,))
    text = the_failure(failed)
    assert "1 of 2 failed, the first after 0.5 ps at 725 K: the force on an atom reached 120 eV/A" in text.replace(
        "failed at 0.5 ps (step 1000): ", ""
    )
    assert with_ramp(sound(measured), "bare", survived_ps=0.5, failed_K=725.0, events=(event,)).passed


def test_bonds_that_change_early_are_a_fault_unless_the_backbone_does_it_too(measured: CheckReport) -> None:
    cold = with_ramp(sound(measured), "subject", changed_K=500.0)
    assert "Bonds change at 500 K" in the_failure(cold)
    assert "to the end" in the_failure(cold)
    assert "until 1500 K" in the_failure(with_ramp(cold, "bare", changed_K=1500.0))
    assert with_ramp(cold, "bare", changed_K=600.0).passed  # the molecule reacts
    assert with_ramp(sound(measured), "subject", changed_K=1200.0).passed


def test_a_hole_is_a_fault_if_its_rim_can_be_reached(measured: CheckReport) -> None:
    low, high = Hole(0.8, 4.0, 0.6, 2.0), Hole(0.6, 40.0, 0.5, 2.0)
    holed = with_wall(sound(measured), "subject", hole=low)
    assert "H-H has a hole, 2 eV deep inside of 0.80 Å, behind a rim of 4 eV" in the_failure(holed)
    assert "backbone has a fault there too" not in the_failure(holed)
    assert "backbone has a fault there too" in the_failure(with_wall(holed, "bare", hole=low))
    seen = with_wall(sound(measured), "subject", hole=high)
    assert seen.passed
    assert any("hole: 2 eV, rim 40 eV at 0.60 Å" in r.subject for r in seen.rows)
    assert not replace(seen, config=CheckConfig(max_hole_rim_eV=float("inf"))).passed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(largest_force_eV_per_A=None), "not finite"),
        (dict(largest_force_eV_per_A=1e9), "a force of 1.0e+09 eV/Å"),
        (dict(wall_A=None), "never rises by 1 eV down to 0.4 Å"),
    ],
)
def test_walls_that_run_away_or_are_missing_are_faults(
    measured: CheckReport, changes: dict[str, Any], words: str
) -> None:
    assert words in the_failure(with_wall(sound(measured), "subject", **changes))


def test_forgetting_is_a_fault_only_where_it_is_judged(measured: CheckReport) -> None:
    report = sound(measured)
    assert report.forgetting is not None
    others = tuple(replace(s, adapted_mae_meV_per_A=30.0) for s in report.forgetting.others)
    assert [s.judged for s in others] == [False, True]
    text = the_failure(replace(report, forgetting=replace(report.forgetting, others=others)))
    assert "30 meV/Å, 3 times the bare backbone's 10 meV/Å, bound 2" in text
    unknown = tuple(replace(s, judged=False) for s in others)
    unjudged = replace(report, forgetting=replace(report.forgetting, others=unknown))
    assert unjudged.passed
    assert any("not judged" in r for r in unjudged.remarks)


def test_a_drift_beyond_its_error_is_a_fault(measured: CheckReport) -> None:
    report = sound(measured)

    def drifting(drift: float, error: float, *events: str) -> CheckReport:
        nve = replace(
            report.subject.constant_energy,
            drift_meV_per_atom_ps=drift,
            drift_error_meV_per_atom_ps=error,
            events=events,
        )
        return replace(report, subject=replace(report.subject, constant_energy=nve))

    assert "drifts by -3 ± 0.5 meV/atom/ps" in the_failure(drifting(-3.0, 0.5))
    assert drifting(3.0, 2.0).passed
    assert "replica failed" in the_failure(drifting(0.0, 0.0, "start0-300K-0: failed at 0.1 ps (step 200): too hot"))
