"""Imports point one way, as ARCHITECTURE.md says: whoever knows too much is found here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "mmea_calc"
MODULES = sorted(LIBRARY.rglob("*.py"))

# What stands on structures, networks and files must not be known to those who only compute.
UPPER = {"potential", "data", "training", "evaluation", "calculator", "md", "check", "benchmark", "pretrain", "lammps"}


def imported(file: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, also within functions; not those for types alone."""
    package = list(file.relative_to(ROOT).parts[:-1])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    ]
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms(file: Path) -> set[str]:
    """First names below mmea_calc of what a file imports."""
    return {name.split(".")[1] for name in imported(file) if name.startswith("mmea_calc.")}


def test_the_walk_sees_imports() -> None:
    assert {"errors", "graph"} <= rooms(LIBRARY / "potential.py")
    assert {"backbone", "calculator"}.isdisjoint(rooms(LIBRARY / "__init__.py"))  # for types alone


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_the_library_does_not_know_its_command_line(file: Path) -> None:
    assert not [name for name in imported(file) if name.split(".")[0] in ("mmea_cli", "typer", "rich")]


@pytest.mark.parametrize("name", ["gates", "updates", "updated_weights", "layer_shape", "short_range", "methods"])
def test_gates_and_updates_know_no_files_data_or_training(name: str) -> None:
    assert rooms(LIBRARY / f"{name}.py").isdisjoint(UPPER | {"backbone", "adapter_file"})


def test_data_know_neither_networks_nor_training() -> None:
    found = {file.name: rooms(file) & (UPPER - {"data"} | {"backbone", "adapted", "fast"}) for file in files("data")}
    assert not {name: known for name, known in found.items() if known}


def test_what_a_trajectory_shows_is_asked_without_a_network() -> None:
    found = {file.name: rooms(file) & {"potential", "backbone", "training", "fast"} for file in files("analysis")}
    assert not {name: known for name, known in found.items() if known}


def test_mace_is_known_by_its_bridge_alone() -> None:
    known = [f for f in MODULES if any(name.split(".")[0] == "mace" for name in imported(f))]
    named = [f for f in MODULES if 'import("mace' in (text := f.read_text()) or 'import_module("mace' in text]
    assert {f.stem for f in [*known, *named]} == {"mace_bridge", "mace_names", "mace_networks"}


def test_a_folder_says_what_its_modules_are() -> None:
    """Every module of a room with a page is on that page."""
    for folder in ("data", "fast", "training"):
        page = ast.get_docstring(ast.parse((LIBRARY / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        missing = [f.stem for f in files(folder) if f.stem != "__init__" and f"`{f.stem}`" not in page]
        assert not missing, folder


def files(folder: str) -> list[Path]:
    return sorted((LIBRARY / folder).rglob("*.py"))
