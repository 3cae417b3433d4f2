"""The recipe of the embedded backbones runs, resumes, and gives a backbone."""

from __future__ import annotations

import builtins
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from ase.formula import Formula
from commands import mmea

from mmea_calc.backbone import BACKBONE_FOLDER, Backbone, load_backbone, save_backbone
from mmea_calc.errors import BackboneError, DataError, MMEAError, TrainingError
from mmea_calc.potential import Potential
from mmea_calc.pretrain import choose, label, walls
from mmea_calc.pretrain.average import average
from mmea_calc.pretrain.choose import interleaved, ordered
from mmea_calc.pretrain.dataset import PackedSet, read_arrays, read_e0
from mmea_calc.pretrain.train import ELEMENTS, PretrainConfig, pretrain

PBE = Path(__file__).resolve().parents[1] / "data" / "pbe"
# Small enough for a test: four steps, a checkpoint after each of them.
SHORT = PretrainConfig(steps=4, batch_size=3, lr=1e-3, warmup_steps=2, checkpoint_minutes=0.0, device="cpu")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight structures of the shipped set for training, four for validation."""
    folder = tmp_path_factory.mktemp("few")
    for name, count in (("train-0.npz", 8), ("valid.npz", 4)):
        with np.load(PBE / name) as whole:
            arrays = dict(whole)
        n_atoms = int(arrays["n_atoms"][:count].astype(int).sum())
        per_atom = ("numbers", "positions", "forces")
        np.savez(folder / name, **{k: v[: n_atoms if k in per_atom else count] for k, v in arrays.items()})
    for name in ("e0.json", "level.txt"):
        (folder / name).write_bytes((PBE / name).read_bytes())
    return folder


def settings(**changes: Any) -> PretrainConfig:
    return replace(SHORT, **changes)


@pytest.fixture(scope="module")
def whole_run(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(
        data=few, out=tmp_path_factory.mktemp("whole"), name="whole", start="mmea-organic-s", settings=SHORT
    )


def test_a_few_steps_from_a_backbone_give_another_backbone(whole_run: Path) -> None:
    start, made = load_backbone("mmea-organic-s"), load_backbone(whole_run)
    assert made.name == "whole"
    assert made.fingerprint != start.fingerprint
    assert made.level_of_theory == "PBE/def2-SVP (PySCF, density fitting)"
    assert made.atomic_energies == read_e0(PBE)
    assert made.config["start"] == {"name": "mmea-organic-s", "fingerprint": start.fingerprint}
    assert json.loads(whole_run.with_suffix(".json").read_text(encoding="utf-8")) == made.config
    assert "channels" not in made.config["training"]  # that of a new network; here the start tells
    changes = [
        float((a - b).square().mean().sqrt())
        for a, b in zip(start.network.parameters(), made.network.parameters(), strict=True)
        if a.numel()
    ]
    # Four steps of at most 1e-3 in the mean square: turning a step into another basis keeps its length.
    assert 0 < max(changes) < 0.004


def test_the_file_gives_the_errors_that_the_run_has_told(whole_run: Path, few: Path) -> None:
    made = load_backbone(whole_run)
    packed = PackedSet([few / "valid.npz"], e0=read_e0(few), elements=made.elements, device=torch.device("cpu"))
    batch, labels = packed.batch(torch.arange(len(packed)), made.r_max)
    found = Potential(made).predict(batch)
    assert found.forces is not None
    told = made.config["training"]["valid_forces_mae_meV_per_A"]
    assert 1e3 * float((found.forces - labels.forces).abs().mean()) == pytest.approx(told, rel=1e-4)


def test_the_mean_of_two_stages_is_that_of_their_weights(few: Path, whole_run: Path, tmp_path: Path) -> None:
    second = pretrain(data=few, out=tmp_path, name="second", start=whole_run, settings=SHORT)
    out = tmp_path / "mean.safetensors"
    result = mmea("pretrain", "average", whole_run, second, "--out", out)
    assert result.exit_code == 0, result.output
    one, other, mean = (dict(load_backbone(p).network.named_parameters()) for p in (whole_run, second, out))
    assert all(torch.equal(tensor, (one[name] + other[name]) / 2) for name, tensor in mean.items())
    assert not all(torch.equal(tensor, one[name]) for name, tensor in mean.items())
    assert load_backbone(out).fingerprint == result.stdout.strip()
    xtb = BACKBONE_FOLDER / "mmea-organic-s2-xtb.safetensors"
    for wrong, words in (([whole_run], "two backbones or more"), ([xtb, whole_run], "not stages of one network")):
        with pytest.raises(BackboneError, match=words):
            average(wrong, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_trained_frequencies_are_part_of_the_fingerprint(whole_run: Path, tmp_path: Path) -> None:
    made = load_backbone(whole_run)
    state = made.network.state_dict()
    (name,) = (key for key in state if key.endswith("bessel_fn.bessel_weights"))
    moved = {**state, name: state[name] * 1.001}
    identity = save_backbone(tmp_path / "moved.safetensors", made.config, moved)
    assert identity != made.fingerprint
    assert load_backbone(tmp_path / "moved.safetensors").fingerprint == identity


def test_stopped_run_resumes_to_the_same_bits(few: Path, tmp_path: Path, whole_run: Path) -> None:
    def stop_at_step_two(line: str) -> None:
        if ", step 2," in line:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"data": few, "out": tmp_path, "name": "again", "start": "mmea-organic-s"}
    with pytest.raises(KeyboardInterrupt):
        pretrain(**arguments, settings=SHORT, progress=stop_at_step_two)
    assert not (tmp_path / "again.safetensors").exists()
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] == 2
    path = pretrain(**arguments, settings=SHORT, resume=True)
    assert load_backbone(path).fingerprint == load_backbone(whole_run).fingerprint


def test_pair_repulsion_is_added_to_the_networks_energy(few: Path, tmp_path: Path) -> None:
    """By ZBL within the sum of the covalent radii: 1.52 A for two C, 0.96 A for O and H."""
    made = load_backbone(
        pretrain(data=few, out=tmp_path, name="z", start="mmea-organic-s", settings=settings(steps=0, zbl=True))
    )
    assert made.config["pair_repulsion"] is True
    assert made.config["start"]["fingerprint"] == load_backbone("mmea-organic-s").fingerprint

    def energies(backbone: Backbone) -> dict[float, float]:
        potential = Potential(backbone)
        graphs = [potential.graph(Atoms("C2", [(0, 0, 0), (0, 0, r)])) for r in (0.5, 1.0, 1.5, 1.53, 2.0)]
        return dict(zip((0.5, 1.0, 1.5, 1.53, 2.0), potential.predict_graphs(graphs)[0].tolist(), strict=True))

    before, after = energies(load_backbone("mmea-organic-s")), energies(made)

    def zbl(r: float) -> float:
        """Universal potential of Ziegler, Biersack and Littmark (1985) times a polynomial envelope of order 5."""
        a = 0.4543 * 0.529 / (2 * 6**0.3)
        terms = ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4028), (0.02817, 0.2016))
        screening = sum(c * np.exp(-k * r / a) for c, k in terms)
        x = r / (2 * covalent_radii[6])
        envelope = 1 - 21 * x**5 + 35 * x**6 - 15 * x**7 if x < 1 else 0.0
        return float(14.3996 * 36 / r * screening * envelope)

    for r, energy in before.items():
        assert after[r] - energy == pytest.approx(zbl(r), rel=1e-4, abs=2e-5)
    assert zbl(0.5) > 20
    assert zbl(1.53) == 0.0


def test_reference_energies_are_those_of_the_file_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "e0.json").write_text('{"1": -1.0}')
    (tmp_path / "revised.json").write_text('{"1": -2.0}')
    assert read_e0(tmp_path) == {1: -1.0}
    assert read_e0(tmp_path / "revised.json") == {1: -2.0}
    with pytest.raises(DataError, match=r"absent.json should map atomic numbers to energies"):
        read_e0(tmp_path / "absent.json")


@pytest.fixture
def repulsion(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], tuple[float, float]]:
    """In the place of GFN2-xTB: r -> energy, eV, and slope of 400 exp(-3 r) / r, stiff enough to reach 100 eV."""

    def law(r: float) -> tuple[float, float]:
        energy = 400 * np.exp(-3 * r) / r
        return float(energy), float(-energy * (3 + 1 / r))

    def instead(numbers: Any, positions: np.ndarray, *, unpaired: int = 0) -> tuple[float, np.ndarray]:
        assert unpaired == int(sum(walls.VALENCE[z] for z in numbers)) % 2
        energy, slope = law(float(positions[1, 2]))
        return energy - 7.0, np.array([[0, 0, slope], [0, 0, -slope]])

    monkeypatch.setattr(walls, "xtb_energy_and_forces", instead)
    return law


def test_a_wall_goes_on_with_its_slope_where_it_is_high(repulsion: Callable[[float], tuple[float, float]]) -> None:
    distances, energies, slopes = walls.wall(6, 17)
    outer = covalent_radii[6] + covalent_radii[17]
    assert distances[-1] == pytest.approx(outer)
    assert walls.INNER <= distances[0] < walls.INNER + walls.STEP
    assert (np.diff(distances) > 0).all()
    assert (np.diff(energies) < 0).all()
    own = np.array([repulsion(r) for r in distances])
    high = own[:, 0] - own[-1, 0] > walls.HIGHEST
    # the first one above is still the law's own: from there on the wall is straight
    edge = int(high.nonzero()[0][-1])
    np.testing.assert_allclose(energies[edge:], own[edge:, 0] - 7.0)
    np.testing.assert_allclose(slopes[edge:], own[edge:, 1])
    assert edge > 3
    np.testing.assert_allclose(slopes[:edge], own[edge, 1])
    np.testing.assert_allclose(np.diff(energies[: edge + 1]), own[edge, 1] * np.diff(distances[: edge + 1]))


@pytest.mark.usefixtures("repulsion")
def test_walls_of_all_pairs_stand_on_the_atoms_of_the_better_level(tmp_path: Path) -> None:
    cheap = tmp_path / "cheap"
    cheap.mkdir()
    (cheap / "e0.json").write_text(json.dumps({str(z): -3.5 for z in ELEMENTS}), encoding="utf-8")
    result = mmea("pretrain", "walls", "--data", PBE, "--cheap", cheap, "--out", tmp_path / "walls.npz")
    assert result.exit_code == 0, result.output
    found, e0 = read_arrays([tmp_path / "walls.npz"]), read_e0(PBE)
    pairs = found["numbers"].reshape(-1, 2)
    assert len({tuple(p) for p in pairs.tolist()}) == 55
    distances = found["positions"].reshape(-1, 2, 3)[:, 1, 2].astype(float)
    above = found["energy"] - [e0[a] + e0[b] for a, b in pairs.tolist()]
    low = above < 50
    np.testing.assert_allclose(above[low], 400 * np.exp(-3 * distances[low]) / distances[low], rtol=1e-5)
    np.testing.assert_allclose(found["forces"].reshape(-1, 2, 3).sum(1), 0)
    assert (found["forces"].reshape(-1, 2, 3)[:, 1, 2] > 0).all()  # pushed apart
    (cheap / "e0.json").write_text(json.dumps({"1": -3.5}), encoding="utf-8")
    with pytest.raises(DataError, match=r"missing for the elements \[6, 7"):
        walls.walls(data=PBE, cheap=cheap, out=tmp_path / "none.npz")
    assert not (tmp_path / "none.npz").exists()


@pytest.mark.usefixtures("repulsion")
def test_one_structure_of_every_batch_is_a_wall(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e0.json").write_text(json.dumps(dict.fromkeys(map(str, ELEMENTS), -3.5)), encoding="utf-8")
    walls.walls(data=PBE, cheap=tmp_path, out=tmp_path / "walls.npz")
    seen: list[list[int]] = []
    batch = PackedSet.batch

    def noting(self: PackedSet, chosen: torch.Tensor, r_max: float) -> Any:
        found = batch(self, chosen, r_max)
        if len(chosen) == SHORT.batch_size:
            seen.append(found[1].atoms_per_graph.tolist())
        return found

    monkeypatch.setattr(PackedSet, "batch", noting)
    arguments: dict[str, Any] = {"data": few, "start": "mmea-organic-s", "walls": tmp_path / "walls.npz"}
    path = pretrain(**arguments, out=tmp_path / "run", name="w", settings=SHORT)
    assert len(seen) == SHORT.steps
    assert all(sizes[-1] == 2 and min(sizes[:-1]) > 2 for sizes in seen)
    training = load_backbone(path).config["training"]
    assert (training["structures_seen"], training["of_walls"]) == (12, 4)
    with pytest.raises(TrainingError, match="batch_size must be 2 at least, got 1"):
        pretrain(**arguments, out=tmp_path / "one", name="w", settings=settings(batch_size=1))


def test_gfn2_falls_nowhere_on_the_way_in() -> None:
    pytest.importorskip("tblite", reason="tblite is not installed")
    for a, b in ((1, 1), (6, 8), (15, 35), (53, 53)):
        _, energies, slopes = walls.wall(a, b)
        repulsive = slopes < 0
        assert repulsive[: int(0.6 * len(slopes))].all()
        assert (np.diff(energies)[repulsive[:-1] & repulsive[1:]] < 0).all()


def test_a_run_is_not_resumed_with_another_network(few: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"data": few, "out": tmp_path, "name": "z", "start": "mmea-organic-s"}
    pretrain(**arguments, settings=SHORT)
    with pytest.raises(TrainingError, match="another network"):
        pretrain(**arguments, settings=settings(zbl=True), resume=True)


def test_a_run_is_not_resumed_with_other_data(few: Path, tmp_path: Path) -> None:
    """Its record, how many structures and walls it has seen, would not be true."""
    arguments: dict[str, Any] = {"data": few, "out": tmp_path / "run", "name": "z", "start": "mmea-organic-s"}
    pretrain(**arguments, settings=SHORT)
    (other := tmp_path / "other").mkdir()
    for name in ("valid.npz", "e0.json", "level.txt"):
        shutil.copy(few / name, other)
    shutil.copy(few / "valid.npz", other / "train-0.npz")
    before = (tmp_path / "run/resume.pt").read_bytes()
    for wrong in ({"walls": PBE / "walls.npz"}, {"data": other}):
        with pytest.raises(TrainingError, match="other structures or walls"):
            pretrain(**arguments | wrong, settings=SHORT, resume=True)
    assert (tmp_path / "run/resume.pt").read_bytes() == before
    pretrain(**arguments, settings=SHORT, resume=True)


def test_new_network_starts_from_the_seed(few: Path, tmp_path: Path) -> None:
    small = settings(channels=4, max_ell=1, r_max=3.0, steps=2)
    paths = [
        pretrain(data=few, out=tmp_path / name, name=name, settings=settings_)
        for name, settings_ in (
            ("a", small),
            ("b", small),
            ("c", settings(channels=4, max_ell=1, r_max=3.0, steps=2, seed=1)),
        )
    ]
    one, same, other = (load_backbone(path) for path in paths)
    assert one.elements == ELEMENTS
    assert one.r_max == 3.0
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_longer_training_on_few_structures_learns_them(few: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    longer = settings(
        channels=8, max_ell=1, r_max=3.0, steps=60, optimizer="adamw", lr=0.02, batch_size=4, warmup_steps=5
    )
    pretrain(data=few, out=tmp_path, name="longer", settings=longer, progress=lines.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines if "loss " in line]
    assert len(losses) == 60
    # the energy weighs more in the last 30 per cent, so compare before that
    assert np.mean(losses[30:40]) < 0.7 * np.mean(losses[:5])


def test_running_over_an_earlier_run_is_refused(few: Path, whole_run: Path) -> None:
    with pytest.raises(TrainingError, match="--resume"):
        pretrain(data=few, out=whole_run.parent, name="whole", start="mmea-organic-s", settings=SHORT)


def test_resuming_another_network_is_refused(few: Path, whole_run: Path) -> None:
    with pytest.raises(TrainingError, match="another network"):
        pretrain(data=few, out=whole_run.parent, name="whole", resume=True, settings=settings(channels=4, max_ell=1))


def test_nothing_to_resume_is_said(few: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="start without --resume"):
        pretrain(data=few, out=tmp_path, name="x", start="mmea-organic-s", settings=SHORT, resume=True)
    (tmp_path / "resume.pt").write_bytes(b"rubbish")
    with pytest.raises(TrainingError, match="cannot be read"):
        pretrain(data=few, out=tmp_path, name="x", start="mmea-organic-s", settings=SHORT, resume=True)


def test_a_run_of_no_time_is_done_at_once(few: Path, tmp_path: Path) -> None:
    start = load_backbone("mmea-organic-s")
    for options in (settings(steps=None, minutes=0.0), settings(steps=0)):
        path = pretrain(data=few, out=tmp_path / str(options.steps), name="x", start="mmea-organic-s", settings=options)
        made = load_backbone(path)
        assert made.config["training"]["structures_seen"] == 0
        for name, tensor in start.network.named_parameters():
            assert torch.equal(made.network.get_parameter(name), tensor)


def test_files_of_other_kinds_and_stages_are_not_written_over(few: Path, whole_run: Path, tmp_path: Path) -> None:
    (other := tmp_path / "train.xyz").write_text("my labels")
    pool = mmea("pretrain", "pool", few / "train-0.npz", "--broad", few / "valid.npz", "--number", 1, "--out", other)
    chosen = mmea("pretrain", "choose", "--data", few, "--by", whole_run, whole_run, "--out", other)
    for result in (pool, chosen):
        assert result.exit_code == 1
        assert "expected a name that ends in .npz" in result.stderr
    assert other.read_text() == "my labels"
    before = whole_run.read_bytes()
    with pytest.raises(BackboneError, match="is one of the stages"):
        average([whole_run, whole_run], whole_run)
    assert whole_run.read_bytes() == before


def test_start_that_does_not_exist_writes_nothing(few: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError):
        pretrain(data=few, out=tmp_path / "new", name="x", start="no-such", settings=SHORT)
    assert not (tmp_path / "new").exists()


# --- sets -----------------------------------------------------------------------------------------------------------


def test_shipped_set_is_whole_and_split_by_composition() -> None:
    e0, device = read_e0(PBE), torch.device("cpu")
    sizes = {"train-0": 555, "train-1": 185, "train-2": 229, "train-3": 294, "train-4": 188, "train-5": 1541}
    sizes |= {"valid": 62, "valid-1": 17, "valid-2": 21, "valid-3": 28, "valid-4": 4, "valid-5": 144}
    compositions: dict[str, set[tuple[int, ...]]] = {"train": set(), "valid": set()}
    for name, size in sizes.items():
        s = PackedSet([PBE / f"{name}.npz"], e0=e0, elements=ELEMENTS, device=device)
        assert len(s) == size
        ends = s.starts.tolist()
        compositions[name.split("-")[0]] |= {tuple(sorted(s.elements[a:b].tolist())) for a, b in pairwise(ends)}
        assert float(s.forces.abs().max()) < label.LARGEST_FORCE
        # molecules: bound, by less than 10 eV per atom
        per_atom = s.energy / s.n_atoms
        assert float(per_atom.max()) < 0
        assert float(per_atom.min()) > -10
        with np.load(PBE / f"{name}.npz") as content:
            assert content["forces_xtb"].shape == content["forces"].shape
            assert content["energy_xtb"].shape == content["energy"].shape
    assert compositions["train"].isdisjoint(compositions["valid"])
    everything = label.indices([PBE / f"{name}.npz" for name in sizes])
    assert len(everything) == len(set(everything))


def test_no_benchmark_is_in_the_shipped_set() -> None:
    left_out = {tuple(sorted(atomic_numbers[s] for s in Formula(text))) for text in choose.LEFT_OUT}
    for name in (f"{kind}-{number}" for kind in ("train", "valid") for number in (1, 2, 3, 4, 5)):
        arrays = read_arrays([PBE / f"{name}.npz"])
        ends = np.cumsum(arrays["n_atoms"].astype(int))
        found = {tuple(sorted(part.tolist())) for part in np.split(arrays["numbers"], ends[:-1])}
        assert found.isdisjoint(left_out)


def test_batch_has_all_pairs_within_the_cutoff_and_none_between_molecules() -> None:
    packed = PackedSet([PBE / "valid.npz"], e0=read_e0(PBE), elements=ELEMENTS, device=torch.device("cpu"))
    chosen, r_max = torch.tensor([5, 0, 17]), 3.0
    batch, labels = packed.batch(chosen, r_max)
    inputs = batch.tensors
    assert labels.energy.tolist() == packed.energy[chosen].tolist()
    assert batch.atoms_per_graph.tolist() == packed.n_atoms[chosen].tolist()
    distances = torch.cdist(inputs["positions"], inputs["positions"])
    same = inputs["batch"][:, None] == inputs["batch"]
    expected = (distances < r_max) & same & ~torch.eye(len(distances), dtype=torch.bool)
    made = torch.zeros_like(expected)
    made[inputs["edge_index"][0], inputs["edge_index"][1]] = True
    assert torch.equal(made, expected)
    assert int(expected.sum()) == inputs["edge_index"].shape[1]
    start = int(packed.starts[5])
    assert torch.equal(
        inputs["positions"][: int(packed.n_atoms[5])], packed.positions[start : start + packed.n_atoms[5]]
    )


def test_element_without_reference_energy_is_named() -> None:
    e0 = {z: e for z, e in read_e0(PBE).items() if z != 35}
    with pytest.raises(DataError, match="35"):
        PackedSet([PBE / "train-0.npz"], e0=e0, elements=ELEMENTS, device=torch.device("cpu"))


def test_damaged_or_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e0\.json"):
        read_e0(tmp_path)
    (tmp_path / "valid.npz").write_bytes((PBE / "valid.npz").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"valid\.npz is not a packed set"):
        PackedSet([tmp_path / "valid.npz"], e0=read_e0(PBE), elements=ELEMENTS, device=torch.device("cpu"))


# --- labels ---------------------------------------------------------------------------------------------------------


def test_labels_without_pyscf_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "pyscf":
            raise ImportError("No module named 'pyscf'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MMEAError, match=r"mmea\[label\]"):
        label.energy_and_forces([1, 1], np.array([[0, 0, 0], [0, 0, 0.74]]))
    result = mmea("pretrain", "label", "--data", PBE, "--out", tmp_path / "raw")
    assert result.exit_code == 1
    assert "pip install" in result.stderr
    assert not (tmp_path / "raw").exists()


def test_drawing_goes_round_over_compositions_and_skips() -> None:
    first = list(label.draw(PBE, 7, set()))
    compositions = [tuple(sorted(numbers.tolist())) for _, numbers, _ in first]
    distinct = len(set(compositions))
    assert len(set(compositions[:distinct])) == distinct  # every composition once before any comes again
    assert all((numbers > 1).sum() <= 3 for _, numbers, _ in label.draw(PBE, 3, set()))
    skipped = {index for index, _, _ in first[:10]}
    assert skipped.isdisjoint(index for index, _, _ in label.draw(PBE, 7, skipped))


def test_what_two_potentials_disagree_on_is_chosen_first() -> None:
    apart, n_atoms = np.array([1.0, 5.0, 2.0, 9.0, 0.5, 4.0]), np.full(6, 8)
    # the wildest (9.0) counts for nothing; then by disagreement and as they stand, in turn
    assert ordered(apart, n_atoms) == [1, 0, 5, 3, 2, 4]
    assert ordered(np.array([1.0, 1.1]), np.array([4, 40]))[0] == 0  # a label of the second costs far more
    assert ordered(np.array([]), np.array([])) == []
    assert interleaved([0, 1, 2, 3, 4], [10, 11]) == [0, 1, 2, 10, 3, 4, 11]


def test_choosing_gives_an_order_for_labels_and_leaves_benchmarks_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arrays = read_arrays(sorted(PBE.glob("train-*.npz")))
    ends = np.cumsum(arrays["n_atoms"].astype(int))
    compositions = [tuple(sorted(part.tolist())) for part in np.split(arrays["numbers"], ends[:-1])]
    monkeypatch.setattr(choose, "LEFT_OUT", ("C2H6",))
    words = ["pretrain", "choose", "--data", str(PBE), "--by", "mmea-organic-s", "mmea-organic-s-xtb", "--pool", "40"]
    result = mmea(*words, "--out", tmp_path / "order.npz")
    assert result.exit_code == 0, result.output
    assert "other elements too: 10 structures" in result.stdout
    chosen = label.indices([tmp_path / "order.npz"])
    assert len(chosen) == len(set(chosen)) == 40
    counts = Counter(compositions[k] for k in chosen)
    assert max(counts.values()) <= 3
    assert (1,) * 6 + (6,) * 2 not in counts

    monkeypatch.setattr(label, "_pyscf", lambda: None)
    monkeypatch.setattr(
        label, "energy_and_forces", lambda numbers, positions, grid: (-1.0 * len(numbers), positions * 0.0)
    )
    assert label.label(data=PBE, out=tmp_path / "raw", order=tmp_path / "order.npz", limit=5) == 5
    assert {int(file.stem) for file in (tmp_path / "raw").glob("*.npz")} == set(chosen[:5])
    assert mmea(*words, "--out", tmp_path / "next.npz", "--skip", tmp_path / "order.npz").exit_code == 0
    assert set(chosen).isdisjoint(label.indices([tmp_path / "next.npz"]))
    np.savez(tmp_path / "wrong.npz", index=[10**6])
    with pytest.raises(DataError, match="number 1000000"):
        label.label(data=PBE, out=tmp_path / "raw", order=tmp_path / "wrong.npz")
    with pytest.raises(DataError, match="no structure numbers"):
        label.label(data=PBE, out=tmp_path / "raw", order=PBE / "e0.json")


def test_labelling_is_resumable_and_packs_into_a_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for the quantum chemistry: the bookkeeping is what is tested."""
    calls: list[int] = []

    def stand_in(numbers: list[int], positions: np.ndarray, *, grid: int) -> tuple[float, np.ndarray] | None:
        calls.append(len(numbers))
        return None if len(calls) == 3 else (-100.0 * len(numbers), 0.1 * np.ones_like(positions))

    monkeypatch.setattr(label, "_pyscf", lambda: None)
    monkeypatch.setattr(label, "energy_and_forces", stand_in)
    raw = tmp_path / "raw"
    assert label.label(data=PBE, out=raw, limit=25) == 25
    assert len(calls) == 26  # one did not converge
    assert label.label(data=PBE, out=raw, limit=5) == 5
    assert len(list(raw.glob("*.npz"))) == 30
    (raw / "e0.json").write_bytes((PBE / "e0.json").read_bytes())
    result = mmea("pretrain", "pack", raw, "--out", tmp_path / "set", "--valid-fraction", "0.3")
    assert result.exit_code == 0, result.output
    assert "train-0" in result.stdout
    e0, device = read_e0(tmp_path / "set"), torch.device("cpu")
    files = [tmp_path / "set" / name for name in ("train-0.npz", "valid.npz")]
    made = [PackedSet([file], e0=e0, elements=ELEMENTS, device=device) for file in files]
    assert sum(len(s) for s in made) == 30
    assert float(made[0].forces.mean()) == pytest.approx(0.1)


