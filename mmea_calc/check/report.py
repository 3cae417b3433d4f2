"""What a check found, and its verdict: the one place where figures meet their bounds (`CheckConfig`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import CheckConfig, to_dict
from ..files import json_ready
from .dynamics import ConstantEnergy, Ramp
from .forgetting import Forgetting, OtherMolecules
from .scans import Scan

_MOST_NAMES = 4


@dataclass(frozen=True)
class ModelReport:
    """The figures of one model.

    Attributes:
        label: "adapter" or "backbone".
        ramp: stability.
        pairs, squeezes, approaches: walls.
        constant_energy: drift.
    """

    label: str
    ramp: Ramp
    pairs: tuple[Scan, ...]
    squeezes: tuple[Scan, ...]
    approaches: tuple[Scan, ...]
    constant_energy: ConstantEnergy

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """As plain, JSON-ready values; the arrays are left out without `curves`."""
        walls = {name: [s.to_dict(curves=curves) for s in getattr(self, name)] for name in _WALLS}
        parts = {"ramp": self.ramp.to_dict(curves=curves), "nve": self.constant_energy.to_dict(curves=curves)}
        return {**parts, **walls}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        quantity: what was measured.
        subject, bare: of the potential under check, and of its bare backbone (empty if that is what is checked).
        bound: what is sound, in words.
        failure: a sentence if the bound is not kept.
        judged: whether the line has a verdict at all.
    """

    quantity: str
    subject: str
    bare: str
    bound: str = ""
    failure: str | None = None
    judged: bool = True


