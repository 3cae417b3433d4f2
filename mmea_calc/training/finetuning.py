"""`finetune`: from labelled structures and a backbone to an adapter file.

    read and check -> attach -> reference energies -> train -> record ranges -> errors, also of the backbone -> write

`run_folder` tells what is kept beside the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..adapted import Adapter, attach
from ..adapter_file import AdapterFile, backbone_for, named_after, read_adapter, write_adapter
from ..backbone import Backbone
from ..config import AdapterConfig, TrainConfig, to_dict
from ..data.dataset import Dataset
from ..data.preflight import PreflightReport, preflight
from ..data.reading import split
from ..data.reference_energies import ReferenceEnergies, resolve_reference_energies
from ..errors import AdapterError, TrainingError
from ..evaluation import Evaluation, GroupErrors, evaluate
from ..files import alone_in
from ..methods import differing_form, unused_settings
from ..potential import Potential
from ..sparsity import Sparsity, sparsity
from ..updates import SoftThreshold
from .auto import AUTO, Decision, decide
from .finetune_checks import check_labels, check_settings, check_writable
from .parallel import merge_ranges, total_energies
from .replay import Replay, replay_structures
from .run_folder import DATA, RunFolder, versions
from .steps import Training, whole
from .team import SOLO, Team
from .trainer import Errors, Progress, ProgressEvent, Samples, Trainer

NOT_EQUIVARIANT = (
    "method {} is not equivariant: energies change when a structure is turned. It is a baseline for comparisons, and "
    "dynamics refuses it"
)


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        path: the adapter file.
        run_dir: the run folder.
        adapter: what was written.
        zero_shot, initial, fine_tuned: "valid" and, if there was one, "test" -> errors, of the backbone alone, of the
            adapter that training started from (empty if there was none), and after.
        best_epoch: whose averaged weights were written.
        seconds: of training.
        improved: whether the fine-tuned validation error is below the backbone's, and below that of the adapter that
            training started from, if there was one: of the forces, or of the energies where there are no forces.
    """

    path: Path
    run_dir: Path
    adapter: AdapterFile
    zero_shot: dict[str, Errors]
    initial: dict[str, Errors]
    fine_tuned: dict[str, Errors]
    best_epoch: int
    seconds: float
    improved: bool


def finetuning(
    train: Dataset,
    output: str | Path,
    *,
    valid: Dataset | None = None,
    test: Dataset | None = None,
    backbone: str | Path | Backbone | None = None,
    head: str | None = None,
    adapter: AdapterConfig | None = None,
    init: str | Path | AdapterFile | None = None,
    training: TrainConfig | None = None,
    E0s: str | Mapping[Any, float] | Path | None = None,
    level_of_theory: str | None = None,
    report: PreflightReport | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress = lambda event: None,
    team: Team = SOLO,
) -> Training[FinetuneResult]:
    """Train an adapter on labelled structures and write it.

    `finetune` does it at once; `finetuning` hands out its steps before they are computed (`one_batch.OneBatch`). Both
    return a `FinetuneResult`.

    Args:
        train: structures to train on; without `valid`, a part of them (`TrainConfig.valid_fraction`) is set aside.
        output: the adapter file.
        valid: structures that choose the best weights.
        test: structures that are only measured, before and after.
        backbone: name, path, or a loaded backbone, which is given back as it was; if not given, that of `init`, or
            the default one.
        head: head of the backbone.
        adapter: what is attached; with `init`, that file's own settings if not given.
        init: an adapter of the same backbone to start from, of the same form or of a method that does a part of what
            is asked for (gates, for mmea). Its reference energies are the start of corrections, and
            the ranges it saw count as seen.
        training: how it is trained.
        E0s: see `resolve_reference_energies`.
        level_of_theory: of the labels, kept in the file; later checks compare like with like by it.
        report: of `preflight` on these data, where it has been made already.
        run_dir: run folder; the output's name with `.run` in the place of `.adapter` if not given.
        resume: go on from the run folder's checkpoint.
        progress: told what happens, in the first process.
        team: processes that train this adapter together (`team.joined`); `training.batch_size` counts the structures
            of all of them. The first one writes; all return the same.

    Raises:
        DataError, BackboneError, AdapterError: before anything is written. Also an `init` for another backbone
            (AdapterFileError), or whose form does not fit that of `adapter`.
        TrainingError: the loss is no longer a number (the best adapter so far is written), or a checkpoint that
            does not fit.
    """
    training = training or TrainConfig()
    start = read_adapter(init) if isinstance(init, str | Path) else init
    adapter = _form(adapter, start)
    check_settings(training, team)
    output = Path(output)
    run_dir = Path(run_dir) if run_dir is not None else named_after(output, ".run")
    if team.leads:
        check_writable(output, run_dir)
    if not isinstance(backbone, Backbone):
        backbone = backbone_for(backbone, start, head=head, device=training.device, dtype=training.dtype)
    if start is not None:
        start.check_backbone(backbone)
    report = report or preflight(train, valid, test, backbone_elements=backbone.elements, r_max=backbone.r_max)
    if valid is None:
        train, valid = split(train, training.valid_fraction, training.seed)
    check_labels(train, valid, test)
    potential = Potential(backbone)
    samples = Samples(train, potential), Samples(valid, potential)
    decision = None
    if adapter.method == AUTO:
        asked = training
        training, decision = team.from_first(lambda: decide(potential, samples[0], asked))
    training = training.for_structures(len(train))
    handle = attach(backbone.network, adapter, start=start is None)
    try:
        if start is not None:
            # Its ranges would bound what is learnt from the new data; they count again once training is over.
            values = {k: v for k, v in start.tensors.items() if not k.startswith("ranges.")}
            handle.load_state_dict({**handle.state_dict(), **values})
            potential.adapter = handle
            potential.reference_energies = {**backbone.atomic_energies, **start.reference_energies}
        with nullcontext() if start is not None else handle.disabled():
            energies = _reference_energies(E0s, train, potential, samples[0], team)
        potential.adapter, potential.reference_energies = handle, energies.energies
        data = train, valid, test
        run = _Run(
            output, run_dir, potential, handle, start, training, samples, data, energies, report, level_of_theory, team
        )
        run.decision = decision
        return (yield from run.go(resume, progress if team.leads else lambda event: None))
    finally:
        handle.detach()


