"""Name or path -> `Backbone`: a frozen network that yields interaction energies, with what must be known of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .backbone_file import (
    config_of_model,
    fingerprint,
    identifying,
    minimal_config,
    read_model,
    read_safetensors,
    rebuilt,
    restore,
    stored_tensors,
    write_safetensors,
)
from .config import DEFAULT_BACKBONE, Kernels, Precision
from .errors import BackboneError, BackboneNotFoundError
from .mace_names import PUBLISHED, fetch, locate
from .mace_networks import accept_neutral_graphs, mark_untrained, repeat_to_the_bit

BACKBONE_FOLDER = Path(__file__).parent / "backbones"

# name -> what it is, in one line. NAME.safetensors, NAME.json and NAME.md lie in `backbones/`.
EMBEDDED: dict[str, str] = {
    "mmea-organic-s": "small organic molecules, PBE/def2-SVP, 325,328 parameters; the first version",
    "mmea-organic-s-xtb": "the same network before its PBE stage, GFN2-xTB",
    "mmea-organic-s2": "the same shape, trained further in both stages: a fifth less error on molecules never seen",
    "mmea-organic-s2-xtb": "mmea-organic-s2 before its PBE stage, GFN2-xTB",
    "mmea-organic-s3": "the same shape, trained on 30,000 molecules of GFN2-xTB brought near PBE, and on PBE",
    "mmea-organic-s4": "the same on 60,000 molecules, with pair repulsion and a wall for every pair of elements",
    "mmea-organic-s5": "the same on 90,000 molecules, and with hydrogen bonds and halogens",
    "mmea-organic-s6": "the same with labels nearer to PBE, and larger molecules at PBE",
    "mmea-organic-s7": "the same with more of both, and trained longer",
    "mmea-organic-s8": "mmea-organic-s7 trained further, with hydrogen bonds within molecules",
    "mmea-organic-s9": "mmea-organic-s8 trained further, with more molecules with carbonyl groups",
    "mmea-organic-s10": "mmea-organic-s9 trained further, with more of these at PBE; the default",
    "mmea-organic-m": "mmea-organic-s7 in twice as many channels, trained further",
}

_TRUST_PICKLE = (
    "{} is a pickled network: opening it runs code from the file, so open only what you trust; "
    "`mmea backbone convert` makes a file of it that is safe to pass on"
)
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Backbone:
    """A pretrained network, ready to be adapted.

    Attributes:
        name: as a user would give it again: embedded or published name, or the file's stem.
        source: where it was read from: an absolute path, or what it is.
        network: frozen and in eval mode, on the fast path. Its E0 buffer is zero, so that its
            energies are interaction energies (eV) at full precision; the reference energies are in
            `atomic_energies`.
        config: what `mace_bridge.build_network` needs, and notes; less for a network that cannot be converted.
        fingerprint: sha256 (hex) of `mmea_calc.backbone_file.fingerprint`.
        elements: atomic numbers in the order of the network's one-hot encoding.
        r_max: cutoff, A.
        heads: names of the network's heads; `head` is the chosen one.
        atomic_energies: E0 of the chosen head, eV.
        level_of_theory, licence, notes: what is known of its data, its licence, its use.
        trust_note: one sentence where loading it executed code from the file; None otherwise.
        fast: whether it is on the fast path (`mmea_calc.fast.switch`); False: as mace-torch computes it.
        kernels: "cuequivariance": calls are computed by a network of its layers (`mmea_calc.fast.converted`).
    """

    name: str
    source: str
    network: nn.Module
    config: dict[str, Any]
    fingerprint: str
    elements: tuple[int, ...]
    r_max: float
    heads: tuple[str, ...]
    head: str
    atomic_energies: dict[int, float]
    level_of_theory: str | None = None
    licence: str | None = None
    notes: str | None = None
    trust_note: str | None = field(default=None, repr=False)
    fast: bool = True
    kernels: Kernels = "own"
    _where: tuple[dict[str, nn.Parameter | None], str] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def head_index(self) -> int:
        """What the network takes as `head` of a graph."""
        return self.heads.index(self.head)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._a_parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """The network's precision."""
        return self._a_parameter().dtype

    def _a_parameter(self) -> nn.Parameter:
        """Found where it was found before: every call asks several times, and to go through the modules takes long."""
        found = None if self._where is None else self._where[0].get(self._where[1])
        if found is None:
            places = (
                (m._parameters, key)
                for m in self.network.modules()
                for key, p in m._parameters.items()
                if p is not None
            )
            self._where = next(places)
            found = self._where[0][self._where[1]]
            assert found is not None
        return found

    @property
    def n_parameters(self) -> int:
        """Number of the network's own trained values."""
        return sum(p.numel() for p in self.network.parameters())

    def to(self, device: str | torch.device | None = None, dtype: Precision | torch.dtype | None = None) -> Backbone:
        """Move the network in place; returns self.

        Raises:
            BackboneError: there is no such device, or no such precision.
        """
        kind = self.dtype if dtype is None else _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if kind not in _DTYPES.values():
            raise BackboneError(f"dtype is {dtype!r}; expected float32 or float64")
        self.network.to(self.device if device is None else device_of(device), kind)
        mark_untrained(self.network)
        return self


