"""`analyse`: the folder of a run -> pictures, csv files, and one page that holds everything."""

from __future__ import annotations

import base64
import csv
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmea_calc.errors import DataError
from mmea_calc.files import replacing

from . import geometry, over_time, vibrations
from .pictures import draw
from .quantity import Quantity, Selection
from .reader import Run, read_run
from .table import ReplicaRow, rows

# Part of a run that averages leave out unless told otherwise: it has not yet forgotten how it was started.
SKIP_FRACTION = 0.2
PAGE, TABLE = "index.html", "table.csv"

QUANTITIES: tuple[Callable[[Selection], Quantity | None], ...] = (
    over_time.temperature,
    over_time.energies,
    over_time.conserved,
    over_time.monitor,
    over_time.blocking,
    geometry.bonds,
    geometry.angles,
    geometry.dihedrals,
    geometry.rdf,
    vibrations.msd,
    vibrations.vacf,
    vibrations.spectrum,
)


@dataclass(frozen=True)
class Analysis:
    """What `analyse` wrote and found.

    Attributes:
        page: the page.
        files: all files, the page included.
        rows: one per replica.
        remarks: sentences on what was left out, and on what to beware of.
        skip_ps: the part of the run that averages leave out.
    """

    page: Path
    files: tuple[Path, ...]
    rows: tuple[ReplicaRow, ...]
    remarks: tuple[str, ...]
    skip_ps: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "page": str(self.page),
            "files": [str(f) for f in self.files],
            "skip_ps": self.skip_ps,
            "replicas": [row.to_dict() for row in self.rows],
            "remarks": list(self.remarks),
        }


def analyse(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    skip_ps: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """Analyse a run of dynamics: one picture and one csv file per quantity, a table, and a page with all of it.

    Args:
        folder: of the run, or its trajectory file.
        output: folder to write to; `analysis` in the folder of the run unless given, and cleared of an
            earlier analysis then. Files of the same names are replaced.
        skip_ps: beginning of the run that averages, distributions and correlations leave out, ps; a fifth of it
            unless given.
        progress: told what is being worked on.

    Raises:
        TrajectoryError: no trajectory in `folder`, or one that cannot be read.
        DataError: `skip_ps` is longer than the run.
    """
    run = read_run(folder)
    longest = max((float(r.time_fs[-1]) for r in run.replicas if r.time_fs.size), default=0.0) / 1000.0
    skip = SKIP_FRACTION * longest if skip_ps is None else skip_ps
    if not 0.0 <= skip <= longest:
        raise DataError(
            f"the part to skip must be between 0 and the length of the run, {longest:g} ps; got {skip:g} ps"
        )
    target = Path(output) if output is not None else run.path.parent / "analysis"
    target.mkdir(parents=True, exist_ok=True)
    sections, files, all_rows, remarks = [], [], [], []
    starts = sorted({r.start_index for r in run.replicas})
    for start in starts:
        selection = Selection(run, tuple(r for r in run.replicas if r.start_index == start), 1000.0 * skip)
        suffix = f"-start{start}" if len(starts) > 1 else ""
        quantities = _draw_all(selection, target, suffix, progress)
        files += [f for _, picture in quantities for f in (picture, picture.with_suffix(".csv"))]
        found = rows(selection)
        all_rows += found
        remarks += [f"Start structure {start}: {r}" if suffix else r for r in selection.remarks]
        sections.append(_section(selection, found, quantities, f"Start structure {start}" if suffix else ""))
    columns = {f.name: [getattr(r, f.name) for r in all_rows] for f in fields(ReplicaRow)}
    files.append(_write_csv(target / TABLE, columns))
    page = target / PAGE
    with replacing(page) as temporary:
        temporary.write_text(_page(run, sections, skip), encoding="utf-8")
    if output is None:
        _remove_others(target, files)
    return Analysis(page, (page, *files), tuple(all_rows), tuple(remarks), skip)


def _remove_others(folder: Path, files: Sequence[Path]) -> None:
    """Pictures and tables of an earlier analysis that this one has no counterpart of."""
    own = re.compile(rf"({'|'.join(make.__name__ for make in QUANTITIES)})(-start\d+)?\.(png|csv)")
    for path in folder.iterdir():
        if own.fullmatch(path.name) and path not in files:
            path.unlink()


def _draw_all(
    selection: Selection, target: Path, suffix: str, progress: Callable[[str], None] | None
) -> list[tuple[Quantity, Path]]:
    """Picture and csv file of every quantity that there is; returns the quantities with their pictures."""
    done = []
    for make in QUANTITIES:
        if progress is not None:
            progress(f"{make.__name__}{suffix}")
        if (quantity := make(selection)) is not None:
            picture = draw(quantity, target / f"{make.__name__}{suffix}.png")
            _write_csv(picture.with_suffix(".csv"), quantity.columns)
            done.append((quantity, picture))
    return done


# -- csv -----------------------------------------------------------------------------------------------------------


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(v) for v in row] for row in zip(*columns.values(), strict=True))
    return path


