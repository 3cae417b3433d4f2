"""How fast: calls, dynamics, replicas, periodic systems, training steps and memory, against mace-torch; fine-tuning.

Both sides have the same backbone.

What is compared alternates within one run, so that a drift of the machine's speed meets all alike; medians are taken,
and ratios are what counts. mace-torch's side is its own network without adapter, as its calculator and its training use
it; ours has an adapter on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ..adapted import attach
from ..adapter_file import read_adapter
from ..calculator import MMEACalculator
from ..config import AdapterConfig, MDConfig, TrainConfig
from ..data.dataset import Labelled
from ..errors import BackboneError, CompilationError
from ..graph import Batch
from ..loss import Labels, Loss, LossWeights, collect_labels, loss_of
from ..md.simulation import Simulation
from ..potential import Potential
from ..training.compiled_training import CompiledGradient, Gradients
from ..training.optimiser import Optimiser
from .speed_finetune import STRUCTURES, time_finetuning
from .speed_memory import free_memory, peak_memory
from .speed_setup import SpeedConfig, aspirin, diamond, mace_calculator, open_backbone, random_adapter

_PLENTY = 2000  # atoms from which on a call may need more memory than there is
_SMALLER = 512  # atoms of the crystal that tells what a larger one needs


@dataclass(frozen=True)
class Timed:
    """One line of the table.

    Attributes:
        what: what is measured.
        ours, theirs: in `unit`; None where one side could not be measured, for the reason in `note`.
        unit: "ms" and "s" (less is better), "steps/s" (more is), "MB" (less is).
        note: what must be known of it.
        series, size: "atoms" (calls), "dynamics" (the same, whole steps) or "replicas", and how many atoms or
            replicas, where this is one of several sizes.
    """

    what: str
    ours: float | None
    theirs: float | None
    unit: str
    note: str = ""
    series: str = ""
    size: int = 0

    @property
    def ratio(self) -> float | None:
        """How many times better ours is."""
        if not self.ours or not self.theirs:
            return None
        return self.ours / self.theirs if self.unit == "steps/s" else self.theirs / self.ours

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "times better": self.ratio}


@dataclass(frozen=True)
class Measured:
    """The table, what it was measured with, and whether it has all lines that were asked for."""

    settings: str
    rows: list[Timed]
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"settings": self.settings, "complete": self.complete, "rows": rows}


# --- measuring ------------------------------------------------------------------------------------------------------


def medians(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, *, warm_up: int = 3
) -> dict[str, float]:
    """Seconds of each, taken in turn; the first `warm_up` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + warm_up):
        for name, call in calls.items():
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speed(
    config: SpeedConfig,
    tell: Callable[[str], None] = lambda message: None,
    keep: Callable[[Measured], None] = lambda measured: None,
) -> Measured:
    """All lines of the table.

    Args:
        tell: told what is being done.
        keep: given what there is after every line, for a run that may be stopped.

    Raises:
        BackboneError, AdapterFileError: what is to be measured cannot be opened. What cannot be compiled is told, and
            measured without.
    """
    file = read_adapter(config.adapter) if config.adapter else random_adapter(config)
    adapted = MMEACalculator(file, backbone=open_backbone(config, kernels=config.kernels))
    bare = MMEACalculator(backbone=open_backbone(config, kernels=config.kernels))
    theirs = mace_calculator(config)
    if missing := sorted(set(aspirin().numbers.tolist()) - set(adapted.backbone.elements)):
        raise BackboneError(f"aspirin is measured, and this backbone has no elements {missing}: choose another")
    config = _compiled(config, adapted, bare, tell)
    device = adapted.potential.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    without = "" if config.compile or config.kernels != "own" else ", no programs made"
    settings = f"{adapted.backbone.name}, {config.dtype}, {where}{without}"
    rows: list[Timed] = []

    def add(*found: Timed) -> None:
        rows.extend(found)
        for row in found:
            ours, theirs_ = (f"{value:.4g} {row.unit}" if value else "not measured" for value in (row.ours, row.theirs))
            tell(f"  {row.what}: {ours}, mace-torch {theirs_}")
        keep(Measured(settings, list(rows), complete=False))

    tell("one call for aspirin")
    add(*_one_call(config, adapted, bare, theirs))
    for n in dict.fromkeys((1, *config.replicas)):
        tell(f"dynamics of aspirin, {n} replicas")
        add(_dynamics(config, adapted, theirs, n))
    for n in config.replicas:
        tell(f"{n} replicas of aspirin")
        add(_replicas(config, adapted, theirs, n))
    needs = _needs(config)
    for n in config.atoms:
        tell(f"{n} atoms of diamond")
        add(_periodic(config, adapted, theirs, n, needs))
        tell(f"dynamics of {n} atoms of diamond")
        add(_periodic_dynamics(config, adapted, theirs, n, needs))
    if config.training:
        tell("training steps")
        add(*_training(config))
    if config.finetune:
        tell("a whole fine-tuning")
        add(_finetuning(config))
    return Measured(settings, rows)


