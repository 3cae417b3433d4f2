"""A compiled step of training gives the loss and the gradient of the network itself, or is not used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from ase import Atoms
from ase.build import molecule
from test_finetuning import QUICK, SMALL, dataset, tiny_backbone
from torch import Tensor
from waiting import Nothing, Watching, watched_recording

from conftest import batch_of, crystal, ethanol, network_config, random_network, randomise, small_backbone_around
from mmea_calc import finetune, read_adapter
from mmea_calc.adapted import Adapter, attach
from mmea_calc.adapter_state import SHORTEST
from mmea_calc.backbone import Backbone
from mmea_calc.config import AdapterConfig, TrainConfig
from mmea_calc.data.dataset import Labelled
from mmea_calc.errors import CompilationError
from mmea_calc.fast import machine_code
from mmea_calc.fast.arrangement import arrange
from mmea_calc.fast.recorded import Recording, Recordings
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.fast.tracing import Inputs, loss_evaluator, tables_of, trace_loss
from mmea_calc.graph import Batch
from mmea_calc.loss import LossWeights, collect_labels, loss_of
from mmea_calc.mace_networks import repeat_to_the_bit
from mmea_calc.methods import METHODS
from mmea_calc.potential import Potential
from mmea_calc.training import compiled_training
from mmea_calc.training.compiled_training import CompiledGradient, difference, on_device, packed, targets_of, unpacked

CONFIG = TrainConfig(huber_delta=0.3)
Step = tuple[Any, Any]


def labelled(*structures: Atoms, energies: bool = True) -> list[Labelled]:
    """Random labels; the second structure has no forces."""
    rng = np.random.default_rng(3)
    return [
        Labelled(
            atoms,
            energy=float(rng.standard_normal()) if energies else None,
            forces=None if i == 1 else rng.standard_normal((len(atoms), 3)),
            stress=None,
        )
        for i, atoms in enumerate(structures)
    ]


def of(potential: Potential, adapter: Adapter, structures: list[Labelled]) -> tuple[Batch, Any, LossWeights, Any]:
    """What a step is computed from, and the plain way to compute it."""
    batch = potential.collate([potential.graph(s.atoms) for s in structures])
    labels = collect_labels(structures, dtype=potential.dtype, device=potential.device)
    weights = LossWeights.of(labels, CONFIG, energy_weight=2.0, forces_weight=3.0)

    def plainly() -> Step:
        loss = loss_of(potential.predict(batch, training=True), labels, weights, CONFIG)
        return loss, torch.autograd.grad(loss.total, adapter.parameters(), allow_unused=True)

    return batch, labels, weights, plainly


class Uncompiled:
    """In the place of a program: the function that is traced, or its graph."""

    def __init__(self, gradient: CompiledGradient, *, traced: Batch | None = None) -> None:
        backbone = gradient.potential.backbone
        self.gradient, self.names = gradient, [*gradient._updated, *gradient._gates]
        with gradient._folded():
            network = backbone.network
            batch = batch_of(ethanol()) if traced is None else traced
            arrangement = arrange(batch.tensors)
            tables = tables_of(network, arrangement.present, compiled=True, frozen=False)
            inputs = Inputs.of(batch, arrangement, tables, stress=False)
            self.run: Any = loss_evaluator(network, inputs, backbone.head_index, self.names)
            if traced is not None:
                known = dict(machine_code.named_tensors(network))
                shown = trace_loss(
                    network,
                    batch,
                    compiled_training._example_targets(batch),
                    backbone.head_index,
                    {name: known[name] for name in self.names},
                )
                self.run = lambda *tensors: shown.graph(*tensors, *shown.constants)

    def __call__(self, inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        with self.gradient._folded():
            return self.run(*inputs)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A gradient whose program is not compiled."""

    class NoProgram:
        def __init__(self, *args: object) -> None: ...

        def values(self, known: object) -> list[Tensor]:
            return []

    def make(potential: Potential, adapter: Adapter, *, traced: Batch | None = None) -> CompiledGradient:
        with monkeypatch.context() as patch:
            patch.setattr(CompiledGradient, "_made", lambda self: Path())
            patch.setattr(compiled_training, "Program", NoProgram)
            gradient = CompiledGradient(potential, adapter, CONFIG)
        gradient._program = Uncompiled(gradient, traced=traced)
        return gradient

    return make


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Iterator[Backbone]:
    name = request.param
    with borrowed(name) as network:
        backbone = small_backbone_around(network, dict.fromkeys((1, 6, 8), -1.5))
        heads = tuple(ARCHITECTURES[name].get("heads", ("Default",)))
        yield replace(backbone, config=network_config(**ARCHITECTURES[name]), heads=heads, head=heads[-1])


