"""The `.adapter` file: safetensors, with everything about the adapter in its header.

Tensors: the trained values (`gates.*`, `updates.*`) in float32 or float64, and what was seen in training (`ranges.*`):
the range of every gate, the shortest distance of every pair of elements. Header: one JSON document under the key `mmea`
of the safetensors metadata; its fields are those of `AdapterFile`. Nothing in the file is executed when it is read.

A format that changes gets a new `FORMAT_VERSION` and one small function in `_UPGRADES` that lifts the header of the
version before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .backbone import EMBEDDED as EMBEDDED_BACKBONES
from .backbone import Backbone, load_backbone
from .config import DEFAULT_BACKBONE, AdapterConfig, from_dict, to_dict
from .errors import AdapterFileError, BackboneNotFoundError
from .files import json_ready, replacing
from .mace_names import PUBLISHED

FORMAT = "mmea adapter"
FORMAT_VERSION = 1
EMBEDDED = Path(__file__).parent / "adapters"
_KEY = "mmea"

# version -> lifts a header of that version to the next one
_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def named_after(adapter: Path, ending: str) -> Path:
    """What stands beside an adapter file: its name with `ending` for `.adapter`, or after a name that has none.

    Not `Path.with_suffix`, to which `lr0.01` and `lr0.003` would be the same name.
    """
    return adapter.with_name(adapter.name.removesuffix(".adapter") + ending)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it is stored.

    Attributes:
        config: what is to be attached.
        tensors: trained values and gate ranges, by the names of `Adapter.state_dict`.
        backbone: name of the backbone, as `load_backbone` takes it.
        fingerprint: fingerprint of the backbone.
        head: head of the backbone.
        elements: atomic numbers seen in training.
        reference_energies: atomic number -> eV.
        reference_energies_method: how they were found.
        level_of_theory: of the training data, if it is known.
        data: summary of the training data, with a hash.
        training: settings of the run, seed included.
        metrics: errors on the validation and test sets, zero-shot and fine-tuned.
        checks: verdicts of later checks.
        versions: of the packages that made it.
        created: date and time, UTC.
        units: of everything stored.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor] = field(repr=False)
    backbone: str
    fingerprint: str
    head: str = "Default"
    elements: tuple[int, ...] = ()
    reference_energies: dict[int, float] = field(default_factory=dict)
    reference_energies_method: str = ""
    level_of_theory: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    units: dict[str, str] = field(default_factory=lambda: {"energy": "eV", "length": "A", "forces": "eV/A"})
    path: Path | None = None

    def unseen(self, numbers: Iterable[int]) -> list[str]:
        """Symbols of those elements that were not in the training data; none where these are not known."""
        return sorted({chemical_symbols[z] for z in numbers if self.elements and z not in self.elements})

    @property
    def n_parameters(self) -> int:
        """Number of trained entries."""
        return sum(t.numel() for name, t in self.tensors.items() if not name.startswith("ranges."))

    def load_backbone(self, given: str | Path | None = None, *, head: str | None = None, **how: Any) -> Backbone:
        """The backbone that this adapter names, or the one that is given for it.

        Args:
            given: name or path.
            head: the adapter's where not given.
            how: as `mmea_calc.backbone.load_backbone` takes it.

        Raises:
            BackboneError: it cannot be found or read.
        """
        if given is not None:
            return load_backbone(given, head=head or self.head, **how)
        try:
            return load_backbone(self.backbone, head=head or self.head, **how)
        except BackboneNotFoundError as problem:
            raise BackboneNotFoundError(
                f"{self.path or 'this adapter'} was made for backbone {self.backbone!r}, which is not found by that "
                f"name ({problem}): give its file, with --backbone on the command line, with backbone=... in Python"
            ) from problem

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise an AdapterFileError unless this adapter was made for `backbone` and its head."""
        if backbone.fingerprint != self.fingerprint:
            raise AdapterFileError(
                f"{self._where()}this adapter was made for backbone {self.backbone!r} with fingerprint "
                f"{self.fingerprint}, but {backbone.name!r} has fingerprint {backbone.fingerprint}: "
                "load the backbone it was made for"
            )
        if backbone.head != self.head:
            raise AdapterFileError(
                f"{self._where()}this adapter was made for head {self.head!r} of the backbone, "
                f"but head {backbone.head!r} is loaded: load the backbone with head={self.head!r}"
            )

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, as plain, JSON-ready values."""
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("tensors", "path", "config")}
        header["elements"] = [chemical_symbols[z] for z in self.elements]
        header["reference_energies"] = {chemical_symbols[z]: e for z, e in sorted(self.reference_energies.items())}
        header["adapter"] = to_dict(self.config)
        header["n_parameters"] = self.n_parameters
        header["gate_ranges"] = self._gate_ranges()
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **header}

    def _gate_ranges(self) -> dict[str, list[float]]:
        """Smallest and largest bottleneck value each gate saw in training; the ranges by component are tensors."""
        names = [n.removeprefix("ranges.").removesuffix(".low") for n in self.tensors if n.endswith(".low")]
        return {
            n: [float(self.tensors[f"ranges.{n}.low"].min()), float(self.tensors[f"ranges.{n}.high"].max())]
            for n in names
        }

    def _where(self) -> str:
        return f"{self.path}: " if self.path else ""


def backbone_for(
    given: str | Path | None, start: AdapterFile | str | Path | None = None, *, head: str | None = None, **how: Any
) -> Backbone:
    """The backbone of a training.

    Args:
        given: name or path that was asked for; None: that of `start`, else the default.
        start: an adapter to start from, or its path.
        head, how: as `mmea_calc.backbone.load_backbone` takes them.

    Raises:
        AdapterFileError: `start` cannot be read.
        BackboneError: it cannot be found or read.
    """
    if start is None:
        return load_backbone(given or DEFAULT_BACKBONE, head=head, **how)
    file = start if isinstance(start, AdapterFile) else read_adapter(start)
    return file.load_backbone(given, head=head, **how)


def write_adapter(path: str | Path, adapter: AdapterFile) -> Path:
    """Write an adapter; an existing file is replaced only by a complete new one.

    Raises:
        AdapterFileError: a value is not finite, or the folder cannot be written.
    """
    path = Path(path)
    for name, tensor in adapter.tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{name} holds values that are not finite; {path} is not written")
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.tensors.items()}
    text = json.dumps(json_ready(adapter.header()), allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={_KEY: text}))
    except (OSError, SafetensorError) as problem:
        raise AdapterFileError(f"{path} cannot be written: {problem}") from problem
    return path


def embedded_adapters() -> list[str]:
    """Names of the adapters that come with the package; what each is for stands in `adapters/README.md`."""
    return sorted(p.name for p in EMBEDDED.glob("*.adapter"))


def is_adapter(path: str | Path) -> bool:
    """Whether this names an adapter: by its ending, or by what is in the file."""
    if Path(path).suffix == ".adapter":
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter; nothing in the file is executed.

    Args:
        path: a file, or where there is none of that name, one of `embedded_adapters`.

    Raises:
        AdapterFileError: no such file; not an adapter, truncated or damaged; of a newer format; values that are not
            finite.
    """
    path = Path(path)
    if not path.exists() and str(path) in embedded_adapters():
        path = EMBEDDED / path
    header, tensors = _read(path)
    try:
        return _from_header(path, header, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise AdapterFileError(
            f"{path}: the header of this adapter is damaged ({type(problem).__name__}: {problem}); "
            "get a fresh copy of the file"
        ) from problem


def update_adapter(path: str | Path, **changes: Any) -> AdapterFile:
    """Change fields of a stored adapter, such as `checks`, leaving its tensors as they are.

    Raises:
        AdapterFileError: it cannot be read or written, or is one of `embedded_adapters`.
    """
    file = read_adapter(path)
    if file.path is not None and file.path.parent == EMBEDDED:
        raise AdapterFileError(f"{path} comes with mmea and stays as it is: copy it, and name the copy")
    changed = replace(file, **changes)
    write_adapter(path, changed)
    return changed


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        if str(path) in EMBEDDED_BACKBONES or str(path) in PUBLISHED:
            raise AdapterFileError(
                f"{path} is a backbone, not an adapter; backbones are for MMEACalculator(backbone={str(path)!r}), "
                "`mmea evaluate`, `mmea check`, `mmea md` and `mmea backbone show`"
            )
        raise AdapterFileError(
            f"{path}: no such adapter file; adapters that come with mmea: {', '.join(embedded_adapters()) or 'none'}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise AdapterFileError(
                    f"{path} is a safetensors file, but not an adapter: it has no {_KEY!r} entry in its header; "
                    "expected a file written by `mmea finetune`"
                )
            header = json.loads(metadata[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as problem:
        raise AdapterFileError(
            f"{path} is not a readable adapter file: truncated, damaged or of another kind ({problem}); "
            "expected a file written by `mmea finetune`"
        ) from problem
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is not an adapter: its header does not say {FORMAT!r}")
    return header, tensors


def _from_header(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterFile:
    version = int(header["format_version"])
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format version {version}, newer than the {FORMAT_VERSION} of this mmea: upgrade mmea"
        )
    while version < FORMAT_VERSION:
        header, version = _UPGRADES[version](header), version + 1
    bad = sorted(name for name, t in tensors.items() if not torch.isfinite(t).all())
    if bad:
        raise AdapterFileError(f"{path}: {bad[0]} holds values that are not finite ({len(bad)} tensors in all)")
    known = {f.name for f in fields(AdapterFile)} - {"config", "tensors", "path", "elements", "reference_energies"}
    energies = {atomic_numbers[s]: float(e) for s, e in header["reference_energies"].items()}
    if not all(math.isfinite(e) for e in energies.values()):
        raise AdapterFileError(f"{path}: reference energies must be finite")
    return AdapterFile(
        config=from_dict(AdapterConfig, header["adapter"]),
        tensors=tensors,
        elements=tuple(atomic_numbers[s] for s in header["elements"]),
        reference_energies=energies,
        path=path,
        **{name: header[name] for name in known if name in header},
    )


__all__ = ["FORMAT_VERSION", "AdapterFile", "is_adapter", "read_adapter", "update_adapter", "write_adapter"]
