"""Backbones load by name or path, safely, whole, and each for itself."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import read
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import batch_of, ethanol, network_config, run
from mmea_calc import backbone as backbone_module
from mmea_calc import backbone_file, mace_names
from mmea_calc.adapter_file import EMBEDDED as EMBEDDED_ADAPTERS
from mmea_calc.backbone import (
    BACKBONE_FOLDER,
    EMBEDDED,
    Backbone,
    convert_backbone,
    list_backbones,
    load_backbone,
    model_card,
    save_backbone,
)
from mmea_calc.config import DEFAULT_BACKBONE
from mmea_calc.errors import BackboneError
from mmea_calc.graph import build_graph, collate
from mmea_calc.mace_bridge import build_network, quiet, symmetric_contractions

ROOT = Path(__file__).resolve().parents[1]
ASPIRIN = ROOT / "examples" / "data" / "aspirin" / "test.xyz"
E0 = [-1.5, -2.5, -3.5]


def model_file(path: Path, dtype: torch.dtype = torch.float64, seed: int = 5, **changes: Any) -> Path:
    """A tiny network, pickled as mace-torch pickles its own (e3nn's code as TorchScript)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(network_config(**{"atomic_energies": E0, **changes})).to(dtype)
    with quiet():
        torch.save(network, path)
    return path


def outputs(backbone: Backbone, head: int | None = None) -> dict[str, torch.Tensor]:
    index = backbone.head_index if head is None else head
    return run(backbone.network, batch_of(ethanol(), r_max=backbone.r_max, dtype=backbone.dtype, head=index))


@pytest.fixture(scope="module")
def default() -> Backbone:
    return load_backbone()


# --- embedded -------------------------------------------------------------------------------------------------------


def test_default_backbone_says_what_it_is(default: Backbone) -> None:
    assert default.name == "mmea-organic-s10"
    assert default.elements == (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
    assert default.r_max == 4.5
    assert default.n_parameters == 325_328
    assert default.level_of_theory is not None
    assert default.level_of_theory.startswith("PBE/def2-SVP")
    assert default.licence is not None
    assert default.licence.startswith("MIT")
    assert default.trust_note is None
    assert (default.head, default.head_index) == ("Default", 0)


def test_backbone_is_frozen_in_eval_mode_and_yields_interaction_energies(default: Backbone) -> None:
    assert not any(p.requires_grad for p in default.network.parameters())
    assert not default.network.training
    # isolated hydrogen at PBE/def2-SVP, eV: the package's own config
    assert default.atomic_energies[1] == pytest.approx(-13.57028349160633, abs=1e-12)
    batch = collate([build_graph(ethanol(), 4.5)], default.elements, dtype=default.dtype)
    result = default.network(dict(batch.tensors), compute_force=False)
    assert torch.equal(result["energy"], result["interaction_energy"])
    # the atomisation energy of ethanol is about 35 eV, its total energy -4,200 eV
    assert -60 < result["energy"].item() < -20


def test_every_embedded_backbone_has_its_files_and_a_model_card() -> None:
    for name in EMBEDDED:
        config = json.loads((BACKBONE_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(BACKBONE_FOLDER / f"{name}.safetensors")
        frequencies = (
            0 if name in ("mmea-organic-s", "mmea-organic-s-xtb") else 8
        )  # of the radial functions, trained from the second version on
        assert sum(t.numel() for t in tensors.values()) == PARAMETERS.get(name, 325_328) + frequencies
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        card = model_card(name)
        assert card is not None
        for part in (config["level_of_theory"].split(" ")[0], "not good for", "MIT", "## Errors"):
            assert part in card
    assert model_card("mace-off23-small") is None


PARAMETERS = {"mmea-organic-m": 1_091_984}  # of the others each has as many as the first


def test_fingerprints_of_the_embedded_backbones_are_these() -> None:
    # Adapters in use name them: computed from the released files, and not to change while those do not.
    assert FINGERPRINTS.keys() == EMBEDDED.keys()
    for name, fingerprint in FINGERPRINTS.items():
        assert load_backbone(name).fingerprint == fingerprint


FINGERPRINTS = {
    "mmea-organic-s": "4f80f6cf90e7c7420a7799cc6a9253b6c01182d67176e8efb7cd44cc38ff1a0b",
    "mmea-organic-s-xtb": "d5980aba7155872f9c6ebb6a7b32499faeb73e1146b77b8165b95492bbc44774",
    "mmea-organic-s2": "d753a8afae269cca1c76243f9bb1255bc2ca0b9b8bc5843a99205464aed8e158",
    "mmea-organic-s3": "17a4aeae59e88ecff291206c159538444bed5ba11e12b03b9f2e44371b6b3eb5",
    "mmea-organic-s4": "d710a3e4a60e31244407a5fc05e2e049a0b93e1d1f0a7422d8beb178f4be93af",
    "mmea-organic-s5": "b12bdafb2537658bcb57dbd5a3a154028200f770b3cd4d8c75ef8637873c788b",
    "mmea-organic-s6": "173bc46032f8ae28bb5e7ef10de33a835fb2132cea0ff62a69118c6fed0da5ac",
    "mmea-organic-s7": "779c5575a330d1d09f6d1f5954b80ce9a30b0943006f96164a7518ef136a16f8",
    "mmea-organic-s8": "6f334bc9311f1d69a4c95bd5231975093fe972b03386b96e2bf14404be3f8a3d",
    "mmea-organic-s9": "b7a0328c21b5955706cb2b90c9630ae9cf8718da4eb85f69d8cdefd39210230a",
    "mmea-organic-s10": "a62306fc0d9c4f89dbc5404476ea747aae6896fd67497bd8d90ecb6986d314ef",
    "mmea-organic-m": "3a5bfa278ba844754175839da7d58b15dcb7b062aa5d375b6658dae1aba6ed87",
    "mmea-organic-s2-xtb": "57cc1c018420d522192ebf58157aa4dc9639b95e07b2b16484ff253255321e12",
}


def test_embedded_backbone_loads_without_unpickling_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert load_backbone("mmea-organic-s-xtb").level_of_theory == "GFN2-xTB (tblite 0.8)"


def test_loading_prints_nothing_and_leaves_the_process_as_it_was() -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); before = dict(os.environ); import torch\n"
        "state = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().sum()\n"
        "from mmea_calc.backbone import load_backbone; load_backbone(dtype='float64')\n"
        "assert state == (torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().sum())\n"
        "assert dict(os.environ) == before"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


_REPEAT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)  # of several, fewer may be there for the first call of a process: it is then rounded otherwise
from ase.build import molecule
from mmea_calc.backbone import load_backbone
from mmea_calc.graph import build_graph, collate
backbone = load_backbone()
network = backbone.network.requires_grad_(True)
molecules = [molecule("CH3CH2OH") for _ in range(4)]
for k, atoms in enumerate(molecules):
    atoms.rattle(0.1, seed=k)
batch = collate([build_graph(atoms, 4.5) for atoms in molecules], backbone.elements, dtype=backbone.dtype)
seen = set()
for _ in range(4):
    network.zero_grad()
    output = network(dict(batch.tensors), training=True)
    (output["forces"].square().sum() + output["energy"].sum()).backward()
    parts = [output["forces"].detach()] + [p.grad for p in network.parameters() if p.grad is not None]
    seen.add(torch.cat([part.flatten() for part in parts]).numpy().tobytes())
sys.exit(len(seen) - 1)
"""


def test_first_call_in_a_process_gives_the_bits_of_every_later_one() -> None:
    program = _REPEAT.format(paths=[str(ROOT)])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


def test_copied_network_computes_with_its_own_weights() -> None:
    backbone = load_backbone(dtype="float64")
    with quiet():
        twin = copy.deepcopy(backbone.network)
    batch = collate([build_graph(ethanol(), 4.5)], backbone.elements, dtype=backbone.dtype)
    before = run(backbone.network, batch)["forces"]
    for parameter in backbone.network.parameters():
        parameter.mul_(1.1)
    assert not torch.allclose(run(backbone.network, batch)["forces"], before)
    assert torch.allclose(run(twin, batch)["forces"], before, rtol=0, atol=1e-9)


def test_each_call_builds_a_network_of_its_own(default: Backbone) -> None:
    other = load_backbone()
    assert other.fingerprint == default.fingerprint
    addresses = {p.data_ptr() for p in default.network.parameters() if p.numel()}
    assert addresses.isdisjoint({p.data_ptr() for p in other.network.parameters() if p.numel()})


def test_precision_is_as_asked_and_moves_in_place(tmp_path: Path) -> None:
    backbone = load_backbone(dtype="float64")
    assert backbone.dtype == torch.float64
    assert backbone.to(dtype="float32") is backbone
    assert backbone.dtype == torch.float32
    with pytest.raises(BackboneError, match="float16"):
        backbone.to(dtype=torch.float16)
    with pytest.raises(BackboneError, match="float32 or float64"):
        load_backbone(dtype="half")  # type: ignore[arg-type]


def test_device_that_is_not_here_is_named() -> None:
    with pytest.raises(BackboneError, match="cuda:77"):
        load_backbone(device="cuda:77")
    with pytest.raises(BackboneError, match="toaster"):
        load_backbone(device="toaster")


def test_backbone_works_on_every_device(device: str) -> None:
    assert load_backbone(device=device).device.type == device


def test_zero_shot_forces_on_aspirin_are_as_good_as_when_released(default: Backbone) -> None:
    frames = read(ASPIRIN, ":")
    graphs = [build_graph(atoms, default.r_max) for atoms in frames]
    batch = collate(graphs, default.elements, dtype=default.dtype)
    result = default.network(dict(batch.tensors))
    forces = np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])
    # 53.14 meV/A over the 30 frames of examples/data/aspirin/test.xyz (300, 600 and 1200 K), measured with the
    # released weights in float32 and in float64
    assert 1e3 * np.abs(result["forces"].numpy(force=True) - forces).mean() == pytest.approx(53.14, rel=0.01)
    e0 = [sum(default.atomic_energies[z] for z in atoms.numbers) for atoms in frames]
    error = result["energy"].numpy(force=True) + e0 - [atoms.info["REF_energy"] for atoms in frames]
    # 2.273 meV per atom, measured with it
    assert 1e3 * np.abs(error).mean() / graphs[0].n_atoms == pytest.approx(2.273, rel=0.02)


# --- fingerprint ----------------------------------------------------------------------------------------------------


def test_fingerprint_changes_when_one_weight_one_e0_or_the_cutoff_changes() -> None:
    config = network_config(atomic_energies=E0)
    parameters = {name: p.detach() for name, p in build_network(config).named_parameters()}
    before = backbone_file.fingerprint(config, parameters)
    assert backbone_file.fingerprint(dict(config), dict(reversed(parameters.items()))) == before
    changed = {name: p.clone() for name, p in parameters.items()}
    changed["readouts.0.linear.weight"][0] += 1e-12
    assert backbone_file.fingerprint(config, changed) != before
    assert backbone_file.fingerprint(config, {n: p.float() for n, p in parameters.items()}) != before
    for key, value in (("atomic_energies", [-1.5, -2.5, -3.6]), ("r_max", 4.1), ("avg_num_neighbors", 8.1)):
        assert backbone_file.fingerprint({**config, key: value}, parameters) != before
    unusual = [
        ("num_polynomial_cutoff", 6),
        ("gate", "tanh"),
        ("distance_transform", "Agnesi"),
        ("apply_cutoff", False),
    ]
    found = {backbone_file.fingerprint({**config, key: value}, parameters) for key, value in unusual}
    assert len(found | {before}) == 5
    usual = {"distance_transform": "None", "radial_type": "bessel", "apply_cutoff": True}
    assert backbone_file.fingerprint({**config, **usual}, parameters) == before  # said or not
    assert backbone_file.fingerprint({**config, "notes": "anything"}, parameters) == before


def test_fingerprint_is_of_the_stored_tensors_whatever_precision_is_asked_for(default: Backbone) -> None:
    assert load_backbone(dtype="float64").fingerprint == default.fingerprint


# --- pickled files and conversion -----------------------------------------------------------------------------------

TWO_HEADS: dict[str, Any] = {
    "heads": ["pbe", "r2scan"],
    "atomic_energies": [E0, [-1.0, -2.0, -3.0]],
    "atomic_inter_scale": [1.0, 2.0],
    "atomic_inter_shift": [0.1, 0.2],
}
KINDS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {"dtype": torch.float32},
    "without scale and shift": {"model": "MACE"},
    "heads, repulsion, density": {
        "dtype": torch.float32,
        **TWO_HEADS,
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
        "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    },
}


def test_an_adapter_is_no_backbone_and_no_damaged_one(tmp_path: Path) -> None:
    adapter = tmp_path / "aspirin.adapter"
    shutil.copyfile(EMBEDDED_ADAPTERS / "gfn2-to-pbe.adapter", adapter)
    with pytest.raises(BackboneError, match=r"aspirin\.adapter is an adapter, not a backbone"):
        load_backbone(adapter, device="cpu")


def test_an_embedded_backbone_need_not_be_converted(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="comes with mmea in the safe format"):
        convert_backbone(DEFAULT_BACKBONE, tmp_path / "own.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_converted_backbone_has_the_same_fingerprint_and_the_same_bits(kind: str, tmp_path: Path) -> None:
    source = model_file(tmp_path / "own.model", **KINDS[kind])
    head = KINDS[kind].get("heads", [None])[-1]
    pickled = load_backbone(source, head=head, dtype="float64")
    convert_backbone(source, tmp_path / "own.safetensors")
    converted = load_backbone(tmp_path / "own.safetensors", head=head, dtype="float64")
    assert pickled.trust_note is not None
    assert "own.model" in pickled.trust_note
    assert converted.trust_note is None
    assert converted.fingerprint == pickled.fingerprint
    assert converted.atomic_energies == pickled.atomic_energies
    assert (converted.head, converted.heads, converted.r_max) == (pickled.head, pickled.heads, pickled.r_max)
    for backbone in (pickled.to(dtype="float64"), converted):
        assert not any(p.requires_grad for p in backbone.network.parameters())
    for dtype in (torch.float64, torch.float32):
        one, other = outputs(pickled.to(dtype=dtype)), outputs(converted.to(dtype=dtype))
        assert torch.equal(one["energy"], other["energy"])
        assert torch.equal(one["forces"], other["forces"])


def test_pickled_network_gives_what_mace_computes_from_the_same_file(tmp_path: Path) -> None:
    source = model_file(tmp_path / "own.model")
    with quiet():
        stock = torch.load(source, weights_only=False)
    backbone = load_backbone(source, dtype="float64")
    ours, theirs = outputs(backbone), run(stock, batch_of(ethanol()))
    total = ours["energy"] + sum(backbone.atomic_energies[z] for z in ethanol().numbers)
    assert torch.allclose(total, theirs["energy"], rtol=0, atol=1e-10)
    assert torch.allclose(ours["forces"], theirs["forces"], rtol=0, atol=1e-10)
    assert backbone.atomic_energies == dict(zip((1, 6, 8), E0, strict=True))


def test_network_that_lacks_later_attributes_still_loads(tmp_path: Path) -> None:
    network = build_network(network_config(atomic_energies=E0))
    for name in ("heads", "use_reduced_cg", "use_so3", "use_agnostic_product", "apply_cutoff", "edge_irreps"):
        delattr(network, name)
    del network.radial_embedding.apply_cutoff  # type: ignore[union-attr]
    with quiet():
        torch.save(network, tmp_path / "old.model")
    backbone = load_backbone(tmp_path / "old.model", dtype="float64")
    assert backbone.heads == ("Default",)
    assert torch.isfinite(outputs(backbone)["forces"]).all()


def test_network_that_cannot_be_rebuilt_is_used_as_unpickled_but_not_converted(tmp_path: Path) -> None:
    network = build_network(network_config(atomic_energies=E0))
    reference = run(network, batch_of(ethanol()))
    network.interactions[1].avg_num_neighbors = 5.0  # type: ignore[index, union-attr]
    with quiet():
        torch.save(network, tmp_path / "odd.model")
    backbone = load_backbone(tmp_path / "odd.model", dtype="float64")
    assert backbone.notes is not None
    assert backbone.notes.startswith("used as unpickled")
    result = outputs(backbone)
    assert not torch.allclose(result["forces"], reference["forces"])
    assert len(symmetric_contractions(backbone.network)) == 2
    with pytest.raises(BackboneError, match="other energy"):
        convert_backbone(tmp_path / "odd.model", tmp_path / "odd.safetensors")
    assert not (tmp_path / "odd.safetensors").exists()


def test_network_with_reduced_coupling_tensors_survives(tmp_path: Path) -> None:
    """As trained with cuequivariance: fewer paths than mace-torch builds without it."""
    network: Any = build_network(network_config(atomic_energies=E0))
    part = network.products[0].symmetric_contractions.contractions[0]
    part.U_matrix_3 = part.U_matrix_3[..., :2].clone()
    part.weights_max = torch.nn.Parameter(part.weights_max[:, :2].detach().clone())
    with quiet():
        torch.save(network, tmp_path / "reduced.model")
    pickled = load_backbone(tmp_path / "reduced.model", dtype="float64")
    assert pickled.notes is None
    convert_backbone(tmp_path / "reduced.model", tmp_path / "reduced.safetensors")
    converted = load_backbone(tmp_path / "reduced.safetensors", dtype="float64")
    assert converted.fingerprint == pickled.fingerprint
    assert torch.equal(outputs(converted)["forces"], outputs(pickled)["forces"])


def test_pickle_is_opened_without_weakening_torch_for_others(tmp_path: Path) -> None:
    source, environment = model_file(tmp_path / "own.model"), dict(os.environ)
    load_backbone(source)
    assert dict(os.environ) == environment
    with pytest.raises(pickle.UnpicklingError):
        torch.load(source)


def test_saved_config_beside_the_tensors_is_read_too(tmp_path: Path, default: Backbone) -> None:
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"copy{suffix}").write_bytes((BACKBONE_FOLDER / f"{DEFAULT_BACKBONE}{suffix}").read_bytes())
    copy = load_backbone(tmp_path / "copy.safetensors")
    assert (copy.name, copy.fingerprint) == ("copy", default.fingerprint)


def test_converting_a_safe_file_keeps_its_fingerprint_and_notes(tmp_path: Path, default: Backbone) -> None:
    convert_backbone(BACKBONE_FOLDER / f"{DEFAULT_BACKBONE}.safetensors", tmp_path / "one.safetensors")
    one = load_backbone(tmp_path / "one.safetensors")
    assert one.fingerprint == default.fingerprint
    assert (one.level_of_theory, one.licence) == (default.level_of_theory, default.licence)
    assert not list(tmp_path.glob("*.json"))
    assert (tmp_path / "one.safetensors").stat().st_size < 1.4e6


def test_failed_writing_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = network_config(atomic_energies=E0)
    state = build_network(config).state_dict()
    target = tmp_path / "one.safetensors"
    target.write_bytes(b"the old one")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(backbone_file, "save", fail)
    with pytest.raises(BackboneError, match="disk full"):
        save_backbone(target, config, state)
    assert target.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


# --- wrong files and names ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = network_config(atomic_energies=E0)
    save_backbone(tmp_path / "tiny.safetensors", config, build_network(config).state_dict())
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no such thing" * 100, bytes(range(256)) * 64])
def test_random_file_is_one_clear_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"random{suffix}"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=f"random{suffix} is not a whole"):
        load_backbone(path)


def test_truncated_files_are_one_clear_error(tmp_path: Path, tiny: Path) -> None:
    for path in (model_file(tmp_path / "own.model"), tiny):
        content = path.read_bytes()
        for part in (0.3, 0.99):
            path.write_bytes(content[: int(len(content) * part)])
            with pytest.raises(BackboneError, match="is not a whole"):
                load_backbone(path)


def test_pickle_of_something_else_says_what_it_is(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "state.model")
    with pytest.raises(BackboneError, match="dict"):
        load_backbone(tmp_path / "state.model")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.model")
    with pytest.raises(BackboneError, match="Linear; expected a MACE"):
        load_backbone(tmp_path / "linear.model")


def rewrite(path: Path, **changes: Any) -> None:
    """The same file with tensors taken out (None) or put in."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = {k: v for k, v in {**load_file(path), **changes}.items() if v is not None}
    save_file(tensors, path, metadata=metadata)


def test_missing_and_unexpected_tensors_are_named(tiny: Path) -> None:
    rewrite(tiny, **{"readouts.0.linear.weight": None, "surprise": torch.zeros(1)})
    with pytest.raises(BackboneError, match=r"readouts\.0\.linear\.weight.*surprise"):
        load_backbone(tiny)


def test_tensor_of_another_shape_is_named(tiny: Path) -> None:
    rewrite(tiny, **{"readouts.0.linear.weight": torch.zeros(7, dtype=torch.float64)})
    with pytest.raises(BackboneError, match=r"readouts\.0\.linear\.weight has shape \(7,\)"):
        load_backbone(tiny)


def test_newer_format_asks_for_an_upgrade(tiny: Path) -> None:
    with safe_open(str(tiny), framework="pt") as file:
        metadata = dict(file.metadata(), format_version="99")
    save_file(load_file(tiny), tiny, metadata=metadata)
    with pytest.raises(BackboneError, match="upgrade"):
        load_backbone(tiny)


def test_changed_tensors_do_not_pass_for_the_recorded_fingerprint(tiny: Path) -> None:
    weight = load_file(tiny)["readouts.0.linear.weight"]
    rewrite(tiny, **{"readouts.0.linear.weight": weight + 1})
    with pytest.raises(BackboneError, match="fingerprint"):
        load_backbone(tiny)


def test_tensors_without_a_config_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(BackboneError, match=r"bare\.json beside it"):
        load_backbone(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmea-organic", "mmea-organic-s"),
        ("mace-off23-smal", "mace-off23-small"),
        ("zzz", "mmea backbone list"),
        ("lost.model", "there is no file"),
        ("folder/lost", "there is no file"),
    ],
)
def test_unknown_name_or_path_says_what_to_do(name: str, words: str) -> None:
    with pytest.raises(BackboneError, match=words):
        load_backbone(name)


def test_names_do_not_depend_on_case() -> None:
    assert load_backbone("MMEA-Organic-S").name == "mmea-organic-s"


# --- heads ----------------------------------------------------------------------------------------------------------


def test_head_must_be_chosen_and_known(tmp_path: Path) -> None:
    path = model_file(tmp_path / "heads.model", **TWO_HEADS)
    with pytest.raises(BackboneError, match="pbe, r2scan"):
        load_backbone(path)
    with pytest.raises(BackboneError, match=r"no head 'b3lyp'.*pbe, r2scan"):
        load_backbone(path, head="b3lyp")
    backbone = load_backbone(path, head="r2scan", dtype="float64")
    assert (backbone.head_index, backbone.atomic_energies) == (1, {1: -1.0, 6: -2.0, 8: -3.0})
    assert not torch.allclose(outputs(backbone)["energy"], outputs(backbone, head=0)["energy"])


def test_head_called_default_is_the_default(tmp_path: Path) -> None:
    path = model_file(tmp_path / "heads.model", **{**TWO_HEADS, "heads": ["pt_head", "Default"]})
    assert load_backbone(path).head == "Default"


# --- published names ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of mace-torch's, and no network."""
    from mmea_calc.mace_bridge import mace_calculators

    mace_calculators()
    from mace.calculators import foundations_models

    def offline(url: str, filename: str, **_: object) -> None:
        print("Downloading ...")
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(foundations_models, "_urlretrieve_with_timeout", offline)
    monkeypatch.setattr(foundations_models, "module_dir", str(tmp_path / "package"))
    return tmp_path / "cache" / "mace"


@pytest.mark.parametrize("name", mace_names.PUBLISHED)
def test_without_a_network_the_message_names_the_file_and_its_place(
    name: str, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, url = mace_names.locate(name)
    with pytest.raises(BackboneError) as caught:
        load_backbone(name)
    assert str(path) in str(caught.value)
    assert url in str(caught.value)
    assert ".safetensors file instead" in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        # what mace-torch 0.3.16 calls them
        ("mace-off23-medium", "MACE-OFF23_medium.model"),
        ("mace-off24-medium", "MACE-OFF24_medium.model"),
        ("mace-mp-0-small", "20231210mace128L0_energy_epoch249model"),
        ("mace-mp-0b3-medium", "macemp0b3mediummodel"),
        ("mace-omol-0", "MACE-omol-0-extra-large-1024.model"),
        ("mace-mh-1", "macemh1model"),
    ],
)
def test_file_in_mace_torchs_cache_is_used(name: str, file: str, cache: Path) -> None:
    cache.mkdir(parents=True)
    head = {"mace-omol-0": ["other", "omol"]}.get(name, ["Default"])
    model_file(cache / file, heads=head, atomic_energies=[E0] * len(head))
    backbone = load_backbone(name)
    assert backbone.name == name
    assert backbone.source == str(cache / file)
    assert backbone.trust_note is not None
    assert backbone.licence == mace_names.PUBLISHED[name].licence
    assert backbone.head == head[-1]
    assert {row.name for row in list_backbones() if row.available} == {*EMBEDDED, name}


def test_every_network_mace_torch_offers_has_a_name(cache: Path) -> None:
    from mace.calculators import foundations_models

    arguments = {entry.argument for entry in mace_names.PUBLISHED.values() if entry.loader == "mp"}
    assert arguments == set(foundations_models.mace_mp_urls)
    assert set(foundations_models.mace_off_urls) <= {
        entry.argument for entry in mace_names.PUBLISHED.values() if entry.loader == "off"
    }


def test_damaged_file_in_the_cache_is_named(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "MACE-OFF23_small.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(BackboneError, match=r"MACE-OFF23_small\.model is not a whole torch file"):
        load_backbone("mace-off23-small")


def test_list_names_every_backbone_with_licence_and_place(cache: Path) -> None:
    rows = list_backbones()
    assert [row.name for row in rows] == [*EMBEDDED, *mace_names.PUBLISHED]
    assert all(row.licence for row in rows)
    assert [row.name for row in rows if row.available] == list(EMBEDDED)
    assert all(row.path.parent == cache for row in rows if row.origin == "mace-torch" and row.name != "mace-anicc")
    assert backbone_module.DEFAULT_BACKBONE in EMBEDDED
