"""Trainings whose steps are computed in one batch are what each would have been alone."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from ase import Atoms
from ase.build import molecule
from test_finetuning import QUICK, SMALL, dataset, tiny_backbone
from torch import Tensor

from conftest import crystal, ethanol, network_config, random_network, randomise, small_backbone_around
from mmea_calc import finetune, read_adapter
from mmea_calc.adapted import attach, attached
from mmea_calc.backbone import Backbone, save_backbone
from mmea_calc.config import AdapterConfig, TrainConfig
from mmea_calc.data.dataset import Labelled
from mmea_calc.errors import TrainingError
from mmea_calc.fast.switch import remove_fast_path, use_fast_path
from mmea_calc.loss import Loss, LossWeights, collect_labels
from mmea_calc.methods import METHODS
from mmea_calc.potential import Potential
from mmea_calc.training.compiled_training import difference
from mmea_calc.training.finetuning import finetuning
from mmea_calc.training.one_batch import OneBatch
from mmea_calc.training.steps import Gradients, Step, Training
from mmea_calc.training.sweep import Point, committee, train_all

CONFIG = TrainConfig(huber_delta=0.3)
BATCHES: tuple[tuple[Atoms, ...], ...] = (
    (ethanol(), crystal(), molecule("CH3COOH")),
    (molecule("CH3OH"),),
    (Atoms("H"), molecule("CO"), ethanol()),
)
Found = tuple[Loss, Gradients]


def backbone_of(name: str = "agnostic", *, fast: bool = True) -> Backbone:
    backbone = small_backbone_around(random_network(**ARCHITECTURES[name]), dict.fromkeys((1, 6, 8), -1.5))
    if not fast:
        backbone.fast = False
        remove_fast_path(backbone.network)
    heads = tuple(ARCHITECTURES[name].get("heads", ("Default",)))
    return replace(backbone, config=network_config(**ARCHITECTURES[name]), heads=heads, head=heads[-1])


def step_of(backbone: Backbone, config: AdapterConfig, number: int, *, stress: bool = False) -> Step:
    """Of a training with an adapter and reference energies of its own, and labels for one of `BATCHES`."""
    rng = np.random.default_rng(number)
    structures = [
        Labelled(
            atoms,
            energy=float(rng.standard_normal()),
            forces=None if i == 1 else rng.standard_normal((len(atoms), 3)),
            stress=rng.standard_normal((3, 3)) if stress and atoms.pbc.all() else None,
        )
        for i, atoms in enumerate(BATCHES[number])
    ]
    potential = Potential(backbone)
    potential.adapter = adapter = attach(backbone.network, replace(config, seed=number))
    potential.reference_energies = {1: -1.0 - number, 6: -2.0, 8: -3.0}
    randomise(adapter, seed=number, std=0.02)
    graphs = [potential.graph(s.atoms) for s in structures]
    labels = collect_labels(structures, dtype=potential.dtype, device=potential.device)
    training = replace(CONFIG, stress_weight=5.0 if stress else 0.0)
    weights = LossWeights.of(labels, training, energy_weight=2.0, forces_weight=3.0)
    return Step(potential, adapter, graphs, potential.collate(graphs), labels, weights, training, stress)


def training(step: Step, n: int = 1) -> Training[list[Found]]:
    """That hands out one step, `n` times; what was found."""
    found = []
    for _ in range(n):
        step.found = None
        yield step
        found.append(step.plainly() if step.found is None else step.found)  # type: ignore[redundant-expr]
    return found


def computed(hub: Potential, steps: Sequence[Step]) -> list[Found]:
    """In one batch, whatever each of them is alone."""
    return OneBatch(hub)._together(list(steps))


def assert_own(found: Sequence[Found], steps: Sequence[Step], tolerance: float = 1e-10) -> None:
    for (loss, gradients), step in zip(found, steps, strict=True):
        own, own_gradients = step.plainly()
        for name in ("energy", "forces", "stress"):
            torch.testing.assert_close(getattr(loss, name), getattr(own, name), rtol=tolerance, atol=0)
        assert own.total > 0
        assert difference(gradients, own_gradients) < tolerance


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_training_gets_its_own_gradient_on_every_architecture(name: str) -> None:
    hub = Potential(backbone_of(name))
    steps = [step_of(backbone_of(name), AdapterConfig(gate_rank=2, low_rank=2), k) for k in range(2)]
    assert_own(computed(hub, steps), steps)


@pytest.fixture(scope="module")
def backbones() -> list[Backbone]:
    return [backbone_of() for _ in range(4)]


@pytest.fixture
def four(backbones: list[Backbone]) -> Iterator[list[Backbone]]:
    """One that all go through, and three for trainings, whose adapters are taken off again."""
    yield backbones
    for backbone in backbones:
        if adapter := attached(backbone.network):
            adapter.detach()


@pytest.mark.parametrize("method", METHODS)
def test_every_training_gets_its_own_gradient_for_every_method(method: str, four: list[Backbone]) -> None:
    steps = [step_of(b, AdapterConfig(method=method, gate_rank=2, low_rank=2), k) for k, b in enumerate(four[1:])]
    found = computed(Potential(four[0]), steps)
    assert_own(found, steps)


def test_trainings_may_differ_in_what_they_adapt_and_learn_stresses(four: list[Backbone]) -> None:
    configs = (AdapterConfig("gates", gate_rank=3), AdapterConfig("elora", low_rank=2), AdapterConfig("readout"))
    steps = [step_of(b, c, k, stress=k == 0) for k, (b, c) in enumerate(zip(four[1:], configs, strict=True))]
    assert_own(computed(Potential(four[0]), steps), steps)
    assert steps[0].plainly()[0].stress > 0


def test_the_plain_path_does_the_same() -> None:
    hub = Potential(backbone_of(fast=False))
    steps = [step_of(backbone_of(fast=False), AdapterConfig(gate_rank=2, low_rank=2), k) for k in range(2)]
    assert_own(computed(hub, steps), steps)


def test_the_network_that_all_go_through_is_left_as_it_was(four: list[Backbone]) -> None:
    hub = Potential(four[0])
    batch = hub.collate([hub.graph(ethanol())])
    before = hub.predict(batch)
    forwards = {name: m.__dict__.get("forward") for name, m in four[0].network.named_modules()}
    steps = [step_of(b, AdapterConfig(gate_rank=2, low_rank=2), k) for k, b in enumerate(four[1:])]
    computed(hub, steps)
    assert {name: m.__dict__.get("forward") for name, m in four[0].network.named_modules()} == forwards
    after = hub.predict(batch)
    assert torch.equal(before.energy, after.energy)
    assert before.forces is not None
    assert after.forces is not None
    assert torch.equal(before.forces, after.forces)


def test_what_memory_does_not_hold_goes_in_smaller_batches(
    four: list[Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, sizes = Potential(four[0]), []
    whole = Potential.predict
    failed: list[weakref.ref[torch.Tensor]] = []

    def small_memory(self: Potential, batch: Any, **options: Any) -> Any:
        if self is hub:
            sizes.append(batch.n_graphs)
            assert not any(one() is not None for one in failed)  # nothing of a failed attempt is held in the next
            if batch.n_graphs > 4:
                activations = torch.ones(3)
                failed.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch, **options)

    monkeypatch.setattr(Potential, "predict", small_memory)
    steps = [step_of(b, AdapterConfig(gate_rank=2, low_rank=2), k) for k, b in enumerate(four[1:])]
    rounds = OneBatch(hub).run([training(step, 2) for step in steps])
    for which in range(2):
        assert_own([found[which] for found in rounds], steps)
    assert len(failed) == 1
    assert sizes == [7, 4, 4]  # all, then the first two together and the last alone; all are not tried again


def test_a_wrong_gradient_is_found_out_and_members_go_on_alone(
    four: list[Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [step_of(b, AdapterConfig(gate_rank=2, low_rank=2), k) for k, b in enumerate(four[1:])]
    right = OneBatch._together

    def wrong(self: OneBatch, some: list[Step]) -> list[Found]:
        return [(loss, [None if g is None else 1.01 * g for g in gs]) for loss, gs in right(self, some)]

    monkeypatch.setattr(OneBatch, "_together", wrong)
    with pytest.warns(UserWarning, match=r"go on one by one: the gradient of number \d: it differs .* by 0\.01"):
        found = OneBatch(Potential(four[0])).run([training(step) for step in steps])
    assert_own([one for (one,) in found], steps)


def test_a_layer_that_mixes_rows_is_found_out(four: list[Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [step_of(b, AdapterConfig("elora", low_rank=2), k) for k, b in enumerate(four[1:])]
    monkeypatch.setattr(
        "mmea_calc.training.one_batch.adapted_layers",
        lambda adapter: {"interactions.0.conv_tp_weights.layer0": "atoms"},
    )
    with pytest.warns(UserWarning, match=r"conv_tp_weights.layer0 takes an input of shape .*, expected \d+ rows"):
        found = OneBatch(Potential(four[0])).run([training(step) for step in steps])
    assert_own([one for (one,) in found], steps)


# Whole trainings ----------------------------------------------------------------------------------------------------


def tensors(path: Path) -> dict[str, Tensor]:
    return dict(read_adapter(path).tensors)


def fast_tiny() -> Backbone:
    backbone = tiny_backbone()
    use_fast_path(backbone.network)
    return backbone


def test_trainings_of_other_lengths_end_as_they_would_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    # Not SOAP: its bases are those of matrices without full rank at first, where rounding decides.
    settings = [replace(QUICK, optimizer="adamw", epochs=n, batch_size=b, seed=n) for n, b in ((4, 4), (1, 4), (3, 3))]

    def options(name: str, config: TrainConfig) -> dict[str, Any]:
        path = tmp_path / f"{name}-{config.epochs}.adapter"
        return dict(train=data, output=path, backbone=fast_tiny(), adapter=SMALL, training=config)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = OneBatch(Potential(fast_tiny())).run([finetuning(**options("together", s)) for s in settings])
    for result, config in zip(together, settings, strict=True):
        found, alone = tensors(result.path), tensors(finetune(**options("alone", config)).path)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def failing(event: Any) -> None:
    if event.epoch == 1:
        raise RuntimeError("no more")


def stopping(event: Any) -> None:
    if event.epoch == 1:
        raise KeyboardInterrupt


def test_what_one_training_raises_comes_when_the_others_have_ended(tmp_path: Path) -> None:
    data, config = dataset(tmp_path), replace(QUICK, epochs=2)
    told: list[Any] = [lambda event: None, failing, lambda event: None]
    trainings = [
        finetuning(
            data, tmp_path / f"{k}.adapter", backbone=fast_tiny(), adapter=SMALL, training=config, progress=progress
        )
        for k, progress in enumerate(told)
    ]
    with pytest.raises(RuntimeError, match="no more"):
        OneBatch(Potential(fast_tiny())).run(trainings)
    assert sorted(path.name for path in tmp_path.glob("*.adapter")) == ["0.adapter", "2.adapter"]


def test_an_interruption_ends_all_trainings_which_can_be_resumed(tmp_path: Path) -> None:
    data, config = dataset(tmp_path), replace(QUICK, epochs=3, optimizer="adamw")
    backbones = [fast_tiny() for _ in range(2)]

    def trainings(*, resume: bool, progress: Any = lambda event: None) -> list[Any]:
        return [
            finetuning(
                data,
                tmp_path / f"{k}.adapter",
                backbone=backbone,
                adapter=SMALL,
                training=replace(config, seed=k),
                resume=resume,
                progress=progress,
            )
            for k, backbone in enumerate(backbones)
        ]

    with pytest.raises(KeyboardInterrupt):
        OneBatch(Potential(fast_tiny())).run(trainings(resume=False, progress=stopping))
    assert all(attached(backbone.network) is None for backbone in backbones)
    OneBatch(Potential(fast_tiny())).run(trainings(resume=True))
    for k in range(2):
        whole = finetune(
            data, tmp_path / "whole.adapter", backbone=fast_tiny(), adapter=SMALL, training=replace(config, seed=k)
        )
        resumed = tensors(tmp_path / f"{k}.adapter")
        for name, value in tensors(whole.path).items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-6, atol=1e-8)


def test_a_committee_in_one_batch_is_the_committee_trained_one_by_one(tmp_path: Path) -> None:
    saved = tmp_path / "tiny.safetensors"
    save_backbone(saved, network_config(), random_network().state_dict())
    dataset(tmp_path)
    training = replace(QUICK, epochs=2, optimizer="adamw", device="cpu", valid_fraction=0.25)
    found = []
    for name, one_batch in (("together", True), ("apart", False)):
        point = Point("a", {}, SMALL, training, tmp_path / name / "a.adapter", (tmp_path / "train.xyz",))
        point = replace(point, options={"backbone": str(saved), "E0s": "average"})
        members = committee(3, point)
        outcomes = train_all(members, one_batch=one_batch, folder=tmp_path)
        assert [o.reason for o in outcomes] == ["", "", ""]
        found.append([tensors(m.output) for m in members])
    for together, apart in zip(*found, strict=True):
        assert together.keys() == apart.keys()
        for key, value in apart.items():
            torch.testing.assert_close(
                together[key], value, rtol=1e-3 if value.dtype == torch.float32 else 1e-6, atol=1e-5
            )


def test_points_of_different_backbones_are_refused(tmp_path: Path) -> None:
    one = Point("a", {}, SMALL, QUICK, tmp_path / "a.adapter", (tmp_path / "train.xyz",))
    other = replace(one, name="b", options={"backbone": "mmea-organic-s-xtb"})
    with pytest.raises(TrainingError, match="one backbone, head, device and precision"):
        train_all([one, other], one_batch=True, folder=tmp_path)