def _cell(value: Any) -> Any:
    """Numbers to their last bit, total energies among them; what is not there is an empty cell."""
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0") if math.isfinite(value) else ""
    return value


# -- page ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; } h3 { font-size: 1.05em; margin: 1.8em 0 .2em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child, td.text { text-align: left; }
img { max-width: 100%; height: auto; display: block; }
.note, figcaption { color: #555; margin: .2em 0 .6em; } figure { margin: 0; } .event { color: #b00020; }
.wide { overflow-x: auto; }
"""


def _page(run: Run, sections: Sequence[str], skip_ps: float) -> str:
    title = html.escape(f"Dynamics: {run.path.parent.resolve().name}")
    settings = ", ".join(f"{k} {_plain(v)}" for k, v in run.config.items() if not isinstance(v, dict))
    notes = [f"{len(run.replicas)} replicas. Means, distributions and correlations leave out the first {skip_ps:g} ps."]
    notes += [f"Settings: {settings}."] if settings else []
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{title}</h1>\n"
        + "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes)
        + "".join(sections)
        + "</body>\n</html>\n"
    )


def _section(
    selection: Selection, found: Sequence[ReplicaRow], quantities: Sequence[tuple[Quantity, Path]], title: str
) -> str:
    from ase.formula import Formula
    from ase.symbols import Symbols

    formula = Formula(str(Symbols(selection.first.numbers))).format("hill")
    heading = f"{title}: {formula}" if title else formula
    parts = [f"<h2>{html.escape(heading)}, {len(selection.first.numbers)} atoms</h2>\n", _table(found)]
    if selection.remarks:
        parts.append("<ul>\n" + "".join(f"<li>{html.escape(r)}</li>\n" for r in selection.remarks) + "</ul>\n")
    for quantity, picture in quantities:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(
            f"<figure>\n<h3>{html.escape(quantity.title)}</h3>\n"
            f"<figcaption>{html.escape(quantity.note)} Numbers: {html.escape(picture.with_suffix('.csv').name)}."
            f'</figcaption>\n<img alt="{html.escape(quantity.title)}" src="data:image/png;base64,{data}">\n</figure>\n'
        )
    return "".join(parts)


HEADINGS = (
    "replica",
    "length<br>ps",
    "temperature<br>K",
    "potential energy<br>eV",
    "drift of the conserved quantity<br>meV/atom/ps",
    "",
)


def _table(found: Sequence[ReplicaRow]) -> str:
    lines = ["<tr>" + "".join(f"<th>{h}</th>" for h in HEADINGS) + "</tr>\n"]
    for row in found:
        remark = html.escape(row.remark)
        cells = (
            html.escape(row.replica),
            f"{row.length_ps:g}",
            with_error(row.temperature_K, row.temperature_error_K),
            with_error(row.potential_eV, row.potential_error_eV),
            with_error(row.drift_meV_per_atom_ps, row.drift_error_meV_per_atom_ps),
        )
        kind = "text event" if row.events else "text"
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + f'<td class="{kind}">{remark}</td></tr>\n')
    note = "± is the standard error by block averages; of the drift, that of its slope."
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>\n<p class="note">{note}</p>\n'


def with_error(value: float, error: float) -> str:
    """A value to the second digit of its error, "301.2 ± 3.4"; without an error to six digits."""
    if not math.isfinite(value):
        return "–"  # noqa: RUF001 (a dash in a table)
    if not math.isfinite(error) or error <= 0.0:
        return f"{value:.6g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list) else f"{value}"