def _compiled(
    config: SpeedConfig, adapted: MMEACalculator, bare: MMEACalculator, tell: Callable[[str], None]
) -> SpeedConfig:
    """Make the programs of calls; the settings of what is measured then: where there is no compiler, without."""
    if not config.compile or config.kernels != "own":
        return config
    try:
        for name, calculator in (("with its adapter", adapted), ("alone", bare)):
            for stress in (False, True) if config.atoms else (False,):
                tell(f"compiling the backbone {name}{', with stresses' if stress else ''}")
                calculator.potential.compile(stress=stress)
    except CompilationError as problem:
        tell(f"measured without programs: {problem}")
        return replace(config, compile=False)
    return config


def _mover(atoms: Atoms, calculator: Any) -> Callable[[], object]:
    """A call for the structure with its atoms moved a little further, as dynamics asks for one."""
    moved, rng = atoms.copy(), np.random.default_rng(0)
    properties = ["energy", "forces"]

    def call() -> object:
        moved.positions += rng.normal(0, 0.002, moved.positions.shape)
        return calculator.calculate(moved, properties, ["positions"])

    return call


def _one_call(config: SpeedConfig, adapted: MMEACalculator, bare: MMEACalculator, theirs: Any) -> list[Timed]:
    calculators = {"adapted": adapted, "bare": bare, "theirs": theirs}
    calls = {name: _mover(aspirin(), calculator) for name, calculator in calculators.items()}
    device = adapted.potential.device
    found = {name: 1000 * s for name, s in medians(calls, config.calls, device).items()}
    # Apart, since a network in between leaves nothing of theirs in the cache, which is not so in dynamics.
    alone = medians({name: calls[name] for name in ("adapted", "bare")}, 5 * config.calls, device)
    overhead = 100 * (alone["adapted"] / alone["bare"] - 1)
    return [
        Timed("one call, aspirin", found["adapted"], found["theirs"], "ms", f"adapter costs {overhead:+.1f} %"),
        Timed("the same without an adapter", found["bare"], found["theirs"], "ms"),
    ]