finetune = whole(finetuning, name="finetune")


def _form(adapter: AdapterConfig | None, start: AdapterFile | None) -> AdapterConfig:
    """What to attach. Raises AdapterError where it is not the form of `start`."""
    if start is None:
        return adapter or AdapterConfig()
    if adapter is not None:
        wanted, has = adapter.form(), start.config.form()
        if differing := differing_form(adapter, start.config):
            listed = ", ".join(f"{k} is {has[k]!r} there, {wanted[k]!r} here" for k in differing)
            raise AdapterError(
                f"the adapter to start from ({start.path or 'given'}) has another form: {listed}; "
                "leave these settings out"
            )
    return adapter or start.config


def _reference_energies(
    spec: Any, train: Dataset, potential: Potential, samples: Samples, team: Team
) -> ReferenceEnergies:
    """Choose E0s, with what the potential predicts for the training structures before any training."""
    base = _Energies(potential.backbone.name, potential.reference_energies)
    train, graphs = samples.for_reference_energies(train)
    totals = total_energies(team, potential, graphs)
    reference = [sum(base.atomic_energies[int(z)] for z in s.atoms.numbers) for s in train.structures]
    if isinstance(spec, str) and spec.strip() == "backbone":  # not those of an adapter to start from
        base.atomic_energies = potential.backbone.atomic_energies
    return team.from_first(lambda: resolve_reference_energies(spec, train, base, totals.numpy() - np.array(reference)))


@dataclass
class _Energies:
    """Reference energies that predictions were made with."""

    name: str
    atomic_energies: dict[int, float]


