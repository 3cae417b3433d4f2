"""Errors on labelled structures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from matplotlib.image import imread

from conftest import ELEMENTS, crystal, ethanol, network_config, random_network, randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile
from mmea_calc.backbone import Backbone
from mmea_calc.config import AdapterConfig
from mmea_calc.data.dataset import Dataset, Labelled
from mmea_calc.errors import DataError
from mmea_calc.evaluation import Evaluation, StressErrors, evaluate
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.plots import parity
from mmea_calc.potential import Potential

CONFIG = AdapterConfig(gate_rank=3, low_rank=2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    network = random_network()
    use_fast_path(network)
    return Backbone(
        "small", "tests", network, network_config(), "f" * 64, ELEMENTS, 4.0, ("Default",), "Default",
        dict.fromkeys(ELEMENTS, -1.0),
    )  # fmt: skip


@pytest.fixture
def potential(backbone: Backbone) -> Iterator[Potential]:
    """With a random adapter that has reference energies of its own."""
    adapter = attach(backbone.network, CONFIG)
    randomise(adapter)
    tensors = adapter.state_dict()
    adapter.detach()
    energies = dict.fromkeys(ELEMENTS, -2.0)
    loaded = Potential(backbone)
    loaded.use(AdapterFile(CONFIG, tensors, "small", "f" * 64, reference_energies=energies))
    yield loaded
    loaded.use(None)


def water(seed: int) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.1, seed=seed)
    return atoms


STRUCTURES = [ethanol(), water(1), crystal(), water(2), water(3)]
TYPES = ["a", "b", "a", "b", "b"]


def predictions(potential: Potential) -> list[tuple[float, np.ndarray]]:
    """One structure at a time."""
    results = []
    for atoms in STRUCTURES:
        prediction = potential.predict(potential.collate([potential.graph(atoms)]))
        assert prediction.forces is not None
        results.append((float(prediction.energy), prediction.forces.numpy()))
    return results


def labelled(potential: Potential, **without: set[int]) -> tuple[Dataset, np.ndarray, list[np.ndarray]]:
    """A data set whose labels are the adapter's predictions minus known errors; the errors in eV and eV/A."""
    rng = np.random.default_rng(0)
    energy_errors = rng.standard_normal(len(STRUCTURES))
    force_errors = [rng.standard_normal((len(a), 3)) for a in STRUCTURES]
    items = []
    for i, (energy, forces) in enumerate(predictions(potential)):
        items.append(
            Labelled(
                STRUCTURES[i],
                energy=None if i in without.get("energy", ()) else energy - energy_errors[i],
                forces=None if i in without.get("forces", ()) else forces - force_errors[i],
                config_type=TYPES[i],
                index=i,
            )
        )
    return Dataset(tuple(items), "test", {"energy": "energy", "forces": "forces"}), energy_errors, force_errors


def test_errors_are_what_was_put_in(potential: Potential) -> None:
    dataset, energy, forces = labelled(potential)
    found = evaluate(potential, dataset, batch_size=2).adapter
    assert found is not None
    n_atoms = np.array([len(a) for a in STRUCTURES])
    overall, components = found.overall, np.concatenate(forces).ravel()
    assert overall.n_structures == overall.energy.n_structures == 5
    assert overall.energy.mae_meV == pytest.approx(1e3 * abs(energy).mean())
    assert overall.energy.rmse_meV == pytest.approx(1e3 * np.sqrt((energy**2).mean()))
    assert overall.energy.mae_meV_per_atom == pytest.approx(1e3 * abs(energy / n_atoms).mean())
    assert overall.energy.rmse_meV_per_atom == pytest.approx(1e3 * np.sqrt(((energy / n_atoms) ** 2).mean()))
    assert overall.forces.n_atoms == n_atoms.sum()
    assert overall.forces.mae_meV_per_A == pytest.approx(1e3 * abs(components).mean())
    assert overall.forces.rmse_meV_per_A == pytest.approx(1e3 * np.sqrt((components**2).mean()))

    assert list(found.by_config_type) == ["a", "b"]
    rows = [i for i, name in enumerate(TYPES) if name == "b"]
    of_b = found.by_config_type["b"]
    assert of_b.n_structures == 3
    assert of_b.energy.mae_meV == pytest.approx(1e3 * abs(energy[rows]).mean())
    assert of_b.forces.mae_meV_per_A == pytest.approx(1e3 * abs(np.concatenate([forces[i] for i in rows])).mean())

    assert list(found.forces_by_element) == ["H", "C", "O"]
    numbers = np.concatenate([a.numbers for a in STRUCTURES])
    on_oxygen = np.concatenate(forces)[numbers == 8]
    assert found.forces_by_element["O"].n_atoms == len(on_oxygen)
    assert found.forces_by_element["O"].rmse_meV_per_A == pytest.approx(1e3 * np.sqrt((on_oxygen**2).mean()))


