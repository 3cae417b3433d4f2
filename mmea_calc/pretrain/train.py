"""One stage of pretraining: time-boxed, resumable, wholly on one device.

The learning rate falls along a cosine over the time (or the number of steps) given; an exponential moving average of
the weights is what is written. A run writes, in its folder,

    NAME.safetensors, NAME.json   the backbone (the config is in both)
    resume.pt                     everything needed to go on, renewed now and then
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapted import attach
from ..backbone import Backbone, device_of, load_backbone, save_backbone
from ..config import AdapterConfig, TrainConfig, fields_of
from ..errors import TrainingError
from ..files import replacing, write_text
from ..loss import Loss, LossWeights, loss_of
from ..mace_bridge import build_network
from ..potential import Potential
from ..training.compiled_training import CompiledGradient, Gradients
from ..training.finetune_checks import check_numbers
from ..training.optimiser import Optimiser
from ..training.trainer import hash_of
from .dataset import PackedSet, read_e0, read_level

ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
_LATE = 0.7  # part of the run after which the energy weighs more
_OF_THE_START = ("notes", "licence", "mean_of")  # what is said of it holds no longer
_OF_A_NEW_NETWORK = ("channels", "max_ell", "r_max")  # settings that a run with a start takes no notice of


@dataclass(frozen=True)
class PretrainConfig:
    """How one stage is trained; energies in eV, lengths in A.

    Attributes:
        minutes: length of the run; the cosine ends with it. `steps`, if given, is used instead.
        batch_size: structures per step.
        optimizer, huber_delta, ema_decay, clip_norm: see `TrainConfig`.
        lr: largest learning rate; it rises to it over `warmup_steps` and ends at a hundredth of it.
        forces_weight: of the Huber loss of the forces.
        energy_weight, late_energy_weight: of the Huber loss of the energy per atom; the second holds for the last 30
            per cent of the run.
        compile: train with steps compiled to machine code (`compiled_training`): minutes once, twice as fast after.
        checkpoint_minutes: time between renewals of resume.pt.
        readout_scale: what the readouts of the start are multiplied by first: less than 1 where energies are to become
            smaller, such as differences of two levels of theory.
        zbl: give the network mace's pair repulsion (Ziegler, Biersack, Littmark) within the sum of two covalent radii,
            where few structures teach it a wall; a network that starts from another one without it gets it too.
        channels, max_ell, r_max: of a new network; a run with a start takes its network as it is.
        seed: of the first weights and of the order of the structures.
        device: "cpu", "cuda", "cuda:1", ..., or "auto".
    """

    minutes: float = 10.0
    steps: int | None = None
    batch_size: int = 8
    optimizer: Literal["soap", "adamw"] = "soap"
    lr: float = 0.003
    warmup_steps: int = 100
    forces_weight: float = 100.0
    energy_weight: float = 10.0
    late_energy_weight: float = 40.0
    huber_delta: float = 0.02
    ema_decay: float = 0.999
    clip_norm: float = 10.0
    compile: bool = False
    checkpoint_minutes: float = 2.0
    readout_scale: float = 1.0
    zbl: bool = False
    channels: int = 64
    max_ell: int = 2
    r_max: float = 4.5
    seed: int = 0
    device: str = "auto"

    def training(self) -> TrainConfig:
        """What of it the common parts of a training take."""
        return TrainConfig(**fields_of(TrainConfig, {f.name: getattr(self, f.name) for f in fields(self)}))


def pretrain(
    *,
    data: Path,
    out: Path,
    name: str,
    start: str | Path | None = None,
    walls: Path | None = None,
    resume: bool = False,
    settings: PretrainConfig | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train one stage.

    Args:
        data: folder of a packed set (`dataset`).
        out: folder to write into.
        name: of the backbone that is made.
        start: name or path of a backbone to start from; None starts from random weights.
        walls: packed set of pairs of atoms (`walls`); one structure of every batch is one of these.
        resume: go on from OUT/resume.pt with the same data; with `steps`, to the bits of a run that was never stopped
            (CPU).
        settings: how; the defaults are those of the second stage.
        progress: called with a line of text now and then.

    Returns:
        the path of the backbone.

    Raises:
        BackboneError: the start cannot be loaded. DataError: the set cannot be used. TrainingError: there is nothing
            to resume, it belongs to other data or another network, the loss is not finite, or batches have no place
            for a wall.
    """
    settings = settings or PretrainConfig()
    check_stage(settings, name)
    checkpoint = out / "resume.pt"
    saved = _read_checkpoint(checkpoint) if resume else None
    if saved is None and checkpoint.exists():
        raise TrainingError(f"{checkpoint} is the state of an earlier run: continue it with --resume, or remove it")
    run = _Run(data, start, walls, settings, saved)
    out.mkdir(parents=True, exist_ok=True)
    run.train(lambda: _write_checkpoint(checkpoint, run.state()), progress)
    metrics = run.evaluate()
    progress(f"validation: {metrics}")
    seen = {"structures_seen": run.step * settings.batch_size, "of_walls": run.step if walls else 0}
    told = {k: v for k, v in asdict(settings).items() if start is None or k not in _OF_A_NEW_NETWORK}
    run.config["training"] = {**seen, **told, **metrics}
    path = out / f"{name}.safetensors"
    save_backbone(path, run.config, run.tensors())
    write_text(path.with_suffix(".json"), json.dumps(run.config, indent=1) + "\n")
    return path


