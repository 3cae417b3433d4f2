"""`import mmea_calc` is cheap and silent, and offers what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmea_calc
from conftest import ROOT


def run(code: str) -> str:
    """What a fresh interpreter prints on either stream."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_loads_nothing_heavy_and_prints_nothing() -> None:
    code = "import sys; before = set(sys.modules); import mmea_calc; print(sorted(set(sys.modules) - before))"
    loaded = run(code)
    assert "mmea_calc" in loaded
    for name in ("torch", "numpy", "ase", "mace", "e3nn"):
        assert f"'{name}'" not in loaded
    assert run("from mmea_calc import AdapterConfig, MMEAError; import sys; assert 'torch' not in sys.modules") == ""


def test_using_every_name_prints_nothing_and_sets_no_global() -> None:
    code = """
import os, random
import numpy, torch
environment = dict(os.environ)
before = torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), numpy.random.get_state()[1].tolist()
import mmea_calc
for name in mmea_calc.__all__:
    getattr(mmea_calc, name)
mmea_calc.load_backbone()
after = torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), numpy.random.get_state()[1].tolist()
assert before == after
assert dict(os.environ) == environment
"""
    assert run(code) == ""


def test_every_public_name_exists_and_is_no_module() -> None:
    folder = Path(mmea_calc.__file__).parent
    for name in mmea_calc.__all__:
        assert callable(getattr(mmea_calc, name)), name
        assert name in dir(mmea_calc)
        # importing a module sets an attribute of its name on the package, which would hide the public one
        assert not (folder / f"{name}.py").exists()


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        mmea_calc.nothing  # noqa: B018


def test_the_version_is_the_one_of_the_package() -> None:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    assert mmea_calc.__version__ == found[1]
