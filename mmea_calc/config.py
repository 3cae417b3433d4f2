"""Settings of the library. Every default lives here, once.

Units are in the names: eV, A (angstrom), fs, K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

DEFAULT_BACKBONE = "mmea-organic-s10"
# With 10 replayed molecules an epoch and this many times the steps, errors on five molecules of rMD17 are below those
# of the default recipe without.
REPLAY_STEPS = 16 / 3
# One training of each method tells the order of large differences; a benchmark has three by default.
COMPARE_SEEDS = (1,)

Device = str
Precision = Literal["float32", "float64"]
Kernels = Literal["own", "cuequivariance"]


class _Settings:
    """Numbers of NumPy become Python's, lists tuples, and one value stands for a tuple of it."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = _plain(given := getattr(self, name))
            if any(get_origin(k) is tuple for k in (kind, *get_args(kind))) and value is not None:
                several = isinstance(value, Iterable) and not isinstance(value, str)
                value = tuple(map(_plain, value)) if several else (value,)
            if value is not given:
                object.__setattr__(self, name, value)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


@dataclass(frozen=True)
class AdapterConfig(_Settings):
    """What is attached to a network, and how it starts.

    Attributes:
        method: a name in `mmea_calc.methods.METHODS`.
        gate_rank: width r of a gate's bottleneck (arXiv 2511.06696, eq. 3), or of method "bottleneck"'s.
        low_rank: rank r of the low-rank weight updates.
        alpha: scale of the low-rank updates, W + (alpha / r) A B.
        phi: gain of orders l >= 1: "exp" is exp(g), "residual" is 1 + g.
        nonlinearity: False leaves the SiLU of a gate's bottleneck out.
        separate_bottlenecks: give a gate's two heads a bottleneck each.
        shift: False leaves the shift of even scalars out.
        gains: one gain per "channel", per "order" (irrep), or "none".
        init_std: standard deviation of W_0 at the start; 0 makes the adapted network equal its backbone exactly.
        saturate: outside the range seen in training, level gates off and fade radial functions back to the backbone's;
            False is the published adapter, which knows no range.
        targets: shell-style patterns of module names to adapt; None adapts all that the method knows.
        seed: seed of the initial values.
    """

    method: str = "mmea"
    gate_rank: int = 16
    low_rank: int = 16
    alpha: float = 16.0
    phi: Literal["exp", "residual"] = "exp"
    nonlinearity: bool = True
    separate_bottlenecks: bool = False
    shift: bool = True
    gains: Literal["channel", "order", "none"] = "channel"
    init_std: float = 0.0
    saturate: bool = True
    targets: tuple[str, ...] | None = None
    seed: int = 0

    def form(self) -> dict[str, Any]:
        """The settings but those of initial values: adapters of one form differ in their values alone."""
        return {k: v for k, v in asdict(self).items() if k not in ("seed", "init_std")}