def adapted(backbone: Backbone, config: AdapterConfig) -> tuple[Potential, Adapter]:
    repeat_to_the_bit(backbone.network)
    potential = Potential(backbone)
    potential.adapter = adapter = attach(backbone.network, config)
    randomise(adapter, std=0.02)
    return potential, adapter


def assert_agrees(gradient: CompiledGradient, structures: list[Labelled], tolerance: float = 1e-10) -> None:
    batch, labels, weights, plainly = of(gradient.potential, gradient.adapter, structures)
    found = gradient(batch, labels, weights, plainly)
    assert found is not None
    loss, gradients = found
    own, own_gradients = plainly()
    assert own.energy > 0
    assert own.forces > 0
    torch.testing.assert_close(loss.energy.double(), own.energy.detach().double(), rtol=tolerance, atol=0)
    torch.testing.assert_close(loss.forces.double(), own.forces.detach().double(), rtol=tolerance, atol=0)
    assert difference(gradients, own_gradients) < tolerance


def fast_backbone(**changes: Any) -> Backbone:
    """As `load_backbone` gives it."""
    backbone = replace(tiny_backbone(), network=random_network(**changes))
    use_fast_path(backbone.network)
    repeat_to_the_bit(backbone.network)
    return backbone


def quick_backbone() -> Backbone:
    """One that is compiled in a minute."""
    return fast_backbone(num_interactions=1, max_ell=1, correlation=2)


STRUCTURES = (ethanol(), crystal(), molecule("CH3COOH"))


def test_the_gradient_is_the_networks_on_every_architecture(architecture: Backbone, uncompiled: Any) -> None:
    potential, adapter = adapted(architecture, AdapterConfig(gate_rank=2, low_rank=2))
    gradient = uncompiled(potential, adapter)
    assert_agrees(gradient, labelled(*STRUCTURES))
    assert_agrees(gradient, labelled(molecule("CH3OH")))


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_networks_for_every_method(method: str, uncompiled: Any) -> None:
    with borrowed("agnostic") as network:
        backbone = small_backbone_around(network, dict.fromkeys((1, 6, 8), -1.5))
        potential, adapter = adapted(backbone, AdapterConfig(method=method, gate_rank=2, low_rank=2))
        assert_agrees(uncompiled(potential, adapter), labelled(*STRUCTURES))
        assert not adapter.weights.folded


# --- recorded --------------------------------------------------------------------------------------------------------


def recorded(potential: Potential, adapter: Adapter) -> CompiledGradient:
    """As on a GPU, where nothing is compiled."""
    return CompiledGradient(potential, adapter, CONFIG, compiled=False, recorded=True)


def shaken(seed: int) -> Atoms:
    atoms = ethanol()
    atoms.rattle(0.05, seed=seed)
    return atoms


def test_a_recorded_gradient_is_the_networks_on_every_architecture(architecture: Backbone) -> None:
    potential, adapter = adapted(architecture, AdapterConfig(gate_rank=2, low_rank=2))
    gradient = recorded(potential, adapter)
    if "NonLinear" in architecture.config["interaction_cls"]:  # what fills up weighs something there
        with pytest.warns(UserWarning, match="differs from the network's own"):
            assert gradient(*of(potential, adapter, labelled(*STRUCTURES))) is None
        return
    assert gradient._recordings is not None
    for seed in range(5):
        assert_agrees(gradient, labelled(shaken(seed), crystal(), molecule("CH3COOH")))
        randomise(adapter, seed, std=0.02)  # values are inputs
    assert gradient._recordings.n_kept == 1
    assert_agrees(gradient, labelled(molecule("CH3OH")))  # seen once


@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_gradient_is_the_networks_for_every_method(method: str) -> None:
    with borrowed("agnostic") as network:
        backbone = small_backbone_around(network, dict.fromkeys((1, 6, 8), -1.5))
        potential, adapter = adapted(backbone, AdapterConfig(method=method, gate_rank=2, low_rank=2))
        gradient = recorded(potential, adapter)
        for seed in range(4):
            assert_agrees(gradient, labelled(shaken(seed), shaken(seed + 5)))
        assert gradient._recordings is not None
        assert gradient._recordings.n_kept == 1
        assert not adapter.weights.folded


