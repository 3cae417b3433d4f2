"""The `.pt` file of `pair_style mliap unified`: adapter and backbone for a LAMMPS with ML-IAP.

LAMMPS opens it with `torch.load` and takes the object that comes out. A pickled network would run whatever code it
names, and break with the next version of torch or mace-torch. So the object pickles as one call, `restore(contents)`,
where the contents are plain values and the bytes of two safetensors files, the backbone's and the adapter's. Opening it
imports this module and reads two files that execute nothing. `torch.load(..., weights_only=True)` accepts it where
`restore` is allowed (`allow_loading`), and `read_mliap` opens it in no other way.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..adapter_file import AdapterFile, is_adapter, read_adapter, write_adapter
from ..backbone import BACKBONE_FOLDER, Backbone, convert_backbone, load_backbone
from ..config import Precision
from ..errors import EngineError
from ..files import replacing
from ..methods import method_named
from .mliap import MLIAPPotential

FORMAT = "mmea potential for ML-IAP"
FORMAT_VERSION = 1
SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True)
class ExportedPotential:
    """What was written.

    Attributes:
        path: the file.
        backbone: name of the backbone; head: its head.
        method: of the adapter; None for the bare backbone.
        elements: symbols that `pair_coeff * *` may name.
        trained_elements: those that the adapter has seen; None for the bare backbone, empty if it is not known.
        cutoff: of the network, A.
        exchanges: of features between domains, per step and direction.
        dtype: precision of the network.
    """

    path: Path
    backbone: str
    head: str
    method: str | None
    elements: tuple[str, ...]
    trained_elements: tuple[str, ...] | None
    cutoff: float
    exchanges: int
    dtype: Precision


def export_mliap(
    adapter: str | Path | AdapterFile,
    destination: str | Path,
    *,
    backbone: str | Path | None = None,
    head: str | None = None,
    dtype: Precision = "float32",
) -> ExportedPotential:
    """Write an adapter with its backbone for `pair_style mliap unified`.

    Args:
        adapter: an `.adapter` file (or one read already), or name or path of a bare backbone.
        destination: NAME.pt. It holds all that is needed but this package.
        backbone: name or path of the adapter's backbone, where it is not found by the name in the adapter.
        head: of a bare backbone with several; that of the adapter where there is one.
        dtype: precision of the network. Reference energies and sums are in float64 in any case.

    Raises:
        EngineError: a wrong suffix or folder; a network that cannot be spread over domains; an adapter that is not
            equivariant; the file cannot be written.
        AdapterFileError, AdapterError: the adapter is damaged, or made for another backbone.
        BackboneError: the backbone cannot be loaded, or not be stored in the safe format.
    """
    destination = Path(destination)
    if destination.suffix not in SUFFIXES:
        raise EngineError(f"{destination} should end in .pt: by that LAMMPS knows how to open it")
    if not destination.parent.is_dir():
        raise EngineError(f"there is no folder {destination.parent}; make it first, or choose another place")
    file = _adapter(adapter)
    if file is not None and not method_named(file.config.method).equivariant:
        raise EngineError(
            f"an adapter of method {file.config.method!r} is not equivariant: its energies change when a structure is "
            "turned, and no dynamics should be run with it"
        )
    if file is None and backbone is not None:
        raise EngineError(f"{adapter} is taken for a backbone itself: leave out backbone={str(backbone)!r}")
    if file is None:
        loaded = load_backbone(str(adapter), head=head, dtype=dtype)
    else:
        loaded = file.load_backbone(backbone, head=head, dtype=dtype)
        file.check_backbone(loaded)
    potential = restore(_contents(loaded, file, dtype))
    _write(potential, destination)
    return ExportedPotential(
        path=destination,
        backbone=loaded.name,
        head=loaded.head,
        method=None if file is None else file.config.method,
        elements=tuple(potential.element_types),
        trained_elements=None if file is None else _symbols(file),
        cutoff=potential.cutoff,
        exchanges=len(potential.widths),
        dtype=dtype,
    )


def read_mliap(path: str | Path) -> MLIAPPotential:
    """Open a file of `export_mliap` without executing anything that is in it.

    Raises:
        EngineError: no such file, or none of `export_mliap`; of a newer format.
        AdapterFileError, BackboneError: its contents are damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise EngineError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([restore]):
            potential = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as problem:
        raise EngineError(f"{path} is no whole file of `mmea export lammps` ({_first_line(problem)})") from problem
    if not isinstance(potential, MLIAPPotential):
        raise EngineError(f"{path} holds a {type(potential).__name__}; expected a file of `mmea export lammps`")
    return potential