@dataclass(frozen=True)
class CheckReport:
    """What `check` returns.

    Attributes:
        subject: figures of the potential under check.
        bare: of its bare backbone; None where the backbone itself is checked.
        forgetting: None without an adapter.
        formula: of the start structure.
        n_bonds: bonds of the start; more than were squeezed if they were thinned out.
        config: settings and bounds.
        seconds: what it took.
    """

    subject: ModelReport
    bare: ModelReport | None
    forgetting: Forgetting | None
    formula: str
    n_bonds: int
    config: CheckConfig
    seconds: float

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table, with the verdict of every line."""
        found = [*_ramp_rows(self), *_wall_rows(self), *_forgetting_rows(self), _drift_row(self)]
        return tuple(found)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence per criterion that is not met."""
        return tuple(r.failure for r in self.rows if r.failure is not None)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader should know, and is no fault."""
        found = []
        if (n := len(self.subject.squeezes)) < self.n_bonds:
            found.append(f"{n} of the {self.n_bonds} bonds were squeezed, evenly over their kinds.")
        if not self.subject.approaches:
            found.append("The start is periodic: no two copies of it were pushed together.")
        if self.forgetting is not None and not any(s.judged for s in self.forgetting.others):
            found.append(
                "Forgetting is reported, not judged: no labels at the level of theory of the adapter's training are "
                "at hand. Give some, or name the level; forces that differ from the backbone's are no fault by "
                "themselves."
            )
        return tuple(found)

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """As plain, JSON-ready values; what the plots are drawn from is left out without `curves`."""
        models = [m for m in (self.subject, self.bare) if m is not None]
        result = {
            "passed": self.passed,
            "failures": list(self.failures),
            "remarks": list(self.remarks),
            "formula": self.formula,
            **{m.label: m.to_dict(curves=curves) for m in models},
            "forgetting": None if self.forgetting is None else self.forgetting.to_dict(curves=curves),
            "settings": to_dict(self.config),
            "seconds": self.seconds,
        }
        ready: dict[str, Any] = json_ready(result)
        return ready


# Stability ----------------------------------------------------------------------------------------------------------


def _ramp_rows(report: CheckReport) -> list[Row]:
    config = report.config
    asked = f"{config.ramp_from_K:g} to {config.ramp_to_K:g} K"
    models = _models(report)
    survived = [f"{m.ramp.survived_ps:.2f} of {m.ramp.length_ps:.2f} ps, {_failed(m.ramp)}" for m in models]
    changed = ["none" if (t := m.ramp.changed_K) is None else f"from {t:.0f} K" for m in models]
    ramp, bound = report.subject.ramp, config.min_bond_change_K
    above = f"not below {bound:g} K" if report.bare is not None else ""
    failure = None
    if ramp.n_failed:
        first = min((r for r in ramp.replicas if r.failed_K is not None), key=lambda r: r.survived_ps)
        failure = (
            f"In the ramp {_failed(ramp)}, the first after {first.survived_ps:.3g} ps at {first.failed_K:.0f} K: "
            f"{_last_words(first.events)}."
        )
    chemistry = None
    if report.bare is not None and (t := ramp.changed_K) is not None and t < bound:
        there = report.bare.ramp.changed_K
        if there is None or there >= bound:
            until = "to the end" if there is None else f"until {there:.0f} K"
            chemistry = (
                f"Bonds change at {t:.0f} K in the ramp, below {bound:g} K; under the bare backbone they stay {until}."
            )
    return [
        Row(f"ramp {asked}", *_two(survived), "none fails", failure),
        Row("bonds changed in the ramp", *_two(changed), above, chemistry, judged=report.bare is not None),
    ]


def _failed(ramp: Ramp) -> str:
    return f"{ramp.n_failed or 'none'} of {len(ramp.replicas)} failed"


def _last_words(events: Sequence[str]) -> str:
    """The reason of a failure without the name of the replica."""
    return events[-1].split(": ", 1)[-1].rstrip(".") if events else "unknown"


# Walls --------------------------------------------------------------------------------------------------------------

_WALLS = {"pairs": "two atoms", "squeezes": "squeezed bonds", "approaches": "molecules pushed together"}


def _wall_rows(report: CheckReport) -> list[Row]:
    config, rows = report.config, []
    bound = f"no hole below {config.max_hole_rim_eV:g} eV"
    for i, pair in enumerate(report.subject.pairs):
        texts = [_wall(m.pairs[i]) for m in _models(report)]
        rows.append(
            Row(f"{pair.label} at {pair.distances_A[0]:g} Å", *_two(texts), bound, _wall_failure(report, "pairs", [i]))
        )
    for name in ("squeezes", "approaches"):
        scans: tuple[Scan, ...] = getattr(report.subject, name)
        if not scans:
            continue
        texts = [_walls(getattr(m, name)) for m in _models(report)]
        failure = _wall_failure(report, name, range(len(scans)))
        rows.append(Row(f"{_WALLS[name]} ({len(scans)})", *_two(texts), bound, failure))
    return rows


def _wall(scan: Scan) -> str:
    if scan.largest_force_eV_per_A is None:
        return "not finite"
    if scan.wall_A is None:
        return "no wall"
    top = f"{scan.energies_eV[0]:.0f} eV"
    return top if scan.hole is None else f"{top}; hole: {_hole_text(scan)}"


def _walls(scans: Sequence[Scan]) -> str:
    broken = [s for s in scans if s.largest_force_eV_per_A is None]
    holes = sorted((s for s in scans if s.hole is not None), key=_rim)
    missing = [s for s in scans if s.wall_A is None and s not in broken]
    words = [f"{len(items)} {text}" for items, text in ((broken, "not finite"), (missing, "without a wall")) if items]
    if holes:
        words.append(f"{len(holes)} with a hole, {holes[0].label}: {_hole_text(holes[0])}")
    return ", ".join(words) or "no hole"


def _hole_text(scan: Scan) -> str:
    hole = scan.hole
    assert hole is not None
    return f"{hole.depth_eV:.2g} eV, rim {hole.rim_eV:.2g} eV at {hole.rim_A:.2f} Å"


def _rim(scan: Scan) -> float:
    return scan.hole.rim_eV if scan.hole is not None else float("inf")


def _fault(scan: Scan, config: CheckConfig) -> str | None:
    """What is wrong with a wall, or None."""
    force = scan.largest_force_eV_per_A
    if force is None:
        return "gives energies or forces that are not finite"
    if force > config.max_wall_force_eV_per_A:
        return f"feels a force of {force:.1e} eV/Å, bound {config.max_wall_force_eV_per_A:g}"
    if scan.wall_A is None:
        return f"never rises by {config.wall_rise_eV:g} eV down to {scan.distances_A[0]:g} Å"
    if scan.hole is not None and scan.hole.rim_eV < config.max_hole_rim_eV:
        return f"has a hole, {scan.hole}"
    return None


def _wall_failure(report: CheckReport, name: str, which: Sequence[int]) -> str | None:
    scans: tuple[Scan, ...] = getattr(report.subject, name)
    faults = {i: fault for i in which if (fault := _fault(scans[i], report.config)) is not None}
    if not faults:
        return None
    parts = []
    for i, fault in list(faults.items())[:_MOST_NAMES]:
        also = report.bare is not None and _fault(getattr(report.bare, name)[i], report.config) is not None
        parts.append(f"{scans[i].label} {fault}" + (" (the bare backbone has a fault there too)" if also else ""))
    more = f"; {len(faults)} in all" if len(faults) > _MOST_NAMES else ""
    return f"Walls, {_WALLS[name]}: {'; '.join(parts)}{more}."


# Forgetting ---------------------------------------------------------------------------------------------------------


def _forgetting_rows(report: CheckReport) -> list[Row]:
    forgetting = report.forgetting
    if forgetting is None:
        return []
    own = f"{forgetting.own_difference_meV_per_A:.0f} meV/Å"
    rows = [Row(f"adapted - bare forces, {report.formula}", own, "", judged=False)]
    for item in forgetting.others:
        ratio = "" if item.ratio is None else f", ratio {item.ratio:.2f}"
        text = f"{item.difference_meV_per_A:.0f} meV/Å{ratio}"
        rows.append(Row(f"  {item.name} ({item.n_structures})", text, "", judged=False))
    for item in forgetting.others:
        errors = [f"{e:.0f} meV/Å" for e in (item.adapted_mae_meV_per_A, item.bare_mae_meV_per_A)]
        name, most = f"forces MAE, {item.name} ({item.n_structures})", report.config.max_forgetting
        bound = f"{most:g} times bare" if item.judged else "not judged"
        rows.append(Row(name, *_two(errors), bound, _forgot(item, most), item.judged))
    return rows


def _forgot(item: OtherMolecules, most: float) -> str | None:
    adapted, bare = item.adapted_mae_meV_per_A, item.bare_mae_meV_per_A
    if not item.judged or adapted <= most * bare:
        return None
    return (
        f"Forgetting: on {item.name} the error of the forces is {adapted:.0f} meV/Å, {adapted / bare:.2g} times the "
        f"bare backbone's {bare:.0f} meV/Å, bound {most:g}."
    )


# Constant energy ----------------------------------------------------------------------------------------------------


def _drift_row(report: CheckReport) -> Row:
    config, models = report.config, _models(report)
    most, nve = config.max_drift_meV_per_atom_ps, report.subject.constant_energy
    texts = []
    for m in models:
        drift, error = m.constant_energy.drift_meV_per_atom_ps, m.constant_energy.drift_error_meV_per_atom_ps
        unknown = "failed" if m.constant_energy.events else "-"
        texts.append(unknown if drift is None else f"{drift:.3f} ± {error:.3f} meV/atom/ps")
    failure = None
    drift, error = nve.drift_meV_per_atom_ps, nve.drift_error_meV_per_atom_ps
    if nve.events:
        failure = f"At constant energy a replica failed: {_last_words(nve.events[:1])}."
    elif drift is not None and error is not None and abs(drift) - 2 * error > most:
        failure = f"The energy drifts by {drift:.2g} ± {error:.2g} meV/atom/ps at constant energy, bound {most:g}."
    measured = drift is not None or bool(nve.events)
    return Row(f"NVE drift, {config.nve_K:g} K", *_two(texts), f"{most:g} meV/atom/ps", failure, judged=measured)


def _models(report: CheckReport) -> list[ModelReport]:
    return [m for m in (report.subject, report.bare) if m is not None]


def _two(texts: Sequence[str]) -> tuple[str, str]:
    return texts[0], texts[1] if len(texts) > 1 else ""


__all__ = ["CheckReport", "ModelReport", "Row"]