@dataclass(frozen=True)
class TrainConfig(_Settings):
    """How an adapter is trained. Energies in eV, lengths in A.

    The defaults are the default recipe; `mmea_calc.training.recipes.RECIPES` holds the named alternatives.

    Attributes:
        epochs: passes over the training set; 0 takes as many as make about `steps`, at least 20 and at most 300.
        steps: optimisation steps that `epochs` 0 stands for; with replayed molecules these and the most epochs are
            `REPLAY_STEPS` times as many.
        batch_size: structures per optimisation step.
        replay: structures of other molecules that every epoch adds, labelled by the model that training starts from,
            so that it is not forgotten; they are spread over the batches, which grow by them. None is 0, but for
            method "auto", which decides.
        lr: largest learning rate.
        optimizer: "soap", Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321), "adamw", or
            "schedulefree": AdamW whose weights are averages of its own (arXiv 2405.15682); it takes the "constant"
            schedule and `ema_decay` 0.
        schedule: "cosine" lowers the rate along a cosine after a linear warm-up; "constant" stays after it; "plateau"
            multiplies it by `plateau_factor` after `plateau_patience` epochs without a better validation loss.
        warmup_steps: steps of linear warm-up (cosine and constant schedules).
        plateau_factor, plateau_patience: of the plateau schedule.
        energy_weight: weight of the squared error of the energy per atom, (eV/atom)^2.
        forces_weight: weight of the mean squared error of the forces, (eV/A)^2.
        stress_weight: weight of the mean squared error of the stress, (eV/A^3)^2.
        loss: "mse", or "huber" with `huber_delta`.
        huber_delta: where the Huber loss turns linear, eV/atom and eV/A.
        stage_two_start: fraction of the epochs after which the second stage begins; None for one stage.
        stage_two_lr, stage_two_energy_weight, stage_two_forces_weight: of the second stage.
        ema_decay: decay of the exponential moving average of the weights; 0 switches it off.
        clip_norm: largest norm of the gradient.
        weight_decay: decoupled weight decay; of method "sparse" it acts on the changes that survive.
        tau_lr: largest learning rate of the thresholds of method "sparse"; None: `lr`.
        tau_weight_decay: decoupled weight decay of these thresholds (lambda_tau): the larger, the sparser.
        amsgrad: use the AMSGrad variant of AdamW.
        seed: seed of splits, shuffling and initial values.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: precision of the network.
        compile: train with steps compiled to machine code, which takes minutes once and pays in long runs.
        valid_fraction: part of the training structures set aside for validation where no other set is given.
        validate_every: epochs between validations; 0 chooses about 100 validations in a run.
    """

    epochs: int = 0
    steps: int = 600
    batch_size: int = 5
    replay: int | None = None
    lr: float = 0.005
    optimizer: Literal["soap", "adamw", "schedulefree"] = "soap"
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    warmup_steps: int = 20
    plateau_factor: float = 0.8
    plateau_patience: int = 5
    energy_weight: float = 10.0
    forces_weight: float = 100.0
    stress_weight: float = 0.0
    loss: Literal["mse", "huber"] = "huber"
    huber_delta: float = 0.02
    stage_two_start: float | None = None
    stage_two_lr: float = 0.001
    stage_two_energy_weight: float = 1000.0
    stage_two_forces_weight: float = 100.0
    ema_decay: float = 0.99
    clip_norm: float = 10.0
    weight_decay: float = 0.0
    tau_lr: float | None = None
    tau_weight_decay: float = 0.01
    amsgrad: bool = True
    seed: int = 0
    device: Device = "auto"
    dtype: Precision = "float32"
    compile: bool = False
    valid_fraction: float = 0.1
    validate_every: int = 0

    def for_structures(self, n_structures: int) -> TrainConfig:
        """The same with the number of epochs settled for a training set of `n_structures`."""
        if self.epochs:
            return self
        steps_per_epoch = math.ceil(n_structures / self.batch_size)
        longer = REPLAY_STEPS if self.replay else 1.0
        return replace(self, epochs=min(round(300 * longer), max(20, round(longer * self.steps / steps_per_epoch))))


@dataclass(frozen=True)
class MDConfig(_Settings):
    """How molecular dynamics is run.

    Every start structure is run at every temperature `replicas` times; all of them advance as one batch.

    Attributes:
        temperatures_K: of the thermostat and of the initial velocities, K.
        replicas: runs per start structure and temperature, each with random numbers of its own.
        time_ps: length of the whole run, earlier parts that are resumed included, ps.
        timestep_fs: fs.
        friction_per_fs: friction of the Langevin thermostat, 1/fs; without meaning for "nve".
        heating_K_per_ps: how fast the thermostat's temperature rises from `temperatures_K`; falls, if negative.
        ensemble: "nvt" is Langevin dynamics (BAOAB), "nve" is velocity Verlet.
        minimize: relax the start structures first.
        seed: of all random numbers.
        traj_every: steps between frames; the default of 4 fs resolves vibrations up to 4170 / cm.
        stats_every: steps between temperatures, energies and what the monitor measures; divides `traj_every`.
        restart_every: steps between checkpoints; also what a crash can cost.
        drift_every: steps between comparisons of adapted with bare forces, one more evaluation each; a multiple of
            `stats_every`; 0 for never.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: precision of the network; positions and velocities are float64 in any case.
        positions_dtype: precision of the stored positions and velocities.
        velocities: store velocities with every frame (spectra need them).
        max_temperature_K: a replica hotter than this has failed; None allows for 2 T + 14 standard deviations,
            twice that without a thermostat, and at least 1000 K.
        max_force_eV_per_A: a replica with a larger force on an atom has failed.
        min_distance_ratio: a replica has failed when two atoms are closer than this times the sum of their covalent
            radii.
    """

    temperatures_K: tuple[float, ...] = (300.0,)
    replicas: int = 1
    time_ps: float = 10.0
    timestep_fs: float = 0.5
    friction_per_fs: float = 0.01
    heating_K_per_ps: float = 0.0
    ensemble: Literal["nvt", "nve"] = "nvt"
    minimize: bool = False
    seed: int = 0
    traj_every: int = 8
    stats_every: int = 8
    restart_every: int = 1000
    drift_every: int = 400
    device: Device = "auto"
    dtype: Precision = "float32"
    positions_dtype: Precision = "float32"
    velocities: bool = True
    max_temperature_K: float | None = None
    max_force_eV_per_A: float = 100.0
    min_distance_ratio: float = 0.5

    @property
    def thermostat(self) -> bool:
        """Whether there is one: without friction the equations are Newton's, and no motion that is absent comes up."""
        return self.ensemble == "nvt" and self.friction_per_fs > 0

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return round(self.time_ps * 1000.0 / self.timestep_fs)


