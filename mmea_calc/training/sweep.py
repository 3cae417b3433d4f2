"""Several trainings on the same data: a committee of seeds, or a grid of settings, in processes or on a cluster.

Every training is one `Point`, carried out by `train_point` wherever that runs; its outcome is kept beside its adapter
as `NAME.json`, and a point that has one with the same settings and files is not trained again.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter_file import named_after
from ..config import DEFAULT_BACKBONE, AdapterConfig, TrainConfig, fields_of, setting_types, to_dict
from ..data.reference_energies import identity_of
from ..errors import CheckpointError, MMEAError, TrainingError
from ..fast.memory import keep_freed_memory
from ..files import json_ready, write_text
from ..methods import method_named
from ..setting_values import from_text
from .recipes import RECIPES, recipe_for
from .run_folder import RunFolder

if TYPE_CHECKING:
    from ..backbone import Backbone
    from .finetuning import FinetuneResult
    from .steps import Training

# Where all points are alike; the rest of AdapterConfig and TrainConfig, and the recipe, can be varied.
_FIXED = ("device", "valid_fraction", "targets")


@dataclass(frozen=True)
class Point:
    """One training of a sweep.

    Attributes:
        name: of its files.
        varied: setting -> value, of those that differ between points.
        adapter, training: all settings.
        output: the adapter file.
        train: files, as of `open_dataset`.
        options: `valid`, `test` (files), `energy_key`, `forces_key`, `stress_key`, and what else `finetune` takes:
            backbone, head, init, E0s, level_of_theory; `split_seed`, of the split where it is not the training's own.
    """

    name: str
    varied: dict[str, Any]
    adapter: AdapterConfig
    training: TrainConfig
    output: Path
    train: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def result_file(self) -> Path:
        return named_after(self.output, ".json")

    def identity(self) -> dict[str, Any]:
        """What an outcome must agree with to be that of this point."""
        training = {k: v for k, v in to_dict(self.training).items() if k != "device"}
        options = {k: str(v) for k, v in sorted(self.options.items()) if v is not None}
        if "init" not in options:
            options.setdefault("backbone", DEFAULT_BACKBONE)
        named = (self.options.get(name) for name in ("valid", "test", "init", "backbone"))
        paths = [*self.train, *(path for path in named if path)]
        files = [[str(p), Path(p).stat().st_size, Path(p).stat().st_mtime_ns] for p in paths if Path(p).exists()]
        energies = identity_of(self.options.get("E0s"))
        return dict(
            json_ready({**to_dict(self.adapter), **training, "options": options, "E0s": energies, "files": files})
        )


@dataclass(frozen=True)
class Outcome:
    """What came of a point; errors are those of the validation set, NaN or None where there are no labels.

    Attributes:
        name, varied: of the point.
        energy_mae_meV, energy_mae_meV_per_atom, forces_mae_meV_per_A: after training.
        parameters: trained values.
        best_epoch, seconds: of the training.
        output: the adapter file.
        backbone_energy_mae_meV, backbone_energy_mae_meV_per_atom, backbone_forces_mae_meV_per_A: of the backbone alone.
        improved: whether it is better than the backbone, and than what it started from (`FinetuneResult`).
        reason: why there is none, if it failed.
    """

    name: str
    varied: dict[str, Any]
    energy_mae_meV: float | None = None
    energy_mae_meV_per_atom: float | None = None
    forces_mae_meV_per_A: float | None = None
    parameters: int | None = None
    best_epoch: int | None = None
    seconds: float | None = None
    output: str = ""
    backbone_energy_mae_meV: float | None = None
    backbone_energy_mae_meV_per_atom: float | None = None
    backbone_forces_mae_meV_per_A: float | None = None
    improved: bool | None = None
    reason: str = ""


def grid(
    words: Sequence[str],
    given: Mapping[str, Any],
    *,
    folder: Path,
    train: Sequence[Path],
    options: Mapping[str, Any],
) -> list[Point]:
    """All combinations of the values in `words`.

    Args:
        words: `setting=value,value,...`, fields of AdapterConfig and TrainConfig, or `recipe`.
        given: settings that hold for all points; a recipe, the method's own if none is named, has what they lack.
        folder: where adapters go.
        train, options: as of `Point`.

    Raises:
        TrainingError: an unknown setting, one named twice or without values, or a value of the wrong type.
        AdapterError: an unknown method.
    """
    axes = [_axis(word) for word in words]
    names = [name for name, _ in axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TrainingError(f"the sweep names {', '.join(twice)} more than once: give all its values together")
    # Errors on validation sets that differ do not compare: seeds share the split of the common one.
    more = {"split_seed": _settings(given)[1].seed} if "seed" in names else {}
    points = []
    for values in itertools.product(*(values for _, values in axes)):
        varied = dict(zip(names, values, strict=True))
        adapter, training = _settings({**given, **varied})
        name = "_".join(f"{key}={_text(value)}" for key, value in varied.items())
        output = folder / f"{name}.adapter"
        points.append(Point(name, varied, adapter, training, output, tuple(train), {**options, **more}))
    return points


def committee(n: int, point: Point) -> list[Point]:
    """`n` points that differ in their seeds: of initial values and of the order of structures; not of the split.

    Raises:
        TrainingError: fewer than two.
    """
    if n < 2:
        raise TrainingError(f"a committee has at least 2 members, got {n}: leave --committee out for one adapter")
    members = []
    for k in range(n):
        seed = point.training.seed + k
        ending = ".adapter" if point.output.suffix == ".adapter" else ""
        output = named_after(point.output, f"-{k + 1}{ending}")
        members.append(
            replace(
                point,
                name=output.name.removesuffix(".adapter"),
                varied={"seed": seed},
                adapter=replace(point.adapter, seed=seed),
                training=replace(point.training, seed=seed),
                output=output,
                options={**point.options, "split_seed": point.training.seed},
            )
        )
    return members


def train_point(point: Point, backbone: Backbone | None = None) -> Outcome:
    """Train a point and keep what came of it. A failure that is understood is an outcome with a reason.

    Args:
        point: what to train; it goes on where it was interrupted.
        backbone: the loaded one of the point's options; None loads it.
    """
    from .steps import to_the_end

    return to_the_end(_training(point, backbone))


def _train_alone(point: Point) -> Outcome:
    """In a process that does nothing else."""
    keep_freed_memory()
    return train_point(point)


def _training(point: Point, backbone: Backbone | None) -> Training[Outcome]:
    """`train_point`, its steps handed out before they are computed."""
    record = _record(point)
    if record is not None and record["outcome"] is not None and point.output.exists():
        return Outcome(**record["outcome"])
    checkpoint = RunFolder(named_after(point.output, ".run")).checkpoint
    try:
        point.output.parent.mkdir(parents=True, exist_ok=True)
        if record is None:
            checkpoint.unlink(missing_ok=True)  # of other settings; the record tells whose the next one is
        _write_record(point, None)
        try:
            result = yield from _finetuning(point, backbone, resume=record is not None)
        except CheckpointError:  # of another version, or damaged: nobody needs it
            checkpoint.unlink()
            result = yield from _finetuning(point, backbone, resume=False)
    except MMEAError as problem:
        return Outcome(point.name, point.varied, reason=" ".join(str(problem).split()))
    errors = result.fine_tuned["valid"]
    outcome = Outcome(
        point.name,
        point.varied,
        energy_mae_meV=errors.energy_mae_meV,
        energy_mae_meV_per_atom=errors.energy_mae_meV_per_atom,
        forces_mae_meV_per_A=errors.forces_mae_meV_per_A,
        parameters=result.adapter.n_parameters,
        best_epoch=result.best_epoch,
        seconds=result.seconds,
        output=str(point.output),
        backbone_energy_mae_meV=result.zero_shot["valid"].energy_mae_meV,
        backbone_energy_mae_meV_per_atom=result.zero_shot["valid"].energy_mae_meV_per_atom,
        backbone_forces_mae_meV_per_A=result.zero_shot["valid"].forces_mae_meV_per_A,
        improved=result.improved,
    )
    outcome = Outcome(**json_ready(asdict(outcome)))  # NaN, which no file of JSON holds, becomes None
    _write_record(point, outcome)
    return outcome


def _finetuning(point: Point, backbone: Backbone | None, *, resume: bool) -> Training[FinetuneResult]:
    from ..data.prepared import is_prepared, open_dataset
    from ..data.reading import split
    from .finetuning import finetuning

    options = dict(point.options)
    keys = {name: options.pop(name, None) for name in ("energy_key", "forces_key", "stress_key")}
    split_seed = options.pop("split_seed", point.training.seed)
    named = {name: options.pop(name, None) for name in ("valid", "test")}
    sets: dict[str, Any] = {
        name: None if path is None else open_dataset([path], **({} if is_prepared(path) else keys))
        for name, path in named.items()
    }
    train = open_dataset(point.train, **keys)
    if sets["valid"] is None:
        train, sets["valid"] = split(train, point.training.valid_fraction, split_seed)
    if backbone is not None:
        options["backbone"] = backbone
    return finetuning(
        train, point.output, adapter=point.adapter, training=point.training, resume=resume, **sets, **options
    )


def _record(point: Point) -> dict[str, Any] | None:
    """What an earlier training of this point has left; None if there is nothing, or its settings or files differ."""
    try:
        record: dict[str, Any] = json.loads(point.result_file.read_text(encoding="utf-8"))
        same = record["identity"] == json.loads(json.dumps(point.identity()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same else None


def _write_record(point: Point, outcome: Outcome | None) -> None:
    record = {"identity": point.identity(), "outcome": None if outcome is None else asdict(outcome)}
    write_text(point.result_file, json.dumps(record, indent=1))


# Where points are trained -------------------------------------------------------------------------------------------


def train_all(
    points: Sequence[Point],
    *,
    jobs: int = 1,
    one_batch: bool = False,
    cluster: str | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    folder: Path,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Train all points; outcomes in their order.

    Args:
        points: what to train.
        jobs: how many at a time; 1 trains in this process, one after another.
        one_batch: train all of them at once in this process, their steps computed in one batch (`one_batch.OneBatch`).
            They name the same backbone, head, device and precision. Not for compiled steps, which go one after another.
        cluster: None for processes of this machine; "slurm", or "local" for submitit's own processes.
        cluster_options: parameters of submitit's executor, such as timeout_min, slurm_partition, gpus_per_node.
        folder: where submitit keeps its files.
        told: called with every outcome as it comes.

    Raises:
        TrainingError: fewer than one job, or submitit is needed and absent.
    """
    if jobs < 1:
        raise TrainingError(f"jobs must be at least 1, got {jobs}")
    if cluster is None and one_batch and len(points) > 1 and not any(p.training.compile for p in points):
        return _in_one_batch(points, told)
    if cluster is None and jobs == 1:
        return list(_one_after_another(points, told))
    with _started(points, jobs, cluster, cluster_options or {}, folder) as waiting:
        return [_tell(told, _outcome(point, wait)) for point, wait in zip(points, waiting, strict=True)]


