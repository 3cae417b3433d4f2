"""`mmea inspect`: which weights an adapter changes, and what its gates do on a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ase import Atoms

    from mmea_calc.inspection import Inspection

# Beyond this many structures the means that are drawn hardly change.
DEFAULT_STRUCTURES = 200


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .adapter file.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="Structures to measure gates on; needed if there are gates."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture (.png, .pdf, .svg); FILE.inspect.png if not given.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Name or path of the adapter's backbone, if it is not found by itself.")
    ] = None,
    max_structures: Annotated[
        int, typer.Option(help="Structures of DATA to take, evenly spread.", min=1)
    ] = DEFAULT_STRUCTURES,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every path included, for programs.")] = False,
) -> None:
    """Draw what an adapter does: the weights that it changes, by order and path; gains and shifts of its gates."""
    from mmea_calc.adapter_file import named_after, read_adapter
    from mmea_calc.inspection import inspect as look
    from mmea_calc.inspection_picture import draw
    from mmea_calc.plots import check_picture
    from mmea_calc.potential import Potential

    from .console import print_json

    place = output or named_after(file, ".inspect.png")
    check_picture(place)
    content = read_adapter(file)
    structures: list[Atoms] = []
    if data is not None:
        from mmea_calc.data.reading import read_frames

        frames = read_frames(data)
        taken = min(len(frames), max_structures)
        structures = [frames[i * len(frames) // taken] for i in range(taken)]
    potential = Potential(content.load_backbone(backbone, device=device))
    potential.use(content)
    inspection = look(potential, structures)
    picture = draw(inspection, place, title=f"{file.name}, method {inspection.method}")
    if as_json:
        print_json({"adapter_file": str(file), "picture": str(picture), **inspection.to_dict()})
        return
    _print(inspection)
    typer.echo(f"{picture} written")


def _print(inspection: Inspection) -> None:
    from .console import out, table

    if inspection.changes:
        rows = list(_change_rows(inspection))
        headings = ["tensor", "order", "paths", "weights", "changed %", "rms change\n/ rms weight %"]
        out().print(table(headings, rows, caption="orders are those of the paths' output"))
    if inspection.gates:
        headings = ["gated layer", "order", "channels", "mean |shift|\n/ rms %", "mean gain", "lowest", "highest"]
        caption = f"means over {inspection.n_atoms:,} atoms of {inspection.n_structures:,} structures"
        out().print(table(headings, list(_gate_rows(inspection)), caption=caption))


def _change_rows(inspection: Inspection) -> Iterator[tuple[Any, ...]]:
    for change in inspection.changes:
        whole = change.total.rms_weight
        for order, part in change.by_order().items():
            paths = sum(p.order == order for p in change.paths)
            relative = 100 * part.rms_change / whole if whole else None
            name = "-" if order is None else f"l={order}"
            yield change.tensor, name, paths, part.entries, 100 * part.changed / part.entries, relative


def _gate_rows(inspection: Inspection) -> Iterator[tuple[Any, ...]]:
    import numpy as np

    for gate in inspection.gates:
        if gate.shift.size:
            mean = float(np.abs(gate.shift).mean())
            relative = 100 * mean / gate.scalar_rms if gate.scalar_rms else None
            yield gate.layer, "0e", int(gate.shift.size), relative, None, None, None
        for order, gains in gate.gains.items():
            known = gains[np.isfinite(gains)]
            values = (float(known.mean()), float(known.min()), float(known.max())) if known.size else (None,) * 3
            yield gate.layer, order, int(gains.size), None, *values
