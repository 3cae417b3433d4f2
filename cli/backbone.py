"""`mmea backbone`: which backbones there are, what one is, and conversion to the safe format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import FINGERPRINT_DIGITS, elements_text, out, pairs_table, print_json, table

app = typer.Typer(help="List, show and convert backbones.", no_args_is_help=True)


@app.command("list")
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the backbones that can be given by name."""
    from mmea_calc.backbone import list_backbones

    backbones = list_backbones()
    if as_json:
        print_json([{**vars(b), "path": str(b.path)} for b in backbones])
        return
    rows = [
        (
            b.name,
            "embedded" if b.origin == "embedded" else "on this machine" if b.available else "to be fetched",
            b.level_of_theory,
            elements_text(b.elements) if b.elements else "most of the periodic table",
            b.licence.split(", http")[0] if b.licence else None,
        )
        for b in backbones
    ]
    caption = "A path of a .model or .safetensors file can be given in the place of a name."
    out().print(table(["name", "where", "level of theory", "elements", "licence"], rows, caption=caption))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or path of a backbone.", show_default=False)],
    head: Annotated[str | None, typer.Option(help="Head of a backbone with several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what a backbone is: shape, elements, reference energies, fingerprint, model card."""
    from mmea_calc.backbone import load_backbone, model_card

    backbone = load_backbone(name, head=head)
    values: dict[str, Any] = {
        "name": backbone.name,
        "source": backbone.source,
        "fingerprint": backbone.fingerprint,
        "level_of_theory": backbone.level_of_theory,
        "licence": backbone.licence,
        "notes": backbone.notes,
        "n_parameters": backbone.n_parameters,
        "elements": list(backbone.elements),
        "r_max": backbone.r_max,
        "heads": list(backbone.heads),
        "head": backbone.head,
        "atomic_energies": backbone.atomic_energies,
        "config": backbone.config,
    }
    if as_json:
        print_json(values)
        return
    from ase.data import chemical_symbols
    from rich.markdown import Markdown

    console = out()
    energies = ", ".join(f"{chemical_symbols[z]} {e:.6f}" for z, e in sorted(backbone.atomic_energies.items()))
    shape = {k: backbone.config.get(k) for k in ("model", "hidden_irreps", "num_interactions", "correlation")}
    rows = [
        ("source", backbone.source),
        ("fingerprint", backbone.fingerprint),
        ("level of theory", backbone.level_of_theory),
        ("licence", backbone.licence),
        ("notes", backbone.notes),
        ("shape", ", ".join(f"{k} {v}" for k, v in shape.items() if v is not None)),
        ("parameters", backbone.n_parameters),
        ("elements", elements_text(backbone.elements)),
        ("cutoff", f"{backbone.r_max:g} Å"),
        ("heads", f"{', '.join(backbone.heads)} (chosen: {backbone.head})"),
        ("reference energies", f"{energies} (eV)"),
    ]
    console.print(pairs_table("backbone", backbone.name, rows))
    if backbone.trust_note:
        typer.echo(backbone.trust_note, err=True)
    if card := model_card(backbone.name):
        console.print(Markdown(card))


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A .model file, or a published name.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, NAME.safetensors.", show_default=False)
    ],
) -> None:
    """Write a backbone in the safe format. Opening a .model file runs code from it: convert only what you trust."""
    from mmea_calc.backbone import convert_backbone

    backbone = convert_backbone(source, output)
    typer.echo(f"{output} written, fingerprint {backbone.fingerprint[:FINGERPRINT_DIGITS]}")
