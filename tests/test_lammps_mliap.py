"""ML-IAP potentials: the energies, forces and stresses of `MMEACalculator`, from any number of domains."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from ase import Atoms
from ase.build import molecule
from ase.stress import voigt_6_to_full_3x3_stress
from mliap_double import KokkosData, PlainData, Results, decompose, elements_of, evaluate
from small_adapter import ENERGIES, adapter, backbone_path, box, calculator, folder, trained
from torch import nn
from typer.testing import CliRunner

from conftest import ELEMENTS, crystal, ethanol, random_network
from mmea_calc import AdapterConfig
from mmea_calc.adapter_file import AdapterFile
from mmea_calc.backbone import Backbone
from mmea_calc.errors import AdapterFileError, BackboneError, EngineError
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.lammps import MLIAPPotential, export_mliap, read_mliap
from mmea_calc.lammps.export import FORMAT, restore
from mmea_cli.main import app

CHARGED: dict[str, Any] = {
    "embedding_specs": {"total_charge": {"type": "continuous", "emb_dim": 4, "per": "graph", "in_dim": 1}}
}


@cache
def exported() -> Path:
    return export_mliap(adapter(), folder() / "tiny.pt", dtype="float64").path


@cache
def _opened(copy: int) -> MLIAPPotential:
    return read_mliap(exported())


def potentials(n: int) -> list[MLIAPPotential]:
    """One for each process, as each LAMMPS process opens the file."""
    return [_opened(copy) for copy in range(n)]


@contextmanager
def in_memory(shape: str, method: str | None = "mmea", head: str = "Default") -> Iterator[MLIAPPotential]:
    """A potential on a network of this shape, without a file."""
    with borrowed(shape) as network:
        backbone = Backbone("tiny", "", network, {}, "-", ELEMENTS, 4.0, ("Default",), "Default", ENERGIES)
        backbone.heads = tuple(ARCHITECTURES[shape].get("heads", backbone.heads))
        backbone.head = head
        e0: Any = network.atomic_energies_fn
        e0.atomic_energies.zero_()
        use_fast_path(network)
        potential = MLIAPPotential(backbone, trained(backbone, method) if method else None)
        try:
            yield potential
        finally:
            potential.potential.use(None)


def assert_same(results: Results, atoms: Atoms, atol: float = 1e-10) -> None:
    """As `MMEACalculator` has them."""
    atoms = atoms.copy()
    atoms.calc = calculator()
    assert results.energy == pytest.approx(atoms.get_potential_energy(), rel=0, abs=atol * len(atoms))
    np.testing.assert_allclose(results.energies, atoms.get_potential_energies(), rtol=0, atol=atol)
    np.testing.assert_allclose(results.forces, atoms.get_forces(), rtol=0, atol=atol)
    if atoms.pbc.all():
        virial = -atoms.get_volume() * voigt_6_to_full_3x3_stress(atoms.get_stress())
        np.testing.assert_allclose(results.virial, virial, rtol=0, atol=10 * atol)


def assert_consistent(potential: MLIAPPotential, atoms: Atoms, atol: float = 1e-10) -> None:
    """One domain, its ghosts periodic images, gives what the same network gives for the whole structure."""
    results = evaluate([potential], atoms, (1, 1, 1))
    inner = potential.potential
    whole = inner.predict(inner.collate([inner.graph(atoms)]), stress=True)
    assert whole.forces is not None
    assert whole.stress is not None
    np.testing.assert_allclose(results.energies, whole.node_energy.numpy(), rtol=0, atol=atol)
    np.testing.assert_allclose(results.forces, whole.forces.numpy(), rtol=0, atol=atol)
    np.testing.assert_allclose(results.virial, -atoms.get_volume() * whole.stress[0].numpy(), rtol=0, atol=10 * atol)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("structure", [box, crystal, ethanol])
def test_domains_together_give_the_calculators_results(structure: Any, grid: tuple[int, int, int]) -> None:
    atoms = structure()
    results = evaluate(potentials(int(np.prod(grid))), atoms, grid)
    assert_same(results, atoms)
    assert {tuple(c) for c in results.calls} == {(("forward", 16), ("reverse", 16))}


@pytest.mark.parametrize("method", ["gates", "elora", "sparse", "full", "readout"])
def test_every_method_is_kept(method: str) -> None:
    with in_memory("agnostic", method) as potential:
        assert_consistent(potential, box())
        adapted = evaluate([potential], box(), (1, 1, 1))
        assert potential.potential.adapter is not None
        with potential.potential.adapter.disabled():
            bare = evaluate([potential], box(), (1, 1, 1))
    assert np.abs(adapted.forces - bare.forces).max() > 1e-3


@pytest.mark.filterwarnings("ignore:some convolutions run in mace-torch's own:UserWarning")
@pytest.mark.parametrize("shape", [s for s in ARCHITECTURES if s not in ("agnostic", "heads")])
def test_networks_of_every_shape_can_be_divided(shape: str) -> None:
    with in_memory(shape) as potential:
        assert_consistent(potential, box(), atol=1e-9)


@pytest.mark.parametrize("head", ["low", "high"])
def test_the_head_is_the_adapters(head: str) -> None:
    with in_memory("heads", head=head) as potential:
        assert_consistent(potential, box())
        energies = evaluate([potential], box(), (1, 1, 1)).energies
    with in_memory("heads", head="low") as potential:
        same = np.array_equal(evaluate([potential], box(), (1, 1, 1)).energies, energies)
    assert same == (head == "low")


def test_what_is_exported_differs_from_the_bare_backbone() -> None:
    adapted = evaluate(potentials(1), box(), (1, 1, 1))
    with in_memory("agnostic", None) as bare:  # the network that the file was made for
        assert_consistent(bare, box())
        plain = evaluate([bare], box(), (1, 1, 1))
    (potential,) = potentials(1)
    assert potential.potential.adapter is not None
    with potential.potential.adapter.disabled():
        off = evaluate([potential], box(), (1, 1, 1))
    np.testing.assert_allclose(off.energies, plain.energies, rtol=0, atol=1e-10)
    assert np.abs(adapted.forces - plain.forces).max() > 1e-2
    assert np.abs(adapted.energies - plain.energies).max() > 1e-2


def test_without_the_exchanges_domains_would_be_wrong() -> None:
    class NoForward(KokkosData):
        def forward_exchange(self, source: Any, target: Any, width: int) -> None:
            super().forward_exchange(source, target, width)
            target[self.nlocal :] = 0

    class NoReverse(KokkosData):
        def reverse_exchange(self, source: Any, target: Any, width: int) -> None:
            super().reverse_exchange(source, target, width)
            target.copy_(source)

    right = evaluate(potentials(2), box(), (2, 1, 1))
    without_forward = evaluate(potentials(2), box(), (2, 1, 1), data_class=NoForward)
    without_reverse = evaluate(potentials(2), box(), (2, 1, 1), data_class=NoReverse)
    assert np.abs(without_forward.energies - right.energies).max() > 1e-3
    np.testing.assert_array_equal(without_reverse.energies, right.energies)
    assert np.abs(without_reverse.forces - right.forces).max() > 1e-3


def test_atoms_may_move_between_domains_from_step_to_step() -> None:
    processes = potentials(2)
    atoms = box()
    for step in range(3):
        atoms.rattle(0.05, seed=step)
        atoms.positions += 1.5
        assert_same(evaluate(processes, atoms, (2, 1, 1), seed=step), atoms)


@pytest.mark.parametrize("atoms", [molecule("H2O"), molecule("H2O", vacuum=8, pbc=True)], ids=["open", "periodic"])
def test_a_domain_without_atoms_takes_part(atoms: Atoms) -> None:
    if atoms.pbc.all():
        atoms.positions[:, 0] -= atoms.positions[:, 0].min() - 0.1
    results = evaluate(potentials(3), atoms, (3, 1, 1))
    domains = decompose(atoms, 4.0, (3, 1, 1))
    if atoms.pbc.all():
        assert any(d.n_local == 0 for d in domains)
    assert_same(results, atoms)
    assert len(results.calls[0]) == 2


def test_an_atom_without_neighbours_has_its_energy() -> None:
    atoms = Atoms("OH2", [[0, 0, 0], [30, 0, 0], [60, 0, 0]])
    results = evaluate(potentials(2), atoms, (2, 1, 1))
    assert_same(results, atoms)
    assert results.forces.tolist() == np.zeros((3, 3)).tolist()


def test_single_precision_keeps_the_reference_energies() -> None:
    stored = potentials(1)[0].stored
    assert stored is not None
    results = evaluate([restore({**stored, "dtype": "float32"})], box(), (1, 1, 1))
    assert_same(results, box(), atol=2e-5)


# -- LAMMPS as it should not be run ----------------------------------------------------------------------------------


def plain_data(potential: MLIAPPotential) -> PlainData:
    (domain,) = decompose(box(), potential.cutoff, (1, 1, 1))
    return PlainData(domain, elements_of(potential, box().numbers[domain.atoms]))


def test_without_kokkos_a_network_with_messages_says_what_to_do() -> None:
    (potential,) = potentials(1)
    with pytest.raises(EngineError, match="-sf kk"):
        potential.compute_forces(plain_data(potential))


def test_without_kokkos_a_network_of_one_layer_runs() -> None:
    with in_memory("one-interaction") as potential:
        assert potential.widths == []
        data = plain_data(potential)
        potential.compute_forces(data)
        lent = evaluate([potential], box(), (1, 1, 1))
    (domain,) = decompose(box(), potential.cutoff, (1, 1, 1))
    assert data.energy == pytest.approx(lent.energy, rel=0, abs=1e-9)
    np.testing.assert_allclose(data.energies, lent.energies[domain.atoms[: domain.n_local]], rtol=0, atol=1e-10)


def test_an_atom_type_without_element_is_refused() -> None:
    (potential,) = potentials(1)
    data = plain_data(potential)
    data._elements[0] = -1
    with pytest.raises(EngineError, match="not NULL"):
        potential.compute_forces(data)
    data.nlistatoms -= 1
    data.nlocal = data.nlistatoms + 1  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="hybrid"):
        potential.compute_forces(data)


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_file_names_one_function_of_this_package_and_torchs_tensors() -> None:
    with zipfile.ZipFile(exported()) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        operations = list(pickletools.genops(archive.read(name)))
    assert not [code.name for code, _, _ in operations if code.name in ("INST", "STACK_GLOBAL", "OBJ")]
    assert {str(argument) for code, argument, _ in operations if code.name == "GLOBAL"} == {
        "mmea_calc.lammps.export restore",
        "torch._utils _rebuild_tensor_v2",
        "torch ByteStorage",
        "collections OrderedDict",
    }


def test_torch_opens_the_file_as_lammps_does() -> None:
    script = (
        "import torch\n"
        f"unified = torch.load({str(exported())!r}, weights_only=False)\n"  # newer LAMMPS
        "unified.interface = object()\n"
        "print(unified.element_types, unified.ndescriptors, unified.nparams, unified.rcutfac)\n"
        "from mmea_calc.lammps import allow_loading; allow_loading()\n"
        f"print(torch.load({str(exported())!r}).element_types)\n"  # older LAMMPS
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder())
    assert done.stdout == "['H', 'C', 'O'] 1 1 2.0\n['H', 'C', 'O']\n", done.stderr


def test_safe_loading_alone_does_not_open_it() -> None:
    with pytest.raises(pickle.UnpicklingError, match="restore"):
        torch.load(exported(), weights_only=True)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    whole = exported().read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match="no whole file"):
        read_mliap(cut)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(EngineError, match="holds a dict"):
        read_mliap(tmp_path / "other.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "network.pt")
    with pytest.raises(EngineError, match="no whole file"):
        read_mliap(tmp_path / "network.pt")
    with pytest.raises(EngineError, match="no such file"):
        read_mliap(tmp_path / "absent.pt")
    with pytest.raises(EngineError, match="upgrade mmea"):
        restore({"format": FORMAT, "format_version": 99})
    with pytest.raises(EngineError, match="export the adapter again"):
        restore({})


@pytest.mark.parametrize(
    ("source", "target", "error", "says"),
    [
        (adapter, "a.model", EngineError, "should end in .pt"),
        (adapter, "absent/a.pt", EngineError, "no folder"),
        (lambda: AdapterFile(AdapterConfig(method="bottleneck"), {}, "-", "-"), "a.pt", EngineError, "not equivariant"),
        (lambda: "absent.adapter", "a.pt", AdapterFileError, "no such adapter"),
        (lambda: "absent.model", "a.pt", BackboneError, "no file"),
    ],
    ids=["suffix", "folder", "bottleneck", "adapter", "backbone"],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, source: Any, target: str, error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        export_mliap(source(), tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    (potential,) = potentials(1)
    assert potential.file is not None
    with pytest.raises(AdapterFileError, match="fingerprint"):
        export_mliap(replace(potential.file, fingerprint="0"), tmp_path / "a.pt", backbone=backbone_path())
    assert not list(tmp_path.iterdir())


def test_a_network_that_embeds_charges_is_refused() -> None:
    backbone = Backbone("tiny", "", random_network(**CHARGED), {}, "-", ELEMENTS, 4.0, ("Default",), "Default", {})
    with pytest.raises(EngineError, match="total charge or spin"):
        MLIAPPotential(backbone, None)


def test_a_potential_made_in_memory_is_not_pickled() -> None:
    with in_memory("agnostic", None) as potential, pytest.raises(EngineError, match="export_mliap"):
        pickle.dumps(potential)


def test_the_command_writes_the_file_and_says_how_to_use_it(tmp_path: Path) -> None:
    target = tmp_path / "a.pt"
    result = CliRunner().invoke(app, ["export", "lammps", str(adapter()), "-o", str(target), "--dtype", "float64"])
    assert result.exit_code == 0, result.output
    assert f"pair_style mliap unified {target} 0" in result.output
    assert "pair_coeff * * H C O" in result.output
    assert_same(evaluate([read_mliap(target)], box(), (1, 1, 1)), box())
    refused = CliRunner().invoke(app, ["export", "lammps", str(adapter()), "-o", str(tmp_path / "a.model")])
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output
