"""`mmea info`: what an adapter file says about itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import FINGERPRINT_DIGITS, out, pairs_table, plain, print_json, show

if TYPE_CHECKING:
    from mmea_calc.adapter_file import AdapterFile

ERROR_UNITS = {
    "energy_mae_meV": "energy {} meV",
    "energy_mae_meV_per_atom": "{} meV/atom",
    "forces_mae_meV_per_A": "forces {} meV/Å",
}


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .adapter file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole header as JSON, for programs.")] = False,
) -> None:
    """Show the header of an adapter file: method, backbone, elements, data, settings, errors."""
    from mmea_calc.adapter_file import read_adapter

    adapter = read_adapter(file)
    if as_json:
        print_json(adapter.header())
    else:
        out().print(pairs_table("adapter", str(file), _rows(adapter, adapter.path or file)))


def _rows(adapter: AdapterFile, file: Path) -> Iterator[tuple[str, Any]]:
    header = adapter.header()
    yield "file", f"{file.stat().st_size / 1000:.1f} kB, format {header['format_version']}, {adapter.created}"
    yield "parameters", adapter.n_parameters
    yield "settings", _words(header["adapter"])
    yield from _marks(adapter)
    fingerprint = adapter.fingerprint[:FINGERPRINT_DIGITS]
    yield "backbone", f"{adapter.backbone}, head {adapter.head}, fingerprint {fingerprint}"
    yield "level of theory", adapter.level_of_theory
    yield "elements", list(header["elements"])
    energies = ", ".join(f"{symbol} {e:.6f}" for symbol, e in header["reference_energies"].items())
    yield "reference energies", f"{energies} eV ({adapter.reference_energies_method or 'origin unknown'})"
    for name in ("train", "valid"):
        if isinstance(used := adapter.data.get(name), Mapping):
            yield f"{name} data", _data(used)
    yield "training", _words({k: v for k, v in adapter.training.items() if k not in ("auto", "init")})
    if isinstance(start := adapter.training.get("init"), Mapping):
        yield "started from", f"adapter {start.get('name')}"
    if isinstance(decision := adapter.training.get("auto"), Mapping):
        yield "method auto", decision.get("why")
    yield from _errors(adapter.metrics)
    for name, verdict in adapter.checks.items():
        yield f"check of {name}", _verdict(verdict)
    if ranges := header["gate_ranges"]:
        low, high = min(r[0] for r in ranges.values()), max(r[1] for r in ranges.values())
        yield "gate ranges", f"{low:.3g} to {high:.3g} over {len(ranges)} gates in training"
    yield "units", _words(header["units"])
    yield "versions", _words(header["versions"])
    yield "", "--json shows everything"


def _marks(adapter: AdapterFile) -> Iterator[tuple[str, str]]:
    """What a user must know of the method."""
    from mmea_calc.methods import METHODS

    method = METHODS.get(adapter.config.method)
    if method is not None and not method.equivariant:
        yield "symmetry", "not equivariant: energies change when a structure is turned; a baseline, not for dynamics"


def _errors(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One row per data set and model."""
    names = {"zero_shot": "backbone alone", "initial": "adapter at the start", "fine_tuned": "fine-tuned"}
    sets = dict.fromkeys(s for k in names for s in (metrics.get(k) or {}))
    for data in sets:
        for key, label in names.items():
            errors = (metrics.get(key) or {}).get(data) or {}
            parts = [text.format(show(errors[k])) for k, text in ERROR_UNITS.items() if errors.get(k) is not None]
            if parts:
                yield f"MAE {data}, {label}", ", ".join(parts)
    if sparsity := metrics.get("sparsity"):
        parts = [
            f"{key if key == 'radial' else f'l = {key}'} {value:.1%}" for key, value in sparsity["by_order"].items()
        ]
        yield "left unchanged", f"{sparsity['overall']:.1%} of the entries: {', '.join(parts)}"
    if (seconds := metrics.get("seconds")) is not None:
        yield "trained in", f"{seconds / 60:.1f} minutes on {metrics.get('device', 'an unknown device')}"


def _data(used: Mapping[str, Any]) -> str:
    digits = str(used.get("sha256", ""))[:FINGERPRINT_DIGITS]
    return f"{show(used.get('structures'))} structures of {used.get('name')}, sha256 {digits}"


def _verdict(check: Any) -> Any:
    """Passed or not, with the reasons where the check gives some; the whole of it is in --json."""
    if not isinstance(check, Mapping) or "passed" not in check:
        return check
    return "passed" if check["passed"] else " ".join(["not passed.", *map(str, check.get("failures") or ())])


def _words(values: Mapping[str, Any]) -> str | None:
    """`{"epochs": 3, "loss": "mse"}` as "epochs 3, loss mse"; what is not set is left out."""
    words = [
        f"{key} {plain(v) if isinstance(v, int | float) and not isinstance(v, bool) else show(v)}"
        for key, v in values.items()
        if v is not None
    ]
    return ", ".join(words) or None
