"""Soft-thresholded updates: the threshold, how it and the increments are optimised, and what is left unchanged."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import borrowed
from test_finetuning import dataset, tiny_backbone
from torch import Tensor, nn

from conftest import batch_of, ethanol, random_network, run
from mmea_calc.adapted import Adapter, attach
from mmea_calc.adapter_file import read_adapter
from mmea_calc.config import AdapterConfig, TrainConfig
from mmea_calc.errors import AdapterError, TrainingError
from mmea_calc.potential import Potential
from mmea_calc.sparsity import sparsity
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.optimiser import Optimiser
from mmea_calc.training.recipes import RECIPES, recipe_for
from mmea_calc.training.trainer import ProgressEvent
from mmea_calc.updates import ParameterGroup, SoftThreshold

F64 = torch.float64
SPARSE = AdapterConfig(method="sparse")
SCHEDULE_FREE = TrainConfig(**{**RECIPES["sparse"], "batch_size": 4, "warmup_steps": 2})
QUICK = replace(
    SCHEDULE_FREE, epochs=6, loss="mse", validate_every=2, dtype="float64", device="cpu", tau_weight_decay=0.3
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update_of(values: list[float], threshold: float = 0.02) -> SoftThreshold:
    update = SoftThreshold(torch.zeros(len(values), dtype=F64), threshold=threshold)
    with torch.no_grad():
        update.D.copy_(torch.tensor(values, dtype=F64))
    return update


@pytest.fixture
def adapter() -> Iterator[Adapter]:
    with borrowed("agnostic") as network:
        yield attach(network, SPARSE)


# -- the update ------------------------------------------------------------------------------------------------------


def test_entries_beyond_the_threshold_change_by_what_is_beyond_it() -> None:
    update = update_of([0.05, -0.05, 0.01, -0.01, 0.02])
    expected = torch.tensor([0.03, -0.03, 0.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(update.change(), expected, rtol=0, atol=1e-16)
    assert update.survivors().tolist() == [True, True, False, False, False]
    weight = torch.arange(5, dtype=F64)
    assert torch.equal(update(weight)[2:], weight[2:])


def test_increments_start_normal_with_spread_0_01_and_the_threshold_at_0_001() -> None:
    update = SoftThreshold(torch.zeros(200, 200, dtype=F64), generator=generator())
    assert float(update.D.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(torch.sigmoid(update.tau.detach())) == pytest.approx(0.001, rel=1e-12)
    again = SoftThreshold(torch.zeros(200, 200, dtype=F64), generator=generator())
    assert torch.equal(update.D, again.D)
    assert float(update.survivors().double().mean()) > 0.9


def test_gradients_reach_surviving_increments_and_the_threshold() -> None:
    update = update_of([0.05, -0.05, 0.01, -0.07])
    d, tau = torch.autograd.grad(update.change().square().sum() / 2, [update.D, update.tau])
    torch.testing.assert_close(d, torch.tensor([0.03, -0.03, 0.0, -0.05], dtype=F64), rtol=0, atol=1e-15)
    # d sigmoid = s (1 - s), and a higher threshold shrinks every survivor
    assert float(tau) == pytest.approx(-0.02 * 0.98 * (0.03 + 0.03 + 0.05), rel=1e-12)


def test_every_increment_and_threshold_of_a_network_gets_a_gradient(adapter: Adapter) -> None:
    batch = batch_of(ethanol())
    tensors = dict(batch.tensors)
    tensors["positions"] = tensors["positions"].detach().clone()
    with torch.enable_grad():
        forces = adapter.network(tensors, training=True)["forces"]
    named = dict(adapter.named_parameters())
    gradients = torch.autograd.grad(forces.square().sum(), list(named.values()), materialize_grads=True)
    idle = {name for name, g in zip(named, gradients, strict=True) if not bool(g.any())}
    assert len(named) == 2 * len(adapter.updates)
    assert idle == set()


# -- the whole network -----------------------------------------------------------------------------------------------


def test_a_sparse_adapter_folds_exactly(adapter: Adapter) -> None:
    with torch.no_grad():
        for update in adapter.updates.values():
            assert isinstance(update, SoftThreshold)
            update.tau.fill_(math.log(0.015 / 0.985))
    before = run(adapter.network, batch_of(ethanol()))
    assert 0.5 < sparsity(adapter).overall < 0.95
    with adapter.disabled():
        assert not torch.allclose(run(adapter.network, batch_of(ethanol()))["forces"], before["forces"], atol=1e-4)
    adapter.merge()
    after = run(adapter.network, batch_of(ethanol()))
    for key in ("energy", "forces"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-12)
    unchanged = 0
    for path, site in adapter.sites.items():
        unchanged += int((site.value == adapter.weights.originals[path]).sum())
    found = sparsity(adapter)
    assert unchanged == found.n_entries - found.n_changed


def test_sparsity_is_counted_by_layer_order_and_path(adapter: Adapter) -> None:
    paths = ("products.0.linear.weight", "interactions.0.skip_tp.weight")
    with torch.no_grad():
        for update in adapter.updates.values():
            assert isinstance(update, SoftThreshold)
            update.D.zero_()
        linear, product = (adapter.updates[path] for path in paths)
        assert isinstance(linear, SoftThreshold)
        assert isinstance(product, SoftThreshold)
        linear.D[:16] = torch.tensor([1.0, 0, 0, 0] * 4)  # 4x0e -> 4x0e; then 4x1o -> 4x1o
        contraction = adapter.updates["products.0.symmetric_contractions.contractions.1.weights_max"]
        assert isinstance(contraction, SoftThreshold)
        contraction.D[:, 1] = 1.0
    found = sparsity(adapter)
    n_elements, n_paths, n_channels = contraction.D.shape
    changed = 4 + n_elements * n_channels
    assert found.n_changed == changed
    assert found.overall == 1 - changed / found.n_entries
    assert found.n_entries == sum(p.numel() for n, p in adapter.named_parameters() if n.endswith(".D"))
    layers = found.by_layer()
    assert layers[paths[0]] == 1 - 4 / 32
    assert layers[paths[1]] == 1
    of_linear = {p.path: (p.order, p.entries, p.unchanged) for p in found.paths if p.tensor == paths[0]}
    assert of_linear == {"0e -> 0e": (0, 16, 12), "1o -> 1o": (1, 16, 16)}
    third = {p.path: p.unchanged / p.entries for p in found.paths if p.path.startswith("nu=3 -> l=1")}
    assert third == {f"nu=3 -> l=1, path {k}": float(k != 1) for k in range(n_paths)}
    assert set(found.by_order()) == {"0", "1", "2", "radial"}
    assert found.by_order()["2"] == found.by_order()["radial"] == 1
    assert found.by_order()["1"] < 1
    assert found.by_path()["0e -> 0e"] < found.by_path()["1o -> 1o"] == 1


def test_an_adapter_of_gates_alone_has_no_sparsity() -> None:
    with borrowed("agnostic") as network, pytest.raises(AdapterError, match="updates no weight"):
        sparsity(attach(network, AdapterConfig(method="gates", gate_rank=2)))


# -- optimisation ----------------------------------------------------------------------------------------------------


def stepped(config: TrainConfig, update: SoftThreshold, gradient: float, steps: int = 1) -> Optimiser:
    optimiser = Optimiser(list(update.parameters()), update.groups(), config)
    for _ in range(steps):
        for parameter in update.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimiser.step()
    return optimiser


@pytest.mark.parametrize("kind", ["adamw", "schedulefree"])
def test_weight_decay_of_increments_acts_on_survivors_alone(kind: str) -> None:
    base = SCHEDULE_FREE if kind == "schedulefree" else TrainConfig(amsgrad=False)
    config = replace(base, lr=0.1, weight_decay=0.5, tau_weight_decay=0.0)
    update = update_of([0.5, -0.5, 0.01])
    stepped(config, update, gradient=0.0)
    expected = torch.tensor([0.5 * 0.95, -0.5 * 0.95, 0.01], dtype=F64)
    torch.testing.assert_close(update.D.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "schedulefree"])
def test_thresholds_have_a_rate_and_a_decay_of_their_own(kind: str) -> None:
    base = SCHEDULE_FREE if kind == "schedulefree" else TrainConfig(optimizer="adamw", amsgrad=False)
    config = replace(base, lr=0.1, tau_lr=0.02, weight_decay=0.0, tau_weight_decay=0.3)
    update = update_of([0.5, -0.5, 0.01])
    before = float(update.tau.detach())
    stepped(config, update, gradient=0.0)
    assert torch.equal(update.D, torch.tensor([0.5, -0.5, 0.01], dtype=F64))
    assert float(update.tau.detach()) == pytest.approx(before * (1 - 0.02 * 0.3), rel=1e-12)
    # the decay raises the threshold: sparsity grows with it
    assert float(torch.sigmoid(update.tau.detach())) > 0.02
    update = update_of([0.5])
    stepped(replace(config, tau_weight_decay=0.0), update, gradient=1.0)
    assert float(update.D.detach()) == pytest.approx(0.4, rel=1e-6)
    assert float(update.tau.detach()) == pytest.approx(before - 0.02, rel=1e-6)


def test_masked_decay_of_everything_is_the_schedule_free_optimiser_s_own() -> None:
    config = replace(SCHEDULE_FREE, lr=0.1, weight_decay=0.3)
    target = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    results = []
    for masked in (True, False):
        w = nn.Parameter(torch.tensor([0.3, 0.7, -0.2], dtype=F64))
        decaying = (lambda: torch.ones(3, dtype=torch.bool),) if masked else None
        optimiser = Optimiser([w], [ParameterGroup([w], decaying=decaying)], config)
        for _ in range(7):
            w.grad = w.detach() - target
            optimiser.step()
        results.append((w.detach().clone(), *optimiser.averages()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_looking_at_the_averages_changes_no_bit_of_the_training() -> None:
    def trained(look: bool) -> tuple[Tensor, Tensor]:
        update = SoftThreshold(torch.zeros(50, dtype=F64), generator=generator(3))
        optimiser = Optimiser(list(update.parameters()), update.groups(), SCHEDULE_FREE)
        for i in range(5):
            for parameter in update.parameters():
                parameter.grad = torch.sin(parameter.detach() * 100 + i)
            optimiser.step()
            if look:
                before = update.D.detach().clone()
                with optimiser.averaged():
                    assert i == 0 or not torch.equal(update.D, before)
                assert torch.equal(update.D, before)
        return update.D.detach(), optimiser.averages()[0]

    for one, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(schedule="cosine"), "schedule is 'cosine', expected 'constant'"),
        (dict(ema_decay=0.9), "ema_decay is 0.9, expected 0.0"),
        (dict(stage_two_start=0.5), "stage_two_start is 0.5, expected None"),
        (dict(optimizer="sgd"), "optimizer must be 'soap', 'adamw' or 'schedulefree', got 'sgd'"),
        (dict(tau_lr=0.0), "tau_lr must be positive"),
        (dict(weight_decay=-1.0), "weight_decay must not be negative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    data = dataset(tmp_path, 3)
    training = replace(QUICK, **changes)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=message):
        finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), adapter=SPARSE, training=training)
    assert {p.name for p in tmp_path.iterdir()} == {"train.xyz"}


def test_the_method_has_recipes_of_low_and_high_sparsity() -> None:
    low, high = TrainConfig(**recipe_for("sparse")), TrainConfig(**recipe_for("sparse", "sparse-H"))
    assert recipe_for("sparse", "sparse-L") == recipe_for("sparse")
    assert (low.tau_weight_decay, high.tau_weight_decay) == (0.01, 0.3)
    assert replace(high, tau_weight_decay=0.01) == low
    assert (low.optimizer, low.batch_size, low.weight_decay, low.lr) == ("schedulefree", 10, 1e-8, 1e-2)


# -- training --------------------------------------------------------------------------------------------------------


def test_training_improves_reports_its_sparsity_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data, valid = dataset(tmp_path, 8), dataset(tmp_path, 3, "valid.xyz", seed=1)
    messages: list[str] = []

    def trained(name: str, stop_after: int | None = None, resume: bool = False) -> bool:
        def progress(event: ProgressEvent) -> None:
            messages.append(event.message)
            if stop_after is not None and event.epoch == stop_after + 1:
                raise KeyboardInterrupt

        options = dict(valid=valid, adapter=SPARSE, training=QUICK, progress=progress)
        return finetune(data, tmp_path / name, backbone=tiny_backbone(), resume=resume, **options).improved  # type: ignore[arg-type]

    assert trained("whole.adapter")
    with pytest.raises(KeyboardInterrupt):
        trained("parts.adapter", stop_after=3)
    assert trained("parts.adapter", resume=True)
    whole, parts = (read_adapter(tmp_path / f"{name}.adapter") for name in ("whole", "parts"))
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(whole.tensors[k], parts.tensors[k]) for k in whole.tensors)

    potential = Potential(tiny_backbone())
    potential.use(whole)
    assert potential.adapter is not None
    found = sparsity(potential.adapter)
    assert 0 < found.overall < 1
    assert whole.metrics["sparsity"] == {"overall": found.overall, "by_order": found.by_order()}
    assert any(f"{found.overall:.1%} of {found.n_entries:,} entries are left unchanged" in m for m in messages)
    with (tmp_path / "whole.run" / "sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["unchanged"]) for row in rows) == found.n_entries - found.n_changed


def test_a_network_of_its_own_leaves_no_entry_unchanged() -> None:
    adapter = attach(random_network(), AdapterConfig(method="scratch", seed=5))
    found = sparsity(adapter)
    assert found.n_entries == adapter.n_parameters
    assert found.overall < 0.05
