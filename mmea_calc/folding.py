"""`fold`: a backbone and an adapter that is a change of weights become one network, in a file of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_file import AdapterFile, read_adapter
from .backbone import Backbone, save_backbone
from .config import Precision
from .errors import AdapterError, BackboneError
from .fast.switch import remove_fast_path
from .files import replacing
from .mace_bridge import is_untrained, quiet
from .mace_networks import restore_plain
from .potential import Potential

SUFFIXES = (".model", ".safetensors")


@dataclass(frozen=True)
class FoldedModel:
    """What was written.

    Attributes:
        path: the file.
        backbone: name of the backbone that was folded into.
        heads: of the network. All of them have the new weights; the adapter was trained for `head` alone.
        head: the adapter's; its reference energies are the adapter's, those of other heads are the backbone's.
        reference_energies: of `head`, atomic number -> eV.
        dtype: precision of the file.
    """

    path: Path
    backbone: str
    heads: tuple[str, ...]
    head: str
    reference_energies: dict[int, float]
    dtype: Precision


def fold(
    adapter: str | Path | AdapterFile,
    destination: str | Path,
    *,
    backbone: str | Path | None = None,
    dtype: Precision = "float64",
) -> FoldedModel:
    """Write the adapted network as a plain one, with the cost of the bare backbone.

    Args:
        adapter: an adapter of a foldable method (elora, full, readout, ...), or its file.
        destination: NAME.model, which mace-torch's `MACECalculator` opens without this package, or NAME.safetensors,
            which `load_backbone` takes. Energies are total energies, eV: the adapter's reference energies are in it.
        backbone: name or path of the adapter's backbone, where it is not found by the name in the adapter.
        dtype: precision of the file. In float32 a `.model` holds reference energies to 2 meV at -17,600 eV.

    Raises:
        AdapterError: the adapter has parts that depend on their input, such as gates.
        AdapterFileError: the adapter is damaged, or made for another backbone.
        BackboneError: the backbone cannot be loaded, or not be written in this format; a wrong suffix or folder.
    """
    destination = Path(destination)
    if destination.suffix not in SUFFIXES:
        raise BackboneError(f"{destination} should end in .model (for mace-torch) or .safetensors (for mmea)")
    if not destination.parent.is_dir():
        raise BackboneError(f"there is no folder {destination.parent}; make it first, or choose another place")
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
    loaded = file.load_backbone(backbone, dtype=dtype)
    potential = Potential(loaded)
    potential.use(file)
    _check_foldable(potential, file)
    energies = {z: potential.reference_energies[z] for z in loaded.elements}
    network = _plain_network(potential)
    table = _energies_of_heads(loaded, energies)
    if destination.suffix == ".model":
        buffer: Any = network.atomic_energies_fn
        buffer.atomic_energies.copy_(torch.tensor(table, dtype=torch.float64).reshape(buffer.atomic_energies.shape))
        _write_model(network, destination)
    else:
        save_backbone(destination, _config(loaded, file, table), network.state_dict())
    return FoldedModel(destination, loaded.name, loaded.heads, loaded.head, energies, dtype)


def _check_foldable(potential: Potential, file: AdapterFile) -> None:
    handle = potential.adapter
    assert handle is not None
    if handle.foldable:
        return
    method = file.config.method
    dynamics = " and `mmea md`" if handle.equivariant else ""
    part = f"{len(handle.on_linears)} {next(iter(handle.on_linears.values())).family}"
    raise AdapterError(
        f"an adapter of method {method!r} cannot become a plain model: its {part} depend on the features of each atom, "
        f"so no change of weights does the same. Use it in MMEACalculator{dynamics}, which folds by itself "
        "whatever can be folded; or train with a method that changes weights alone, such as elora or full"
    )


def _plain_network(potential: Potential) -> nn.Module:
    """The network with the adapter in its weights and nothing of this package on it; E0 are zero."""
    handle, network = potential.adapter, potential.backbone.network
    assert handle is not None
    handle.merge()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    potential.use(None)
    network.load_state_dict(state)
    remove_fast_path(network)
    restore_plain(network)
    for parameter in network.parameters():
        parameter.requires_grad_(not is_untrained(parameter))  # as mace-torch leaves them
    return network


def _energies_of_heads(backbone: Backbone, energies: dict[int, float]) -> list[list[float]]:
    """E0 by head and element, eV: those of the backbone, but of its chosen head."""
    given = backbone.config["atomic_energies"]
    per_head = [list(row) for row in given] if isinstance(given[0], list) else [list(given)]
    per_head[backbone.head_index if len(per_head) > 1 else 0] = [energies[z] for z in backbone.elements]
    return per_head


def _config(backbone: Backbone, file: AdapterFile, table: list[list[float]]) -> dict[str, Any]:
    """The backbone's settings with what is true of the folded network."""
    config = {k: v for k, v in backbone.config.items() if k not in ("training", "level_of_theory", "notes")}
    config["atomic_energies"] = table if isinstance(config["atomic_energies"][0], list) else table[0]
    config["notes"] = f"{backbone.name} with an adapter of method {file.config.method} folded into its weights"
    return config | ({"level_of_theory": file.level_of_theory} if file.level_of_theory else {})


def _write_model(network: nn.Module, path: Path) -> None:
    try:
        with replacing(path) as temporary, quiet():  # e3nn makes TorchScript of its code, which torch deprecates
            torch.save(network, temporary)
    except OSError as problem:
        raise BackboneError(f"cannot write {path} ({problem})") from problem
