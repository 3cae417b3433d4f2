"""How fast: calls, dynamics, replicas, periodic systems, training steps and memory, against mace-torch.

Both sides have the same backbone.

What is compared alternates within one run, so that a drift of the machine's speed meets all alike; medians are taken,
and ratios are what counts. mace-torch's side is its own network without adapter, as its calculator and its training use
it; ours has an adapter on.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from torch import Tensor

from ..adapted import attach
from ..adapter_file import AdapterFile, read_adapter
from ..backbone import Backbone, load_backbone, save_backbone
from ..calculator import MMEACalculator
from ..compiled_training import CompiledGradient, Gradients
from ..config import DEFAULT_BACKBONE, AdapterConfig, Kernels, MDConfig, Precision, TrainConfig
from ..dataset import Labelled
from ..errors import BackboneError
from ..loss import Loss, LossWeights, collect_labels, loss_of
from ..mace_bridge import build_network, mace_calculators, quiet
from ..md.simulation import Simulation
from ..potential import Potential

ASPIRIN = Path(__file__).parent / "aspirin.xyz"
PAPER_SHAPE = "paper-shape"

# arXiv 2511.06696, section 4: the shape of MACE-OFF23-medium.
_PAPER_CONFIG: Mapping[str, Any] = dict(
    model="ScaleShiftMACE",
    r_max=5.0,
    num_bessel=8,
    num_polynomial_cutoff=5,
    max_ell=3,
    num_interactions=2,
    hidden_irreps="128x0e + 128x1o",
    MLP_irreps="16x0e",
    correlation=3,
    gate="silu",
    interaction_cls_first="RealAgnosticInteractionBlock",
    interaction_cls="RealAgnosticResidualInteractionBlock",
    atomic_inter_scale=1.0,
    atomic_inter_shift=0.0,
    avg_num_neighbors=15.0,
    atomic_numbers=[1, 6, 7, 8, 9, 15, 16, 17, 35, 53],
    atomic_energies=[0.0] * 10,
)


@dataclass(frozen=True)
class Timed:
    """One line of the table.

    Attributes:
        what: what is measured.
        ours, theirs: in `unit`; None where one side could not be measured, for the reason in `note`.
        unit: "ms" (less is better), "steps/s" (more is), "MB" (less is).
        note: what must be known of it.
        series, size: "atoms" or "replicas", and how many, where this is one of several sizes.
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
    """The table, and what it was measured with."""

    settings: str
    rows: list[Timed]

    def to_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured.

    Attributes:
        backbone: name or path; "paper-shape" is a network of MACE-OFF23-medium's shape with random weights.
        adapter: a file; None makes one of the default method with small random values.
        device, dtype: where and how precisely.
        kernels: of our calls and dynamics, see `load_backbone`; training steps and mace-torch's side have their own.
        compile: make programs first where there are none, of training steps too; False: calls use those that are there.
        replicas: sizes of batches of aspirin.
        atoms: sizes of a periodic system (diamond).
        calls: how often the small ones are repeated.
        training: measure training steps and their memory too.
    """

    backbone: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: Precision = "float32"
    kernels: Kernels = "own"
    compile: bool = True
    replicas: Sequence[int] = (12,)
    atoms: Sequence[int] = (1000,)
    calls: int = 40
    training: bool = True


def paper_shape(
    device: str = "auto", dtype: Precision = "float32", *, fast: bool = True, kernels: Kernels = "own"
) -> Backbone:
    """A backbone of MACE-OFF23-medium's shape with random weights: for measuring time, and nothing else."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        path = Path(folder) / f"{PAPER_SHAPE}.safetensors"
        save_backbone(path, _PAPER_CONFIG, build_network(dict(_PAPER_CONFIG)).state_dict())
        return load_backbone(path, device=device, dtype=dtype, fast=fast, kernels=kernels)


def open_backbone(config: SpeedConfig, *, fast: bool = True, kernels: Kernels = "own") -> Backbone:
    """The backbone to measure. Raises BackboneError."""
    if config.backbone == PAPER_SHAPE:
        return paper_shape(config.device, config.dtype, fast=fast, kernels=kernels)
    name = config.backbone or (read_adapter(config.adapter).backbone if config.adapter else DEFAULT_BACKBONE)
    return load_backbone(name, device=config.device, dtype=config.dtype, fast=fast, kernels=kernels)


