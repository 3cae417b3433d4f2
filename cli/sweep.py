"""`mmea finetune --sweep` and `--committee`: several trainings, and one table of what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mmea_calc.training.sweep import Outcome, Point

    from .settings import Settings

_KEYS = ("energy_key", "forces_key", "stress_key")
_TAKEN = ("valid", "test", "backbone", "head", "init", "E0s", "level_of_theory", *_KEYS)
_SINGLE = ("devices", "check_md")


def train_several(train: list[Path], settings: Settings, given: Mapping[str, Any]) -> None:
    """Train a committee or a sweep.

    Args:
        train: files.
        settings: of a single training.
        given: settings that the user named, before recipes and defaults.

    Raises:
        typer.BadParameter: options that do not go together.
        typer.Exit: some trainings have failed; the table says which.
    """
    from mmea_calc.training.sweep import train_all, write_table

    from .console import say

    points, folder, table_file = _points(train, settings, given)
    options = settings.options
    _check(points[0])
    if options["sweep"] or options["cluster"]:
        folder.mkdir(parents=True, exist_ok=True)
    outcomes = train_all(
        points,
        jobs=options["jobs"] or 1,
        one_batch=options["committee"] is not None and options["jobs"] is None,
        cluster=options["cluster"],
        cluster_options=_cluster_options(options["slurm"] or ()),
        folder=folder,
        told=_told,
    )
    write_table(table_file, outcomes)
    _show(outcomes, points, table_file)
    if options["committee"] is not None and not any(o.reason for o in outcomes):
        names = ", ".join(f'"{p.output}"' for p in points)
        typer.echo(f"a committee: MMEACalculator([{names}])")
    if worse := [o.name for o in outcomes if o.improved is False]:
        say(f"no better on their validation sets than before training: {', '.join(worse)}", style="yellow")
    if failed := sum(bool(o.reason) for o in outcomes):
        typer.echo(f"mmea: {failed} of {len(outcomes)} trainings failed, for the reasons above", err=True)
        raise typer.Exit(1)
    if worse and (options["committee"] is not None or len(worse) == len(outcomes)):
        typer.echo("mmea: train longer, lower --lr, or look at the warnings on the data", err=True)
        raise typer.Exit(1)


def _points(train: list[Path], settings: Settings, given: Mapping[str, Any]) -> tuple[list[Point], Path, Path]:
    """What to train, the folder of the sweep, and the file of the table."""
    from mmea_calc.adapter_file import named_after
    from mmea_calc.training.sweep import Point, committee, grid

    options = settings.options
    if options["sweep"] and options["committee"] is not None:
        raise typer.BadParameter("give one of --sweep and --committee; a sweep over seed=0,1,2 varies the seed too")
    if options["slurm"] and not options["cluster"]:
        raise typer.BadParameter("--slurm is of trainings that are submitted: give --cluster slurm with it")
    if wrong := [name for name in _SINGLE if options[name]]:
        raise typer.BadParameter(f"--{wrong[0].replace('_', '-')} is for a single training")
    taken = {name: options[name] for name in _TAKEN}
    output, stem = options["output"], Path(train[0].stem)
    if options["sweep"]:
        folder = output or Path(f"{stem}.sweep")
        if folder.suffix == ".adapter":
            raise typer.BadParameter(f"a sweep writes several adapters: {folder} should be a folder's name")
        form = settings.adapter.form() if options["init"] else {}  # that of the adapter to start from
        common = {**form, **given, "device": settings.training.device}
        return grid(options["sweep"], common, folder=folder, train=train, options=taken), folder, folder / "sweep.csv"
    output = output or Path(f"{stem}.adapter")
    name = output.name.removesuffix(".adapter")
    one = Point(name, {}, settings.adapter, settings.training, output, tuple(train), taken)
    table_file = named_after(output, ".committee.csv")
    return committee(options["committee"], one), named_after(output, ".committee"), table_file


def _check(point: Point) -> None:
    """Files that are wrong are wrong for all points: the report on them comes before the first is started."""
    from mmea_calc.adapter_file import backbone_for

    from .finetune_run import read_sets, show_report

    options = point.options
    backbone = backbone_for(options["backbone"], options["init"], head=options["head"], device="cpu")
    show_report(*read_sets(list(point.train), point.options), backbone)


def _cluster_options(words: Sequence[str]) -> dict[str, Any]:
    """`partition=gpu time=60` -> what submitit's executor takes."""
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise typer.BadParameter(
                f"expected name=value, such as slurm_partition=gpu, got {word!r}", param_hint="'--slurm'"
            )
        found[name] = yaml.safe_load(value)
    return found


def _told(outcome: Outcome) -> None:
    from .console import say
    from .progress import duration

    if outcome.reason:
        say(f"{outcome.name}: failed: {outcome.reason}", style="red")
        return
    pairs = ((outcome.energy_mae_meV, "meV"), (outcome.forces_mae_meV_per_A, "meV/Å"))
    figures = " and ".join(f"{value:.1f} {unit}" for value, unit in pairs if value is not None)
    say(f"{outcome.name}: validation MAE {figures}, trained in {duration(outcome.seconds)}")


def _show(outcomes: Sequence[Outcome], points: Sequence[Point], file: Path) -> None:
    from mmea_calc.training.sweep import ranked

    from .console import out, plain, say, table

    varied = list(points[0].varied)
    columns = [*varied, "energy (meV)", "energy (meV/atom)", "forces (meV/Å)", "parameters", "min"]
    rows = [
        (
            *(plain(o.varied[name]) for name in varied),
            o.energy_mae_meV,
            o.energy_mae_meV_per_atom,
            o.forces_mae_meV_per_A,
            o.parameters,
            None if o.seconds is None else o.seconds / 60,
        )
        for o in ranked(outcomes)
    ]
    if (one := next((o for o in outcomes if not o.reason), None)) is not None:
        nothing = ("",) * max(0, len(varied) - 1)
        errors = (
            one.backbone_energy_mae_meV,
            one.backbone_energy_mae_meV_per_atom,
            one.backbone_forces_mae_meV_per_A,
        )
        rows.append(("backbone alone", *nothing, *errors, None, None))
    out().print(table(columns, rows, title="MAE on the validation set, best first"))
    say(f"the table is in {file}, the adapters in {points[0].output.parent}")