@dataclass(frozen=True)
class BackboneInfo:
    """One line of `mmea backbone list`.

    Attributes:
        name: what `load_backbone` takes.
        origin: "embedded" or "mace-torch".
        available: whether its file is on this machine.
        path: of that file, also where it would be put.
        licence, level_of_theory, elements: where known.
        description: one line.
    """

    name: str
    origin: str
    available: bool
    path: Path
    licence: str | None
    level_of_theory: str | None
    elements: tuple[int, ...] | None
    description: str


def list_backbones() -> list[BackboneInfo]:
    """Every backbone that can be loaded by name: the embedded ones, then those that mace-torch fetches."""
    rows = []
    for name, description in EMBEDDED.items():
        path = BACKBONE_FOLDER / f"{name}.safetensors"
        config = read_safetensors(path).config
        elements = tuple(config["atomic_numbers"])
        licence, level = config.get("licence"), config.get("level_of_theory")
        rows.append(BackboneInfo(name, "embedded", True, path, licence, level, elements, description))
    for name, entry in PUBLISHED.items():
        path, url = locate(name)
        there = path.is_file()
        rows.append(
            BackboneInfo(name, "mace-torch", there, path, entry.licence, entry.level_of_theory, entry.elements, url)
        )
    return rows


def model_card(name: str) -> str | None:
    """The model card (Markdown) of an embedded backbone; None for any other."""
    card = BACKBONE_FOLDER / f"{name}.md"
    return card.read_text(encoding="utf-8") if name in EMBEDDED and card.is_file() else None


def load_backbone(
    name_or_path: str | Path = DEFAULT_BACKBONE,
    *,
    head: str | None = None,
    device: str = "cpu",
    dtype: Precision = "float32",
    fast: bool = True,
    kernels: Kernels = "own",
) -> Backbone:
    """A backbone by name or path. Each call builds a network of its own.

    Args:
        name_or_path: an embedded name, a published name (`list_backbones`), or the path of a `.model` or
            `.safetensors` file. Only a `.model` file executes code when it is opened.
        head: which head of a network with several; needed unless one of them is called "default".
        device: "cpu", "cuda", "cuda:1", ..., or "auto".
        dtype: precision of the network.
        fast: False leaves mace-torch's own forms of all layers in place, and uses no compiled programs: slower, and
            the same to rounding.
        kernels: "cuequivariance" computes energies, forces and stresses with the layers of that package, which is an
            extra for GPUs (`pip install 'mmea[cue]'`), in float32; training goes on as ever.

    Raises:
        BackboneError: unknown name, head, device, precision or kernels; a missing, damaged or unsuitable file; a
            published network that is not on this machine and cannot be downloaded; a package that is not installed.
    """
    if dtype not in _DTYPES:
        raise BackboneError(f"dtype is {dtype!r}; expected float32 or float64")
    _check_kernels(kernels, dtype, fast)
    device_of(device)
    text = str(name_or_path)
    name = text.lower()
    if name in EMBEDDED:
        backbone = _from_safetensors(name, BACKBONE_FOLDER / f"{name}.safetensors", head, "embedded in mmea")
    elif name in PUBLISHED:
        entry, path = PUBLISHED[name], fetch(name)
        backbone = _from_model(name, path, head, preferred=entry.head)
        backbone.level_of_theory, backbone.licence = entry.level_of_theory, entry.licence
    else:
        backbone = _from_path(_existing(text), head)
    backbone.kernels = kernels
    return _finish(backbone, device, dtype, fast)