def _one_after_another(points: Sequence[Point], told: Callable[[Outcome], None]) -> Iterator[Outcome]:
    """On one backbone, which every training gives back as it was, as long as the points name the same."""
    loaded: dict[_BackboneKey, Backbone] = {}
    for point in points:
        key = _backbone_of(point)
        if key not in loaded:
            loaded.clear()
            loaded[key] = _load(key)
        yield _tell(told, train_point(point, loaded[key]))


def _in_one_batch(points: Sequence[Point], told: Callable[[Outcome], None]) -> list[Outcome]:
    from ..potential import Potential
    from .one_batch import OneBatch

    if len({_backbone_of(point) for point in points}) > 1:
        raise TrainingError("trainings in one batch have one backbone, head, device and precision: train them apart")

    def training(point: Point) -> Training[Outcome]:
        return _tell(told, (yield from _training(point, _load(_backbone_of(point)))))

    return OneBatch(Potential(_load(_backbone_of(points[0])))).run([training(point) for point in points])


_BackboneKey = tuple[Any, Any, Any, str, Any]


def _backbone_of(point: Point) -> _BackboneKey:
    """Name or path, the adapter to start from, head, device and precision."""
    options, training = point.options, point.training
    return options.get("backbone"), options.get("init"), options.get("head"), training.device, training.dtype