class _Run:
    """One run, from an attached adapter to its file."""

    decision: Decision | None = None  # of method "auto"

    def __init__(
        self,
        output: Path,
        run_dir: Path,
        potential: Potential,
        handle: Adapter,
        start: AdapterFile | None,
        training: TrainConfig,
        samples: tuple[Samples, Samples],
        data: tuple[Dataset, Dataset, Dataset | None],
        energies: ReferenceEnergies,
        report: PreflightReport,
        level_of_theory: str | None,
        team: Team,
    ) -> None:
        self.team = team
        self.output, self.folder = output, RunFolder(run_dir, writes=team.leads)
        self.potential, self.handle, self.training, self.samples = potential, handle, training, samples
        self.start, self.initial = start, dict[str, Errors]()
        self.train, self.valid, self.test = data
        self.energies, self.report, self.level_of_theory = energies, report, level_of_theory

    def go(self, resume: bool, progress: Progress) -> Training[FinetuneResult]:
        """Train, alone in the run folder."""
        if not self.team.leads:
            return (yield from self._go(resume, progress))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with alone_in(self.folder.path, TrainingError):
            return (yield from self._go(resume, progress))

    def _go(self, resume: bool, progress: Progress) -> Training[FinetuneResult]:
        replay = self._add_replay(resume)
        trainer = Trainer(
            self.potential,
            self.handle,
            *self.samples,
            self.training,
            replay=replay,
            checkpoint=self.folder.checkpoint,
            progress=progress,
            team=self.team,
        )
        for text in (self.energies.note, *self.energies.warnings, self.decision.why if self.decision else ""):
            if text:
                progress(ProgressEvent(message=text))
        if unused := unused_settings(self.handle.config):
            text = f"method {self.handle.config.method} has no use for {', '.join(unused)}: this changes nothing"
            progress(ProgressEvent(message=text))
        if not self.handle.equivariant:
            progress(ProgressEvent(message=NOT_EQUIVARIANT.format(self.handle.config.method)))
        if self.handle.skipped:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.handle.skipped.items())
            progress(ProgressEvent(message=f"layers that stay as they are: {listed}"))
        if replay is not None:
            text = f"{replay.per_epoch} of {replay.pool} other molecules are replayed in every epoch"
            progress(ProgressEvent(message=text))
        if (n := self.train.counts["stress"]) and not self.training.stress_weight:
            progress(ProgressEvent(message=f"the stresses of {n} structures are not trained: stress_weight is 0"))
        if self.start is not None:
            without_ranges = self.handle.state_dict()
            self.handle.load_state_dict({**without_ranges, **self.start.tensors})
            self.initial = {k: _errors(e.adapter.overall) for k, e in self._evaluate().items() if e.adapter}
            self.handle.load_state_dict(without_ranges)
            progress(ProgressEvent(message=f"starting from {self.start.path or 'the given adapter'}"))
        if resume:
            found = trainer.restore()
            text = f"resuming after epoch {trainer.epoch}" if found else "no checkpoint found: training from the start"
            progress(ProgressEvent(message=f"{self.folder.path}: {text}"))
        self._write_settings()
        try:
            yield from trainer.steps()
        except TrainingError as problem:
            self.folder.write_csv("log.csv", trainer.log)
            if trainer.best is not None:
                self._finish(trainer)
                raise TrainingError(f"{problem}. The best adapter so far is in {self.output}") from None
            raise
        return self._finish(trainer)

    def _add_replay(self, resume: bool) -> Replay | None:
        """Other molecules join the training samples, labelled by the model that training starts from."""
        if not self.training.replay:
            return None
        with nullcontext() if self.start is not None else self.handle.disabled():
            added = replay_structures(self.potential, self.folder.replay, resume=resume, team=self.team)
        train, valid = self.samples
        self.samples = train.joined(Samples(Dataset(added, "replay", {}), self.potential)), valid
        return Replay(len(self.train), len(added), self.training.replay)

    def _finish(self, trainer: Trainer) -> FinetuneResult:
        trainer.use_best()
        with self.handle.recording():
            total_energies(self.team, self.potential, self.samples[0].graphs)
            merge_ranges(self.team, self.handle)
        if self.start is not None:
            self.handle.widen(self.start.tensors)
        evaluations = self._evaluate()
        zero_shot, fine_tuned = {}, {}
        for name, evaluation in evaluations.items():
            assert evaluation.adapter is not None
            zero_shot[name] = _errors(evaluation.backbone.overall)
            fine_tuned[name] = _errors(evaluation.adapter.overall)
        found = self._sparsity(trainer)
        file = self._adapter_file(trainer, zero_shot, fine_tuned, found)
        if self.team.leads:
            write_adapter(self.output, file)
        self.folder.write_csv("log.csv", trainer.log)
        self.folder.draw(trainer.log, zero_shot["valid"].to_dict(), evaluations)
        after = fine_tuned["valid"]
        before = [zero_shot["valid"], *([self.initial["valid"]] if self.initial else [])]
        key = "energy_mae_meV" if np.isnan(after.forces_mae_meV_per_A) else "forces_mae_meV_per_A"
        return FinetuneResult(
            path=self.output,
            run_dir=self.folder.path,
            adapter=file,
            zero_shot=zero_shot,
            initial=self.initial,
            fine_tuned=fine_tuned,
            best_epoch=trainer.best.epoch if trainer.best else 0,
            seconds=trainer.seconds,
            improved=all(getattr(after, key) < getattr(one, key) for one in before),
        )

    def _evaluate(self) -> dict[str, Evaluation]:
        sets = {"valid": self.valid, **({} if self.test is None else {"test": self.test})}
        return {name: evaluate(self.potential, dataset, team=self.team) for name, dataset in sets.items()}

    def _adapter_file(
        self,
        trainer: Trainer,
        zero_shot: dict[str, Errors],
        fine_tuned: dict[str, Errors],
        found: Sparsity | None,
    ) -> AdapterFile:
        backbone = self.potential.backbone
        # Elements that only the adapter of the start knows keep its energies.
        known = set(self.train.elements) | set(self.start.elements if self.start else ())
        # What training and validation counted with, other elements' too where they are not the backbone's own.
        own = backbone.atomic_energies
        used = {z: e for z, e in sorted(self.energies.energies.items()) if z in known or e != own.get(z)}
        return AdapterFile(
            config=self.handle.config,
            tensors=self.handle.state_dict(),
            backbone=backbone.name,
            fingerprint=backbone.fingerprint,
            head=backbone.head,
            elements=tuple(sorted(known)),
            reference_energies=used,
            reference_energies_method=self.energies.method,
            level_of_theory=self.level_of_theory,
            data={
                "train": {"name": self.train.name, "structures": len(self.train), "sha256": self.train.hash},
                "valid": {"name": self.valid.name, "structures": len(self.valid), "sha256": self.valid.hash},
                **self.report.to_dict()["sets"].get("train", {}),
            },
            training={
                **to_dict(self.training),
                "best_epoch": trainer.best.epoch if trainer.best else 0,
                **({} if self.decision is None else {"auto": self.decision.to_dict()}),
                **({} if self.start is None else {"init": self._start_summary(self.start)}),
            },
            metrics={
                "zero_shot": {k: v.to_dict() for k, v in zero_shot.items()},
                **({"initial": {k: v.to_dict() for k, v in self.initial.items()}} if self.initial else {}),
                "fine_tuned": {k: v.to_dict() for k, v in fine_tuned.items()},
                "seconds": trainer.seconds,
                "device": str(self.potential.device),
                **({} if found is None else {"sparsity": {"overall": found.overall, "by_order": found.by_order()}}),
            },
            versions=versions(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    @staticmethod
    def _start_summary(start: AdapterFile) -> dict[str, Any]:
        return {"name": start.path.name if start.path else None, "created": start.created, "data": start.data}

    # -- the run folder ------------------------------------------------------------------------------------------

    def _write_settings(self) -> None:
        backbone = self.potential.backbone
        settings = {
            "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint, "head": backbone.head},
            "adapter": to_dict(self.handle.config),
            "training": to_dict(self.training),
            "reference_energies": {
                "method": self.energies.method,
                "note": self.energies.note,
                "energies_eV": {str(z): self.energies.energies[z] for z in self.train.elements},
                "residual_meV_per_atom": self.energies.residual_meV_per_atom,
            },
            "versions": versions(),
        }
        self.folder.write_json("config.json", settings)
        data = {
            "report": self.report.to_dict(),
            "split": {"train": self.train.indices, "valid": self.valid.indices, "seed": self.training.seed},
        }
        self.folder.write_json(DATA, data)

    def _sparsity(self, trainer: Trainer) -> Sparsity | None:
        """Of a method that leaves entries unchanged: told, and kept path by path."""
        if not any(isinstance(update, SoftThreshold) for update in self.handle.updates.values()):
            return None
        found = sparsity(self.handle)
        orders = ", ".join(f"l = {k} {v:.1%}" if k.isdigit() else f"{k} {v:.1%}" for k, v in found.by_order().items())
        text = f"{found.overall:.1%} of {found.n_entries:,} entries are left unchanged ({orders})"
        trainer.progress(ProgressEvent(message=text))
        self.folder.write_csv("sparsity.csv", found.to_dict()["paths"])
        return found


def _errors(group: GroupErrors) -> Errors:
    def known(value: float | None) -> float:
        return math.nan if value is None else value

    return Errors(
        loss=math.nan,
        energy_mae_meV=known(group.energy.mae_meV),
        energy_mae_meV_per_atom=known(group.energy.mae_meV_per_atom),
        forces_mae_meV_per_A=known(group.forces.mae_meV_per_A),
    )


__all__ = ["FinetuneResult", "finetune", "finetuning"]
