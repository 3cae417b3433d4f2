"""The training loop: batches in, the best averaged weights out; it can stop anywhere and go on to the same bits.

Nothing random is carried from one epoch to the next (the order of an epoch follows from the seed and its number),
so a checkpoint at the end of an epoch holds all there is: weights, averages, optimiser, schedule, best so far, log.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..adapted import Adapter
from ..config import TrainConfig, to_dict
from ..data.dataset import LabelCounts
from ..errors import CheckpointError, CompilationError, TrainingError
from ..files import replacing
from ..loss import Loss, LossWeights
from ..potential import Potential
from .compiled_training import CompiledGradient
from .optimiser import Optimiser
from .parallel import add_up, check_agreement
from .replay import Replay
from .samples import Errors, Samples, measure, stage_weights
from .steps import Gradients, Step, Training, to_the_end
from .team import SOLO, Team

CHECKPOINT_VERSION = 1
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class ProgressEvent:
    """What has happened since the last event; sent after every epoch and for every message.

    Attributes:
        epoch, epochs: finished and planned.
        loss, energy_loss, forces_loss: means over the epoch, weighted as in training.
        stress_loss: likewise; None where stresses are not trained.
        valid_energy_mae_meV_per_atom, valid_forces_mae_meV_per_A: the latest validation, of the averaged weights.
        seconds, seconds_left: gone and expected.
        message: a sentence for the user, if there is one.
    """

    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    energy_loss: float | None = None
    forces_loss: float | None = None
    stress_loss: float | None = None
    valid_energy_mae_meV_per_atom: float | None = None
    valid_forces_mae_meV_per_A: float | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    message: str = ""


Progress = Callable[[ProgressEvent], None]


@dataclass
class Best:
    """The best averaged weights so far."""

    epoch: int
    stage: int
    loss: float
    values: list[Tensor]


class Trainer:
    """Trains the adapter of a potential.

    Args:
        potential: with an adapter attached, and reference energies set.
        adapter: the adapter's handle.
        train, valid: structures.
        config: how.
        replay: which of the training structures are replayed ones.
        checkpoint: where the state is kept after every epoch; None keeps none.
        progress: told what happens.
        team: the processes that train together; each takes its part of every batch. The first one keeps the state.
    """

    def __init__(
        self,
        potential: Potential,
        adapter: Adapter,
        train: Samples,
        valid: Samples,
        config: TrainConfig,
        *,
        replay: Replay | None = None,
        checkpoint: Path | None = None,
        progress: Progress = lambda event: None,
        team: Team = SOLO,
    ) -> None:
        self.team = team
        self.potential, self.adapter, self.config = potential, adapter, config
        self.train, self.valid, self.replay = train, valid, replay
        self.checkpoint, self.progress = checkpoint, progress
        self.parameters: list[Tensor] = list(adapter.parameters())
        team.copy_first(self.parameters)
        self.optimiser = Optimiser(self.parameters, adapter.parameter_groups(), config)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimiser.torch, factor=config.plateau_factor, patience=config.plateau_patience
        )
        self.start = hash_of(self.parameters)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.log: list[dict[str, float]] = []
        self.best: Best | None = None
        self._compiled: CompiledGradient | None = None
        self.n_train = len(train) if replay is None else replay.first
        self.steps_per_epoch = math.ceil(self.n_train / config.batch_size)
        self.validate_every = config.validate_every or max(1, config.epochs // 100)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All `steps`, one after another."""
        to_the_end(self.steps())

    def steps(self) -> Training[None]:
        """Train to the end, or on from a restored state. The best averaged weights are left in the adapter.

        Yields:
            every step before it is computed; those of a team are computed among its processes, and are not handed out.

        Raises:
            TrainingError: the loss is no longer a number (the best weights so far are left in the adapter), or the
                processes of a team do not train the same thing.
        """
        check_agreement(self.team, self.identity(), "give all of them the same files and options")
        try:
            self._compiled = self._compile() if self.epoch < self.config.epochs else None
            while self.epoch < self.config.epochs:
                yield from self._epoch()
                self.save()
        finally:
            if self._compiled is not None:
                self._compiled.close()
            self.optimiser.close()
            self.use_best()

    def use_best(self) -> None:
        """Put the best averaged weights into the adapter."""
        if self.best is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.best.values)

    def stage(self, epoch: int) -> int:
        """1, or 2 from the configured epoch on."""
        start = self.config.stage_two_start
        return 1 if start is None or epoch < round(start * self.config.epochs) else 2

    def _epoch(self) -> Training[None]:
        started = time.perf_counter()
        stage = self.stage(self.epoch)
        if stage == 2 and (self.epoch == 0 or self.stage(self.epoch - 1) == 1):
            self.optimiser.lr = self.config.stage_two_lr
        sums = np.zeros(4)
        n_rows = 0
        for rows in self._batches():
            parts = yield from self._step(rows, stage)
            sums += len(rows) * np.array(parts)
            n_rows += len(rows)
        self.epoch += 1
        sums /= n_rows
        errors = None
        if self.epoch % self.validate_every == 0 or self.epoch == self.config.epochs:
            errors = self._validate(stage)
        self.seconds += time.perf_counter() - started
        row = {"epoch": self.epoch, "loss": sums[0], "energy_loss": sums[1], "forces_loss": sums[2]}
        stress_loss = float(sums[3]) if self.config.stress_weight > 0 else None
        row |= {} if stress_loss is None else {"stress_loss": stress_loss}
        if errors is not None:
            row |= {"valid_loss": errors.loss, **{f"valid_{k}": v for k, v in errors.to_dict().items()}}
        row |= {"lr": self.optimiser.lr, "seconds": self.seconds}
        self.log.append({k: float(v) for k, v in row.items()})
        self.progress(
            ProgressEvent(
                epoch=self.epoch,
                epochs=self.config.epochs,
                loss=float(sums[0]),
                energy_loss=float(sums[1]),
                forces_loss=float(sums[2]),
                stress_loss=stress_loss,
                valid_energy_mae_meV_per_atom=errors.energy_mae_meV_per_atom if errors else None,
                valid_forces_mae_meV_per_A=errors.forces_mae_meV_per_A if errors else None,
                seconds=self.seconds,
                seconds_left=self.seconds / self.epoch * (self.config.epochs - self.epoch),
            )
        )

    def _batches(self) -> Iterator[list[int]]:
        """The samples of every step of this epoch."""
        generator = np.random.default_rng((self.config.seed, self.epoch))
        order, size = generator.permutation(self.n_train), self.config.batch_size
        replayed = self.replay.deal(generator, self.steps_per_epoch) if self.replay else [[]] * self.steps_per_epoch
        for step, more in enumerate(replayed):
            yield order[step * size : (step + 1) * size].tolist() + more

    def _step(self, rows: list[int], stage: int) -> Generator[Step, None, list[float]]:
        """One step; the loss and its terms of energy, forces and stress."""
        if self.config.schedule != "plateau" and stage == 1:
            self.optimiser.lr = self._scheduled_lr()
        if self.team.size == 1:
            step = self._of(rows, stage)
            yield step
            loss, gradients = step.found or self._computed(step)
        else:
            loss, gradients = self._from_all(rows, stage)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        # One question to the device, before it is busy with the optimiser: then the next batch is made meanwhile.
        numbers = torch.stack([t.detach() for t in (loss.total, loss.energy, loss.forces, loss.stress, norm)]).tolist()
        if not (math.isfinite(numbers[0]) and math.isfinite(numbers[-1])):
            self._stop(rows, numbers[0])
        self.optimiser.step()
        self.step += 1
        return numbers[:-1]

    def _from_all(self, rows: list[int], stage: int) -> tuple[Loss, Gradients]:
        """Loss of a batch and its gradient, from all processes."""
        part, gradients = None, cast(Gradients, [None] * len(self.parameters))
        if mine := self.team.mine(rows):
            part, gradients = self._computed(self._of(mine, stage, self.train.label_counts(rows)))
        return add_up(self.team, part, gradients, self.parameters)

    def _of(self, rows: list[int], stage: int, counts: LabelCounts | None = None) -> Step:
        """The step of these structures, with the host; with `counts`, of a part of a batch."""
        graphs = [self.train.graphs[i] for i in rows]
        labels = self.train.labels(rows, self.potential, device=_HOST)
        energy_weight, forces_weight = stage_weights(self.config, stage)
        weights = LossWeights.of(
            labels, self.config, energy_weight=energy_weight, forces_weight=forces_weight, counts=counts
        )
        stress = self.config.stress_weight > 0 and self.train.has_stress
        batch = self.potential.collate(graphs, device=_HOST)
        return Step(self.potential, self.adapter, graphs, batch, labels, weights, self.config, stress)

    def _computed(self, step: Step) -> tuple[Loss, Gradients]:
        found = None
        if self._compiled is not None:
            found = self._compiled(step.batch, step.labels, step.weights, step.plainly)
        return found or step.plainly()

    def _compile(self) -> CompiledGradient | None:
        """The compiled step, if it is wanted and can be had. The first process makes it, the others find it.

        On a GPU steps are recorded in any case, by the network's own operations where they are not compiled.
        """

        made: list[CompiledGradient] = []

        def make() -> str:
            """Why not, or nothing."""
            try:
                made.append(CompiledGradient(self.potential, self.adapter, self.config))
            except CompilationError as problem:
                return str(problem)
            return ""

        if not self.config.compile:
            return self._recorded()
        self.progress(ProgressEvent(message="compiling training steps, unless that was done before: a few minutes"))
        if reason := self.team.from_first(make):
            self.progress(ProgressEvent(message=f"training steps are not compiled: {reason}"))
            return self._recorded()
        return made[0] if made else CompiledGradient(self.potential, self.adapter, self.config)

    def _recorded(self) -> CompiledGradient | None:
        """Steps by the network's own operations, recorded on a GPU."""
        if self.potential.device.type != "cuda" or not self.potential.backbone.fast or self.config.stress_weight:
            return None
        return CompiledGradient(self.potential, self.adapter, self.config, compiled=False)

    def _scheduled_lr(self) -> float:
        warmup = max(1, self.config.warmup_steps)
        total = max(self.config.epochs * self.steps_per_epoch, 1)
        rise = min(1.0, (self.step + 1) / warmup)
        if self.config.schedule == "constant":
            return self.config.lr * rise
        return self.config.lr * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / total))))

    def _stop(self, rows: list[int], loss: float) -> None:
        names = ", ".join(self.train.structures[i].where for i in rows)
        kept = (
            f"the best weights so far (epoch {self.best.epoch}) are kept"
            if self.best
            else "there was no validation before it, so nothing is kept"
        )
        raise TrainingError(
            f"the loss is {loss} in epoch {self.epoch + 1}, step {self.step + 1}, or its gradient is not finite; "
            f"the batch holds {names}; {kept}. Look at these structures, or lower --lr (now {self.config.lr})"
        )

    def _validate(self, stage: int) -> Errors:
        if self.team.size > 1:
            # Processes that have come apart would go on adding up gradients of different weights, unnoticed.
            now = {f"the weights after epoch {self.epoch}": hash_of(self.parameters)}
            check_agreement(self.team, now, "use processors and package versions of one kind, and --resume")
        with self.optimiser.averaged():
            errors = measure(self.potential, self.valid, self.config, stage=stage, team=self.team)
        if self.config.schedule == "plateau" and stage == 1:
            self.plateau.step(errors.loss)
        # Losses of the two stages are weighted differently and cannot be compared: the second starts afresh.
        if math.isfinite(errors.loss) and (
            self.best is None or self.best.stage < stage or errors.loss < self.best.loss
        ):
            self.best = Best(self.epoch, stage, errors.loss, self.optimiser.averages())
        return errors

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state to the checkpoint, by way of a temporary file."""
        if self.checkpoint is None or not self.team.leads:
            return
        best = self.best
        state: dict[str, Any] = {
            "version": CHECKPOINT_VERSION,
            "identity": self.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "parameters": [p.detach() for p in self.parameters],
            "optimiser": self.optimiser.state_dict(),
            "plateau": {k: v for k, v in self.plateau.state_dict().items() if isinstance(v, int | float | list)},
            "best": None if best is None else [best.epoch, best.stage, best.loss, best.values],
            "log": self.log,
        }
        with replacing(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def restore(self) -> bool:
        """Take up the state of the checkpoint; False if there is none.

        Raises:
            CheckpointError: it cannot be read, or belongs to another run.
        """
        path = self.checkpoint
        content = self.team.from_first(lambda: path.read_bytes() if path is not None and path.exists() else None)
        if content is None:
            return False
        try:
            # Everything finds its device below; an optimiser's counters of steps are to stay with the host.
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as problem:
            raise CheckpointError(
                f"{self.checkpoint} cannot be read ({type(problem).__name__}); start without --resume"
            ) from problem
        if differing := sorted(k for k, v in self.identity().items() if identity.get(k) != v):
            was = ", ".join(f"{k} was {identity.get(k)!r}, is {self.identity()[k]!r}" for k in differing)
            raise CheckpointError(f"{self.checkpoint} belongs to another run: {was}. Start without --resume")
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])
        self.plateau.load_state_dict(state["plateau"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.log = state["log"]
        self.best = None if state["best"] is None else Best(*state["best"])
        return True

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to go on with the other's state."""
        training = to_dict(self.config)
        del training["device"]
        return {
            "backbone": self.potential.backbone.fingerprint,
            **{f"adapter.{k}": v for k, v in to_dict(self.adapter.config).items()},
            **training,
            "training data": self.train.hash,
            "validation data": self.valid.hash,
            "reference energies": sorted(self.potential.reference_energies.items()),
            "weights at the start": self.start,
        }


def hash_of(tensors: Sequence[Tensor]) -> str:
    """sha256 (hex) over values, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


__all__ = ["Errors", "Progress", "ProgressEvent", "Samples", "Trainer", "hash_of", "measure", "stage_weights"]