def _load(key: _BackboneKey) -> Backbone:
    from ..adapter_file import backbone_for

    name, init, head, device, dtype = key
    return backbone_for(name, init, head=head, device=device, dtype=dtype)


@contextmanager
def _started(
    points: Sequence[Point], jobs: int, cluster: str | None, cluster_options: Mapping[str, Any], folder: Path
) -> Iterator[list[Callable[[], Outcome]]]:
    """Within this context all points are on their way: functions that wait for their outcomes."""
    if cluster is None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        # Forked processes would inherit the threads of torch in whatever state they are.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield [pool.submit(_train_alone, point).result for point in points]
        return
    try:
        import submitit
    except ImportError as problem:
        raise TrainingError("a sweep over a cluster needs submitit: pip install 'mmea[slurm]'") from problem
    settings = {"name": "mmea-sweep", **cluster_options}
    if cluster == "slurm":
        settings.setdefault("slurm_array_parallelism", jobs)
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        executor.update_parameters(**settings)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as problem:
        raise TrainingError(f"submitit cannot submit to {cluster} with {settings}: {problem}") from problem
    # As one array: Slurm then keeps to the number of jobs at a time.
    yield [job.result for job in executor.map_array(_train_alone, points)]


def _outcome(point: Point, wait: Callable[[], Outcome]) -> Outcome:
    try:
        return wait()
    except KeyboardInterrupt:
        raise
    except Exception as problem:  # a process that was killed, a job that ran out of time, an error that is a bug
        text = " ".join(str(problem).split()) or type(problem).__name__
        return Outcome(point.name, point.varied, reason=text[-500:])