def allow_loading() -> None:
    """Let `torch.load` with safe loading, its default, open files of `export_mliap`, in this process from now on.

    For a LAMMPS that calls `torch.load` without `weights_only=False`. Only `restore` is allowed, which reads data.
    """
    torch.serialization.add_safe_globals([restore])


def restore(contents: Any) -> MLIAPPotential:
    """The potential of an opened file; what its pickle calls.

    Raises:
        EngineError: of a newer format, or not of this one.
        AdapterFileError, BackboneError: its contents are damaged.
    """
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise EngineError("this is no file of `mmea export lammps`: export the adapter again")
    version = contents.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise EngineError(
            f"this file has format version {version}, newer than the {FORMAT_VERSION} of this mmea: upgrade mmea"
        )
    try:
        return _restored(contents)
    except (AttributeError, KeyError, TypeError) as problem:
        raise EngineError(f"the contents of this file are damaged ({type(problem).__name__}: {problem})") from problem


def _restored(contents: dict[str, Any]) -> MLIAPPotential:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.safetensors"
        path.write_bytes(_bytes(contents["backbone"]))
        backbone = load_backbone(path, head=contents["head"], dtype=contents["dtype"])
        backbone.name = backbone.source = contents["backbone_name"]
        file = None
        if contents["adapter"] is not None:
            path = Path(folder) / "adapter"
            path.write_bytes(_bytes(contents["adapter"]))
            file = replace(read_adapter(path), path=None)
    return MLIAPPotential(backbone, file, contents)


def _adapter(adapter: str | Path | AdapterFile) -> AdapterFile | None:
    if isinstance(adapter, AdapterFile):
        return adapter
    return read_adapter(adapter) if is_adapter(adapter) else None


def _contents(backbone: Backbone, file: AdapterFile | None, dtype: Precision) -> dict[str, Any]:
    """Everything that a file holds: plain values and tensors of bytes."""
    with TemporaryDirectory() as folder:
        stored = Path(folder) / "backbone.safetensors"
        source = Path(backbone.source)
        convert_backbone(source if source.is_file() else BACKBONE_FOLDER / f"{backbone.name}.safetensors", stored)
        trained = None if file is None else _tensor(write_adapter(Path(folder) / "adapter", file))
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "mmea": __version__,
            "backbone_name": backbone.name,
            "backbone": _tensor(stored),
            "adapter": trained,
            "head": backbone.head,
            "dtype": dtype,
        }


def _tensor(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _bytes(stored: Tensor) -> bytes:
    return stored.cpu().numpy().tobytes()


def _write(potential: MLIAPPotential, path: Path) -> None:
    """Write the file beside its place, open it again, and only then put it there."""
    try:
        with replacing(path) as temporary:
            torch.save(potential, temporary)
            read_mliap(temporary)
    except OSError as problem:
        raise EngineError(f"cannot write {path} ({problem})") from problem


def _symbols(file: AdapterFile) -> tuple[str, ...]:
    return tuple(file.header()["elements"])


def _first_line(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0] or type(problem).__name__


__all__ = ["ExportedPotential", "allow_loading", "export_mliap", "read_mliap", "restore"]
