"""Cells -> the table: methods in rows, systems or tests in columns, mean and standard deviation over seeds.

Energies of the whole structure in meV, forces in meV/A. The bare backbone (zero-shot) is the first row; published
figures stand below the method's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..methods import METHODS
from .cells import CellResult, Measured
from .comparable import Hashes, comparable
from .method_spec import PAPER, recipe_of
from .published import Pair, published
from .tasks import LAYOUTS, VALID, Measure

Kind = Literal["zero-shot", "method", "published"]
Quantity = Literal["energy", "forces"]

QUANTITIES: tuple[Quantity, Quantity] = ("energy", "forces")
ZERO_SHOT = "backbone alone"


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (None for a single value) of n values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 1 else 2
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


@dataclass(frozen=True)
class Entry:
    """Errors of a method in a column; None where there are no labels, or nothing is finished."""

    energy: Statistic | None = None
    forces: Statistic | None = None

    def of(self, quantity: Quantity) -> Statistic | None:
        return self.energy if quantity == "energy" else self.forces


@dataclass(frozen=True)
class Column:
    """Errors of one system on one test."""

    system: str
    test: str


@dataclass(frozen=True)
class Row:
    """A method, the bare backbone, or a method as published.

    Attributes:
        label: as it is shown.
        method: label of the `MethodSpec`; "" for the bare backbone.
        entries: column -> errors.
        parameters, kilobytes, minutes: of one training; means over all cells of the row.
        finished, failed: cells.
    """

    label: str
    kind: Kind
    method: str = ""
    entries: Mapping[Column, Entry] = field(default_factory=dict)
    parameters: Statistic | None = None
    kilobytes: Statistic | None = None
    minutes: Statistic | None = None
    finished: int = 0
    failed: int = 0


@dataclass(frozen=True)
class ResultTable:
    """The table.

    Attributes:
        title: of the benchmark.
        measure: "mae" or "rmse".
        columns, headings: what the columns are, and their names.
        rows: the bare backbone, then the methods.
        best: (row label, column, quantity) of the lowest of every column; published figures do not compete.
        failures: sentences, one for every cell that failed.
        published_backbone: that published figures are of; None where there are none.
        results: of which it is, without errors that are left out of it.
        notes: sentences on what is not as the rest, and on what is left out.
    """

    title: str
    measure: Measure
    columns: tuple[Column, ...]
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    best: frozenset[tuple[str, Column, Quantity]]
    failures: tuple[str, ...]
    published_backbone: str | None
    results: tuple[CellResult, ...] = ()
    notes: tuple[str, ...] = ()


def build_table(
    results: Iterable[CellResult],
    *,
    benchmark: str,
    title: str,
    measure: Measure,
    backbone: str,
    systems: Sequence[str] = (),
    methods: Sequence[str] = (),
    with_validation: bool = False,
    paper_E0s: str | None = None,
    tests: Hashes | None = None,
) -> ResultTable:
    """The table of all results, every column of one set of structures.

    Args:
        results: of cells.
        benchmark: which published figures are shown.
        title: of the table.
        measure: of the errors.
        backbone: its name; published figures depend on it.
        systems, methods: those that come first, in this order.
        with_validation: show validation errors even where there are tests.
        paper_E0s: reference energies of the methods that name the published recipe, where all others have others.
        tests: which structures a column is of; see `comparable`.
    """
    results, left_out = comparable(results, tests or {})
    done = [r for r in results if r.finished]
    columns = _columns(done, _ordered((r.system for r in done), systems), with_validation)
    figures, source = published(benchmark, backbone)
    rows = [_zero_shot(done, columns, measure)] if done else []
    any_published = False
    labels = _ordered((r.method for r in results), methods)
    under = _published_under(labels)
    for method in labels:
        rows.append(_method(method, [r for r in results if r.method == method], columns, measure))
        if (name := under.get(method)) is None:
            continue
        pairs = {c: figures.get(_published_column(benchmark, c), {}).get(name) for c in columns}
        entries = {c: _published_entry(pair) for c, pair in pairs.items() if pair is not None}
        if entries:
            any_published = True
            rows.append(Row(f"{name}, published", "published", method, entries))
    return ResultTable(
        title=title,
        measure=measure,
        columns=columns,
        headings=_headings(columns),
        rows=tuple(rows),
        best=_best(rows, columns),
        failures=tuple(f"{r.system}, {r.method}, seed {r.seed}: {r.reason}" for r in results if not r.finished),
        published_backbone=source if any_published else None,
        results=tuple(results),
        notes=(*_zero_shot_notes(done, columns, paper_E0s), *left_out),
    )


def bare_cells(done: Iterable[CellResult], test: str) -> list[CellResult]:
    """The finished cells of one system that errors of the bare backbone are taken from, one for each seed.

    Seeds differ in reference energies and validation structures; methods do not, but for those that name the published
    recipe: it may have reference energies of its own, so these count only where there is nothing else.
    """
    measured = [r for r in done if test in r.errors]
    by_seed: dict[int, CellResult] = {}
    for r in [r for r in measured if recipe_of(r.method) != PAPER] or measured:
        by_seed.setdefault(r.seed, r)
    return list(by_seed.values())


def _ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    present = set(names)
    return [*(name for name in first if name in present), *sorted(present - set(first))]


def _columns(done: Sequence[CellResult], systems: Sequence[str], with_validation: bool) -> tuple[Column, ...]:
    """Tests of every system, in the order of the published table; validation where asked for, or nothing else is."""
    columns = []
    for system in systems:
        found = list(dict.fromkeys(test for r in done if r.system == system for test in r.errors))
        tests = [test for test in found if test != VALID]
        order = [test for layout in LAYOUTS.values() for test in layout.tests]
        tests.sort(key=lambda test: order.index(test) if test in order else len(order))
        columns += [Column(system, test) for test in ([VALID] if with_validation or not tests else []) + tests]
    return tuple(columns)


def _headings(columns: Sequence[Column]) -> tuple[str, ...]:
    one_system = len({c.system for c in columns}) == 1

    def heading(column: Column) -> str:
        test = "validation" if column.test == VALID else column.test
        if not test:
            return column.system
        return test if one_system else f"{column.system} → {test}"

    return tuple(heading(c) for c in columns)


def _statistics(measured: Sequence[Measured], measure: Measure, *, zero_shot: bool = False) -> Entry:
    errors = [m.zero_shot if zero_shot else m.fine_tuned for m in measured]

    def of(quantity: Quantity) -> Statistic | None:
        values = [getattr(e, f"{quantity}_{measure}") for e in errors]
        known = [v for v in values if v is not None]
        return Statistic.of(known) if known else None

    return Entry(of("energy"), of("forces"))


def _zero_shot(done: Sequence[CellResult], columns: Sequence[Column], measure: Measure) -> Row:
    entries = {}
    for column in columns:
        cells = bare_cells((r for r in done if r.system == column.system), column.test)
        entries[column] = _statistics([r.errors[column.test] for r in cells], measure, zero_shot=True)
    return Row(ZERO_SHOT, "zero-shot", entries=entries)


def _zero_shot_notes(done: Sequence[CellResult], columns: Sequence[Column], paper_E0s: str | None) -> tuple[str, ...]:
    """Where the bare backbone has the published recipe's reference energies, for want of cells with the folder's."""
    if paper_E0s is None:
        return ()
    having = [
        heading
        for column, heading in zip(columns, _headings(columns), strict=True)
        if any(
            recipe_of(r.method) == PAPER
            for r in bare_cells((r for r in done if r.system == column.system), column.test)
        )
    ]
    where = "" if len(having) == len(columns) else f" of {', '.join(having)}"
    sentence = f"Energies of the {ZERO_SHOT}{where} are with the reference energies of recipe=paper: {paper_E0s}."
    return (sentence,) if having else ()


def _method(method: str, results: Sequence[CellResult], columns: Sequence[Column], measure: Measure) -> Row:
    done = [r for r in results if r.finished]
    entries = {
        c: _statistics([r.errors[c.test] for r in done if r.system == c.system and c.test in r.errors], measure)
        for c in columns
    }

    def statistic(values: Sequence[float]) -> Statistic | None:
        return Statistic.of(values) if values else None

    equivariant = METHODS[method.partition(":")[0]].equivariant
    return Row(
        method if equivariant else f"{method} (not equivariant)",
        "method",
        method,
        entries,
        parameters=statistic([r.parameters for r in done]),
        kilobytes=statistic([r.file_bytes / 1000 for r in done]),
        minutes=statistic([r.seconds / 60 for r in done]),
        finished=len(done),
        failed=len(results) - len(done),
    )


def _published_column(benchmark: str, column: Column) -> str:
    """The published table's name of a column; published AcAc and 3BPA were trained at 300 K."""
    if benchmark == "rmd17":
        return column.system
    return column.test if column.system == "300K" else ""


def _published_under(labels: Sequence[str]) -> dict[str, str]:
    """Label -> name of the published figures that stand below it.

    They are of the published recipe: below a label that names it and nothing else, where there is one.
    """
    of_the_recipe = {f"{label}:recipe={PAPER}": label for label in METHODS}
    named = {label: of_the_recipe[label] for label in labels if label in of_the_recipe}
    return {label: label for label in labels if label not in named.values()} | named


def _published_entry(pair: Pair) -> Entry:
    energy, forces = (None if value is None else Statistic(value, None, 1) for value in pair)
    return Entry(energy, forces)


def _best(rows: Sequence[Row], columns: Sequence[Column]) -> frozenset[tuple[str, Column, Quantity]]:
    best = set()
    for column in columns:
        for quantity in QUANTITIES:
            own = [(s.mean, row.label) for row in rows if row.kind != "published"
                   if (s := row.entries[column].of(quantity)) is not None]  # fmt: skip
            if own:
                best.add((min(own)[1], column, quantity))
    return frozenset(best)