def test_a_second_file_of_a_set_holds_other_structures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(label, "_pyscf", lambda: None)
    monkeypatch.setattr(
        label, "energy_and_forces", lambda numbers, positions, grid: (-1.0 * len(numbers), positions * 0.0)
    )
    monkeypatch.setattr(label, "xtb_energy_and_forces", lambda numbers, positions: (-2.0, positions * 0.0 + 3.0))
    raw, more, made = tmp_path / "raw", tmp_path / "more", tmp_path / "set"
    label.label(data=PBE, out=raw, limit=25)
    counts = label.pack(raw, out=made, e0=PBE / "e0.json", valid_fraction=0.3)
    label.label(data=PBE, out=more, limit=20, skip=[made / "train-0.npz", made / "valid.npz"])
    again = label.pack(more, out=made, e0=PBE / "e0.json", valid_fraction=0.3, number=1, xtb=True)
    assert counts.keys() == {"train-0", "valid"}
    assert again.keys() == {"train-1", "valid-1"}
    both = label.indices(sorted(made.glob("*.npz")))
    assert len(both) == len(set(both)) == 45
    with np.load(made / "train-1.npz") as content:
        assert set(content["energy_xtb"].tolist()) == {-2.0}
        assert content["forces_xtb"].shape == content["forces"].shape
    whole = PackedSet(sorted(made.glob("train-*.npz")), e0=read_e0(made), elements=ELEMENTS, device=torch.device("cpu"))
    assert len(whole) == counts["train-0"] + again["train-1"]
    with pytest.raises(DataError, match="already: give that set to `label --skip`"):
        label.pack(raw, out=made, e0=PBE / "e0.json", valid_fraction=0.3, number=2)