def test_the_bare_backbone_stands_beside_the_adapter(potential: Potential) -> None:
    dataset, _, _ = labelled(potential)
    with potential.adapter_disabled():
        bare = predictions(potential)
    found = evaluate(potential, dataset)
    own = evaluate(potential, dataset, same_reference_energies=False)
    n_atoms = np.array([len(a) for a in STRUCTURES])
    energies = np.array([energy for energy, _ in bare])
    np.testing.assert_allclose(own.backbone.energies, energies, atol=1e-9)
    # the adapter's reference energies are 1 eV per atom lower
    np.testing.assert_allclose(found.backbone.energies, energies - n_atoms, atol=1e-9)
    for ours, (_, expected) in zip(found.backbone.forces, bare, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-10)
    assert [m.label for m in found.models] == ["adapter", "backbone"]
    assert found.same_reference_energies
    assert not own.same_reference_energies


def test_evaluating_leaves_the_potential_as_it_was(potential: Potential) -> None:
    before = predictions(potential)
    names = list(potential.backbone.network.state_dict())
    dataset, _, _ = labelled(potential)
    evaluate(potential, dataset)
    assert list(potential.backbone.network.state_dict()) == names
    for (energy, forces), (energy_after, forces_after) in zip(before, predictions(potential), strict=True):
        assert energy == energy_after
        assert np.array_equal(forces, forces_after)


def test_structures_without_a_label_do_not_count(potential: Potential) -> None:
    dataset, energy, forces = labelled(potential, energy={0, 2}, forces={1, 3, 4})
    found = evaluate(potential, dataset).adapter
    assert found is not None
    assert found.overall.energy.n_structures == 3
    assert found.overall.energy.mae_meV == pytest.approx(1e3 * abs(energy[[1, 3, 4]]).mean())
    assert found.overall.forces.mae_meV_per_A == pytest.approx(1e3 * abs(np.concatenate([forces[0], forces[2]])).mean())
    of_b = found.by_config_type["b"]
    assert (of_b.forces.n_atoms, of_b.forces.mae_meV_per_A, of_b.forces.rmse_meV_per_A) == (0, None, None)
    assert found.by_config_type["a"].energy.rmse_meV is None


def test_energies_alone_are_enough(potential: Potential) -> None:
    dataset, energy, _ = labelled(potential, forces=set(range(5)))
    found = evaluate(potential, dataset)
    assert found.backbone.forces == ()
    assert found.adapter is not None
    assert found.adapter.overall.energy.mae_meV == pytest.approx(1e3 * abs(energy).mean())
    assert found.adapter.forces_by_element == {}
    assert [series.forces.shape for series in found.parity()] == [(0, 3), (0, 3)]


def test_stresses_are_compared_where_structures_have_them(potential: Potential, tmp_path: Path) -> None:
    dataset, _, _ = labelled(potential)
    assert evaluate(potential, dataset).backbone.overall.stress == StressErrors(0, None, None)
    crystals = [i for i, atoms in enumerate(STRUCTURES) if atoms.pbc.all()]
    errors = {i: 1e-3 * np.random.default_rng(i).standard_normal((3, 3)) for i in crystals}
    items = list(dataset.structures)
    for i in crystals:
        found = potential.predict(potential.collate([potential.graph(STRUCTURES[i])]), stress=True)
        assert found.stress is not None
        items[i] = replace(items[i], stress=found.stress[0].double().numpy() - errors[i])
    dataset = replace(dataset, structures=tuple(items))
    evaluation = evaluate(potential, dataset, batch_size=2)
    assert evaluation.adapter is not None
    components = np.array(list(errors.values()))
    of_all = evaluation.adapter.overall.stress
    assert of_all.n_structures == len(crystals) == 1
    assert of_all.mae_meV_per_A3 == pytest.approx(1e3 * abs(components).mean(), rel=1e-4)
    assert of_all.rmse_meV_per_A3 == pytest.approx(1e3 * np.sqrt((components**2).mean()), rel=1e-4)
    assert evaluation.adapter.by_config_type["b"].stress.n_structures == 0
    assert evaluation.backbone.overall.stress.mae_meV_per_A3 != of_all.mae_meV_per_A3
    assert summary(evaluation)["adapter"]["by_config_type"]["a"]["stress"]["n_structures"] == 1
    for series in evaluation.parity():
        assert series.stress.shape == series.reference_stress.shape == (1, 3, 3)
    parity(evaluation.parity(), tmp_path / "parity.png")
    with_stress = imread(tmp_path / "parity.png").shape
    parity(evaluate(potential, labelled(potential)[0]).parity(), tmp_path / "parity.png")
    assert with_stress[1] == pytest.approx(1.5 * imread(tmp_path / "parity.png").shape[1], rel=0.02)


