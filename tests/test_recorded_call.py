"""A recorded call gives the plain path's energies, forces and stresses while atoms move, and knows when it may not."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet
from small_adapter import adapter, backbone_path
from test_md_blocks import carbon, potential
from waiting import Nothing, watched_recording

from conftest import crystal, ethanol
from mmea_calc import MMEACalculator
from mmea_calc.errors import DataError
from mmea_calc.fast import recorded
from mmea_calc.fast.recorded import Recording
from mmea_calc.graph import Batch, Found
from mmea_calc.potential import Potential, Prediction
from mmea_calc.recorded_call import RecordedCall

STRUCTURES = {"molecule": ethanol, "crystal": crystal, "list": carbon}


def assert_right(found: Prediction | None, of: Potential, atoms: Atoms, *, stress: bool) -> None:
    assert found is not None
    expected = of.predict(of.collate([of.graph(atoms)]), stress=stress)
    for name in ("energy", "node_energy", "forces", "stress"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stress", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_results_are_the_plain_paths_while_atoms_move(name: str, stress: bool) -> None:
    made, atoms, rng = potential(), STRUCTURES[name](), np.random.default_rng(0)
    if not atoms.pbc.any():
        atoms.cell = np.diag([9.0, 8.0, 7.0])  # a stress refers to a volume
    call = RecordedCall(made, skin=0.5)
    assert call.predict(atoms, stress=stress) is None  # seen for the first time
    for _ in range(12):
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        assert_right(call.predict(atoms, stress=stress), made, atoms, stress=stress)
    assert call.n_calls == 12
    if name == "molecule":  # all its pairs, for ever
        assert (call.n_lists, call.n_recorded) == (1, 1)
    else:
        assert call.n_lists >= 2
        assert call.n_recorded < call.n_lists  # lists of the same width share a recording


def test_pairs_enter_and_leave_the_cutoff() -> None:
    made = potential()
    pair = molecule("H2O")
    other = molecule("CH4")
    other.positions += [9.0, 0, 0]
    atoms = pair + other
    call = RecordedCall(made)
    energies = []
    for _ in range(30):
        found = call.predict(atoms, stress=False)
        if found is not None:
            assert_right(found, made, atoms, stress=False)
            energies.append(float(found.energy))
        atoms.positions[3:] -= [0.2, 0, 0]
    assert call.n_calls == 29
    assert energies[0] == pytest.approx(energies[1], abs=1e-9)  # out of reach
    assert abs(energies[-1] - energies[0]) > 1e-3


def test_another_structure_cell_or_weight_is_seen() -> None:
    made, atoms = potential(), crystal()
    call = RecordedCall(made)

    def asked() -> Prediction | None:
        return call.predict(atoms, stress=True)

    assert asked() is None
    assert_right(asked(), made, atoms, stress=True)
    atoms.set_cell(atoms.cell.array * 1.02, scale_atoms=True)
    assert asked() is None
    assert_right(asked(), made, atoms, stress=True)
    atoms.numbers[0] = 1
    assert asked() is None
    assert_right(asked(), made, atoms, stress=True)
    assert made.adapter is not None
    with torch.no_grad():
        for parameter in made.adapter.parameters():
            parameter.mul_(1.2)
    assert asked() is None
    assert_right(asked(), made, atoms, stress=True)
    made.reference_energies = {1: 1.0, 6: 2.0, 8: 3.0}
    assert asked() is None
    assert_right(asked(), made, atoms, stress=True)
    with made.adapter_disabled():
        assert asked() is None
        assert_right(asked(), made, atoms, stress=True)
    assert asked() is None
    assert_right(asked(), made, atoms, stress=True)
    assert (call.n_calls, call.n_recorded) == (7, 7)


def test_with_or_without_a_stress_is_seen() -> None:
    made, atoms = potential(), crystal()
    call = RecordedCall(made)
    call.predict(atoms, stress=True)
    for stress in (True, False, True):
        assert_right(call.predict(atoms, stress=stress), made, atoms, stress=stress)
    assert call.n_recorded == 3


def test_an_ordinary_call_comes_before_what_is_recorded_of_another_adapter() -> None:
    """What is to be said of elements that an adapter has not seen is said there, and a program is proven."""
    calculator = MMEACalculator(adapter(), backbone=backbone_path(), dtype="float64", device="cpu")
    call = calculator._recorded = RecordedCall(calculator.potential)
    atoms = ethanol()
    atoms.positions *= 1.15
    atoms.calc = calculator
    names: list[str | None] = [None, calculator.active_adapters[0]]
    recorded = []
    for name in (names[1], *names):
        calculator.set_adapter(name)
        for _ in range(3):
            atoms.rattle(0.001)
            atoms.get_potential_energy()
            recorded.append(call.n_calls)
    assert recorded == [0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_a_program_that_is_not_proven_yet_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording without it would be kept, and start its operations one by one."""
    made, atoms, sure = potential(), ethanol(), [False]

    def program(batch: Batch, *, stress: bool) -> Found | None:
        return made.found_plainly(batch, stress=stress) if sure[0] else None

    opened = SimpleNamespace(program=program, named="a program", proven=False)
    monkeypatch.setattr(made._programs, "_opened", lambda adapter, stress: (("key",), opened))
    call = RecordedCall(made)
    call.predict(atoms, stress=False)
    for certain, n_recorded in ((False, 0), (False, 0), (True, 0), (True, 1), (True, 1)):
        sure[0] = certain
        found = call.predict(atoms, stress=False)
        assert (call.n_recorded, opened.proven) == (n_recorded, certain)
        assert_right(found, made, atoms, stress=False)
    assert call.n_calls == 2


