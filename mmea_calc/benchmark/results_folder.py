"""The folder of results: it belongs to the settings that it was begun with.

Methods, seeds and systems may be added to it later; all else stays, so that its cells can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..backbone import Backbone
from ..config import BenchmarkConfig
from ..data.reference_energies import identity_of
from ..errors import TrainingError
from ..files import json_ready, write_text
from .method_spec import PAPER, parse_methods
from .tasks import Task

SETTINGS, CELLS = "settings.json", "cells"


def valid_fraction(task: Task, config: BenchmarkConfig) -> float:
    """Part of the training structures that validates."""
    return task.valid_fraction if config.valid_fraction is None else config.valid_fraction


def shared_settings(task: Task, config: BenchmarkConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """What all cells of a folder share; the head is the one that was given until the backbone is loaded."""
    settings: dict[str, Any] = {
        "benchmark": task.name,
        "backbone": config.backbone,
        "head": config.head if backbone is None else backbone.head,
        "recipe": config.recipe,
        "epochs": config.epochs,
        "dtype": config.dtype,
        "compile": config.compile,
        "E0s": identity_of(reference_energies_of(task, config)),
        "valid_fraction": valid_fraction(task, config),
        "data": {
            s.name: {"train": s.train.hash, "valid": None if s.valid is None else s.valid.hash} for s in task.systems
        },
    }
    return settings if backbone is None else {**settings, "fingerprint": backbone.fingerprint}


def reference_energies_of(task: Task, config: BenchmarkConfig, recipe: str | None = None) -> str | None:
    """As `finetune` takes them; the published recipe, of all methods or of one, has its own without isolated atoms."""
    if config.E0s is None and PAPER in (recipe, config.recipe):
        return task.paper_E0s
    return config.E0s


def other_reference_energies(task: Task, config: BenchmarkConfig) -> str | None:
    """Those of methods that name the published recipe, where all others have the folder's; None: they are the same."""
    paper = reference_energies_of(task, config, PAPER)
    return None if paper == reference_energies_of(task, config) else paper


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What the folder was begun with; None: it has not been. Raises TrainingError."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["data"], dict):
            raise ValueError("data must be a mapping")
    except (ValueError, KeyError, TypeError) as problem:
        raise TrainingError(f"{path} cannot be read ({problem}): choose another --output folder") from problem
    return content


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings; those that the folder was begun with stay, and systems of earlier calls stay known."""
    before = read_settings(folder) or {"data": {}}
    content = {**settings, **before, "data": {**before["data"], **settings["data"]}}
    if content != before:
        write_text(folder / SETTINGS, json.dumps(json_ready(content), indent=1))


def check_settings(
    folder: Path, settings: Mapping[str, Any], config: BenchmarkConfig, default_head: Callable[[], str] | None = None
) -> None:
    """A folder that has been begun is gone on with under the same settings only, given or by default.

    Args:
        folder: of the results.
        settings: of this call.
        config: which they are of.
        default_head: finds the head that is taken where none is given; None: the backbone is not loaded yet, and heads
            are compared only where both were given.

    Raises:
        AdapterError: as `parse_methods`.
        BackboneError: the default head cannot be found.
        TrainingError: naming what differs.
    """
    if (before := read_settings(folder)) is None:
        return
    shared = [key for key in settings if key != "data" and key in before]
    differing = [key for key in shared if not _same(key, before[key], settings[key], config, default_head)]
    was = [f"{key} was {_word(before[key])}, is {_word(settings[key])}" for key in differing]
    for system, hashes in settings["data"].items():
        if before["data"].get(system, hashes) != hashes:
            was.append(f"the data of {system} have changed")
    if was:
        raise TrainingError(
            f"{folder} was begun with other settings: {'; '.join(was)}. Choose another --output folder, or give the "
            "former settings (methods, seeds and systems may be added)"
        )


def _same(key: str, then: Any, now: Any, config: BenchmarkConfig, default_head: Callable[[], str] | None) -> bool:
    """Whether a setting is what it was, one that is not given by what is taken in its place."""
    if key == "head" and None in (then, now):
        return default_head is None or default_head() == (then or now)
    if key in ("dtype", "compile") and then != now:  # recipes may have their own, so the methods decide
        return parse_methods(replace(config, **{key: then})) == parse_methods(config)
    return bool(then == now)


def _word(value: Any) -> str:
    return "not given" if value is None else str(value)