def test_a_potential_without_adapter_is_evaluated_once(backbone: Backbone) -> None:
    potential = Potential(backbone)
    dataset, energy, _ = labelled(potential)
    steps: list[tuple[int, int]] = []
    found = evaluate(potential, dataset, batch_size=2, progress=lambda *step: steps.append(step))
    assert found.adapter is None
    assert found.models == (found.backbone,)
    assert found.backbone.overall.energy.mae_meV == pytest.approx(1e3 * abs(energy).mean())
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_a_prediction_that_is_not_a_number_shows_in_the_errors(
    potential: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _, _ = labelled(potential)
    original = potential.predict

    def broken(batch: Any, **options: Any) -> Any:
        found = original(batch, **options)
        return replace(found, energy=torch.full_like(found.energy, torch.nan))

    monkeypatch.setattr(potential, "predict", broken)
    found = evaluate(potential, dataset).backbone.overall.energy
    assert found.mae_meV is not None
    assert np.isnan(found.mae_meV)


def test_two_atoms_at_one_place_are_told_with_their_structure(potential: Potential) -> None:
    dataset, _, _ = labelled(potential)
    structures = list(dataset.structures)
    atoms = structures[2].atoms.copy()
    atoms.positions[1] = atoms.positions[0]
    structures[2] = replace(structures[2], atoms=atoms)
    with pytest.raises(DataError, match=rf"{structures[2].where}: atom 0 .* and atom 1 .* are 0.000 A apart"):
        evaluate(potential, replace(dataset, structures=tuple(structures)))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    return json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))


def test_results_are_plain_values_and_parity_series(potential: Potential) -> None:
    dataset, _, _ = labelled(potential, energy={0}, forces={1})
    found = evaluate(potential, dataset)
    values = summary(found)
    assert values["data"] == {"name": "test", "structures": 5, "sha256": dataset.hash}
    assert values["backbone_name"] == "small"
    assert found.adapter is not None
    assert values["adapter"]["overall"]["energy"]["mae_meV"] == found.adapter.overall.energy.mae_meV
    assert values["backbone"]["by_config_type"]["b"]["forces"]["n_atoms"] == 6
    assert values["adapter"]["forces_by_element"]["C"]["n_atoms"] == 3
    for series, model in zip(found.parity(), reversed(found.models), strict=True):
        assert series.label == model.label
        assert series.energy.shape == series.reference_energy.shape == (4,)
        assert series.forces.shape == series.reference_forces.shape == (sum(map(len, STRUCTURES)) - 3, 3)
        difference = 1e3 * abs(series.energy - series.reference_energy).mean()
        assert difference == pytest.approx(model.overall.energy.mae_meV_per_atom)
        difference = 1e3 * abs(series.forces - series.reference_forces).mean()
        assert difference == pytest.approx(model.overall.forces.mae_meV_per_A)


def test_energies_are_drawn_relative_to_those_of_their_composition(potential: Potential) -> None:
    dataset, _, _ = labelled(potential)
    known = np.array([s.energy for s in dataset.structures], dtype=float)
    waters = [i for i, s in enumerate(dataset.structures) if len(s.atoms) == 3]
    assert waters == [1, 3, 4]
    (series, _) = evaluate(potential, dataset).parity()
    assert series.energy_origin is None  # three compositions, five structures
    items = (*dataset.structures, *dataset.structures)
    (series, _) = evaluate(potential, replace(dataset, structures=items)).parity()
    assert series.energy_origin is not None
    assert series.energy_origin[1] == series.energy_origin[3] == pytest.approx(known[waters].mean() / 3)
    assert series.energy_origin[0] == pytest.approx(known[0] / len(ethanol()))
    (series, _) = evaluate(potential, dataset.subset([1, 3, 4])).parity()
    assert series.energy_origin is None


def test_unusable_data_are_refused_before_anything_is_computed(
    potential: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(potential, "predict", fail)
    lost = water(0)
    lost.positions[1] = np.nan
    good = Labelled(water(0), energy=-1.0)
    for bad, message in (
        (Labelled(molecule("NH3"), energy=-1.0, index=7, source="t.xyz"), r"structure 7 of t.xyz has N \(7\)"),
        (Labelled(lost, energy=-1.0, index=3), "structure 3: positions"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(potential, Dataset((good, bad), "test", {}))
    with pytest.raises(DataError, match="expected structures with energies or forces"):
        evaluate(potential, Dataset((Labelled(water(0)),), "test", {}))
    with pytest.raises(DataError, match="batch_size"):
        evaluate(potential, Dataset((good,), "test", {}), batch_size=0)
