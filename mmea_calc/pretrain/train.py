"""One stage of pretraining: time-boxed, resumable, wholly on one device.

The learning rate falls along a cosine over the time (or the number of steps) given; an exponential moving average of
the weights is what is written. A run writes, in its folder,

    NAME.safetensors, NAME.json   the backbone (the config is in both)
    resume.pt                     everything needed to go on, renewed now and then
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import load_backbone, save_backbone
from ..errors import DataError, TrainingError
from ..fast_path import use_fast_path
from ..files import replacing, write_text
from ..mace_bridge import build_network, is_untrained
from ..mace_networks import repeat_to_the_bit
from .dataset import PackedSet, Sample, read_e0

ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
_LATE = 0.7  # part of the run after which the energy weighs more


@dataclass(frozen=True)
class PretrainConfig:
    """How one stage is trained; energies in eV, lengths in A.

    Attributes:
        minutes: length of the run; the cosine ends with it. `steps`, if given, is used instead.
        batch_size: structures per step.
        lr: largest learning rate; it rises to it over `warmup_steps` and ends at a hundredth of it.
        forces_weight, forces_delta: of the Huber loss of the forces.
        energy_weight, late_energy_weight, energy_delta: of the Huber loss of the energy per atom; the second weight
            holds for the last 30 per cent of the run.
        ema_decay: of the average of the weights.
        clip_norm: largest norm of the gradient.
        weight_decay: of the weights of linear maps, products and contractions.
        checkpoint_minutes: time between renewals of resume.pt.
        channels, max_ell, r_max: of a new network; a run with a start takes its network as it is.
        seed: of the first weights and of the order of the structures.
        device: "cpu", "cuda", "cuda:1", ..., or "auto".
    """

    minutes: float = 10.0
    steps: int | None = None
    batch_size: int = 8
    lr: float = 0.002
    warmup_steps: int = 100
    forces_weight: float = 100.0
    forces_delta: float = 0.5
    energy_weight: float = 100.0
    late_energy_weight: float = 2000.0
    energy_delta: float = 0.05
    ema_decay: float = 0.999
    clip_norm: float = 10.0
    weight_decay: float = 5e-7
    checkpoint_minutes: float = 2.0
    channels: int = 64
    max_ell: int = 2
    r_max: float = 4.5
    seed: int = 0
    device: str = "auto"


def pretrain(
    *,
    data: Path,
    out: Path,
    name: str,
    start: str | Path | None = None,
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
        resume: go on from OUT/resume.pt; with `steps`, to the bits of a run that was never stopped (CPU).
        settings: how; the defaults are those of the second stage.
        progress: called with a line of text now and then.

    Returns:
        the path of the backbone.

    Raises:
        BackboneError: the start cannot be loaded. DataError: the set cannot be used. TrainingError: there is nothing
            to resume, or the loss is not finite.
    """
    settings = settings or PretrainConfig()
    checkpoint = out / "resume.pt"
    saved = _read_checkpoint(checkpoint) if resume else None
    if saved is None and checkpoint.exists():
        raise TrainingError(f"{checkpoint} is the state of an earlier run: continue it with --resume, or remove it")
    run = _Run(data, start, settings, saved)
    out.mkdir(parents=True, exist_ok=True)
    run.train(lambda: _write_checkpoint(checkpoint, run.state()), progress)
    metrics = run.evaluate()
    progress(f"validation: {metrics}")
    run.config["training"] = {"structures_seen": run.step * settings.batch_size, **asdict(settings), **metrics}
    path = out / f"{name}.safetensors"
    save_backbone(path, run.config, run.averages)
    write_text(path.with_suffix(".json"), json.dumps(run.config, indent=1) + "\n")
    return path