@dataclass(frozen=True)
class CheckConfig(_Settings):
    """What `mmea_calc.check.check` measures, and the bounds of a sound potential.

    Attributes:
        ramp_from_K, ramp_to_K: the thermostat's temperature at the beginning and the end of the ramp, linear between.
        ramp_ps: its length.
        ramp_replicas: runs of it, each with random numbers of its own.
        nve_K, nve_ps, nve_replicas: of the runs at constant energy.
        equilibration_ps: with a thermostat, before constant energy.
        timestep_fs, friction_per_fs: of all dynamics.
        wall_from_A, wall_to_A: distances of two atoms in vacuum; the latter grows to 1.3 times the sum of the covalent
            radii where that is more.
        pair_step_A: between distances of two atoms in vacuum.
        scan_step_A: between distances of squeezed bonds and approaching molecules.
        max_bonds, max_approaches: more bonds or pairs of elements than this are thinned out evenly.
        seed: of all random numbers.
        wall_rise_eV: the wall begins where the energy, going inwards, is first this much above its minimum so far.
        min_hole_eV: a fall of the energy inside the wall that is shallower than this is no hole.
        max_hole_rim_eV: bound: a hole whose rim is lower than this above the minimum is reachable, and a fault. At
            2000 K two atoms meet with 10 eV once in e^58 attempts. Infinity counts every hole.
        max_wall_force_eV_per_A: bound on forces in all scans. Bare nuclei of two carbon atoms at 0.4 A feel 3e3.
        min_bond_change_K: bound: bonds of the start that break or form in the ramp below this temperature are a fault
            of the adapter if under the bare backbone they stay until then; above it molecules may react.
        max_drift_meV_per_atom_ps: bound on the drift of the energy at constant energy, twice its error granted.
        max_forgetting: bound on the error of forces on other molecules, in units of the bare backbone's.
    """

    ramp_from_K: float = 300.0
    ramp_to_K: float = 2000.0
    ramp_ps: float = 2.0
    ramp_replicas: int = 3
    nve_K: float = 300.0
    nve_ps: float = 0.5
    nve_replicas: int = 2
    equilibration_ps: float = 0.2
    timestep_fs: float = 0.5
    friction_per_fs: float = 0.01
    wall_from_A: float = 0.4
    wall_to_A: float = 1.5
    pair_step_A: float = 0.02
    scan_step_A: float = 0.05
    max_bonds: int = 40
    max_approaches: int = 10
    seed: int = 0
    wall_rise_eV: float = 1.0
    min_hole_eV: float = 0.1
    max_hole_rim_eV: float = 10.0
    max_wall_force_eV_per_A: float = 1e6
    min_bond_change_K: float = 1000.0
    max_drift_meV_per_atom_ps: float = 0.2
    max_forgetting: float = 2.0


@dataclass(frozen=True)
class BenchmarkConfig(_Settings):
    """How methods are compared: every method is trained on every system with every seed.

    Attributes:
        methods: NAME or NAME:field=value,field=value, a name in `mmea_calc.methods.METHODS` and fields of
            `AdapterConfig` and `TrainConfig`, or `recipe`.
        seeds: of the split into training and validation, of shuffling and of initial values.
        backbone: name or path.
        head: of a backbone with several.
        recipe: a name in `mmea_calc.training.recipes.RECIPES`; None: every method's own.
        epochs: instead of the recipe's; None leaves it.
        valid_fraction: part of the training structures for validation; None: the data set's own.
        E0s: see `resolve_reference_energies`; None: as the recipe has it.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: precision of the network; None: the recipe's.
        compile: as for `TrainConfig`; None: the recipe's.
        tolerance: methods whose validation error is within this fraction of the lowest count as equal when one is
            recommended.
    """

    methods: tuple[str, ...] = ("mmea", "elora", "full")
    seeds: tuple[int, ...] = (1, 2, 3)
    backbone: str = DEFAULT_BACKBONE
    head: str | None = None
    recipe: str | None = None
    epochs: int | None = None
    valid_fraction: float | None = None
    E0s: str | None = None
    device: Device = "auto"
    dtype: Precision | None = None
    compile: bool | None = None
    tolerance: float = 0.02


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain, JSON-ready values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def setting_types(*, without: Iterable[str] = ()) -> dict[str, Any]:
    """Name -> type of the settings of `AdapterConfig` and `TrainConfig`, in their order."""
    types = {**get_type_hints(AdapterConfig), **get_type_hints(TrainConfig)}
    return {name: kind for name, kind in types.items() if name not in set(without)}


def fields_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are settings of `cls`."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`.

    Raises:
        ValueError: a name that `cls` does not have.
    """
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown settings {unknown}; {cls.__name__} knows {sorted(known)}")
    return cls(**values)