def random_adapter(config: SpeedConfig) -> AdapterFile:
    """An adapter of the default method with small random values that has seen aspirin."""
    backbone = open_backbone(config)
    handle = attach(backbone.network, AdapterConfig(), start=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator).to(parameter))
    potential = Potential(backbone)
    batch = potential.collate([potential.graph(aspirin())])
    with handle.recording():
        potential.predict(batch)
    # Distances of the training data are those of one structure: half of them, so that moved atoms stay within.
    tensors = {k: t * 0.5 if k.endswith("shortest") else t for k, t in handle.state_dict().items()}
    return AdapterFile(
        handle.config, {k: t.cpu() for k, t in tensors.items()}, backbone.name, backbone.fingerprint, head=backbone.head
    )


def aspirin() -> Atoms:
    """The molecule that small calls are measured with."""
    atoms = read(ASPIRIN)
    assert isinstance(atoms, Atoms)
    return atoms


def mace_calculator(config: SpeedConfig) -> Any:
    """mace-torch's calculator with the backbone alone, in mace-torch's own form."""
    backbone = open_backbone(config, fast=False)
    with quiet():
        network = copy.deepcopy(backbone.network)  # e3nn's code in a copy is TorchScript, as where mace-torch loads one
        return mace_calculators().MACECalculator(
            models=[network], device=backbone.device.type, default_dtype=config.dtype
        )


# --- measuring ------------------------------------------------------------------------------------------------------


