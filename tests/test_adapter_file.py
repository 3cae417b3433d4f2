"""The adapter file: what goes in comes out, damage is one clear error, nothing in it is executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import borrowed
from safetensors.torch import load_file, save_file

from conftest import network_config, randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import FORMAT_VERSION, AdapterFile, read_adapter, update_adapter, write_adapter
from mmea_calc.backbone import Backbone
from mmea_calc.config import DEFAULT_BACKBONE, AdapterConfig
from mmea_calc.errors import AdapterError, AdapterFileError
from mmea_calc.mace_bridge import build_network

CONFIG = AdapterConfig(gate_rank=3, low_rank=2, phi="residual", targets=("interactions.*", "readouts.*"), seed=4)
KEY = "mmea"  # of the header in the metadata


@pytest.fixture
def adapter_file() -> AdapterFile:
    with borrowed("agnostic") as network:
        adapter = attach(network, CONFIG)
        randomise(adapter)
        for gate in adapter.gates.values():
            gate.set_range(torch.full_like(gate.z_low, -0.25), torch.full_like(gate.z_high, 1.5))
        tensors = {name: tensor.float() for name, tensor in adapter.state_dict().items()}
    return AdapterFile(
        config=CONFIG,
        tensors=tensors,
        backbone="tiny",
        fingerprint="0123" * 16,
        head="Default",
        elements=(1, 6, 8),
        reference_energies={1: -13.6, 6: -1029.0, 8: -2041.25},
        reference_energies_method="isolated",
        level_of_theory="PBE/def2-SVP",
        data={"train": {"structures": 50, "hash": "ab"}},
        training={"seed": 4, "epochs": 3},
        metrics={"valid": {"forces_mae_meV_per_A": 12.5, "energy_mae_meV": None}},
        versions={"torch": torch.__version__},
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def path(tmp_path: Path, adapter_file: AdapterFile) -> Path:
    return write_adapter(tmp_path / "a.adapter", adapter_file)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], **tensors: torch.Tensor) -> None:
    """Change the header of a file behind the library's back."""
    header = json.loads(metadata(path)[KEY])
    change(header)
    save_file({**load_file(path), **tensors}, path, metadata={KEY: json.dumps(header)})


def metadata(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def backbone_like(name: str, fingerprint: str, head: str = "Default") -> Backbone:
    return Backbone(
        name=name, source="a test", network=torch.nn.Identity(), config={}, fingerprint=fingerprint, elements=(1, 6, 8),
        r_max=4.0, heads=("Default", "other"), head=head, atomic_energies={},
    )  # fmt: skip


# -- round trip ------------------------------------------------------------------------------------------------------


def test_everything_comes_back(path: Path, adapter_file: AdapterFile) -> None:
    found = read_adapter(path)
    assert found.path == path
    assert set(found.tensors) == set(adapter_file.tensors)
    for name, tensor in adapter_file.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert replace(found, tensors={}, path=None) == replace(adapter_file, tensors={})


def test_a_stored_adapter_gives_the_same_network(path: Path, adapter_file: AdapterFile) -> None:
    with borrowed("agnostic") as network:
        adapter = attach(network, read_adapter(path).config)
        adapter.load_state_dict(read_adapter(path).tensors)
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(tensor.float(), adapter_file.tensors[name])
        assert all(gate.calibrated for gate in adapter.gates.values())


def test_the_header_can_be_read_by_other_programs(path: Path, adapter_file: AdapterFile) -> None:
    header = json.loads(metadata(path)[KEY])
    assert header["format_version"] == FORMAT_VERSION
    assert header["elements"] == ["H", "C", "O"]
    assert header["reference_energies"] == {"H": -13.6, "C": -1029.0, "O": -2041.25}
    assert header["units"] == {"energy": "eV", "length": "A", "forces": "eV/A"}
    assert header["adapter"]["method"] == "mmea"
    assert header["n_parameters"] == adapter_file.n_parameters
    assert all(ends == [-0.25, 1.5] for ends in header["gate_ranges"].values())
    assert header["training"]["seed"] == 4


def test_the_published_adapter_is_at_most_700_kilobytes_in_float32(tmp_path: Path, adapter_file: AdapterFile) -> None:
    network = build_network(
        network_config(hidden_irreps="128x0e + 128x1o", max_ell=3, MLP_irreps="16x0e", radial_MLP=[64] * 3)
    ).float()
    adapter = attach(network, AdapterConfig())
    assert adapter.n_parameters == 151_354
    for gate in adapter.gates.values():
        gate.set_range(torch.zeros_like(gate.z_low), torch.ones_like(gate.z_high))
    tensors = adapter.state_dict()
    path = write_adapter(tmp_path / "paper.adapter", replace(adapter_file, config=adapter.config, tensors=tensors))
    assert read_adapter(path).n_parameters == 151_354
    assert 4 * 151_354 < path.stat().st_size <= 700_000


def test_figures_that_do_not_exist_are_null(tmp_path: Path, adapter_file: AdapterFile) -> None:
    metrics = {"test": {"energy": float("nan"), "forces": torch.tensor(2.5)}}
    path = write_adapter(tmp_path / "b.adapter", replace(adapter_file, metrics=metrics))
    assert read_adapter(path).metrics == {"test": {"energy": None, "forces": 2.5}}


def test_later_checks_can_be_added(path: Path, adapter_file: AdapterFile) -> None:
    update_adapter(path, checks={"md": "passed"})
    found = read_adapter(path)
    assert found.checks == {"md": "passed"}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in adapter_file.tensors.items())


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_missing_and_unexpected_tensors_are_named(path: Path) -> None:
    file = read_adapter(path)
    name = next(iter(file.tensors))
    with borrowed("agnostic") as network:
        adapter = attach(network, file.config)
        with pytest.raises(AdapterError, match=f"are missing: {name}"):
            adapter.load_state_dict({k: v for k, v in file.tensors.items() if k != name})
        with pytest.raises(AdapterError, match=r"do not belong to this adapter: gates\.extra"):
            adapter.load_state_dict({**file.tensors, "gates.extra": torch.zeros(1)})


