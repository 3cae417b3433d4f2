"""`mmea pretrain`: make a backbone of one's own, by the whole recipe of the embedded ones or step by step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import say
from .options import TRAINING, Compile, OwnDevice
from .several import any_word, is_setting, several_values

app = typer.Typer(help="Make a backbone of one's own.", no_args_is_help=True)

LABELLING, SETS = "Geometries and labels", "Sets"

Out = Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.")]
Data = Annotated[Path, typer.Option(help="Folder with train-*.npz, valid*.npz, e0.json, level.txt.")]
Broad = Annotated[Path, typer.Option(help="Folder with train-*.npz to take structures from.")]
Cheap = Annotated[Path, typer.Option(help="Folder of the set at the cheap level.")]
Skip = Annotated[list[Path] | None, typer.Option(metavar="FILE...", help="Sets whose structures are left out.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]


def _counts(found: dict[str, int]) -> None:
    for name, count in found.items():
        say(f"{name}: {count} structures")


@app.command(rich_help_panel=TRAINING)
def recipe(
    data: Annotated[Path, typer.Option(help="Set at the wanted level, labels of the cheap one beside: data/pbe.")],
    cheap: Cheap,
    out: Out,
    name: Annotated[str, typer.Option(help="Of the backbone.")],
    start: Annotated[
        str | None, typer.Option(help="Backbone of the broad stage, name or path; the default one if not given.")
    ] = None,
    difference_start: Annotated[
        str | None, typer.Option(help="Backbone at the cheap level, or an earlier network of differences.")
    ] = None,
    difference_scale: Annotated[
        float | None, typer.Option(help="Of its readouts at first; 1 for a network of differences.")
    ] = None,
    n_broad: Annotated[
        int | None, typer.Option(help="Structures of the broad stage; 90,000 if not given.", min=1)
    ] = None,
    n_mixed: Annotated[
        int | None, typer.Option(help="Structures of the last stage; 10,700 if not given.", min=1)
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Widen the start to so many channels first.", min=1)] = None,
    minutes_difference: Annotated[
        float | None, typer.Option(help="Of the network of differences; 14 if not given.", min=0)
    ] = None,
    minutes_broad: Annotated[float | None, typer.Option(help="Of the broad stage; 70 if not given.", min=0)] = None,
    minutes_last: Annotated[float | None, typer.Option(help="Of the last stage; 11 if not given.", min=0)] = None,
    lr: Annotated[float | None, typer.Option(help="Of the broad stage; 0.0025 if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of every stage, in the place of minutes.", min=0)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Structures per step; 8 if not given.", min=2)] = None,
    seed: Annotated[int | None, typer.Option(help="Of draws and orders.")] = None,
    device: OwnDevice = None,
    compile: Compile = None,
) -> None:
    """Make a backbone by the recipe of the embedded ones, from end to end; the same command resumes."""
    given = {key: value for key, value in locals().items() if value is not None}
    from mmea_calc.pretrain.recipe import RecipeConfig, make_backbone

    config = RecipeConfig(**{f.name: given[f.name] for f in fields(RecipeConfig) if f.name in given})
    say(str(make_backbone(better=data, cheap=cheap, out=out, name=name, config=config, progress=say)))


@app.command(cls=several_values({"--set": is_setting}), rich_help_panel=TRAINING)
def train(
    data: Data,
    out: Out,
    name: Annotated[str, typer.Option(help="Of the backbone.")],
    start: Annotated[str | None, typer.Option(help="Backbone to start from; random weights if not given.")] = None,
    walls: Annotated[Path | None, typer.Option(help="File of `walls`: one structure of every batch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/resume.pt.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Length of the run.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="In the place of minutes.", min=0)] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    energy_weight: Annotated[float | None, typer.Option(help="Of the energy per atom.")] = None,
    late_energy_weight: Annotated[float | None, typer.Option(help="The same, in the last 30 %.")] = None,
    readout_scale: Annotated[float | None, typer.Option(help="What the start's readouts are multiplied by.")] = None,
    zbl: Annotated[bool | None, typer.Option("--zbl", help="Add mace's pair repulsion to the network.")] = None,
    compile: Compile = None,
    device: OwnDevice = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE...", help="Other fields of `PretrainConfig`.")
    ] = None,
) -> None:
    """Train one stage; time-boxed and resumable."""
    given = {key: value for key, value in locals().items() if value is not None}
    from mmea_calc.pretrain.train import PretrainConfig, pretrain

    chosen = {f.name: given[f.name] for f in fields(PretrainConfig) if f.name in given} | _named(settings or [])
    config = PretrainConfig(**chosen)
    made = pretrain(
        data=data, out=out, name=name, start=start, walls=walls, resume=resume, settings=config, progress=say
    )
    say(str(made))


def _named(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE as fields of PretrainConfig."""
    from typing import get_type_hints

    from mmea_calc.pretrain.train import PretrainConfig
    from mmea_calc.setting_values import from_text

    types, found = get_type_hints(PretrainConfig), {}
    for word in words:
        key, _, text = word.partition("=")
        key = key.replace("-", "_")
        if key not in types:
            raise typer.BadParameter(f"{key}: known are {', '.join(types)}", param_hint="'--set'")
        try:
            found[key] = from_text(text, types[key])
        except ValueError as problem:
            raise typer.BadParameter(f"{key} {problem}", param_hint="'--set'") from problem
    return found


