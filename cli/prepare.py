"""`mmea prepare`: labelled structures in, a file with their neighbour lists out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    train: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRAIN...",
            help="Labelled structures: extended xyz, ASE db or .traj. Several files are joined.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; TRAIN's name with .h5 if not given.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="The one to fine-tune, whose cutoff the neighbour lists have.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Head of a backbone with several.")] = None,
    energy_key: Annotated[str | None, typer.Option(help="Name of the energies; detected if not given.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces.")] = None,
    stress_key: Annotated[str | None, typer.Option(help="Name of the stresses.")] = None,
) -> None:
    """Write structures, labels and neighbour lists for mmea finetune, which then reads what it needs when it does."""
    from mmea_calc.backbone import load_backbone
    from mmea_calc.config import DEFAULT_BACKBONE
    from mmea_calc.data.preparing import prepare as write_prepared

    from .console import out, say
    from .progress import counting

    loaded = load_backbone(backbone or DEFAULT_BACKBONE, head=head)
    target = output or Path(train[0].stem + ".h5")
    with counting(out(), "structures") as progress:
        data = write_prepared(
            train,
            target,
            r_max=loaded.r_max,
            elements=loaded.elements,
            energy_key=energy_key,
            forces_key=forces_key,
            stress_key=stress_key,
            progress=progress,
        )
    labels = ", ".join(f"{n:,} with {name} ({data.keys[name]})" for name, n in data.counts.items() if n)
    for note in data.notes:
        say(f"note: {note}")
    say(
        f"{target} ({target.stat().st_size / 1e6:.1f} MB) holds {len(data):,} structures, {labels}, and their "
        f"neighbours within {loaded.r_max:g} Å, the cutoff of {loaded.name}: mmea finetune {target}"
    )