def test_a_recording_holds_what_an_adapter_made_of_its_values() -> None:
    """Merged again it makes the same anew, and a graph would read what has gone."""
    made, atoms = potential(), crystal()
    assert made.adapter is not None
    call = RecordedCall(made)
    for _ in range(2):
        call.predict(atoms, stress=False)
    read = {name: weakref.ref(tensor) for name, tensor in made.adapter.derived().items()}
    assert {name.split(" ")[0].split(".")[0] for name in read} == {"element", "gates"}
    made.adapter.unmerge()
    made.adapter.merge()
    gc.collect()
    assert all(ref() is not None for ref in read.values())
    made.adapter.derived()
    call._close()
    gc.collect()
    assert all(ref() is None for ref in read.values())


def test_atoms_closer_than_in_training_are_left_to_the_plain_path() -> None:
    calculator = MMEACalculator(adapter(), backbone=backbone_path(), dtype="float64", device="cpu")
    call = RecordedCall(calculator.potential)
    for factor in (1.1, 1.1, 0.9):
        atoms = ethanol()
        atoms.positions *= factor  # the adapter has seen 1.1
        found = call.predict(atoms, stress=False)
    assert call.n_calls == 1
    assert_right(found, calculator.potential, atoms, stress=False)
    assert call.usable


def test_what_makes_no_call_is_left_to_who_says_so() -> None:
    call = RecordedCall(potential())
    atoms = ethanol()
    call.predict(atoms, stress=False)
    atoms.positions[0, 0] = np.nan
    assert call.predict(atoms, stress=False) is None
    single = Atoms("H")
    assert [call.predict(single, stress=False) for _ in range(2)] == [None, None]