def check_stage(settings: PretrainConfig, name: str) -> None:
    """Raise a TrainingError for settings that cannot be, and for a name that is none of a file."""
    if Path(name).name != name:
        raise TrainingError(f"{name!r} is no name of a backbone: expected that of a file, without a folder")
    check_numbers(settings, {"minutes": 0, "steps": 0, "batch_size": 1, "lr": 1e-12, "seed": 0, "clip_norm": 1e-12})


class _Run:
    """Network, data, optimiser, averages and place in the run: a fine-tuning of all weights (method "full")."""

    def __init__(
        self,
        data: Path,
        start: str | Path | None,
        walls: Path | None,
        settings: PretrainConfig,
        saved: dict[str, Any] | None,
    ) -> None:
        if walls and settings.batch_size < 2:
            raise TrainingError(
                f"one structure of a batch is a wall's: batch_size must be 2 at least, got {settings.batch_size}"
            )
        self.settings, self.config_of_loss = settings, settings.training()
        level = read_level(data)
        e0, files = read_e0(data), sorted(data.glob("train-[0-9]*.npz"))
        device = device_of(settings.device)

        def packed(some: list[Path], elements: tuple[int, ...]) -> PackedSet:
            return PackedSet(some, e0=e0, elements=elements, device=device)

        begun_with: dict[str, str] | None = None
        if start is None:
            neighbours = (
                saved["avg_num_neighbors"] if saved else packed(files, ELEMENTS).mean_neighbours(settings.r_max)
            )
            backbone = _new_backbone(settings, neighbours, device)
        else:
            backbone = load_backbone(start, device=str(device))
            if len(backbone.heads) > 1:
                raise TrainingError(f"{start} has several heads; pretraining takes networks of one")
            begun_with = {"name": backbone.name, "fingerprint": backbone.fingerprint}
            if settings.zbl:
                backbone = _with_pair_repulsion(backbone, device)
        self.config = {k: v for k, v in backbone.config.items() if k not in _OF_THE_START}
        if begun_with is not None:
            self.config["start"] = begun_with
            _scale_readouts(backbone.network, settings.readout_scale)
        self.train_set = packed([*files, walls] if walls else files, backbone.elements)
        self.n_walls = len(packed([walls], backbone.elements)) if walls else 0
        self.valid_set = packed([data / "valid.npz"], backbone.elements)
        self.config["atomic_energies"] = [e0.get(z, 0.0) for z in backbone.elements]
        self.config["level_of_theory"] = level

        self.potential = Potential(backbone)
        self.potential.reference_energies = dict.fromkeys(backbone.elements, 0.0)  # energies here are of interaction
        self.adapter = self.potential.adapter = attach(backbone.network, AdapterConfig(method="full"))
        self.parameters: list[Tensor] = list(self.adapter.parameters())
        self.optimiser = Optimiser(self.parameters, self.adapter.parameter_groups(), self.config_of_loss)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step, self.elapsed = 0, 0.0
        repelling = [torch.ones(1)] if self.config.get("pair_repulsion") else []
        self.start = hash_of([*backbone.network.parameters(), *repelling])
        taught = self.train_set
        self.data = hash_of([taught.numbers, taught.n_atoms, taught.positions, taught.forces, taught.energy])
        if saved is not None:
            self._restore(saved)
        compiled = settings.compile and self.fraction() < 1
        self.gradient = CompiledGradient(self.potential, self.adapter, self.config_of_loss) if compiled else None

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["start"] != self.start:
            raise TrainingError("resume.pt belongs to another network; use the settings and the start it was made with")
        if saved.get("data") != self.data:
            raise TrainingError(
                "resume.pt was made with other structures or walls; give those again, or begin a new run that starts "
                "from this one's weights"
            )
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, [t.to(self.potential.device) for t in saved["weights"]])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"].cpu())
        self.step, self.elapsed = saved["step"], saved["elapsed"]

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights under mace's names: all parameters, and buffers that are trained (radial frequencies).

        Not the other buffers, which are built anew in any precision.
        """
        network = self.potential.backbone.network
        names = {name for name, _ in network.named_parameters()} | set(self.adapter.sites)
        with self.optimiser.averaged(), self.potential.folded():
            return {n: t.detach().clone() for n, t in network.state_dict().items() if n in names}

    def state(self) -> dict[str, Any]:
        """What `resume.pt` holds: tensors and plain values only."""
        return {
            "start": self.start,
            "data": self.data,
            "weights": [p.detach() for p in self.parameters],
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "avg_num_neighbors": self.config["avg_num_neighbors"],
        }

    def fraction(self) -> float:
        """How much of the run is done, 0 to 1."""
        done, whole = (
            (self.elapsed, 60 * self.settings.minutes)
            if self.settings.steps is None
            else (self.step, self.settings.steps)
        )
        return done / whole if done < whole else 1.0

    def train(self, checkpoint: Callable[[], None], progress: Callable[[str], None]) -> None:
        """Step until the run is done; a checkpoint now and then, and at the end."""
        before = written = time.monotonic()
        device = self.potential.device
        beside = f" and {self.n_walls} of walls" if self.n_walls else ""
        n = len(self.train_set) - self.n_walls
        progress(f"{device}: {n} structures{beside}, {len(self.valid_set)} for validation")
        while (fraction := self.fraction()) < 1:
            loss = self._one_step(fraction)
            now = time.monotonic()
            self.elapsed, before = self.elapsed + now - before, now
            if now - written >= 60 * self.settings.checkpoint_minutes:
                if not math.isfinite(loss):
                    raise TrainingError(f"the loss is {loss} at step {self.step}; lower the learning rate")
                checkpoint()
                written = time.monotonic()
                progress(f"{self.elapsed:.0f} s, step {self.step}, loss {loss:.3f}, {self.evaluate(300)}")
        if not all(bool(torch.isfinite(value).all()) for value in self.optimiser.averages()):
            raise TrainingError(f"the weights are not finite at step {self.step}; lower the learning rate")
        checkpoint()

    def _one_step(self, fraction: float) -> float:
        settings, config = self.settings, self.config_of_loss
        rise = min(1.0, (self.step + 1) / max(1, settings.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * fraction))
        self.optimiser.lr = settings.lr * rise * (0.01 + 0.99 * cosine)
        chosen = self._drawn()
        batch, labels = self.train_set.batch(chosen.to(self.potential.device), self.config["r_max"])
        energy_weight = settings.energy_weight if fraction < _LATE else settings.late_energy_weight
        weights = LossWeights.of(labels, config, energy_weight=energy_weight, forces_weight=settings.forces_weight)

        def plainly() -> tuple[Loss, Gradients]:
            loss = loss_of(self.potential.predict(batch, training=True), labels, weights, config)
            return loss, torch.autograd.grad(loss.total, self.parameters, allow_unused=True)

        compiled = self.gradient(batch, labels, weights, plainly) if self.gradient is not None else None
        loss, gradients = compiled or plainly()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        self.optimiser.step()
        self.step += 1
        return float(loss.total.detach())

    def _drawn(self) -> Tensor:
        """Numbers of the structures of a batch; those of walls stand last in the set."""
        size, n = self.settings.batch_size, len(self.train_set) - self.n_walls
        if not self.n_walls:
            return torch.randint(n, (size,), generator=self.generator)
        others = torch.randint(n, (size - 1,), generator=self.generator)
        return torch.cat([others, n + torch.randint(self.n_walls, (1,), generator=self.generator)])

    def evaluate(self, limit: int | None = None, batch_size: int = 200) -> dict[str, float]:
        """Mean absolute errors of the averaged weights on the validation set, or its first `limit` structures."""
        energy = forces = n_components = 0.0
        n_structures = len(self.valid_set) if limit is None else min(limit, len(self.valid_set))
        with self.optimiser.averaged():
            for part in torch.arange(n_structures, device=self.potential.device).split(batch_size):
                batch, labels = self.valid_set.batch(part, self.config["r_max"])
                found = self.potential.predict(batch)
                assert found.forces is not None
                energy += float(((found.energy - labels.energy) / labels.atoms_per_graph).abs().sum())
                forces += float((found.forces - labels.forces).abs().sum())
                n_components += labels.forces.numel()
        return {
            "valid_energy_mae_meV_per_atom": 1e3 * energy / n_structures,
            "valid_forces_mae_meV_per_A": 1e3 * forces / n_components,
        }


def _new_backbone(settings: PretrainConfig, neighbours: float, device: torch.device) -> Backbone:
    """With random weights that follow from the seed."""
    config = _new_config(settings, neighbours)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _assembled("new", config, build_network(config).state_dict(), device)


def _with_pair_repulsion(backbone: Backbone, device: torch.device) -> Backbone:
    """The same weights, in a network that adds mace's pair repulsion to the energy; trained frequencies stay."""
    repelling = backbone.config | {"pair_repulsion": True}
    state = build_network(repelling).state_dict() | backbone.network.state_dict()
    return _assembled(backbone.name, repelling, state, device)


