"""`mmea finetune`: labelled structures in, an adapter file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

# Options that are no field of AdapterConfig or TrainConfig; a --config file may hold them too.
OTHER_OPTIONS: dict[str, Any] = {
    "output": Path,
    "valid": Path,
    "test": Path,
    "backbone": str,
    "head": str,
    "recipe": str,
    "E0s": str | dict,
    "energy_key": str,
    "forces_key": str,
    "stress_key": str,
    "level_of_theory": str,
    "resume": bool,
    "check_md": bool,
    "init": Path,
    "devices": int,
    "committee": int,
    "sweep": tuple[str, ...],
    "jobs": int,
    "cluster": str,
    "slurm": tuple[str, ...],
}
DATA, MODEL, ABLATIONS, TRAINING = "Data", "Backbone and adapter", "Gate, for ablations", "Training"
SEVERAL = "Several trainings"


def finetune(
    train: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRAIN...",
            help="Labelled structures: extended xyz, ASE db or .traj. Several files are joined, such as one with "
            "isolated atoms. Or one .h5 file from mmea prepare.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Adapter file to write; TRAIN's name with .adapter if not given."),
    ] = None,
    valid: Annotated[
        Path | None, typer.Option(help="Structures that choose the best weights.", rich_help_panel=DATA)
    ] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Part of TRAIN set aside when --valid is not given.", rich_help_panel=DATA)
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Structures for the report at the end.", rich_help_panel=DATA)
    ] = None,
    energy_key: Annotated[
        str | None, typer.Option(help="Name of the energies; detected if not given.", rich_help_panel=DATA)
    ] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces.", rich_help_panel=DATA)] = None,
    stress_key: Annotated[str | None, typer.Option(help="Name of the stresses.", rich_help_panel=DATA)] = None,
    level_of_theory: Annotated[
        str | None,
        typer.Option(help="Of the labels, such as PBE/def2-SVP; kept in the file.", rich_help_panel=DATA),
    ] = None,
    E0s: Annotated[
        str | None,
        typer.Option(
            "--E0s",
            help="Reference energies: isolated, estimated, average, a YAML or JSON file, or a mapping such as "
            "'{1: -13.6, 6: -1029.1}' in eV.",
            rich_help_panel=DATA,
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Name (see mmea backbone list) or path.", rich_help_panel=MODEL)
    ] = None,
    head: Annotated[str | None, typer.Option(help="Head of a backbone with several.", rich_help_panel=MODEL)] = None,
    method: Annotated[
        str | None, typer.Option(help="mmea, gates, elora, sparse, full, ...", rich_help_panel=MODEL)
    ] = None,
    gate_rank: Annotated[int | None, typer.Option(help="Rank of the gates.", rich_help_panel=MODEL)] = None,
    low_rank: Annotated[int | None, typer.Option(help="Rank of the weight updates.", rich_help_panel=MODEL)] = None,
    phi: Annotated[
        Literal["exp", "residual"] | None, typer.Option(help="Gain of orders l >= 1.", rich_help_panel=MODEL)
    ] = None,
    nonlinearity: Annotated[
        bool | None,
        typer.Option(
            "--nonlinearity/--no-nonlinearity", help="SiLU in the gates' bottlenecks.", rich_help_panel=ABLATIONS
        ),
    ] = None,
    separate_bottlenecks: Annotated[
        bool | None,
        typer.Option(
            "--separate-bottlenecks/--no-separate-bottlenecks",
            help="A bottleneck for each head of a gate.",
            rich_help_panel=ABLATIONS,
        ),
    ] = None,
    shift: Annotated[
        bool | None, typer.Option("--shift/--no-shift", help="Shift of even scalars.", rich_help_panel=ABLATIONS)
    ] = None,
    gains: Annotated[
        Literal["channel", "order", "none"] | None,
        typer.Option(help="One gain per channel, per order, or none.", rich_help_panel=ABLATIONS),
    ] = None,
    init_std: Annotated[
        float | None, typer.Option(help="Spread of the gates' first weights at the start.", rich_help_panel=MODEL)
    ] = None,
    saturate: Annotated[
        bool | None,
        typer.Option(
            "--saturate/--no-saturate",
            help="Outside the range seen in training: level gates off, fade radial functions back.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Named settings to start from: paper, ...", rich_help_panel=TRAINING)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training set.", min=1, rich_help_panel=TRAINING)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Structures per step.", rich_help_panel=TRAINING)] = None,
    replay: Annotated[
        int | None,
        typer.Option(
            help="Other molecules mixed into every epoch, labelled by the backbone itself: against forgetting.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    energy_weight: Annotated[float | None, typer.Option(help="Of the energy loss.", rich_help_panel=TRAINING)] = None,
    forces_weight: Annotated[float | None, typer.Option(help="Of the forces loss.", rich_help_panel=TRAINING)] = None,
    stress_weight: Annotated[
        float | None, typer.Option(help="Of the stress loss, where there are stresses.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of splits, shuffling and initial values.", rich_help_panel=TRAINING)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=TRAINING)] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Processes that train together on this machine, one per GPU or CPU core; torchrun starts them on "
            "several machines.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float64"] | None, typer.Option(help="Precision.", rich_help_panel=TRAINING)
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile training steps to machine code: takes minutes once, for long trainings.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Adapter to start from, of the same backbone and form.", rich_help_panel=MODEL),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with option names as keys; options of the command line override it.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume", help="Continue the run of the same output file.", rich_help_panel=TRAINING),
    ] = None,
    committee: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Train N adapters that differ in their seeds, in one batch.", rich_help_panel=SEVERAL
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SETTING=VALUE,VALUE...",
            help="Train every combination, such as --sweep gate_rank=8,16 lr=0.01,0.003.",
            rich_help_panel=SEVERAL,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Trainings at a time, each by itself; 1 if not given, a committee in one batch.",
            rich_help_panel=SEVERAL,
        ),
    ] = None,
    cluster: Annotated[
        Literal["slurm", "local"] | None,
        typer.Option(help="Submit the trainings with submitit (pip install 'mmea\\[slurm]').", rich_help_panel=SEVERAL),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE...",
            help="Of submitit's executor, such as --slurm slurm_partition=gpu timeout_min=600.",
            rich_help_panel=SEVERAL,
        ),
    ] = None,
    check_md: Annotated[
        bool | None,
        typer.Option(
            "--check-md",
            help="Then run short dynamics at 300, 600 and 1200 K; the verdict goes into the file.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
) -> None:
    """Fine-tune a backbone on labelled structures and write an adapter file."""
    flags = {k: v for k, v in locals().items() if k not in ("train", "config")}
    from .finetune_run import run
    from .launch import run_together
    from .settings import resolve

    flags |= {name: tuple(flags[name]) if flags[name] else None for name in ("sweep", "slurm")}
    settings = resolve(flags, config, OTHER_OPTIONS)
    if settings.options["sweep"] or settings.options["committee"] is not None:
        from .settings import read_config
        from .sweep import train_several

        written = read_config(config, OTHER_OPTIONS) if config is not None else {}
        train_several(train, settings, {**written, **{k: v for k, v in flags.items() if v is not None}})
        return
    if alone := [name for name in ("jobs", "cluster", "slurm") if settings.options[name] is not None]:
        raise typer.BadParameter(f"--{alone[0]} is for several trainings: give --sweep or --committee with it")
    run_together(
        settings.options["devices"],
        settings.training.device,
        lambda team, own: run(train, settings.on(own), team),
    )
