"""The table as files: `results.md`, `results.csv`, `cells.csv` (one line for every cell and set) and `results.png`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import BenchmarkConfig
from ..files import write_text
from .cells import CellResult, read_results
from .method_spec import parse_methods
from .published import SOURCE
from .results_folder import CELLS, other_reference_energies, reference_energies_of, valid_fraction
from .table import QUANTITIES, Column, ResultTable, Row, Statistic, build_table
from .tasks import Task

MARKDOWN, CSV, CELLS_CSV, PICTURE = "results.md", "results.csv", "cells.csv", "results.png"
MEASURES = {"mae": "mean absolute errors", "rmse": "root mean square errors"}


def table_of(task: Task, folder: str | Path, config: BenchmarkConfig) -> ResultTable:
    """The table of all that is kept in a folder; systems and methods of this call come first. Raises TrainingError."""
    return build_table(
        read_results(Path(folder) / CELLS),
        benchmark=task.name,
        title=task.title,
        measure=task.measure,
        backbone=config.backbone,
        systems=[s.name for s in task.systems],
        methods=[spec.label for spec in parse_methods(config)],
        with_validation=task.with_validation,
        tests={(s.name, name): test.hash for s in task.systems for name, test in s.tests.items()},
        paper_E0s=other_reference_energies(task, config),
    )


def write_tables(task: Task, folder: str | Path, config: BenchmarkConfig, *, remark: str | None = None) -> ResultTable:
    """Write Markdown and csv of all that is kept in a folder, and return the table.

    Args:
        task, folder, config: as `run` was given them.
        remark: paragraph above the table, such as a recommendation.

    Raises:
        TrainingError: a kept result cannot be read.
    """
    folder = Path(folder)
    table = table_of(task, folder, config)
    write_text(folder / MARKDOWN, markdown(table, describe(task, config, table.results), remark))
    write_text(folder / CSV, _csv(_table_lines(table)))
    write_text(folder / CELLS_CSV, _csv(_cell_lines(table.results)))
    return table


def describe(task: Task, config: BenchmarkConfig, results: Sequence[CellResult] = ()) -> list[str]:
    """Sentences on what the figures are, and how they came about."""
    sets = sorted({m.structures for r in results for name, m in r.errors.items() if name != "valid"})
    tested = f", tested on {_range(sets)} structures" if sets else ""
    validated = "" if all(s.valid is not None for s in task.systems) else (
        f"; {100 * valid_fraction(task, config):g} % of the training structures, drawn by the seed, validate"
    )  # fmt: skip
    sentences = [
        f"{MEASURES[task.measure].capitalize()}: energies of the whole structure in meV / forces in meV/Å{tested}. "
        "Mean ± standard deviation over seeds. The best of every column is bold.",
        f"Backbone {config.backbone}, recipe {config.recipe or 'default of each method'}"
        + ("" if config.epochs is None else f", epochs {config.epochs}")
        + f", reference energies {reference_energies_of(task, config) or 'isolated atoms, or estimated'}{validated}.",
    ]
    if machines := sorted({r.hardware for r in results if r.hardware}):
        sentences.append(f"Minutes of one training on {'; '.join(machines)}.")
    return sentences


def markdown(table: ResultTable, sentences: Sequence[str], remark: str | None = None) -> str:
    """The table with what explains it."""
    head = ["method", *(f"{heading} E / F" for heading in table.headings), "parameters", "file, kB", "min", "trainings"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in table.rows:
        cells = [_entry_text(table, row, column) for column in table.columns]
        label = {"zero-shot": row.label, "method": f"`{row.label}`", "published": f"*{row.label}*"}[row.kind]
        lines.append(f"| {' | '.join([label, *cells, *numbers(row)])} |")
    text = [*sentences, *table.notes]
    if table.published_backbone is not None:
        text.append(published_sentence(table))
    if table.failures:
        text += ["Failed:", "\n".join(f"- {failure}" for failure in table.failures)]
    return "\n\n".join([f"# {table.title}", *([remark] if remark else []), "\n".join(lines), *text]) + "\n"


def published_sentence(table: ResultTable) -> str:
    """Where published rows are from."""
    return f"Published: {SOURCE}, fine-tuned from {table.published_backbone}."


def numbers(row: Row) -> tuple[str, str, str, str]:
    """Parameters, size of the file, minutes and trainings of a row, as text."""
    if row.kind != "method":
        return "", "", "", ""

    def text(value: Statistic | None, digits: int) -> str:
        return "-" if value is None else f"{value.mean:,.{digits}f}"

    trainings = f"{row.finished}" + (f", {row.failed} failed" if row.failed else "")
    return text(row.parameters, 0), text(row.kilobytes, 0), text(row.minutes, 1), trainings


def _entry_text(table: ResultTable, row: Row, column: Column) -> str:
    entry = row.entries.get(column)
    if entry is None:
        return "-"
    words = []
    for quantity in QUANTITIES:
        value = entry.of(quantity)
        text = "-" if value is None else str(value)
        words.append(f"**{text}**" if (row.label, column, quantity) in table.best else text)
    return " / ".join(words) if words != ["-", "-"] else "-"


def _table_lines(table: ResultTable) -> list[dict[str, Any]]:
    lines = []
    for row in table.rows:
        for column, heading in zip(table.columns, table.headings, strict=True):
            entry = row.entries.get(column)
            line: dict[str, Any] = {
                "column": heading, "system": column.system, "test": column.test, "row": row.label, "kind": row.kind,
                "measure": table.measure,
            }  # fmt: skip
            for quantity, unit in zip(QUANTITIES, ("meV", "meV_per_A"), strict=True):
                value = None if entry is None else entry.of(quantity)
                line[f"{quantity}_mean_{unit}"] = None if value is None else value.mean
                line[f"{quantity}_std_{unit}"] = None if value is None else value.std
                line[f"{quantity}_seeds"] = None if value is None else value.n
            for name in ("parameters", "kilobytes", "minutes"):
                statistic = getattr(row, name)
                line[name] = None if statistic is None else statistic.mean
            lines.append(line)
    return lines


def _cell_lines(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    lines = []
    for r in results:
        common = {
            "system": r.system, "method": r.method, "seed": r.seed, "failed": r.reason or "",
            "parameters": r.parameters, "file_bytes": r.file_bytes, "seconds": r.seconds, "best_epoch": r.best_epoch,
        }  # fmt: skip
        for name, measured in r.errors.items():
            errors = {
                f"{model}_{key}": value
                for model in ("zero_shot", "fine_tuned")
                for key, value in asdict(getattr(measured, model)).items()
            }
            lines.append({**common, "set": name or "test", "structures": measured.structures, **errors})
        if not r.errors:
            lines.append(dict(common))
    return lines


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