def medians(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 3):  # the first three warm up
        for name, call in calls.items():
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speed(config: SpeedConfig, tell: Callable[[str], None] = lambda message: None) -> Measured:
    """All lines of the table.

    Args:
        tell: told what is being done.

    Raises:
        BackboneError, AdapterFileError: what is to be measured cannot be opened.
        CompilationError: it cannot be compiled; `compile=False` measures without.
    """
    file = read_adapter(config.adapter) if config.adapter else random_adapter(config)
    adapted = MMEACalculator(file, backbone=open_backbone(config, kernels=config.kernels))
    bare = MMEACalculator(backbone=open_backbone(config, kernels=config.kernels))
    theirs = mace_calculator(config)
    if missing := sorted(set(aspirin().numbers.tolist()) - set(adapted.backbone.elements)):
        raise BackboneError(f"aspirin is measured, and this backbone has no elements {missing}: choose another")
    if config.compile and config.kernels == "own":
        for name, calculator in (("with its adapter", adapted), ("alone", bare)):
            for stress in (False, True) if config.atoms else (False,):
                tell(f"compiling the backbone {name}{', with stresses' if stress else ''}")
                calculator.potential.compile(stress=stress)
    rows: list[Timed] = []

    def add(*found: Timed) -> None:
        rows.extend(found)
        for row in found:
            if row.ours and row.theirs:  # told at once: a later one may need more memory than there is
                tell(f"  {row.what}: {row.ours:.4g} {row.unit}, mace-torch {row.theirs:.4g}")

    tell("one call for aspirin")
    add(*_one_call(config, adapted, bare, theirs))
    for n in dict.fromkeys((1, *config.replicas)):
        tell(f"dynamics of aspirin, {n} replicas")
        add(_dynamics(config, adapted, theirs, n))
    for n in config.replicas:
        tell(f"{n} replicas of aspirin")
        add(_replicas(config, adapted, theirs, n))
    for n in config.atoms:
        tell(f"{n} atoms of diamond")
        add(_periodic(config, adapted, theirs, n))
    if config.training:
        tell("training steps")
        add(*_training(config))
    device = adapted.potential.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Measured(f"{adapted.backbone.name}, {config.dtype}, {where}", rows)


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
    """Whole steps, as `mmea md` takes them: neighbours, network, integrator, monitor, and a sample every 8 steps."""
    potential, start = adapted.potential, aspirin()
    adapted.get_potential_energy(start)  # its adapter is on the network from now on
    # Small steps, and no bound: random weights are no potential to move in.
    settings = MDConfig(
        replicas=n, timestep_fs=0.02, drift_every=0, max_temperature_K=1e9, max_force_eV_per_A=1e9, time_ps=1e3
    )
    simulation = Simulation(potential, [start], settings)
    simulation.start()

    def steps() -> None:
        simulation.advance(settings.stats_every)
        simulation.sample()

    calls = {"ours": steps, "theirs": _mover(start, theirs)}
    found = medians(calls, max(5, config.calls // 8), potential.device)
    rate = n * settings.stats_every / found["ours"]
    in_blocks = simulation.blocks is not None and simulation.blocks.n_taken > 0
    note = f"{1000 * n / rate:.2f} ms for a step{', recorded' if in_blocks else ''}; against one MACECalculator's calls"
    return Timed(f"dynamics of {n} aspirin{'s' if n > 1 else ''}", rate, 1 / found["theirs"], "steps/s", note)


def _periodic(config: SpeedConfig, adapted: MMEACalculator, theirs: Any, n: int) -> Timed:
    side = max(1, round((n / 8) ** (1 / 3)))
    atoms = bulk("C", "diamond", a=3.8, cubic=True).repeat(side)
    calls = {"ours": _mover(atoms, adapted), "theirs": _mover(atoms, theirs)}
    found = medians(calls, max(2, config.calls // 20), adapted.potential.device)
    note = f"{1e6 * found['ours'] / len(atoms):.1f} us per atom"
    what, ours, theirs_ = f"one call, {len(atoms)} atoms, periodic", 1000 * found["ours"], 1000 * found["theirs"]
    return Timed(what, ours, theirs_, "ms", note, "atoms", len(atoms))


# --- training -------------------------------------------------------------------------------------------------------

BATCH = 5


def training_step(config: SpeedConfig, *, ours: bool) -> tuple[Callable[[], object], torch.device]:
    """Loss of forces and energies of five aspirins, and its gradient: of an adapter, or of mace-torch's own network."""
    backbone = open_backbone(config, fast=ours)
    potential, training = Potential(backbone), TrainConfig()
    compiled: CompiledGradient | None = None
    if ours:
        handle = potential.adapter = attach(backbone.network, AdapterConfig(), start=False)
        parameters: Sequence[Tensor] = handle.parameters()
        if config.compile or potential.device.type == "cuda":
            compiled = CompiledGradient(potential, handle, training, compiled=config.compile)
    else:
        parameters = list(backbone.network.requires_grad_(True).parameters())

    def step_of(size: int) -> Callable[[], object]:
        batch = potential.collate([potential.graph(aspirin())] * size)
        structures = [Labelled(aspirin(), energy=0.0, forces=np.zeros((len(aspirin()), 3)))] * size
        labels = collect_labels(structures, dtype=potential.dtype, device=potential.device)
        weights = LossWeights.of(
            labels, training, energy_weight=training.energy_weight, forces_weight=training.forces_weight
        )

        def plainly() -> tuple[Loss, Gradients]:
            loss = loss_of(potential.predict(batch, training=True), labels, weights, training)
            return loss, torch.autograd.grad(loss.total, list(parameters), allow_unused=True)

        return lambda: (compiled and compiled(batch, labels, weights, plainly)) or plainly()

    step_of(1)()  # what is made once: caches, and the plain gradient that a compiled one is compared with
    return step_of(BATCH), potential.device


def _training(config: SpeedConfig) -> list[Timed]:
    one, device = training_step(config, ours=True)
    other, _ = training_step(config, ours=False)
    found = medians({"ours": one, "theirs": other}, max(3, config.calls // 5), device)
    note = "gradient of an adapter's values, against that of all weights"
    memory = [peak_memory(config, ours=side) for side in (True, False)]
    return [
        Timed(f"training step, {BATCH} aspirins", 1000 * found["ours"], 1000 * found["theirs"], "ms", note),
        Timed("memory of that step", memory[0], memory[1], "MB", "beyond what is in use before it"),
    ]


def peak_memory(config: SpeedConfig, *, ours: bool) -> float | None:
    """MB that a training step needs beyond what is in use before, measured in a process of its own.

    None where the system does not tell: on a CPU only Linux does.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (config, ours, torch.get_num_threads()))


def _peak(config: SpeedConfig, ours: bool, threads: int) -> float | None:
    torch.set_num_threads(threads)
    step, device = training_step(config, ours=ours)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        resident = _status("VmRSS")
        step()
        return (_status("VmHWM") - resident) / 1e3
    except OSError:
        return None


def _status(key: str) -> float:
    """What the kernel says of this process, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


__all__ = ["PAPER_SHAPE", "Measured", "SpeedConfig", "Timed", "measure_speed", "paper_shape", "training_step"]
