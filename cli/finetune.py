"""`mmea finetune`: labelled structures in, an adapter file out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ase import Atoms

    from mmea_calc.backbone import Backbone
    from mmea_calc.dataset import Dataset
    from mmea_calc.finetuning import FinetuneResult
    from mmea_calc.preflight import PreflightReport
    from mmea_calc.team import Team

    from .settings import Settings

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
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", rich_help_panel=TRAINING)] = None,
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
        typer.Option(help="YAML file with option names as keys; flags go before it.", rich_help_panel=TRAINING),
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
        typer.Option(help="Submit the trainings with submitit (pip install 'mmea[slurm]').", rich_help_panel=SEVERAL),
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
    from .launch import run_together
    from .settings import resolve

    flags |= {name: tuple(flags[name]) if flags[name] else None for name in ("sweep", "slurm")}
    settings = resolve(flags, config, OTHER_OPTIONS)
    if settings.options["sweep"] or settings.options["committee"]:
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
        lambda team, own: _run(train, settings.on(own), team),
    )


def _run(train_files: list[Path], settings: Settings, team: Team) -> None:
    from mmea_calc.backbone import load_backbone
    from mmea_calc.config import DEFAULT_BACKBONE
    from mmea_calc.finetuning import finetune as train_adapter

    from .console import out
    from .machine import warn_if_busy
    from .progress import TrainingDisplay

    options, training = settings.options, settings.training
    _check_options(settings)
    if team.leads:
        warn_if_busy(training.device)
    train, valid, test = _read(train_files, options)
    backbone = load_backbone(
        options["backbone"] or DEFAULT_BACKBONE,
        head=options["head"],
        device=training.device,
        dtype=training.dtype,
    )
    _introduce(backbone)
    report = _report(train, valid, test, backbone)
    _count(backbone, settings)
    with TrainingDisplay(out()) as display:
        result = train_adapter(
            train,
            options["output"] or Path(train_files[0].stem + ".adapter"),
            valid=valid,
            test=test,
            backbone=backbone,
            adapter=settings.adapter,
            init=options["init"],
            training=training,
            E0s=options["E0s"],
            level_of_theory=options["level_of_theory"],
            report=report,
            resume=bool(options["resume"]),
            progress=display,
            team=team,
        )
    if not team.leads:
        return
    _conclude(result)
    if options["check_md"]:
        _check_dynamics(result.path, train.structures[0].atoms, settings)


def _check_options(settings: Settings) -> None:
    """Better known now than after the training."""
    from mmea_calc.errors import TrainingError
    from mmea_calc.methods import method_named

    name = settings.adapter.method
    if settings.options["check_md"] and not method_named(name).equivariant:
        raise TrainingError(f"method {name!r} is not equivariant, and dynamics refuses it: leave --check-md out")


def _check_dynamics(path: Path, start: Atoms, settings: Settings) -> None:
    """A short run from the first training structure; the verdict is printed and kept in the file's header."""
    from mmea_calc.adapter_file import read_adapter, update_adapter
    from mmea_calc.errors import TrainingError
    from mmea_calc.md import open_potential, quick_check

    from .console import out, say, table

    training = settings.training
    potential = open_potential(
        path, backbone=settings.options["backbone"], device=training.device, dtype=training.dtype
    )
    verdict = quick_check(potential, start)
    update_adapter(path, checks={**read_adapter(path).checks, "dynamics": verdict})
    columns = ["dynamics", "mean K", "stable ps", "gate excess", "adapted - bare (eV/Å)"]
    keys = ("replica", "temperature_K", "stable_ps", "gate_excess", "adapted_minus_bare_eV_per_A")
    out().print(table(columns, [tuple(row[key] for key in keys) for row in verdict["replicas"]]))
    for event in (text for row in verdict["replicas"] for text in row["events"]):
        say(event)
    if not verdict["passed"]:
        raise TrainingError(f"the dynamics check failed, see the events above; the verdict is in {path}")
    say(f"dynamics over {verdict['time_ps']:.3g} ps at 300, 600 and 1200 K: passed; the verdict is in {path}")


def _read(train_files: list[Path], options: dict[str, Any]) -> tuple[Dataset, Dataset | None, Dataset | None]:
    from mmea_calc.prepared import is_prepared, open_dataset

    keys = {name: options[name] for name in ("energy_key", "forces_key", "stress_key")}
    train = open_dataset(train_files, **keys)
    valid, test = (
        open_dataset([path], **({} if is_prepared(path) else keys)) if (path := options[name]) else None
        for name in ("valid", "test")
    )
    return train, valid, test


def _introduce(backbone: Backbone) -> None:
    from .console import FINGERPRINT_DIGITS, elements_text, say

    say(
        f"Backbone {backbone.name} (fingerprint {backbone.fingerprint[:FINGERPRINT_DIGITS]}), head {backbone.head}, "
        f"{backbone.level_of_theory or 'level of theory unknown'}; {elements_text(backbone.elements)}; "
        f"{str(backbone.dtype).removeprefix('torch.')} on {backbone.device}"
    )
    if backbone.trust_note:
        typer.echo(f"note: {backbone.trust_note}", err=True)


def _report(train: Dataset, valid: Dataset | None, test: Dataset | None, backbone: Backbone) -> PreflightReport:
    """Show keys, the report on the data as a table, and what is doubtful."""
    from mmea_calc.preflight import preflight

    from .console import out, say, table

    report = preflight(train, valid, test, backbone_elements=backbone.elements, r_max=backbone.r_max)
    out().print(table(["Data", *report.columns[1:]], report.rows))
    for note in report.notes:
        say(f"note: {note}")
    for warning in report.warnings:
        say(f"warning: {warning}", style="yellow")
    return report


def _count(backbone: Backbone, settings: Settings) -> None:
    """What will train. Attached only to be counted: an adapter that comes off leaves its network as it was."""
    from mmea_calc.adapted import attach

    from .console import say

    adapter = attach(backbone.network, settings.adapter, start=False)
    total, counts = adapter.n_parameters, adapter.counts()
    adapter.detach()
    kinds = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts.items())
    say(f"Method {settings.adapter.method} trains {total:,} parameters: {kinds}")


def _conclude(result: FinetuneResult) -> None:
    """Errors before and after, where the files are; a failure if training did not help."""
    from mmea_calc.errors import TrainingError

    from .console import out, say, table
    from .progress import duration

    rows = [
        (
            name,
            label,
            errors[name].energy_mae_meV,
            errors[name].energy_mae_meV_per_atom,
            errors[name].forces_mae_meV_per_A,
        )
        for name in result.zero_shot
        for label, errors in (
            ("backbone alone", result.zero_shot),
            ("adapter at the start", result.initial),
            ("fine-tuned", result.fine_tuned),
        )
        if errors
    ]
    columns = ["MAE", "", "energy (meV)", "energy (meV/atom)", "forces (meV/Å)"]
    out().print(table(columns, rows))
    size = result.path.stat().st_size / 1000
    say(
        f"{result.path} ({size:.0f} kB) holds the weights of epoch {result.best_epoch}, the best on validation; "
        f"trained in {duration(result.seconds)}; the log, settings and plots are in {result.run_dir}"
    )
    if not result.improved:
        raise TrainingError(
            "the fine-tuned weights are no better on the validation set than before training: train longer, lower "
            "--lr, or look at the warnings on the data and the reference energies"
        )