def _assembled(name: str, config: dict[str, Any], state: dict[str, Tensor], device: torch.device) -> Backbone:
    """What a file of these would load as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.safetensors"
        save_backbone(path, config, state)
        return load_backbone(path, device=str(device))


def _new_config(settings: PretrainConfig, neighbours: float) -> dict[str, Any]:
    """A network of the embedded backbones' kind."""
    return {
        "model": "ScaleShiftMACE",
        "r_max": settings.r_max,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": settings.max_ell,
        "num_interactions": 2,
        "hidden_irreps": f"{settings.channels}x0e + {settings.channels}x1o",
        "MLP_irreps": "16x0e",
        "correlation": 3,
        "gate": "silu",
        "radial_MLP": [64, 64, 64],
        "radial_type": "bessel",
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "atomic_inter_scale": 1.0,
        "atomic_inter_shift": 0.0,
        "avg_num_neighbors": neighbours,
        "pair_repulsion": settings.zbl,
        "atomic_numbers": list(ELEMENTS),
        "atomic_energies": [0.0] * len(ELEMENTS),
    }


def _scale_readouts(network: nn.Module, factor: float) -> None:
    """Multiply what the readouts give by about `factor`, shared among the layers of each."""
    with torch.no_grad():
        for readout in network.get_submodule("readouts").children():
            weights = list(readout.parameters())
            for weight in weights:
                weight.mul_(factor ** (1 / len(weights)))


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError(f"there is no {path} to resume from; start without --resume") from None
    except Exception as problem:  # torch raises many kinds for a damaged file
        raise TrainingError(f"{path} cannot be read ({problem}); start without --resume") from problem
    if not isinstance(saved, dict) or "optimiser" not in saved:
        raise TrainingError(f"{path} is no state of a pretraining run")
    return saved


def _write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as part:
        torch.save(state, part)