def test_a_network_that_does_not_end_at_its_cutoff_is_found_out() -> None:
    block = "RealAgnosticResidualNonLinearInteractionBlock"
    call = RecordedCall(potential(None, interaction_cls_first=block, interaction_cls=block))
    atoms = ethanol()
    call.predict(atoms, stress=False)
    with pytest.warns(UserWarning, match="does not end at its cutoff"):
        assert_right(call.predict(atoms, stress=False), call.potential, atoms, stress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(call.predict(atoms, stress=False), call.potential, atoms, stress=False)
    assert call.n_calls == 0


def test_a_call_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.recorded_call.Recording", Nothing)
    call, atoms = RecordedCall(potential()), crystal()
    call.predict(atoms, stress=True)
    assert call.predict(atoms, stress=True) is not None  # where it was recorded
    atoms.rattle(0.02, seed=1)
    with pytest.warns(UserWarning, match="or something in it was not recorded"):
        assert_right(call.predict(atoms, stress=True), call.potential, atoms, stress=True)
    assert call.n_calls == 1


def test_recordings_that_are_replaced_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recording[Any]] = []

    class Counted(Recording[Any]):
        def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
            super().__init__(function, device)
            made.append(self)

    monkeypatch.setattr("mmea_calc.recorded_call.Recording", Counted)
    call = RecordedCall(potential())
    for factor in (1.0, 1.02, 1.04):
        atoms = crystal()
        atoms.set_cell(atoms.cell.array * factor, scale_atoms=True)
        for _ in range(2):
            call.predict(atoms, stress=False)
    assert [recording._function is None for recording in made] == [True, True, False]


def pairs_of(batch: Batch) -> dict[tuple[int, ...], list[float]]:
    """Of every edge: sender, receiver and where it leads to, without and with the lattice vectors crossed."""
    tensors = batch.tensors
    sender, receiver = tensors["edge_index"]
    vectors = tensors["positions"][receiver] - tensors["positions"][sender] + tensors["shifts"]
    keys = torch.cat([tensors["edge_index"].T, tensors["unit_shifts"].long()], dim=1).tolist()
    return dict(zip(map(tuple, keys), vectors.tolist(), strict=True))


@pytest.mark.parametrize("name", STRUCTURES)
def test_large_structures_keep_their_list_and_have_the_edges_of_an_ordinary_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmea_calc.recorded_call.MOST_EDGES", 1)
    made, atoms, rng = potential(), STRUCTURES[name](), np.random.default_rng(0)
    call = RecordedCall(made, skin=0.5)
    assert call.predict(atoms, stress=bool(atoms.pbc.any())) is None
    for _ in range(12):
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        stress = bool(atoms.pbc.any())
        found = call.predict(atoms, stress=stress)
        assert_right(found, made, atoms, stress=stress)
        assert call._moving is not None
        kept, ordinary = call._moving.forces.batch, made.collate([made.graph(atoms)])
        mine, theirs = pairs_of(kept), pairs_of(ordinary)
        assert mine.keys() == theirs.keys()
        for key, vector in mine.items():
            assert vector == pytest.approx(theirs[key], abs=1e-12)
        # Not only the same ones: in an order that does not depend on when the list was made.
        fresh = RecordedCall(made, skin=0.3)
        assert fresh.predict(atoms, stress=stress) is None
        again = fresh.predict(atoms, stress=stress)
        assert found is not None
        assert again is not None
        assert torch.equal(found.energy, again.energy)
        assert torch.equal(found.forces, again.forces)  # type: ignore[arg-type]
        assert list(mine) == list(pairs_of(fresh._moving.forces.batch))  # type: ignore[union-attr]
    assert (call.n_calls, call.n_recorded) == (0, 0)
    assert call.n_lists == 1 if name == "molecule" else 2 <= call.n_lists < 12


def test_of_a_large_structure_that_moves_nothing_is_made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.recorded_call.MOST_EDGES", 1)
    call, atoms = RecordedCall(potential()), carbon()
    for _ in range(2):
        call.predict(atoms, stress=True)

    def host(*_: object) -> None:
        raise AssertionError("made on the host")

    for place in ("mmea_calc.potential.build_graph", "mmea_calc.potential.collate"):
        monkeypatch.setattr(place, host)
    atoms.rattle(0.01, seed=1)
    assert call.predict(atoms, stress=True) is not None


def test_no_two_recordings_are_made_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's streams come in turns, and closing a recording frees what all those of its stream compute in."""
    handles = cycle(range(3))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(device_index=0, cuda_stream=next(handles)))
    monkeypatch.setattr(recorded, "_TAKEN", taken := set[tuple[int, int]]())
    monkeypatch.setattr(recorded, "_STREAMS", 3)
    device = torch.device("cuda", 0)
    assert [recorded._free_stream(device).cuda_stream for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="as many as torch has streams"):
        recorded._free_stream(device)
    taken.discard((0, 1))
    assert recorded._free_stream(device).cuda_stream == 1