def _check_kernels(kernels: str, dtype: str, fast: bool) -> None:
    if kernels not in get_args(Kernels):
        raise BackboneError(f"kernels is {kernels!r}; expected {' or '.join(get_args(Kernels))}")
    if kernels == "own":
        return
    if find_spec("cuequivariance_torch") is None:
        raise BackboneError(
            f"kernels={kernels!r} needs cuequivariance-torch, which is not installed: pip install 'mmea[cue]'"
        )
    if not fast:
        raise BackboneError(
            f"fast=False asks for mace-torch's own layers, and kernels={kernels!r} for others: leave one out"
        )
    if dtype != "float32":  # constants of the converted network hold to 1e-8
        raise BackboneError(f"kernels={kernels!r} computes in float32, and dtype is {dtype!r}")


def save_backbone(
    path: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> str:
    """Write a backbone of the safe format; the file appears whole or not at all.

    Args:
        path: NAME.safetensors; its folder must exist.
        config: for `mmea_calc.mace_bridge.build_network`, true `atomic_energies` included, and further plain values
            (`level_of_theory`, `licence`, `notes`, `training`) that are kept.
        state: the network's state dict under mace-torch's names, in the precision to be stored.

    Returns:
        the fingerprint.

    Raises:
        BackboneError: the tensors do not fit the config, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BackboneError(f"{path} should end in .safetensors")
    if not path.parent.is_dir():
        raise BackboneError(f"there is no folder {path.parent}")
    return write_safetensors(path, dict(config), stored_tensors(dict(config), state))


def convert_backbone(source: str | Path, destination: str | Path) -> Backbone:
    """Turn a `.model` file, or a published name, into the safe format, with the same fingerprint and outputs.

    Returns:
        the converted backbone, read back from `destination`.

    Raises:
        BackboneError: the source cannot be read or its network cannot be rebuilt from a config.
    """
    text = str(source)
    entry = PUBLISHED.get(text.lower())
    if text.lower() in EMBEDDED:
        raise BackboneError(f"{text} comes with mmea in the safe format: there is nothing to convert")
    path = fetch(text.lower()) if entry else _existing(text)
    extra = {"level_of_theory": entry.level_of_theory, "licence": entry.licence} if entry else {}
    if path.suffix == ".safetensors":
        config, tensors, _ = read_safetensors(path)
        state = dict(restore(config, tensors, path).state_dict()) | tensors
    else:
        network = read_model(path)
        config, state = config_of_model(network), network.state_dict()
        rebuilt(network, config, state, path)
    save_backbone(destination, config | {k: v for k, v in extra.items() if v}, state)
    return _finish(_from_path(Path(destination), config["heads"][0] if config.get("heads") else None), "cpu", "float32")


# --- opening --------------------------------------------------------------------------------------------------------


def _existing(text: str) -> Path:
    """The path, if it can be a backbone's. Raises BackboneError."""
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".model", ".safetensors", ".pt", ".pth", ".json") or "/" in text or path.is_dir():
        raise BackboneNotFoundError(
            f"there is no file {path}; expected a .model or .safetensors file, or a backbone's name"
        )
    known = [*EMBEDDED, *PUBLISHED]
    close = difflib.get_close_matches(text.lower(), known, n=4, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else f"embedded: {', '.join(EMBEDDED)};"
    raise BackboneNotFoundError(f"no backbone is called {text!r}; {hint} `mmea backbone list` shows all")


def _from_path(path: Path, head: str | None) -> Backbone:
    if path.suffix == ".safetensors":
        return _from_safetensors(path.stem, path, head, str(path.absolute()))
    if path.suffix == ".json":
        raise BackboneError(f"{path} is a config; give the .safetensors file beside it")
    return _from_model(path.stem, path, head)


def _from_safetensors(name: str, path: Path, head: str | None, source: str) -> Backbone:
    config, tensors, recorded = read_safetensors(path)
    network = restore(config, tensors, path)
    identity = fingerprint(config, identifying(config, network, tensors))
    if recorded not in (None, identity):
        raise BackboneError(
            f"{path} was changed after it was written: its fingerprint is {identity[:16]}..., its header says "
            f"{recorded[:16]}...; convert or fetch it again"
        )
    backbone = _describe(name, source, network, config, identity, head)
    backbone.level_of_theory, backbone.licence = config.get("level_of_theory"), config.get("licence")
    backbone.notes = config.get("notes")
    return backbone


def _from_model(name: str, path: Path, head: str | None, preferred: str | None = None) -> Backbone:
    """Rebuilt from its config where that gives the same network (which repeats to the bit), else as unpickled."""
    pickled = read_model(path)
    if type(pickled).__name__ not in ("MACE", "ScaleShiftMACE"):
        raise BackboneError(f"{path} is a {type(pickled).__name__}; expected a MACE or ScaleShiftMACE network")
    state, notes = pickled.state_dict(), None
    identity = {key: state[key] for key, _ in pickled.named_parameters()}
    try:
        config = config_of_model(pickled)
        network = rebuilt(pickled, config, state, path)
        identity = identifying(config, network, state)
    except BackboneError as problem:
        config, network, notes = minimal_config(pickled, path), pickled, f"used as unpickled: {problem}"
    if head is None and preferred in (config.get("heads") or ()):
        head = preferred
    backbone = _describe(name, str(path.absolute()), network, config, fingerprint(config, identity), head)
    backbone.notes, backbone.trust_note = notes, _TRUST_PICKLE.format(path.name)
    return backbone


def _describe(
    name: str, source: str, network: nn.Module, config: dict[str, Any], identity: str, head: str | None
) -> Backbone:
    """Everything known of a network, with its head chosen. Raises BackboneError for a head that it lacks."""
    heads = tuple(config.get("heads") or ["Default"])
    listed = ", ".join(heads)
    if head is None:
        default = [h for h in heads if len(heads) == 1 or h.lower() == "default"]
        if not default:
            raise BackboneError(f"backbone {name!r} has several heads: {listed}; choose one (--head)")
        head = default[0]
    if head not in heads:
        raise BackboneError(f"backbone {name!r} has no head {head!r}; it has {listed}")
    elements = tuple(int(z) for z in config["atomic_numbers"])
    per_head = np.atleast_2d(np.asarray(config["atomic_energies"], dtype=np.float64))
    energies = per_head[heads.index(head) if len(per_head) > 1 else 0]
    return Backbone(
        name=name,
        source=source,
        network=network,
        config=config,
        fingerprint=identity,
        elements=elements,
        r_max=float(config["r_max"]),
        heads=heads,
        head=head,
        atomic_energies=dict(zip(elements, energies.tolist(), strict=True)),
    )


def _finish(backbone: Backbone, device: str, dtype: Precision, fast: bool = True) -> Backbone:
    """Freeze, zero the E0 buffer, take the fast path, move."""
    from .fast.switch import use_fast_path

    network = backbone.network
    network.requires_grad_(False)
    network.eval()
    accept_neutral_graphs(network)
    repeat_to_the_bit(network)
    # At -17,600 eV float32 is 2 meV coarse: E0 are added in float64, outside of the network.
    e0: Any = network.atomic_energies_fn
    e0.atomic_energies.zero_()
    backbone.fast = fast
    if fast:
        use_fast_path(network)
    return backbone.to(device, dtype)


def device_of(device: str | torch.device) -> torch.device:
    """The device, if there is one. Raises BackboneError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as problem:
        raise BackboneError(f"device is {device!r}; expected auto, cpu, cuda or cuda:1") from problem
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BackboneError(f"device {device!r} is not here: {torch.cuda.device_count()} CUDA devices; try cpu or auto")
    return found
