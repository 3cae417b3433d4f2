"""`mmea evaluate`: errors on labelled structures, of an adapter beside its bare backbone, or of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from mmea_calc.config import Precision
    from mmea_calc.data.dataset import Dataset
    from mmea_calc.evaluation import Evaluation
    from mmea_calc.potential import Potential

LABELS = {"adapter": "adapter", "backbone": "backbone alone"}


def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An .adapter file, or name or path of a backbone.", show_default=False),
    ],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Labelled structures.", show_default=False)],
    backbone: Annotated[
        str | None, typer.Option(help="Name or path of the adapter's backbone, if it is not found by itself.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Parity plot to write (.png, .pdf, .svg).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Structures per call of the network.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[Literal["float32", "float64"] | None, typer.Option(help="Precision.")] = None,
    energy_key: Annotated[str | None, typer.Option(help="Name of the energies; detected if not given.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces.")] = None,
    stress_key: Annotated[str | None, typer.Option(help="Name of the stresses.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Errors of energies, forces and stresses: overall, by config_type and element, adapter beside bare backbone."""
    from mmea_calc.data.reading import read_dataset
    from mmea_calc.plots import check_picture

    from .console import print_json

    check_picture(plot)
    dataset = read_dataset(test, energy_key=energy_key, forces_key=forces_key, stress_key=stress_key)
    potential = _potential(adapter, backbone, device, dtype)
    evaluation = _evaluate(potential, dataset, batch_size)
    if plot is not None:
        from mmea_calc.plots import parity

        parity(evaluation.parity(), plot, title=f"{Path(adapter).name} on {dataset.name}")
    if as_json:
        print_json({"adapter_file": adapter if evaluation.adapter else None, **evaluation.to_dict()})
        return
    _print(evaluation, dataset, adapter)
    if plot is not None:
        typer.echo(f"{plot} written")


def _potential(adapter: str, backbone: str | None, device: str | None, dtype: Precision | None) -> Potential:
    """The adapter on its backbone, or a backbone. Options that were not given keep the defaults of training."""
    from mmea_calc.config import TrainConfig
    from mmea_calc.md import open_potential

    defaults = TrainConfig()
    return open_potential(adapter, backbone=backbone, device=device or defaults.device, dtype=dtype or defaults.dtype)


def _evaluate(potential: Potential, dataset: Dataset, batch_size: int | None) -> Evaluation:
    """Under a bar on standard error, which leaves standard output to the results."""
    from rich.console import Console
    from rich.progress import Progress

    from mmea_calc.evaluation import evaluate as measure

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if batch_size is None:
            return measure(potential, dataset, progress=progress)
        return measure(potential, dataset, batch_size=batch_size, progress=progress)


def _print(evaluation: Evaluation, dataset: Dataset, adapter: str) -> None:
    from mmea_calc.data.unit_checks import unit_warnings

    from .console import out, say, say_doubts, table

    alone = evaluation.adapter is None
    say(f"{adapter} on {dataset.name}" + ("" if alone else f", backbone {evaluation.backbone_name}"))
    if dataset.keys:
        say("labels: " + ", ".join(f"{name} from {key}" for name, key in dataset.keys.items() if key))
    counts = dataset.counts
    fewer = {k: n for k, n in counts.items() if n < len(dataset) and (k in ("energy", "forces") or n)}
    measured = [
        f"{n} of {len(dataset)} structures have a label for {name}, and are measured" for name, n in fewer.items()
    ]
    say_doubts([*dataset.notes, *measured], unit_warnings(dataset.structures))
    groups = [("all", {model.label: model.overall for model in evaluation.models})]
    types = evaluation.backbone.by_config_type
    if len(types) > 1:
        groups += [(name, {m.label: m.by_config_type[name] for m in evaluation.models}) for name in types]
    rows: list[tuple[Any, ...]] = []
    for name, by_model in groups:
        for label, errors in by_model.items():
            energy, forces = errors.energy, errors.forces
            rows.append(
                (
                    name,
                    errors.n_structures,
                    LABELS[label],
                    *(energy.mae_meV, energy.rmse_meV, energy.mae_meV_per_atom, energy.rmse_meV_per_atom),
                    *(forces.mae_meV_per_A, forces.rmse_meV_per_A),
                    *((errors.stress.mae_meV_per_A3, errors.stress.rmse_meV_per_A3) if counts["stress"] else ()),
                )
            )
    quantities = [("E", "meV"), ("E", "meV/atom"), ("F", "meV/Å"), *([("S", "meV/Å³")] if counts["stress"] else [])]
    headings = [f"{letter} {measure}\n{unit}" for letter, unit in quantities for measure in ("MAE", "RMSE")]
    out().print(table(["config_type", "structures", "", *headings], rows))
    rows = []
    for symbol in evaluation.backbone.forces_by_element:
        for model in evaluation.models:
            of_element = model.forces_by_element[symbol]
            rows.append(
                (symbol, of_element.n_atoms, LABELS[model.label], of_element.mae_meV_per_A, of_element.rmse_meV_per_A)
            )
    if rows:
        out().print(table(["element", "atoms", "", "F MAE\nmeV/Å", "F RMSE\nmeV/Å"], rows))
    if alone:
        say("Energies are with the backbone's own reference energies.")
    elif evaluation.same_reference_energies:
        say("The backbone alone is given the adapter's reference energies.")
