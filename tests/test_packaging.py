"""pyproject.toml, the constraints and the folders agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML by itself")


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(python: str = "") -> list[Requirement]:
    """The constraints, or those that apply to a version of Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [p for p in found if not python or p.marker is None or p.marker.evaluate({"python_version": python})]


def test_every_folder_with_modules_is_installed(project: dict[str, Any]) -> None:
    inside = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "mmea_calc").rglob("*.py")}
    assert {*inside, "mmea_cli"} == set(project["tool"]["setuptools"]["packages"])


def test_every_dependency_is_pinned_within_its_range(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"].values()
    wanted = [Requirement(text) for texts in (project["project"]["dependencies"], *extras) for text in texts]
    for python in ("3.10", "3.11", "3.13"):
        valid = {canonicalize_name(p.name): p for p in pins(python)}
        for requirement in wanted:
            version = str(valid[canonicalize_name(requirement.name)].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), (requirement, version)


def test_every_pin_is_exact_and_applies_once_per_python() -> None:
    assert all(re.fullmatch(r"==[\w.]+", str(p.specifier)) for p in pins())
    for python in ("3.10", "3.11", "3.13"):
        names = [p.name for p in pins(python)]
        assert len(names) == len(set(names))


def test_the_version_of_torch_names_no_build() -> None:
    """A local tag such as +cpu exists in some package indexes only."""
    assert [str(p.specifier) for p in pins() if p.name == "torch"] == ["==2.13.0"]


def test_ignored_files_are_not_shipped_data(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]["mmea_calc"]
    shipped = {p for pattern in patterns for p in (ROOT / "mmea_calc").glob(pattern)}
    assert {p for p in (ROOT / "mmea_calc" / "backbones").iterdir() if p.is_file()} <= shipped


def test_no_file_of_the_set_up_names_a_package_host() -> None:
    for name in ("constraints.txt", "Makefile", "pyproject.toml", ".ci/run"):
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", Path(ROOT / name).read_text())