class _Run:
    """Network, data, optimiser, average and place in the run."""

    def __init__(
        self, data: Path, start: str | Path | None, settings: PretrainConfig, saved: dict[str, Any] | None
    ) -> None:
        self.settings = settings
        device = settings.device
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        e0 = read_e0(data)
        level = data / "level.txt"
        if not level.is_file():
            raise DataError(f"{level} is missing; it says the level of theory of the set in one line")
        training_files = sorted(data.glob("train-[0-9]*.npz"))
        if start is None:
            self.elements: tuple[int, ...] = ELEMENTS
            self.train_set = self._set(training_files, e0)
            neighbours = saved["avg_num_neighbors"] if saved else self.train_set.mean_neighbours(settings.r_max)
            self.config = _new_config(settings, neighbours)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.network = build_network(self.config).to(self.device, torch.float32)
            repeat_to_the_bit(self.network)
            use_fast_path(self.network)
        else:
            backbone = load_backbone(start, device=str(self.device))
            if len(backbone.heads) > 1:
                raise TrainingError(f"{start} has several heads; pretraining takes networks of one")
            self.elements, self.network, self.config = backbone.elements, backbone.network, dict(backbone.config)
            self.train_set = self._set(training_files, e0)
            for key in ("notes", "licence"):  # of the start, not of what is made of it
                self.config.pop(key, None)
            self.config["start"] = {"name": backbone.name, "fingerprint": backbone.fingerprint}
        self.valid_set = self._set([data / "valid.npz"], e0)
        self.config["atomic_energies"] = [e0.get(z, 0.0) for z in self.elements]
        self.config["level_of_theory"] = level.read_text(encoding="utf-8").strip()
        self._prepare(saved)

    def _set(self, files: list[Path], e0: dict[int, float]) -> PackedSet:
        return PackedSet(files, e0=e0, elements=self.elements, device=self.device)

    def _prepare(self, saved: dict[str, Any] | None) -> None:
        """Optimiser, average and place: new, or as saved."""
        self.network.train()
        named = {n: p for n, p in self.network.named_parameters() if p.numel() and not is_untrained(p)}
        self.fixed = {n: p.detach() for n, p in self.network.named_parameters() if n not in named}
        for parameter in named.values():
            parameter.requires_grad_(True)
        self.parameters = named
        heavy = [p for n, p in named.items() if any(k in n for k in ("linear.weight", "skip_tp", "weights"))]
        light = [p for p in named.values() if all(p is not h for h in heavy)]
        groups: list[dict[str, Any]] = [
            {"params": heavy, "weight_decay": self.settings.weight_decay},
            {"params": light},
        ]
        self.optimiser = torch.optim.Adam(groups, lr=self.settings.lr, amsgrad=True)
        self.moving = {n: p.detach().clone() for n, p in named.items()}
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.step, self.elapsed = 0, 0.0
        if saved is None:
            return
        if set(saved["weights"]) != set(named) or any(saved["weights"][n].shape != p.shape for n, p in named.items()):
            raise TrainingError("resume.pt belongs to another network; use the settings and the start it was made with")
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(saved["weights"][key])
                self.moving[key].copy_(saved["average"][key])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"].cpu())
        self.step, self.elapsed = saved["step"], saved["elapsed"]

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged weights under mace's names, with those that never train."""
        return {**self.moving, **self.fixed}

    def state(self) -> dict[str, Any]:
        """What `resume.pt` holds: tensors and plain values only."""
        return {
            "weights": {n: p.detach() for n, p in self.parameters.items()},
            "average": self.moving,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "avg_num_neighbors": self.config["avg_num_neighbors"],
        }

    def fraction(self) -> float:
        """How much of the run is done, 0 to 1."""
        if self.settings.steps is not None:
            return self.step / max(1, self.settings.steps)
        return self.elapsed / (60 * self.settings.minutes)

    def train(self, checkpoint: Callable[[], None], progress: Callable[[str], None]) -> None:
        """Step until the run is done; a checkpoint now and then, and at the end."""
        before = written = time.monotonic()
        progress(f"{self.device}: {len(self.train_set)} structures, {len(self.valid_set)} for validation")
        while (fraction := self.fraction()) < 1:
            loss = self._one_step(fraction)
            now = time.monotonic()
            self.elapsed, before = self.elapsed + now - before, now
            if now - written >= 60 * self.settings.checkpoint_minutes:
                if not math.isfinite(loss.item()):
                    raise TrainingError(f"the loss is {loss.item()} at step {self.step}; lower the learning rate")
                checkpoint()
                written = time.monotonic()
                progress(f"{self.elapsed:.0f} s, step {self.step}, loss {loss.item():.3f}, {self.evaluate(300)}")
        if not all(bool(torch.isfinite(value).all()) for value in self.moving.values()):
            raise TrainingError(f"the weights are not finite at step {self.step}; lower the learning rate")
        checkpoint()

    def _one_step(self, fraction: float) -> Tensor:
        settings = self.settings
        rise = min(1.0, (self.step + 1) / max(1, settings.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * fraction))
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * rise * (0.01 + 0.99 * cosine)
        chosen = torch.randint(len(self.train_set), (settings.batch_size,), generator=self.generator)
        sample = self.train_set.batch(chosen.to(self.device), self.config["r_max"])
        loss = self._loss(sample, settings.energy_weight if fraction < _LATE else settings.late_energy_weight)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip_norm)
        self.optimiser.step()
        self.step += 1
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))  # a short memory at first
        with torch.no_grad():
            torch._foreach_lerp_(list(self.moving.values()), list(self.parameters.values()), 1 - decay)
        return loss.detach()

    def _loss(self, sample: Sample, energy_weight: float) -> Tensor:
        output = self.network(sample.inputs, training=True)
        per_atom = (self._interaction(output, sample) - sample.energy) / sample.n_atoms
        forces = nn.functional.huber_loss(output["forces"], sample.forces, delta=self.settings.forces_delta)
        energy = nn.functional.huber_loss(per_atom, torch.zeros_like(per_atom), delta=self.settings.energy_delta)
        return self.settings.forces_weight * forces + energy_weight * energy

    @staticmethod
    def _interaction(output: dict[str, Tensor], sample: Sample) -> Tensor:
        """The E0 buffer is zero in every network here, so that the energy is the interaction energy."""
        return output["energy"].view(sample.energy.shape)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with its averaged weights."""
        current = {n: p.detach().clone() for n, p in self.parameters.items()}
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.moving[key])
        try:
            yield
        finally:
            with torch.no_grad():
                for key, parameter in self.parameters.items():
                    parameter.copy_(current[key])

    def evaluate(self, limit: int | None = None, batch_size: int = 200) -> dict[str, float]:
        """Mean absolute errors of the averaged weights on the validation set, or its first `limit` structures."""
        energy = forces = n_components = 0.0
        n_structures = len(self.valid_set) if limit is None else min(limit, len(self.valid_set))
        with self._averaged():
            for part in torch.arange(n_structures, device=self.device).split(batch_size):
                sample = self.valid_set.batch(part, self.config["r_max"])
                output = self.network(sample.inputs)
                error = (self._interaction(output, sample).detach() - sample.energy) / sample.n_atoms
                energy += float(error.abs().sum())
                forces += float((output["forces"].detach() - sample.forces).abs().sum())
                n_components += sample.forces.numel()
        return {
            "valid_energy_mae_meV_per_atom": 1e3 * energy / n_structures,
            "valid_forces_mae_meV_per_A": 1e3 * forces / n_components,
        }


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
        "atomic_numbers": list(ELEMENTS),
        "atomic_energies": [0.0] * len(ELEMENTS),
    }


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