def test_another_backbone_shows_both_fingerprints(path: Path) -> None:
    file = read_adapter(path)
    file.check_backbone(backbone_like("tiny", "0123" * 16))
    with pytest.raises(AdapterFileError) as problem:
        file.check_backbone(backbone_like("big", "abcd" * 16))
    for part in (str(path), "'tiny'", "'big'", "0123" * 16, "abcd" * 16):
        assert part in str(problem.value)


def test_another_head_is_named(path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"made for head 'Default' .* but head 'other' is loaded"):
        read_adapter(path).check_backbone(backbone_like("tiny", "0123" * 16, head="other"))


def test_a_newer_format_asks_for_an_upgrade(path: Path) -> None:
    rewrite(path, lambda header: header.update(format_version=FORMAT_VERSION + 1, novelty=1))
    with pytest.raises(AdapterFileError, match=rf"version {FORMAT_VERSION + 1}, newer than .* upgrade mmea"):
        read_adapter(path)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.001, 0.01, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_one_clear_error(path: Path, fraction: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(AdapterFileError, match=r"a\.adapter is not a readable adapter file: truncated, damaged"):
        read_adapter(path)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_one_clear_error(path: Path, seed: int) -> None:
    path.write_bytes(
        torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(seed)).byte().numpy().tobytes()
    )
    with pytest.raises(AdapterFileError, match="not a readable adapter file"):
        read_adapter(path)


def test_a_plain_safetensors_file_is_not_an_adapter(tmp_path: Path) -> None:
    for number, text in enumerate((None, {"format": "pt"})):
        save_file({"w": torch.zeros(3)}, tmp_path / f"{number}.adapter", metadata=text)
        with pytest.raises(AdapterFileError, match="a safetensors file, but not an adapter"):
            read_adapter(tmp_path / f"{number}.adapter")


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [lambda t, p: p.write_bytes(pickle.dumps(t)), torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, write: Callable[[Trap, Path], object]) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.adapter"
    write(Trap(mark), path)
    with pytest.raises(AdapterFileError, match="not a readable adapter file"):
        read_adapter(path)
    assert not mark.exists()


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.adapter", tmp_path):
        with pytest.raises(AdapterFileError, match="no such adapter file"):
            read_adapter(path)
    for name in (DEFAULT_BACKBONE, "mace-off23-medium"):
        with pytest.raises(AdapterFileError, match=rf"MMEACalculator\(backbone='{name}'\)"):
            read_adapter(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("format_version"),
        lambda h: h.update(format_version="one"),
        lambda h: h.update(format_version=0),
        lambda h: h.update(format_version=None),
        lambda h: h.pop("adapter"),
        lambda h: h["adapter"].update(wings=2),
        lambda h: h.update(adapter=[1]),
        lambda h: h.pop("fingerprint"),
        lambda h: h.pop("reference_energies"),
        lambda h: h["reference_energies"].update(H="much"),
        lambda h: h["reference_energies"].update(Zz=1.0),
        lambda h: h.update(elements=["H", "Zz"]),
        lambda h: h.update(elements=None),
        lambda h: h.pop("format"),
    ],
)
def test_a_damaged_header_is_one_clear_error(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(path, change)
    with pytest.raises(AdapterFileError, match=r"a\.adapter"):
        read_adapter(path)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3"])
def test_a_header_that_is_no_document_is_one_clear_error(path: Path, text: str) -> None:
    save_file(load_file(path), path, metadata={KEY: text})
    with pytest.raises(AdapterFileError, match=r"a\.adapter"):
        read_adapter(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(
    path: Path, adapter_file: AdapterFile, value: float
) -> None:
    name = next(iter(adapter_file.tensors))
    bad = torch.full_like(adapter_file.tensors[name], value)
    before = path.read_bytes()
    with pytest.raises(AdapterFileError, match=r"not finite; .* is not written"):
        write_adapter(path, replace(adapter_file, tensors={**adapter_file.tensors, name: bad}))
    assert path.read_bytes() == before
    rewrite(path, lambda header: None, **{name: bad})
    with pytest.raises(AdapterFileError, match=f"{name} holds values that are not finite"):
        read_adapter(path)


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(
    path: Path, adapter_file: AdapterFile, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before = path.read_bytes()

    def broken(where: Path, content: bytes) -> None:
        with where.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(AdapterFileError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_adapter(path, replace(adapter_file, backbone="other"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path, adapter_file: AdapterFile) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AdapterFileError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "a.adapter", adapter_file)


def test_writing_makes_the_folder(tmp_path: Path, adapter_file: AdapterFile) -> None:
    path = write_adapter(tmp_path / "new" / "folder" / "a.adapter", adapter_file)
    assert read_adapter(path).backbone == "tiny"


def test_tensors_of_any_layout_are_stored(tmp_path: Path, adapter_file: AdapterFile) -> None:
    name = next(n for n, t in adapter_file.tensors.items() if t.dim() == 2)
    turned = adapter_file.tensors[name].T.contiguous().T
    shared = {**adapter_file.tensors, name: turned, "copy": turned}
    path = write_adapter(tmp_path / "c.adapter", replace(adapter_file, tensors=shared))
    assert torch.equal(read_adapter(path).tensors[name], turned)
