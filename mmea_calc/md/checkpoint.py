"""Checkpoints: one safetensors file with all that the rest of a run follows from, replaced by a rename.

Random numbers need no place in it: they are a function of the seed, the replica and the step.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DynamicsError
from ..files import replacing
from .state import State

FORMAT = "mmea md checkpoint"
VERSION = 1
_STATE = ("positions", "velocities", "forces", "potential_energy", "heat")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        state: of the dynamics.
        monitor: tensors of the monitor.
        start_positions: (n_atoms, 3), A, of step 0.
        events: so far, as plain values.
        identity: what must be the same for the run to go on: see `mmea_calc.md.run`.
    """

    state: State
    monitor: dict[str, Tensor]
    start_positions: Tensor
    events: list[dict[str, Any]]
    identity: dict[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Raises DynamicsError if it cannot be written; the one before is kept then."""
    tensors = {f"state.{name}": getattr(checkpoint.state, name) for name in _STATE}
    tensors |= {f"monitor.{name}": tensor for name, tensor in checkpoint.monitor.items()}
    tensors["start_positions"] = checkpoint.start_positions
    header = {
        "format": FORMAT,
        "version": VERSION,
        "step": checkpoint.state.step,
        "events": checkpoint.events,
        "identity": checkpoint.identity,
    }
    content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"mmea": json.dumps(header)})
    write_whole(path, content)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Raises DynamicsError if there is none, or it cannot be read."""
    if not path.is_file():
        raise DynamicsError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["mmea"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header["format"] != FORMAT or header["version"] > VERSION:
            raise DynamicsError(f"{path} is no checkpoint of this version of mmea: expected version {VERSION}")
        return Checkpoint(
            state=State(**{name: tensors[f"state.{name}"] for name in _STATE}, step=int(header["step"])),
            monitor={k.removeprefix("monitor."): t for k, t in tensors.items() if k.startswith("monitor.")},
            start_positions=tensors["start_positions"],
            events=header["events"],
            identity=header["identity"],
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as problem:
        raise DynamicsError(f"{path} is damaged ({problem}); start the run again with --overwrite") from problem


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name, wait for the disk, rename. Raises DynamicsError."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise DynamicsError(f"{path} cannot be written: {reason}; the file as it was before is kept") from problem