def _tell(told: Callable[[Outcome], None], outcome: Outcome) -> Outcome:
    told(outcome)
    return outcome


# The table ----------------------------------------------------------------------------------------------------------


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Best first, by the validation error of the forces, or of the energies per atom without forces; failures last."""

    def key(outcome: Outcome) -> tuple[bool, float]:
        values = (outcome.forces_mae_meV_per_A, outcome.energy_mae_meV_per_atom)
        known = [v for v in values if v is not None and v == v]
        return (bool(outcome.reason), known[0] if known else float("inf"))

    return sorted(outcomes, key=key)


def write_table(path: Path, outcomes: Sequence[Outcome]) -> None:
    """All outcomes as one csv file, best first: a column for every varied setting."""
    rows = [{**o.varied, **{k: v for k, v in asdict(o).items() if k != "varied"}} for o in ranked(outcomes)]
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


# Settings -----------------------------------------------------------------------------------------------------------


def _axis(word: str) -> tuple[str, list[Any]]:
    """`gate_rank=8,16` -> ("gate_rank", [8, 16])."""
    name, equals, text = word.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    types = {"recipe": str, **setting_types(without=_FIXED)}
    if name not in types:
        raise TrainingError(f"the sweep cannot vary {name!r}; expected one of {', '.join(types)}")
    parts = [part.strip() for part in text.split(",")]
    if not equals or not all(parts):
        raise TrainingError(f"{word!r}: expected setting=value,value,..., such as gate_rank=8,16,32")
    try:
        values = [from_text(part, types[name]) for part in parts]
    except ValueError as problem:
        raise TrainingError(f"{word!r}: {name} {problem}") from problem
    return name, list(dict.fromkeys(values))


def _settings(values: Mapping[str, Any]) -> tuple[AdapterConfig, TrainConfig]:
    recipe, method = values.get("recipe"), values.get("method", AdapterConfig.method)
    method_named(method)
    if recipe is not None and recipe not in RECIPES:
        raise TrainingError(f"unknown recipe {recipe!r}; expected one of {', '.join(RECIPES)}")
    merged = {**recipe_for(method, recipe), **values}
    return AdapterConfig(**fields_of(AdapterConfig, merged)), TrainConfig(**fields_of(TrainConfig, merged))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
