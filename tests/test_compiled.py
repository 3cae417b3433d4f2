"""A compiled network gives what the network gives, for batches of any size, or is not used."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from ase import Atoms
from ase.build import bulk, molecule
from small_adapter import ENERGIES, trained
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import ELEMENTS, batch_of, crystal, ethanol, random_network, randomise, run, small_backbone_around
from mmea_calc import MMEACalculator, load_backbone
from mmea_calc._e3nn import o3
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile
from mmea_calc.adapter_state import SHORTEST
from mmea_calc.backbone import Backbone
from mmea_calc.config import AdapterConfig
from mmea_calc.errors import CompilationError
from mmea_calc.fast import compiled, machine_code
from mmea_calc.fast.arrangement import arrange
from mmea_calc.fast.harmonics import by_products, written_out
from mmea_calc.fast.machine_code import form_of
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.fast.tracing import Inputs, contraction_forms, evaluator, example, tables_of, trace
from mmea_calc.graph import Batch
from mmea_calc.mace_networks import repeat_to_the_bit
from mmea_calc.potential import Potential
from mmea_cli.main import app


def batches() -> dict[str, Batch]:
    """Of sizes that no example had: other numbers of structures, neighbours and elements."""
    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])
    carbon = bulk("C", "diamond", a=3.5, cubic=True)
    carbon.rattle(0.1, seed=1)
    mixed = (ethanol(), crystal(), Atoms("H"), molecule("CH3COOH"))
    return {
        "molecule": batch_of(ethanol()),
        "pair": batch_of(pair),
        "crystal": batch_of(carbon),
        "mixed": batch_of(*mixed),
    }


@contextmanager
def adapted(name: str) -> Iterator[nn.Module]:
    """The network of this shape as it is compiled: on the fast path, with an adapter, merged."""
    with borrowed(name) as network:
        use_fast_path(network)
        repeat_to_the_bit(network)
        adapter = attach(network, AdapterConfig(gate_rank=2, low_rank=2))
        randomise(adapter, std=0.02)
        adapter.merge()
        yield network


def inputs_of(network: nn.Module, batch: Batch, *, compiled: bool = True, frozen: bool = True) -> Inputs:
    arrangement = arrange(batch.tensors)
    tables = tables_of(network, arrangement.present, compiled=compiled, frozen=frozen)
    return Inputs.of(batch, arrangement, tables, stress=True)


def assert_the_same(found: Any, batch: Batch, network: nn.Module, tolerance: float) -> None:
    """Node energies, forces and the gradient of a strain against the network's own energies, forces and stress."""
    node_energy, forces, strain, doubt = found
    own = run(network, batch, compute_stress=True)
    scale = max(1.0, float(own["forces"].abs().max()))
    assert not doubt
    torch.testing.assert_close(node_energy, own["node_energy"], rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(forces, own["forces"], rtol=0, atol=tolerance * scale)
    volume = torch.linalg.det(batch.tensors["cell"].view(-1, 3, 3)).abs().view(-1, 1, 1)
    torch.testing.assert_close(strain[:-1], own["stress"] * volume, rtol=0, atol=10 * tolerance * scale)
    assert not strain[-1].any()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arranged_forms_give_the_networks_values(name: str, compiled: bool) -> None:
    with adapted(name) as network:
        for batch in batches().values():
            inputs = inputs_of(network, batch, compiled=compiled)
            found = evaluator(network, inputs, 0, compiled=compiled)(*inputs.tensors())
            assert_the_same(found, batch, network, 1e-12)


@pytest.mark.parametrize("name", ["zbl", "nonlinear"])
def test_a_traced_network_holds_for_batches_of_any_size(name: str) -> None:
    with adapted(name) as network:
        shown = example(ELEMENTS, 4.0, head_index=0, dtype=torch.float64, device=torch.device("cpu"))
        traced = trace(network, shown, 0, stress=True)
        for batch in batches().values():
            found = traced.graph(*inputs_of(network, batch).tensors(), *traced.constants)
            assert_the_same(found, batch, network, 1e-12)


def test_slots_gather_and_scatter_the_derivative_of_each_other() -> None:
    arrangement = arrange(batches()["mixed"].tensors)
    generator = torch.Generator().manual_seed(0)
    n_atoms, n_edges = len(arrangement.element), arrangement.edges.slots.shape[1]
    for incidence, n in ((arrangement.edges, n_edges), (arrangement.senders, n_atoms), (arrangement.atoms, n_atoms)):
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        slots = torch.randn(*incidence.rows.shape, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        # <gather x, slots> = <x, scatter slots>
        torch.testing.assert_close((incidence.gather(x) * slots).sum(), (x * incidence.scatter(slots)).sum())
        assert not incidence.gather(x)[incidence.empty].any()
        (gradient,) = torch.autograd.grad((incidence.gather(x) * slots).sum(), x, create_graph=True)
        torch.testing.assert_close(gradient, incidence.scatter(slots))
        (again,) = torch.autograd.grad(gradient.square().sum(), slots)
        torch.testing.assert_close(again, incidence.gather(2 * incidence.scatter(slots)))


@pytest.mark.parametrize("l_max", [0, 1, 2, 3, 5])
def test_written_out_harmonics_are_e3nns(l_max: int) -> None:
    vectors = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = o3.spherical_harmonics(list(range(l_max + 1)), vectors, normalize=True, normalization="component")
    torch.testing.assert_close(written_out(vectors, l_max), theirs, rtol=0, atol=1e-13)
    torch.testing.assert_close(by_products(vectors, l_max), theirs, rtol=0, atol=1e-13)


def test_the_form_is_of_shapes_and_settings_and_not_of_values() -> None:
    def form(seed: int = 0, method: str = "mmea", stress: bool = False, **changes: Any) -> str:
        network = random_network(seed, **changes)
        use_fast_path(network)
        adapter = attach(network, AdapterConfig(method=method, gate_rank=2, low_rank=2))
        randomise(adapter, seed)
        adapter.merge()
        return form_of(network, 0, stress)

    assert form() == form(seed=1)
    network = random_network()
    assert form_of(network, 0, False) != form_of(network, 1, False)
    others = [
        form(stress=True),
        form(method="gates"),
        form(avg_num_neighbors=9.0),
        form(hidden_irreps="5x0e + 5x1o"),
    ]
    assert len({form(), *others}) == len(others) + 1


@pytest.fixture(scope="module")
def program(programs: Path) -> Path:
    """The compiled form of the small backbone with an adapter, stresses included."""
    potential = small_potential()
    path = potential.compile(stress=True)
    assert path.parent == programs
    return path


def smallest_network(seed: int = 0) -> nn.Module:
    """What compiles quickly and has all kinds of parts."""
    network = random_network(seed, max_ell=1, correlation=2, radial_MLP=[4])
    repeat_to_the_bit(network)
    return network


def adapter_for(backbone: Backbone) -> AdapterFile:
    """Its gates level off, since it has seen a stretched molecule; its radial functions do not fade yet."""
    file = trained(backbone)
    file.tensors[SHORTEST].mul_(0.5)
    return file


def small_potential() -> Potential:
    backbone = small_backbone_around(smallest_network(), ENERGIES)
    potential = Potential(backbone)
    potential.use(adapter_for(backbone))
    assert potential.adapter is not None
    potential.adapter.merge()
    return potential


class Counted:
    """How many calls a program answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        call = compiled.CompiledNetwork.__call__

        def counting(program: compiled.CompiledNetwork, *args: Any, **kwargs: Any) -> Any:
            found = call(program, *args, **kwargs)
            self.calls += found is not None
            return found

        monkeypatch.setattr(compiled.CompiledNetwork, "__call__", counting)


def assert_agree(potential: Potential, batch: Batch, *, stress: bool = True) -> None:
    got = potential.predict(batch, stress=stress)
    own = potential._predict_plainly(batch, forces=True, stress=stress, training=False)
    for key in ("energy", "interaction_energy", "node_energy", "forces", "stress"):
        one, other = getattr(got, key), getattr(own, key)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("program")
def test_a_compiled_network_gives_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, potential = Counted(monkeypatch), small_potential()
    for batch in batches().values():
        assert_agree(potential, batch)
    assert counted.calls == 4
    moved = batches()["mixed"]
    moved.tensors["positions"] = moved.tensors["positions"] + 0.01
    assert_agree(potential, moved)


@pytest.mark.usefixtures("program")
def test_a_batch_in_parts_has_the_values_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One structure each where the cache is small; a structure without neighbours has its batch taken whole."""
    calls: list[int] = []
    call = compiled.Program.__call__

    def counting(program: compiled.Program, inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        calls.append(len(inputs[0]))
        return call(program, inputs, values)

    monkeypatch.setattr(compiled.Program, "__call__", counting)
    structures = (ethanol(), crystal(), molecule("CH3COOH"))
    batch, lonely = batch_of(*structures), batch_of(*structures, Atoms("H"))
    sizes = [len(atoms) for atoms in structures]
    for cache, parts in ((10**9, [sum(sizes)]), (1, sizes)):
        monkeypatch.setattr(compiled, "CACHE_PER_THREAD", cache)
        potential = small_potential()
        potential.predict(batch, stress=True)  # the first call of a program is compared with the network's own
        for one, expected in ((batch, parts), (lonely, [sum(sizes) + 1])):
            calls.clear()
            assert_agree(potential, one)
            assert calls == expected


@pytest.mark.usefixtures("program")
def test_one_program_serves_all_adapters_and_sees_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, potential, batch = Counted(monkeypatch), small_potential(), batches()["molecule"]
    assert_agree(potential, batch)
    before = potential.predict(batch, stress=True).forces
    other = adapter_for(replace(potential.backbone, network=smallest_network()))
    for key, tensor in other.tensors.items():
        if key.startswith(("gates.", "updates.")):
            tensor.mul_(1.5)
    potential.use(other)  # in the same places, while merged
    assert_agree(potential, batch)
    after = potential.predict(batch, stress=True).forces
    assert before is not None
    assert after is not None
    assert float((before - after).abs().max()) > 1e-3
    with torch.no_grad():
        next(potential.backbone.network.parameters()).mul_(1.1)
    assert_agree(potential, batch)
    assert counted.calls >= 5
    changed = potential.predict(batch, stress=True).forces
    assert changed is not None
    assert float((changed - after).abs().max()) > 1e-3


@pytest.mark.usefixtures("program")
def test_how_entries_lie_in_memory_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code looks at addresses alone."""
    counted, potential = Counted(monkeypatch), small_potential()
    batch = batches()["molecule"]
    assert_agree(potential, batch)
    columns = {k: t.T.contiguous().T if t.dim() == 2 else t for k, t in batch.tensors.items()}
    assert not columns["positions"].is_contiguous()
    assert_agree(potential, replace(batch, tensors=columns))
    assert counted.calls == 2


@pytest.mark.usefixtures("program")
def test_batches_of_other_types_and_hooks_of_modules_go_to_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code looks at addresses alone, and calls no hooks."""
    counted, potential = Counted(monkeypatch), small_potential()
    batch = batches()["molecule"]
    assert_agree(potential, batch)
    for key, kind in (("edge_index", torch.int32), ("shifts", torch.float32)):
        other = replace(batch, tensors={**batch.tensors, key: batch.tensors[key].to(kind)})
        with suppress(RuntimeError):  # what torch says of such a batch
            potential.predict(other, stress=True)
    assert counted.calls == 1
    seen: list[int] = []
    module = potential.backbone.network.get_submodule("products.1")
    hook = module.register_forward_hook(lambda *_: seen.append(1))
    potential.predict(batch, stress=True)
    assert (counted.calls, len(seen)) == (1, 1)
    hook.remove()
    potential.predict(batch, stress=True)
    assert counted.calls == 2


@pytest.mark.usefixtures("program")
def test_a_batch_without_finite_forces_says_nothing_about_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, potential = Counted(monkeypatch), small_potential()
    same = ethanol()
    same.positions[1] = same.positions[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential.predict(batch_of(same), stress=True)
        assert potential.unproven(stress=True)
        counted.calls = 0
        assert_agree(potential, batches()["molecule"])
    assert counted.calls == 1
    assert not potential.unproven(stress=True)


@pytest.mark.usefixtures("program")
def test_what_a_program_does_not_cover_is_computed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, potential = Counted(monkeypatch), small_potential()
    assert potential.adapter is not None
    assert_agree(potential, batches()["molecule"])
    calls = counted.calls
    squeezed = ethanol()
    squeezed.positions *= 0.45  # closer than the adapter's training data: radial functions fade
    assert_agree(potential, batch_of(squeezed))
    assert_agree(potential, batch_of(Atoms("H")))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "MANY_SLOTS", 0)
        patch.setattr(compiled, "FILLED", 1)
        assert_agree(potential, batches()["mixed"])
    seen: list[float] = []
    gate = list(potential.adapter.gates.values())[-1]  # not one that became a table
    hook = gate.register_forward_pre_hook(
        lambda gate, inputs: seen.append(float(gate.excess(inputs[0]).detach().max()))
    )
    assert_agree(potential, batches()["molecule"])
    hook.remove()
    with potential.adapter_disabled():
        assert_agree(potential, batches()["molecule"])
    potential.adapter.unmerge()
    assert_agree(potential, batches()["molecule"])
    bare = Potential(potential.backbone)  # does not know of the adapter that is on its network
    assert_agree(bare, batches()["molecule"])
    assert counted.calls == calls
    assert seen


def test_a_program_that_is_damaged_or_wrong_is_not_used(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "programs"
    shutil.copytree(program.parent, folder)
    monkeypatch.setattr(machine_code, "program_folder", lambda: folder)
    load = machine_code._load

    def wrong(path: Path, device: torch.device) -> Any:
        program = load(path, device)
        return lambda inputs: [out * 1.01 if out.is_floating_point() else out for out in program(inputs)]

    batch = batches()["molecule"]
    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "_load", wrong)
        with pytest.warns(UserWarning, match="is not used: remove it, and run `mmea compile` again"):
            assert_agree(small_potential(), batch)
    (folder / f"{program.name}.pt2").write_bytes(b"nothing of the kind")
    with pytest.warns(UserWarning, match="cannot be opened"):
        assert_agree(small_potential(), batch)


def test_what_cannot_be_compiled_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "program_folder", lambda: tmp_path / "programs")

    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(compiled, "build", no_compiler)
    potential = small_potential()
    with pytest.raises(CompilationError, match=r"no working C\+\+ compiler found.*everything works without"):
        potential.compile()
    assert list((tmp_path / "programs").iterdir()) == []
    assert_agree(potential, batches()["molecule"])


def test_a_program_that_differs_from_its_network_is_not_kept(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "program_folder", lambda: tmp_path / "programs")

    def another(traced: Any, known: Any, path: Path, **options: Any) -> None:
        for ending in (".pt2", ".safetensors"):
            shutil.copy(program.with_suffix(ending), path.with_suffix(ending))

    monkeypatch.setattr(compiled, "build", another)
    load = machine_code._load
    monkeypatch.setattr(machine_code, "_load", lambda *of: lambda inputs: [2 * out for out in load(*of)(inputs)])
    with pytest.raises(CompilationError, match="it is not kept"):
        small_potential().compile(stress=True)
    assert list((tmp_path / "programs").iterdir()) == []


def test_not_fast_is_the_networks_own_way() -> None:
    plain, fast = load_backbone(fast=False, dtype="float64"), load_backbone(dtype="float64")
    assert contraction_forms(plain.network) == []
    assert contraction_forms(fast.network)
    atoms = ethanol()
    one, other = MMEACalculator(backbone=plain), MMEACalculator(backbone=fast)
    np.testing.assert_allclose(one.get_forces(atoms), other.get_forces(atoms), atol=1e-10)
    with pytest.raises(CompilationError, match="fast=False"):
        one.potential.compile()


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """`compile` without a compiler: what would be compiled."""
    asked: list[bool] = []

    def instead(self: Potential, *, stress: bool = False) -> Path:
        asked.append(stress)
        return Path("folder/program")

    monkeypatch.setattr(Potential, "compile", instead)
    return asked


def test_the_command_compiles_both_kinds_of_calls(quick_compile: list[bool]) -> None:
    result = CliRunner().invoke(app, ["compile", "mmea-organic-s"])
    assert result.exit_code == 0, result.output
    assert quick_compile == [False, True]
    quick_compile.clear()
    result = CliRunner().invoke(app, ["compile", "gfn2-to-pbe.adapter", "--no-stress", "--dtype", "float64"])
    assert result.exit_code == 0, result.output
    assert quick_compile == [False]


def test_the_command_explains_what_it_does_not_know() -> None:
    result = CliRunner().invoke(app, ["compile", "nothing.adapter"])
    assert result.exit_code == 1
    assert "nothing.adapter" in result.output