def test_nothing_in_a_recorded_gradient_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    Watched, found = watched_recording()
    monkeypatch.setattr("mmea_calc.fast.recorded.Recording", Watched)
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient = recorded(potential, adapter)
    for seed in range(5):
        assert_agrees(gradient, labelled(shaken(seed)))
    assert found == [set(), set()]


def test_what_goes_to_a_device_goes_there_in_one_copy_and_comes_out_as_it_was() -> None:
    some = [
        torch.rand(5, 3),
        torch.tensor([[True, False], [False, True], [True, True]]),
        torch.arange(7),
        torch.rand(2, 3, dtype=torch.float64).T,
        torch.tensor(2.5),
        torch.zeros(0, 3),
    ]
    together = packed(some)
    assert together.dtype == torch.uint8
    for one, other in zip(unpacked(together, some), some, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert (one.data_ptr() - together.data_ptr()) % 64 == 0  # programs copy what is not aligned
    with Watching() as watching:
        there = on_device(some, torch.device("meta"))
    assert watching.names.count("_to_copy") == 1
    assert [(t.shape, t.dtype) for t in there] == [(t.shape, t.dtype) for t in some]
    assert all(a is b for a, b in zip(on_device(some, torch.device("cpu")), some, strict=True))


def test_what_is_recorded_takes_few_operations() -> None:
    """Compared with the form for compilers, which make few of many."""
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient, steps = recorded(potential, adapter), of(potential, adapter, labelled(ethanol()))
    found = []
    for form in ("as it is", "for compilers"):
        if form == "for compilers":
            gradient._program, gradient._compiled = Uncompiled(gradient), True
        gradient(*steps)
        with Watching() as watching:
            gradient(*steps)
        found.append(len(watching.names))
    assert found[0] < 0.7 * found[1]


def test_a_recording_ends_with_the_addresses_that_it_reads() -> None:
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient = recorded(potential, adapter)
    assert gradient._recordings is not None
    kept = []
    for seed in range(6):
        if seed == 4:
            for p in adapter.parameters():
                p.data = 1.1 * p.data
        assert_agrees(gradient, labelled(shaken(seed)))
        kept.append(gradient._recordings.n_kept)
    assert kept == [0, 0, 1, 1, 1, 1]
    assert gradient._recordings._n_made == 2
    gradient.close()
    assert gradient._recordings.n_kept == 0


def test_parameters_are_where_they_were_after_a_step() -> None:
    """While it is computed others stand for them."""
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient, before = recorded(potential, adapter), adapter.parameters()
    assert_agrees(gradient, labelled(ethanol()))
    assert all(a is b for a, b in zip(before, adapter.parameters(), strict=True))
    assert all(update.active for update in adapter.updates.values())

    def fail(inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("no")

    gradient._program = fail
    with pytest.warns(UserWarning, match="not recorded: no"), pytest.raises(RuntimeError, match="no"):
        gradient(*of(potential, adapter, labelled(ethanol())))
    assert all(a is b for a, b in zip(before, adapter.parameters(), strict=True))


def test_what_cannot_be_recorded_is_told_once_and_computed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("mmea_calc.fast.recorded.Recording", refuse)
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient = recorded(potential, adapter)
    assert_agrees(gradient, labelled(shaken(0)))
    assert_agrees(gradient, labelled(shaken(1)))
    with pytest.warns(UserWarning, match="not recorded: out of memory$"):
        assert_agrees(gradient, labelled(shaken(2)))
    assert_agrees(gradient, labelled(shaken(3)))


def test_recordings_are_few_and_of_what_comes_often(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    class Closing(Recording[Sequence[Tensor]]):
        def close(self) -> None:
            closed.append(len(self()[0]))
            super().close()

    monkeypatch.setattr("mmea_calc.fast.recorded.Recording", Closing)
    recordings = Recordings(lambda inputs: [2 * inputs[0]], torch.device("cpu"), most=2)

    def call(n: int, value: float) -> Tensor:
        (found,) = recordings([torch.full((n,), value)])
        assert torch.equal(found, torch.full((n,), 2 * value))
        return found

    first = call(1, 1.0)
    kept = []
    for n in (1, 1, 2, 2, 2, 3, 3, 3, 3):
        call(n, 3.0)
        kept.append(recordings.n_kept)
    assert kept == [0, 1, 1, 1, 2, 2, 2, 2, 2]  # a third shape has no place while those that have one did little
    for k in range(20):
        call(2, float(k))
    call(1, 4.0)
    call(3, 5.0)
    assert closed == [2]  # the one used longest ago
    assert recordings.n_kept == 2
    assert torch.equal(first, torch.full((1,), 2.0))  # nobody writes into what was given out
    recordings.close()
    assert recordings.n_kept == 0
    assert sorted(closed) == [1, 2, 3]


def test_a_recording_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.fast.recorded.Recording", Nothing)
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient = recorded(potential, adapter)
    for seed in range(3):
        assert_agrees(gradient, labelled(shaken(seed)))
    with pytest.warns(UserWarning, match="not recorded: what is recorded gives other results"):
        assert_agrees(gradient, labelled(shaken(3)))
    assert_agrees(gradient, labelled(shaken(4)))


def test_training_on_a_gpu_is_that_on_a_processor(device: str, tmp_path: Path) -> None:
    if device != "cuda":
        pytest.skip("compares a GPU with the processor")
    found = []
    for where in ("cpu", device):
        training = replace(QUICK, epochs=4, optimizer="adamw", dtype="float64", device=where)
        path = tmp_path / f"{where}.adapter"
        finetune(dataset(tmp_path), path, backbone=fast_backbone().to(where), adapter=SMALL, training=training)
        found.append(read_adapter(path).tensors)
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-6, atol=1e-8)


# --- traced ----------------------------------------------------------------------------------------------------------


def test_a_traced_step_holds_for_batches_of_any_size(uncompiled: Any) -> None:
    with borrowed("agnostic") as network:
        backbone = small_backbone_around(network, dict.fromkeys((1, 6, 8), -1.5))
        potential, adapter = adapted(backbone, AdapterConfig(gate_rank=2, low_rank=2))
        gradient = uncompiled(potential, adapter, traced=batch_of(*STRUCTURES))
        randomise(adapter, seed=5, std=0.05)  # values are inputs
        for some in (STRUCTURES, (ethanol(),), (molecule("C2H6"), Atoms("H"), molecule("CO"), ethanol())):
            assert_agrees(gradient, labelled(*some))


def test_what_a_step_cannot_do_is_computed_plainly(uncompiled: Any) -> None:
    backbone = small_backbone_around(random_network(), dict.fromkeys((1, 6, 8), -1.5))
    potential, adapter = adapted(backbone, AdapterConfig(gate_rank=2, low_rank=2))
    atom = of(potential, adapter, labelled(Atoms("H")))
    assert uncompiled(potential, adapter)(*atom) is None
    # atoms closer than where the fade of radial functions has begun
    state = adapter.state_dict()
    assert adapter.short_range is not None
    adapter.load_state_dict({**state, SHORTEST: torch.full_like(adapter.short_range.shortest, 1.5)})
    assert uncompiled(potential, adapter)(*of(potential, adapter, labelled(ethanol()))) is None


def test_a_wrong_gradient_is_found_out_and_not_used(uncompiled: Any) -> None:
    backbone = small_backbone_around(random_network(), dict.fromkeys((1, 6, 8), -1.5))
    potential, adapter = adapted(backbone, AdapterConfig(gate_rank=2, low_rank=2))
    gradient, step = uncompiled(potential, adapter), of(potential, adapter, labelled(ethanol()))
    right = gradient._program

    def wrong(inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        energy, forces, doubt, *rest = right(inputs, values)
        return [energy, forces, doubt, *(1.01 * g for g in rest)]

    gradient._program = wrong
    with pytest.warns(UserWarning, match=r"is not used: it differs from the network's own by 0\.01 of its norm"):
        assert gradient(*step) is None
    gradient._program = right
    assert gradient(*step) is None


def test_a_program_for_other_shapes_is_found_out_and_not_used(uncompiled: Any) -> None:
    potential, adapter = adapted(fast_backbone(), AdapterConfig(gate_rank=2, low_rank=2))
    gradient = uncompiled(potential, adapter)

    def other(inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("shape '[218]' is invalid")

    gradient._program = other
    with pytest.warns(UserWarning, match=r"is not used: shape '\[218\]' is invalid"):
        assert gradient(*of(potential, adapter, labelled(ethanol()))) is None


def test_what_is_refused_is_refused_with_the_reason() -> None:
    backbone = small_backbone_around(random_network(), dict.fromkeys((1, 6, 8), -1.5))
    potential, adapter = adapted(backbone, AdapterConfig(gate_rank=2, low_rank=2))
    with pytest.raises(CompilationError, match="stresses are trained"):
        CompiledGradient(potential, adapter, replace(CONFIG, stress_weight=1.0))
    potential.backbone.fast = False
    with pytest.raises(CompilationError, match="fast=False"):
        CompiledGradient(potential, adapter, CONFIG)
    potential.backbone.fast = True
    adapter.merge()
    with pytest.raises(CompilationError, match="merged"):
        CompiledGradient(potential, adapter, CONFIG)


def test_labels_lie_row_by_row_however_they_were_given() -> None:
    """Extended xyz gives columns, and machine code looks at addresses alone."""
    item = labelled(ethanol())[0]
    assert item.forces is not None
    turned = replace(item, forces=np.asfortranarray(item.forces))
    one, other = (collect_labels([s], dtype=torch.float64, device=torch.device("cpu")) for s in (item, turned))
    assert torch.equal(one.forces, other.forces)
    assert other.forces.is_contiguous()


def test_targets_hold_what_is_labelled() -> None:
    potential = Potential(small_backbone_around(random_network(), dict.fromkeys((1, 6, 8), -1.5)))
    structures = labelled(*STRUCTURES)
    batch = potential.collate([potential.graph(s.atoms) for s in structures])
    labels = collect_labels(structures, dtype=torch.float64, device=torch.device("cpu"))
    weights = LossWeights.of(labels, CONFIG, energy_weight=2.0, forces_weight=3.0)
    targets = targets_of(batch, labels, weights, potential.reference_energy_of(batch), 0.3)
    n = [len(s.atoms) for s in structures]
    assert targets.n_atoms.tolist() == [*n, 1]
    assert (~targets.none).sum(0).tolist() == [*n, 0]
    expected = [float(s.energy or 0) + 1.5 * k for s, k in zip(structures, n, strict=True)]
    assert targets.energy.tolist() == pytest.approx([*expected, 0])
    assert targets.energy_weight.tolist() == pytest.approx([2 / 3] * 3 + [0])
    counted = 3 * (n[0] + n[2])
    assert targets.forces_weight.flatten().tolist() == pytest.approx(
        [3 / counted] * n[0] + [0] * n[1] + [3 / counted] * n[2]
    )


def test_compiled_training_is_that_of_the_network_and_resumes_to_the_bit(tmp_path: Path) -> None:
    # Not SOAP: its bases are those of matrices without full rank at first, where rounding decides.
    data, training = dataset(tmp_path), replace(QUICK, epochs=4, ema_decay=0.5, optimizer="adamw")

    def trained(
        name: str, config: TrainConfig, *, resume: bool = False, stop: int = 0
    ) -> tuple[dict[str, Tensor], list[str]]:
        said: list[str] = []

        def progress(event: Any) -> None:
            said.extend([event.message] if event.message else [])
            if stop and event.epoch == stop:
                raise KeyboardInterrupt

        path = tmp_path / f"{name}.adapter"
        try:
            finetune(
                data, path, backbone=quick_backbone(), adapter=SMALL, training=config, progress=progress, resume=resume
            )
        except KeyboardInterrupt:
            return {}, said
        return dict(read_adapter(path).tensors), said

    plain, _ = trained("plain", training)
    compiled, said = trained("compiled", replace(training, compile=True))
    assert not any("not compiled" in text for text in said), said
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-6, atol=1e-8)
    trained("again", replace(training, compile=True), stop=2)
    resumed, _ = trained("again", replace(training, compile=True), resume=True)
    assert all(torch.equal(resumed[key], value) for key, value in compiled.items())


def test_training_without_a_compiler_goes_on_plainly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: object) -> None:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(machine_code, "program_folder", lambda: tmp_path / "programs")
    monkeypatch.setattr(compiled_training, "build", no_compiler)
    said: list[str] = []
    finetune(
        dataset(tmp_path),
        tmp_path / "a.adapter",
        backbone=fast_backbone(),
        adapter=SMALL,
        training=replace(QUICK, epochs=1, compile=True),
        progress=lambda event: said.append(event.message),
    )
    assert any("training steps are not compiled: " in text and "C++ compiler" in text for text in said)
    assert list((tmp_path / "programs").iterdir()) == []
    shutil.rmtree(tmp_path / "programs")
