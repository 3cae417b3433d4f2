"""What a backbone is held against beside forces, and the geometries that its training lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from commands import mmea
from scipy.spatial.transform import Rotation

from mmea_calc.check.paths import pairs as pairs_of
from mmea_calc.errors import CompilationError, DataError
from mmea_calc.md import open_potential
from mmea_calc.md.minimise import minimise
from mmea_calc.potential import Potential
from mmea_calc.pretrain import references, sample, soundness
from mmea_calc.pretrain.choose import LEFT_OUT
from mmea_calc.pretrain.label import draw, indices
from mmea_calc.pretrain.references import DIHEDRALS, MOLECULES, SEPARATIONS, read_references, wavenumbers

PBE = Path(__file__).resolve().parents[1] / "data" / "pbe"


@pytest.fixture(scope="module")
def potential() -> Potential:
    return open_potential("mmea-organic-s", dtype="float64", device="cpu")


def springs(atoms: Atoms, bonds: list[tuple[int, int]], k: float) -> np.ndarray:
    """Hessian of springs of `k` eV/A^2 at rest."""
    hessian = np.zeros((len(atoms), 3, len(atoms), 3))
    for i, j in bonds:
        axis = atoms.positions[i] - atoms.positions[j]
        block = k * np.outer(axis, axis) / (axis @ axis)
        for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            hessian[a, :, b] += sign * block
    return hessian


def test_two_atoms_on_a_spring_vibrate_as_they_must() -> None:
    atoms = Atoms("CO", [[0.3, 0, 0], [0.3, 1.1, 0.2]])
    reduced = np.prod(atoms.get_masses()) / atoms.get_masses().sum()
    # nu = sqrt(k / mu) / (2 pi c)
    k, mass = 100 * units._e * 1e20, reduced * units._amu
    expected = np.sqrt(k / mass) / (2 * np.pi * units._c) / 100
    assert wavenumbers(atoms, springs(atoms, [(0, 1)], 100.0)) == pytest.approx([expected], rel=1e-5)
    assert wavenumbers(atoms, springs(atoms, [(0, 1)], -100.0)) == pytest.approx([-expected], rel=1e-5)


@pytest.mark.parametrize(("name", "modes"), [("H2O", 3), ("CO2", 4), ("CH4", 9)])
def test_vibrations_know_neither_place_nor_direction_nor_rigid_motions(name: str, modes: int) -> None:
    atoms = molecule(name)
    bonds = [(i, j) for i in range(len(atoms)) for j in range(i)]
    found = wavenumbers(atoms, springs(atoms, bonds, 30.0))
    assert len(found) == modes
    turned = atoms.copy()
    turned.positions = Rotation.random(random_state=np.random.default_rng(1)).apply(atoms.positions) + np.array(
        [5, -3, 2]
    )
    again = wavenumbers(turned, springs(turned, bonds, 30.0))
    assert again == pytest.approx(found, abs=1e-3)
    # a trace of the weighted Hessian: nothing of the vibrations is lost with the rigid motions
    weighted = np.einsum("iaia->i", springs(atoms, bonds, 30.0)) / atoms.get_masses()
    to_frequency = units._e * 1e20 / units._amu / (2 * np.pi * units._c * 100) ** 2
    assert (found**2).sum() == pytest.approx(weighted.sum() * to_frequency, rel=1e-4)


def test_scans_change_what_they_name_and_nothing_else() -> None:
    butane = molecule("trans-butane")
    scan = references.butane_scan(butane)
    carbons = np.flatnonzero(butane.numbers == 6)
    near = butane.get_all_distances()[np.ix_(carbons, carbons)] < 1.7
    ends = [c for c, n in zip(carbons, near.sum(1), strict=True) if n == 2]
    inner = [next(c for c in carbons if c not in ends and butane.get_distance(c, e) < 1.7) for e in ends]
    for angle, turned in zip(DIHEDRALS, scan, strict=True):
        found = turned.get_dihedral(ends[0], inner[0], inner[1], ends[1])
        assert min(abs(found - angle), abs(found - (360 - angle))) < 1e-6
        for i in range(len(butane)):
            j = int(np.argsort(butane.get_distances(i, range(len(butane))))[1])
            assert turned.get_distance(i, j) == pytest.approx(butane.get_distance(i, j))
    dimer = Atoms("OHHOHH", np.random.default_rng(0).normal(size=(6, 3)))
    apart = references.dimer_scan(dimer)
    before = dimer.get_distance(0, 3)
    assert [a.get_distance(0, 3) for a in apart] == pytest.approx([before + s for s in SEPARATIONS])
    for half in (slice(0, 3), slice(3, 6)):
        assert apart[-1][half].get_all_distances() == pytest.approx(dimer[half].get_all_distances())


def test_references_are_kept_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def one(atoms: Any = None) -> dict[str, Any]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append("")
        return {"numbers": [1], "positions": [[0, 0, 0]], "energy": float(len(made))}

    for name in ("_vibrating", "_butane", "_water_dimer"):
        monkeypatch.setattr(references, name, one)
    out = tmp_path / "references.json"
    with pytest.raises(KeyboardInterrupt):
        references.make_references(out)
    assert [item["energy"] for item in read_references(out).values()] == [1, 2, 3]
    made.clear()
    monkeypatch.setattr(references, "_butane", lambda: {"energy": 0.0})
    monkeypatch.setattr(references, "_water_dimer", lambda: {"energy": 0.0})
    monkeypatch.setattr(references, "_vibrating", lambda atoms: {"energy": -1.0})
    assert references.make_references(out) == len(MOLECULES) + 2
    assert [item["energy"] for item in read_references(out).values()][:4] == [1, 2, 3, -1]
    out.write_text("{}")
    with pytest.raises(DataError, match="has no references"):
        read_references(out)


def own_references(potential: Potential, names: tuple[str, ...]) -> dict[str, Any]:
    """As the potential itself would make them."""

    def kept(atoms: Atoms, **more: Any) -> dict[str, Any]:
        energy = float(soundness.evaluate(potential, [atoms])[0][0])
        return {"numbers": atoms.numbers.tolist(), "positions": atoms.positions.tolist(), "energy": energy, **more}

    items = {}
    for name in names:
        (at_rest,), _ = minimise(potential, [molecule(name)], fmax=soundness.CONVERGED)
        own = soundness._vibrating(potential, name, at_rest, kept(at_rest, wavenumbers=[]))
        items[name] = kept(at_rest, wavenumbers=own.wavenumbers)
    butane = molecule("trans-butane")
    items["butane"] = kept(butane, dihedrals=list(DIHEDRALS), scan=[kept(a) for a in references.butane_scan(butane)])
    water = items["H2O"]["energy"]
    one = Atoms(items["H2O"]["numbers"], items["H2O"]["positions"])
    two = one.copy()
    two.positions += [2.9, 0.1, 0.2]
    scan = [kept(a) for a in references.dimer_scan(one + two)]
    items["water dimer"] = kept(
        one + two,
        distances=[(one + two).get_distance(0, 3) + s for s in SEPARATIONS],
        scan=[{**point, "interaction": point["energy"] - 2 * water} for point in scan],
    )
    return items


def test_a_backbone_held_against_itself_has_no_errors(
    potential: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soundness, "MOLECULES", ("H2O", "HCN"))
    monkeypatch.setattr(soundness, "GAPS", np.array([2.0, 3.0, 4.0, 5.0]))
    monkeypatch.setattr("mmea_calc.pretrain.soundness_plots.GAPS", np.array([2.0, 3.0, 4.0, 5.0]))
    monkeypatch.setattr(soundness, "pairs", lambda elements, config: pairs_of((1, 6, 8), config))
    monkeypatch.setattr(soundness, "DRUG_LIKE", 2)
    monkeypatch.setattr(soundness, "WORTH_COMPILING_PS", 0.01)

    def no_compiler(potential: Potential) -> None:
        raise CompilationError("there is no compiler")

    monkeypatch.setattr(Potential, "compile", no_compiler)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"items": own_references(potential, ("H2O", "HCN"))}))
    out = tmp_path / "report" / "s"
    command = ["pretrain", "report", "mmea-organic-s", "--data", PBE, "--references", file, "--out", out]
    result = mmea(*command, "--md-ps", 0.01, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "without machine code: there is no compiler" in result.output
    assert "wavenumbers MAE (1/cm): " in result.stdout
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    figures = found["figures"]
    assert figures["wavenumbers MAE (1/cm)"] < 0.5
    assert figures["bond lengths MAE (Å)"] < 1e-4
    assert figures["butane, energies along the torsion: MAE (meV)"] < 1e-6
    assert figures["water dimer, depth (meV)"] == pytest.approx(figures["the same with PBE"], abs=0.1)
    assert figures["interaction beyond the cutoff, largest (meV)"] < 1e-6
    assert figures["interaction at 4 Å and beyond, largest (meV)"] >= 0
    assert figures["pairs of elements"] == 6
    assert figures["forces MAE, valid (meV/Å)"] == pytest.approx(103, abs=1)  # as its model card says
    assert figures["runs without a break"] == figures["runs"] == 4
    assert out.with_suffix(".png").stat().st_size > 20_000


def test_a_report_without_its_data_is_refused_in_one_line(tmp_path: Path) -> None:
    result = mmea("pretrain", "report", "mmea-organic-s", "--data", tmp_path, "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert result.stderr.startswith("mmea: ")
    assert list(tmp_path.iterdir()) == []


def test_dynamics_take_large_single_molecules_of_different_composition() -> None:
    found = soundness.drug_like(PBE)
    assert len(found) == 10
    assert len({a.get_chemical_formula() for a in found}) == 10
    assert all((a.numbers > 1).sum() >= 9 for a in found)


def test_sampled_molecules_are_none_that_something_is_measured_by() -> None:
    left_out = {tuple(sorted(Atoms(text).numbers)) for text in LEFT_OUT}
    singles = sample.single_molecules()
    assert len(singles) > 60
    measured = [molecule(name) for name in MOLECULES]
    for atoms in singles:
        composition = tuple(sorted(atoms.numbers))
        assert composition not in left_out
        assert int(atoms.numbers.sum()) % 2 == 0
        assert not any(len(atoms) == len(other) and np.allclose(atoms.positions, other.positions) for other in measured)
    pairs = sample.touching_pairs(np.random.default_rng(0))
    assert len(pairs) > 100
    assert all(atoms.get_chemical_formula() != "H4O2" for atoms in pairs)
    for atoms in pairs:
        closest = [atoms.get_all_distances()[:k, k:].min() for k in range(2, len(atoms) - 1)]
        assert min(closest) > 0.9  # no two atoms on top of each other
        assert max(closest) < 3.0


def test_sampled_frames_can_be_labelled(potential: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "single_molecules", lambda: [molecule("C3H8")])
    monkeypatch.setattr(sample, "PARTNERS", ("H2O", "NH3"))
    count = sample.sample(potential, out=tmp_path)
    # three temperatures, three frames; two pairs, two temperatures, two frames
    assert count == 9 + 8
    drawn = list(draw(tmp_path, 7, set(), indices([tmp_path / "order.npz"])))
    assert [k for k, _, _ in drawn] == list(range(count))
    assert {len(numbers) for _, numbers, _ in drawn} == {11, 7, 8}
    moved = [positions for _, numbers, positions in drawn if len(numbers) == 11]
    assert all(np.abs(a - moved[0]).max() > 1e-3 for a in moved[1:])


def test_references_that_are_not_complete_are_told_before_anything_is_measured(tmp_path: Path) -> None:
    known = json.loads((PBE / "references.json").read_text())
    del known["items"]["butane"]
    (file := tmp_path / "references.json").write_text(json.dumps(known))
    with pytest.raises(DataError, match="lacks butane: go on with"):
        soundness.measure_soundness("mmea-organic-s", data=tmp_path, references=file)
    with pytest.raises(DataError, match="has no larger molecules"):
        soundness.measure_soundness(
            "mmea-organic-s", data=tmp_path, references=PBE / "references.json", md_ps=1.0, device="cpu"
        )