@app.command(rich_help_panel=TRAINING)
def average(
    stages: Annotated[list[Path], typer.Argument(metavar="STAGE.safetensors...", help="Two or more.")], out: Out
) -> None:
    """Write the mean of the weights of several stages."""
    from mmea_calc.pretrain.average import average

    say(average(stages, out))


@app.command(rich_help_panel=TRAINING)
def widen(
    start: Annotated[str, typer.Argument(metavar="BACKBONE", help="Name or path.")],
    channels: Annotated[int, typer.Option(help="Of every order in the wider network.", min=1)],
    out: Annotated[Path, typer.Option("--out", "-o", help=".safetensors file to write.")],
    seed: Annotated[int, typer.Option(help="Of the weights of the added channels.")] = 0,
) -> None:
    """Write a network of more channels with the same energies and forces, for `train --start`."""
    from mmea_calc.pretrain.widen import widen

    say(widen(start, channels, out, seed=seed))


@app.command(rich_help_panel=TRAINING)
def report(
    backbone: Annotated[str, typer.Argument(help="Name or path.")],
    data: Annotated[Path, typer.Option(help="Folder with valid*.npz and references.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Files to write, without endings.")],
    references: Annotated[Path | None, typer.Option(help="DATA/references.json if not given.")] = None,
    md_ps: Annotated[float, typer.Option(help="Dynamics of ten larger molecules at 300 and 600 K, ps.", min=0)] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Tell what a backbone is like: errors, walls, vibrations, dynamics; json and plots."""
    from mmea_calc.pretrain.soundness import measure_soundness, write_soundness

    found = measure_soundness(backbone, data=data, references=references, md_ps=md_ps, device=device, progress=say)
    for name, value in found.figures().items():
        say(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    say(" ".join(str(path) for path in write_soundness(found, out)))


@app.command(cls=several_values({"--skip": any_word}), rich_help_panel=LABELLING)
def choose(
    data: Broad,
    by: Annotated[tuple[str, str], typer.Option(metavar="POTENTIAL POTENTIAL", help="Two adapters or backbones.")],
    out: Out,
    pool: Annotated[int, typer.Option(help="Structures that are compared.", min=1)] = 4000,
    min_heavy: Annotated[int, typer.Option(help="Smallest number of heavy atoms.", min=0)] = 3,
    max_heavy: Annotated[int, typer.Option(help="Largest number of heavy atoms.", min=1)] = 12,
    skip: Skip = None,
) -> None:
    """Choose the structures on which two potentials disagree, for `label --order`."""
    from mmea_calc.md import open_potential
    from mmea_calc.pretrain.choose import choose

    one, other = (open_potential(name) for name in by)
    count = choose(
        data=data,
        by=(one, other),
        out=out,
        pool=pool,
        min_heavy=min_heavy,
        max_heavy=max_heavy,
        skip=skip or [],
        progress=say,
    )
    say(f"{out}: {count} structures")


@app.command(rich_help_panel=LABELLING)
def sample(
    by: Annotated[str, typer.Option(metavar="POTENTIAL", help="Adapter or backbone that moves them.")],
    out: Out,
    seed: Seed = 0,
) -> None:
    """Take frames of dynamics of small molecules and of pairs, for `label --data`."""
    from mmea_calc.md import open_potential
    from mmea_calc.pretrain.sample import sample

    say(f"{out}: {sample(open_potential(by), out=out, seed=seed, progress=say)} structures")


@app.command(rich_help_panel=LABELLING)
def small(out: Out, seed: Seed = 0) -> None:
    """Make very small molecules, pairs and clusters by GFN2-xTB, for `label --data`."""
    from mmea_calc.pretrain.small import small

    say(f"{out}: {small(out=out, seed=seed, progress=say)} structures")


@app.command(rich_help_panel=LABELLING)
def chelates(
    out: Out,
    enols: Annotated[int, typer.Option(help="Molecules D-CR=CR-CR=A that are drawn.", min=0)] = 300,
    max_heavy: Annotated[int, typer.Option(help="Largest number of their heavy atoms.", min=5)] = 7,
    seed: Seed = 0,
) -> None:
    """Make molecules with a hydrogen bond within themselves by GFN2-xTB, for `label --data`."""
    from mmea_calc.pretrain.chelates import chelates

    count = chelates(out=out, enols=enols, max_heavy=max_heavy, seed=seed, progress=say)
    say(f"{out}: {count} structures")


@app.command(rich_help_panel=LABELLING)
def carbonyls(
    out: Out,
    by: Annotated[
        str | None, typer.Option(metavar="POTENTIAL", help="Adapter or backbone that moves them, not GFN2-xTB.")
    ] = None,
    drawn: Annotated[int, typer.Option(help="Molecules that are drawn.", min=1)] = 600,
    max_heavy: Annotated[int, typer.Option(help="Largest number of their heavy atoms.", min=3)] = 11,
    seed: Seed = 0,
) -> None:
    """Make chains, rings and aromatic molecules with carbonyl groups by GFN2-xTB, for `label --data`."""
    from mmea_calc.md import open_potential
    from mmea_calc.pretrain.carbonyls import carbonyls

    potential = open_potential(by) if by else None
    count = carbonyls(out=out, by=potential, drawn=drawn, max_heavy=max_heavy, seed=seed, progress=say)
    say(f"{out}: {count} structures")


@app.command(cls=several_values({"--skip": any_word}), rich_help_panel=LABELLING)
def label(
    data: Broad,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of one file per structure.")],
    worker: Annotated[int, typer.Option(help="Number of this process, from 0.", min=0)] = 0,
    of: Annotated[int, typer.Option(help="Processes that share the work.", min=1)] = 1,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after so many structures.", min=0)] = None,
    max_heavy: Annotated[int, typer.Option(help="Largest number of heavy atoms.", min=1)] = 7,
    skip: Skip = None,
    order: Annotated[Path | None, typer.Option(help="Structures to label: a file of `choose` or `sample`.")] = None,
    first_index: Annotated[int, typer.Option(help="Added to the numbers of the structures.", min=0)] = 0,
    grid: Annotated[int, typer.Option(help="PySCF's grid level; 1 takes half the time.", min=1, max=3)] = 3,
    atoms: Annotated[bool, typer.Option("--atoms", help="Isolated atoms instead: writes OUT/e0.json.")] = False,
) -> None:
    """Label structures at PBE/def2-SVP with PySCF, one file each; resumable."""
    from mmea_calc.pretrain import label as labelling

    if atoms:
        say(str(labelling.label_atoms(out)))
        return
    labelling.label(
        data=data,
        out=out,
        worker=worker,
        of=of,
        minutes=minutes,
        limit=limit,
        max_heavy=max_heavy,
        skip=skip or [],
        order=order,
        first_index=first_index,
        grid=grid,
        progress=say,
    )


@app.command(rich_help_panel=LABELLING)
def references(out: Annotated[Path, typer.Option("--out", "-o", help=".json file; what is in it is kept.")]) -> None:
    """Make geometries, vibrations, a torsion and a dimer at PBE/def2-SVP, for `report`."""
    from mmea_calc.pretrain.references import make_references

    say(f"{make_references(out, progress=say)} items")


@app.command(rich_help_panel=SETS)
def pack(
    raw: Annotated[Path, typer.Argument(help="Folder that `label` filled.")],
    out: Out,
    e0: Annotated[Path | None, typer.Option(help="Energies of isolated atoms; RAW/e0.json if not given.")] = None,
    valid_fraction: Annotated[float, typer.Option(help="Set aside for validation.", min=0, max=1)] = 0.1,
    number: Annotated[int, typer.Option(help="1 and more: train-1.npz and valid-1.npz, and so on.", min=0)] = 0,
    xtb: Annotated[bool, typer.Option("--xtb", help="Keep GFN2-xTB's energies and forces beside.")] = False,
) -> None:
    """Pack labelled structures: train-0.npz, valid.npz, e0.json, level.txt."""
    from mmea_calc.pretrain.label import pack

    _counts(pack(raw, out=out, e0=e0, valid_fraction=valid_fraction, number=number, xtb=xtb))


@app.command(rich_help_panel=SETS)
def unpack(data: Annotated[Path, typer.Argument(help="Folder of a packed set.")], out: Out) -> None:
    """Unpack a set: train.xyz, with isolated atoms, and valid.xyz."""
    from mmea_calc.pretrain.unpack import unpack

    _counts(unpack(data, out=out))


@app.command(rich_help_panel=SETS)
def pool(
    sets: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Packed sets that are taken whole.")],
    broad: Annotated[Path, typer.Option(help="Packed set that some more are drawn from.")],
    out: Out,
    number: Annotated[int, typer.Option(help="How many are drawn.", min=0)] = 500,
    seed: Seed = 0,
) -> None:
    """Collect the molecules that fine-tuning replays."""
    from mmea_calc.pretrain.pool import pool

    say(f"{out}: {pool(sets, broad=broad, out=out, number=number, seed=seed)} structures")


@app.command(rich_help_panel=SETS)
def walls(data: Data, cheap: Cheap, out: Out) -> None:
    """Make pairs of atoms alone from their bond inwards, for all pairs of elements."""
    from mmea_calc.pretrain.walls import walls

    say(f"{out}: {walls(data=data, cheap=cheap, out=out)} structures")


@app.command(rich_help_panel=SETS)
def differences(data: Data, cheap: Cheap, out: Out) -> None:
    """Subtract the cheap level's labels from the better ones, of a set that was packed with --xtb."""
    from mmea_calc.pretrain.relabel import differences

    _counts(differences(data=data, cheap=cheap, out=out))


@app.command(rich_help_panel=SETS)
def relabel(
    data: Broad,
    by: Annotated[str, typer.Option(metavar="BACKBONE", help="Trained on differences.")],
    beside: Annotated[Path, typer.Option(help="Folder of the set at the better level.")],
    out: Out,
    number: Annotated[int, typer.Option(help="Structures that are drawn.", min=1)] = 30000,
    seed: Seed = 0,
) -> None:
    """Bring a broad, cheap set nearly to the better level."""
    from mmea_calc.md import open_potential
    from mmea_calc.pretrain.relabel import relabel

    count = relabel(data=data, by=open_potential(by), beside=beside, out=out, number=number, seed=seed, progress=say)
    say(f"{out}: {count} structures relabelled")
