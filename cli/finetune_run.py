"""What `mmea finetune` does in each process: read, report, train, conclude."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ase import Atoms

    from mmea_calc.backbone import Backbone
    from mmea_calc.data.dataset import Dataset
    from mmea_calc.data.preflight import PreflightReport
    from mmea_calc.training.finetuning import FinetuneResult
    from mmea_calc.training.team import Team

    from .settings import Settings


def run(train_files: list[Path], settings: Settings, team: Team) -> None:
    """Train one adapter in this process, one of the team's, and tell what happens.

    Args:
        train_files: as given.
        settings: everything else that was asked for.
        team: processes that train together; the first one tells.

    Raises:
        MMEAError: of any kind, see `mmea_calc.training.finetuning`; also where training did not help, or where dynamics
            that were asked for fail.
    """
    from mmea_calc.adapter_file import backbone_for
    from mmea_calc.training.finetuning import finetune as train_adapter

    from .console import out
    from .machine import warn_if_busy
    from .progress import TrainingDisplay

    options, training = settings.options, settings.training
    output: Path = options["output"] or Path(train_files[0].stem + ".adapter")
    _check_options(settings)
    _check_output(output, resume=bool(options["resume"]), tells=team.leads)
    if team.leads:
        warn_if_busy(training.device)
    train, valid, test = read_sets(train_files, options)
    backbone = backbone_for(
        options["backbone"], options["init"], head=options["head"], device=training.device, dtype=training.dtype
    )
    _introduce(backbone)
    report = show_report(train, valid, test, backbone)
    _count(backbone, settings)
    try:
        with TrainingDisplay(out()) as display:
            result = train_adapter(
                train,
                output,
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
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on with --resume") from None
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


def _check_output(output: Path, *, resume: bool, tells: bool) -> None:
    """What an earlier training of this name has left is not lost without a word."""
    from mmea_calc.adapter_file import named_after
    from mmea_calc.errors import TrainingError
    from mmea_calc.files import check_no_folder
    from mmea_calc.training.run_folder import RunFolder

    from .console import say

    check_no_folder(output)
    folder = named_after(output, ".run")
    if resume:
        return
    checkpoint = RunFolder(folder).checkpoint
    # The adapter is written after the last checkpoint: an older one is of a training before.
    if checkpoint.exists() and not (output.exists() and output.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns):
        raise TrainingError(
            f"{folder} is of a training that did not end: go on with --resume, give another --output, or remove it"
        )
    if output.exists() and tells:
        say(f"note: {output} is there already, and is replaced when this training ends")


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


def read_sets(train_files: list[Path], options: dict[str, Any]) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Training, validation and test structures; MMEAError where a file is not what it should be."""
    from mmea_calc.data.prepared import is_prepared, open_dataset

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


def show_report(train: Dataset, valid: Dataset | None, test: Dataset | None, backbone: Backbone) -> PreflightReport:
    """Show keys, the report on the data as a table, and what is doubtful."""
    from mmea_calc.data.preflight import preflight

    from .console import out, say_doubts, table

    report = preflight(train, valid, test, backbone_elements=backbone.elements, r_max=backbone.r_max)
    out().print(table(["Data", *report.columns[1:]], report.rows))
    say_doubts(report.notes, report.warnings)
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
    before, after = result.zero_shot["valid"], result.fine_tuned["valid"]
    if after.energy_mae_meV > before.energy_mae_meV:  # false for NaN: no energies
        say(
            f"warning: energies have become worse, {before.energy_mae_meV:.1f} -> {after.energy_mae_meV:.1f} meV: "
            "train longer, or give a larger --energy-weight",
            style="yellow",
        )
    if not result.improved:
        raise TrainingError(
            "the fine-tuned weights are no better on the validation set than before training: train longer, lower "
            "--lr, or look at the warnings on the data and the reference energies"
        )