@pytest.mark.parametrize("valid_fraction", [0.0, 1.0])
def test_a_composition_stays_on_its_side(valid_fraction: float, tmp_path: Path) -> None:
    made, raw = tmp_path / "set", tmp_path / "raw"
    made.mkdir()
    raw.mkdir()
    for name in ("train-0.npz", "valid.npz", "walls.npz"):  # walls are no structures of the set
        (made / name).write_bytes((PBE / name).read_bytes())
    first = {}
    for k, name in enumerate(("train-0", "valid")):
        arrays = read_arrays([PBE / f"{name}.npz"])
        n = int(arrays["n_atoms"][0])
        own: dict[str, Any] = {key: arrays[key][:n] for key in ("numbers", "positions", "forces")}
        np.savez(raw / f"{k}.npz", **own, energy=arrays["energy"][0], index=10**9 + k)
        first[name] = own["numbers"]
    counts = label.pack(raw, out=made, e0=PBE / "e0.json", valid_fraction=valid_fraction, number=1)
    assert counts == {"train-1": 1, "valid-1": 1}
    for name, numbers in first.items():
        assert (read_arrays([made / f"{name.split('-')[0]}-1.npz"])["numbers"] == numbers).all()


def test_packing_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e0.json").write_bytes((PBE / "e0.json").read_bytes())
    with pytest.raises(DataError, match="no structures"):
        label.pack(tmp_path, out=tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_pbe_labels_agree_with_the_shipped_ones() -> None:
    pytest.importorskip("pyscf", reason="PySCF is not installed")
    with np.load(PBE / "valid.npz") as content:
        arrays = dict(content)
    ends = np.cumsum(arrays["n_atoms"].astype(int))
    smallest = int(np.argmin(arrays["n_atoms"]))
    span = slice(ends[smallest] - int(arrays["n_atoms"][smallest]), ends[smallest])
    numbers, positions = arrays["numbers"][span].tolist(), arrays["positions"][span].astype(float)
    for grid, error in ((3, 1e-3), (1, 0.02)):
        result = label.energy_and_forces(numbers, positions, grid=grid)
        assert result is not None
        assert result[0] == pytest.approx(arrays["energy"][smallest], abs=error)
        assert np.abs(result[1] - arrays["forces"][span]).max() < error


def test_xtb_labels_agree_with_the_shipped_ones() -> None:
    pytest.importorskip("tblite", reason="tblite is not installed")
    with np.load(PBE / "valid.npz") as content:
        n = int(content["n_atoms"][0])
        numbers, positions = content["numbers"][:n].astype(int), content["positions"][:n].astype(float)
        energy, forces = label.xtb_energy_and_forces(numbers, positions)
        assert energy == pytest.approx(content["energy_xtb"][0], abs=1e-4)
        assert np.abs(forces - content["forces_xtb"][:n]).max() < 1e-3


@pytest.mark.parametrize("device", ["gpu", "cuda:7"])
def test_a_device_that_is_not_here_is_told(device: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    call = ["pretrain", "train", "--data", PBE, "--out", folder, "--name", "n", "--minutes", 1]
    result = mmea(*call, "--device", device)
    assert result.exit_code == 1
    assert device in result.output
    assert "cpu" in result.output
    assert not folder.exists()