def _replicas(config: SpeedConfig, adapted: MMEACalculator, theirs: Any, n: int) -> Timed:
    rng, potential, start = np.random.default_rng(0), adapted.potential, aspirin()
    replicas = []
    for _ in range(n):
        replica = start.copy()
        replica.positions += rng.normal(0, 0.02, replica.positions.shape)
        replicas.append(replica)
    batch = potential.collate([potential.graph(r) for r in replicas])
    calls = {"ours": lambda: potential.predict(batch), "theirs": _mover(start, theirs)}
    found = medians(calls, max(5, config.calls // 4), potential.device)
    note = "a step of all in one batch against one MACECalculator, one after the other"
    return Timed(f"{n} replicas of aspirin", n / found["ours"], 1 / found["theirs"], "steps/s", note, "replicas", n)


def _dynamics(config: SpeedConfig, adapted: MMEACalculator, theirs: Any, n: int) -> Timed:
    """Of n replicas of aspirin."""
    rate, theirs_, note = _whole_steps(adapted, theirs, aspirin(), n, max(5, config.calls // 8))
    return Timed(f"dynamics of {n} aspirin{'s' if n > 1 else ''}", rate, theirs_, "steps/s", note)


def _periodic_dynamics(
    config: SpeedConfig, adapted: MMEACalculator, theirs: Any, n: int, needs: Mapping[str, float]
) -> Timed:
    """Of one crystal; a side is left out as in `_periodic`."""
    atoms = diamond(n)
    wanting, notes = _too_large(len(atoms), adapted.potential.device, needs)
    # Eight steps of a large crystal are warm-up enough, and take their time.
    warm_up = 1 if len(atoms) > _PLENTY else 3
    repeats = max(2, config.calls // 20)
    rate, theirs_, note = _whole_steps(adapted, theirs, atoms, 1, repeats, wanting, warm_up=warm_up)
    what = f"dynamics of {len(atoms)} atoms, periodic"
    return Timed(what, rate, theirs_, "steps/s", "; ".join([note, *notes]), "dynamics", len(atoms))


def _whole_steps(
    adapted: MMEACalculator,
    theirs: Any,
    start: Atoms,
    n: int,
    repeats: int,
    without: Collection[str] = (),
    *,
    warm_up: int = 3,
) -> tuple[float | None, float | None, str]:
    """Steps per second of n replicas as `mmea md` takes them: neighbours, network, integrator, monitor, and a sample
    every 8 steps; calls per second of one MACECalculator; and a note. None for sides that are to be left out.
    """
    # Small steps, and no bound: random weights are no potential to move in.
    settings = MDConfig(
        replicas=n, timestep_fs=0.02, drift_every=0, max_temperature_K=1e9, max_force_eV_per_A=1e9, time_ps=1e3
    )
    calls: dict[str, Callable[[], object]] = {}
    simulation: Simulation | None = None
    if "ours" not in without:
        adapted.get_potential_energy(aspirin())  # its adapter is on the network from now on
        taken = simulation = Simulation(adapted.potential, [start], settings)
        simulation.start()

        def steps() -> None:
            taken.advance(settings.stats_every)
            taken.sample()

        calls["ours"] = steps
    if "theirs" not in without:
        calls["theirs"] = _mover(start, theirs)
    found = medians(calls, repeats, adapted.potential.device, warm_up=warm_up)
    rate = n * settings.stats_every / found["ours"] if "ours" in found else None
    notes = ["against one MACECalculator's calls"]
    if simulation is not None and rate is not None:
        in_blocks = simulation.blocks is not None and simulation.blocks.n_taken > 0
        notes.insert(0, f"{1000 * n / rate:.2f} ms for a step{', recorded' if in_blocks else ''}")
        simulation.close()
    return rate, 1 / found["theirs"] if "theirs" in found else None, "; ".join(notes)


def _periodic(config: SpeedConfig, adapted: MMEACalculator, theirs: Any, n: int, needs: Mapping[str, float]) -> Timed:
    """One call each; a side whose call would need more memory than there is is left out.

    Args:
        needs: side -> MB that an atom needs, where that is known; told of large crystals.
    """
    atoms, device = diamond(n), adapted.potential.device
    calls = {"ours": _mover(atoms, adapted), "theirs": _mover(atoms, theirs)}
    wanting, needed = _too_large(len(atoms), device, needs)
    found = medians({k: call for k, call in calls.items() if k not in wanting}, max(2, config.calls // 20), device)
    ours, theirs_ = (1000 * found[k] if k in found else None for k in calls)
    notes = [f"{1e3 * ours / len(atoms):.1f} us per atom"] if ours else []
    what = f"one call, {len(atoms)} atoms, periodic"
    return Timed(what, ours, theirs_, "ms", "; ".join([*notes, *needed]), "atoms", len(atoms))


def _too_large(n_atoms: int, device: torch.device, needs: Mapping[str, float]) -> tuple[set[str], list[str]]:
    """The sides whose call for so many atoms needs more memory than there is, and notes of what they need."""
    large = {k: mb * n_atoms for k, mb in needs.items()} if n_atoms > _PLENTY else {}
    free = free_memory(device)
    wanting = {k for k, mb in large.items() if free is not None and mb > free}
    notes = []
    for key, name in (("ours", "mmea"), ("theirs", "mace-torch")):
        if key in large:
            notes.append(f"{name} {'would need' if key in wanting else 'needs'} about {large[key] / 1e3:.2g} GB")
    return wanting, notes


def _needs(config: SpeedConfig) -> dict[str, float]:
    """MB that an atom needs in a call of either side, judged from a crystal; nothing without large ones to measure."""
    if max(config.atoms, default=0) <= _PLENTY:
        return {}
    sides = {key: peak_memory(periodic_call, config, ours) for key, ours in (("ours", True), ("theirs", False))}
    return {key: mb / len(diamond(_SMALLER)) for key, mb in sides.items() if mb is not None}


def periodic_call(config: SpeedConfig, ours: bool) -> tuple[Callable[[], object], torch.device]:
    """A call for the crystal by which the memory of larger ones is judged."""
    calculator: Any
    if ours:
        file = read_adapter(config.adapter) if config.adapter else random_adapter(config)
        calculator = MMEACalculator(file, backbone=open_backbone(config, kernels=config.kernels))
        device = calculator.potential.device
    else:
        calculator = mace_calculator(config)
        device = calculator.device
    _mover(diamond(8), calculator)()  # what is made once; a call for as many would leave its memory with the process
    return _mover(diamond(_SMALLER), calculator), torch.device(device)


# --- training -------------------------------------------------------------------------------------------------------

BATCH = 5


def training_step(config: SpeedConfig, ours: bool) -> tuple[Callable[[], object], torch.device]:
    """A step with five aspirins: loss of forces and energies, its gradient, and the optimiser's part.

    Of an adapter, with the default optimiser; or of mace-torch's own network, with Adam as its training has it. The
    learning rate is so small that values stay what they are.
    """
    backbone = open_backbone(config, fast=ours)
    potential, training = Potential(backbone), TrainConfig(lr=1e-9)
    optimiser: Optimiser | torch.optim.Optimizer
    compiled: CompiledGradient | None = None
    if ours:
        handle = potential.adapter = attach(backbone.network, AdapterConfig(), start=False)
        parameters: Sequence[Tensor] = handle.parameters()
        optimiser = Optimiser(parameters, handle.parameter_groups(), training)
        if config.compile or potential.device.type == "cuda":
            compiled = CompiledGradient(potential, handle, training, compiled=config.compile)
    else:
        parameters = list(backbone.network.requires_grad_(True).parameters())
        optimiser = torch.optim.Adam(parameters, lr=training.lr, amsgrad=True)

    def step_of(size: int) -> Callable[[], object]:
        graphs = [potential.graph(aspirin())] * size
        structures = [Labelled(aspirin(), energy=0.0, forces=np.zeros((len(aspirin()), 3)))] * size

        def inputs(device: torch.device) -> tuple[Batch, Labels, LossWeights]:
            labels = collect_labels(structures, dtype=potential.dtype, device=device)
            weights = LossWeights.of(
                labels, training, energy_weight=training.energy_weight, forces_weight=training.forces_weight
            )
            return potential.collate(graphs, device=device), labels, weights

        given = inputs(torch.device("cpu"))  # as a training has it
        batch, labels, weights = inputs(potential.device)

        def plainly() -> tuple[Loss, Gradients]:
            loss = loss_of(potential.predict(batch, training=True), labels, weights, training)
            return loss, torch.autograd.grad(loss.total, list(parameters), allow_unused=True)

        def step() -> tuple[Loss, Gradients]:
            loss, gradients = (compiled and compiled(*given, plainly)) or plainly()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            return loss, gradients

        return step

    step_of(1)()  # what is made once: caches, and the plain gradient that a compiled one is compared with
    return step_of(BATCH), potential.device


def _training(config: SpeedConfig) -> list[Timed]:
    one, device = training_step(config, True)
    other, _ = training_step(config, False)
    found = medians({"ours": one, "theirs": other}, max(3, config.calls // 5), device)
    note = "an adapter's values with SOAP, against all weights with Adam"
    memory = [peak_memory(training_step, config, side) for side in (True, False)]
    return [
        Timed(f"training step, {BATCH} aspirins", 1000 * found["ours"], 1000 * found["theirs"], "ms", note),
        Timed("memory of that step", memory[0], memory[1], "MB", "beyond what is in use before it"),
    ]


def _finetuning(config: SpeedConfig) -> Timed:
    took = time_finetuning(config)
    note = f"forces of {took.teacher}: {took.before:.1f} -> {took.after:.1f} meV/A in validation"
    return Timed(f"fine-tuning on {STRUCTURES} aspirins, default recipe, end to end", took.seconds, None, "s", note)


__all__ = ["Measured", "SpeedConfig", "Timed", "measure_speed", "training_step"]