def test_streams_of_recordings_that_nobody_can_reach_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(device_index=0, cuda_stream=7))
    monkeypatch.setattr(recorded, "_TAKEN", set[tuple[int, int]]())
    monkeypatch.setattr(recorded, "_record", lambda *_: (SimpleNamespace(reset=lambda: None), None))
    device = torch.device("cuda", 0)
    gc.disable()
    try:
        one: Any = Recording(lambda: None, device)
        one.itself = one  # a circle, as those of dynamics stand in
        with pytest.raises(RuntimeError, match="as many as torch has streams"):
            Recording(lambda: None, device)
        del one
        Recording(lambda: None, device).close()
    finally:
        gc.enable()


def test_a_recording_that_fails_gives_its_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("waits")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(device_index=0, cuda_stream=7))
    monkeypatch.setattr(recorded, "_TAKEN", taken := set[tuple[int, int]]())
    monkeypatch.setattr(recorded, "_record", fail)
    with pytest.raises(RuntimeError, match="waits"):
        Recording(lambda: None, torch.device("cuda"))
    assert not taken
    graph = SimpleNamespace(reset=lambda: None)
    monkeypatch.setattr(recorded, "_record", lambda *_: (graph, None))
    one = Recording(lambda: None, torch.device("cuda"))
    assert taken == {(0, 7)}
    one.close()
    assert not taken


def test_nothing_in_a_recorded_call_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    Watched, found = watched_recording()
    monkeypatch.setattr("mmea_calc.recorded_call.Recording", Watched)
    call, atoms = RecordedCall(potential()), crystal()
    for _ in range(3):
        call.predict(atoms, stress=True)
    assert found == [set(), set()]


def test_dynamics_of_ase_with_recorded_calls_are_those_without() -> None:
    ends = []
    for records in (False, True):
        calculator = MMEACalculator(adapter(), backbone=backbone_path(), dtype="float64", device="cpu")
        atoms = ethanol()
        atoms.positions *= 1.15
        atoms.calc = calculator
        if records:
            calculator._recorded = RecordedCall(calculator.potential)
        VelocityVerlet(atoms, 0.5 * units.fs).run(20)
        ends.append((atoms.positions.copy(), atoms.get_potential_energy()))
        if records:
            assert calculator._recorded is not None
            assert 10 <= calculator._recorded.n_calls <= 20  # not where a bond is shorter than those seen
            with calculator.adapter_disabled():
                bare = atoms.get_potential_energy()
            assert abs(bare - ends[-1][1]) > 1e-6
            atoms.numbers[0] = 7
            with pytest.raises(DataError, match="the structure has N"):
                atoms.get_potential_energy()
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=0, atol=1e-9)
    assert ends[1][1] == pytest.approx(ends[0][1], abs=1e-9)


def test_two_atoms_at_one_place_are_told_of_a_recorded_call_too() -> None:
    calculator = MMEACalculator(backbone=backbone_path(), dtype="float64", device="cpu")
    call = calculator._recorded = RecordedCall(calculator.potential)
    atoms = ethanol()
    atoms.calc = calculator
    for _ in range(3):
        atoms.rattle(0.01)
        atoms.get_potential_energy()
    assert call.n_calls == 2
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(DataError, match="are two atoms at the same place"):
        atoms.get_potential_energy()


def test_on_a_gpu_calls_are_recorded(device: str) -> None:
    calculator = MMEACalculator(adapter(), backbone=backbone_path(), dtype="float64", device=device)
    assert (calculator._recorded is not None) == (device == "cuda")
    if calculator._recorded is not None:
        plain = MMEACalculator(adapter(), backbone=backbone_path(), dtype="float64", device="cpu")
        atoms = ethanol()
        atoms.positions *= 1.15
        for _ in range(3):
            atoms.rattle(0.01)
            found, expected = calculator.get_forces(atoms), plain.get_forces(atoms)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
        assert calculator._recorded.n_calls == 2
