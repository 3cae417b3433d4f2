"""Watching replicas: what makes one fail, and what is worth telling.

After every step, without leaving the device: values that are not finite, a temperature or a force beyond its bound,
two atoms too close. A replica that fails stays in its last good state from then on, and the others go on.

At every sample: bonds of the start that broke, bonds that it did not have, gates outside the range seen in training;
now and then the bare backbone's forces beside the adapted ones. These are told, and stop nothing: a reaction may be
what the run is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from ..config import MDConfig
from .forces import ReplicaForces
from .neighbours import Pairs
from .state import Layout, State
from .trajectory import OBSERVABLES

# In units of the sum of the covalent radii: what counts as a bond at the start, as broken, as formed. Between the
# last two a bond may stretch and a contact may close in without being told.
BONDED, BROKEN, FORMED = 1.25, 1.6, 1.15
# The bound on the temperature is nowhere lower by default.
LOWEST_BOUND_K = 1000.0
# A gate further outside its range than this (in widths of the range) is told.
GATE_EXCESS = 1.0

NOT_FINITE, TOO_HOT, FORCE_TOO_LARGE, TOO_CLOSE = 1, 2, 3, 4


@dataclass(frozen=True)
class Event:
    """Something that happened to a replica.

    Attributes:
        replica: its name.
        step: the step after which it was seen; for a failure the step that failed and was not taken.
        time_ps: of that step.
        kind: "failed", "bond broken", "bond formed" or "gate out of range".
        detail: in words.
    """

    replica: str
    step: int
    time_ps: float
    kind: str
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.replica}: {self.kind} at {self.time_ps:g} ps (step {self.step}): {self.detail}"


class Monitor:
    """Args: the run's settings, layout and forces.

    Attributes:
        alive: which replicas have not failed, (n_replicas,), bool.
        events: all so far.
    """

    def __init__(self, config: MDConfig, layout: Layout, forces: ReplicaForces) -> None:
        self.config, self.layout, self.forces = config, layout, forces
        n, device = layout.n_replicas, layout.device
        self.alive = torch.ones(n, dtype=torch.bool, device=device)
        self._code = torch.zeros(n, dtype=torch.int64, device=device)
        self._step = torch.zeros(n, dtype=torch.int64, device=device)
        self._value = torch.zeros(n, dtype=torch.float64, device=device)
        self._bounds = self.bounds_after(0)
        self._bonds: Pairs | None = None
        self.events: list[Event] = []
        self._told: set[tuple[str, str]] = set()

    def bounds_after(self, step: int | Tensor) -> Tensor:
        """Bounds after so many steps, (4, n_replicas): of the measures of `check`, in their order.

        For n numbers of steps, (n,), int64: (n, 4, n_replicas).
        """
        config, dof = self.config, self.layout.degrees_of_freedom
        done = step.double()[:, None] if isinstance(step, Tensor) else step
        asked = self.layout.temperatures_K + config.heating_K_per_ps * done * config.timestep_fs / 1000
        # The temperature of n degrees of freedom has the standard deviation T sqrt(2 / n).
        hot = asked * (2 + 14 * torch.sqrt(2 / dof))
        if not config.thermostat:
            hot = 2 * hot  # without a thermostat the relaxation of a strained start stays in the replica
        # A strained start warms a cold replica by more than its fluctuations.
        hot = torch.clamp(hot, min=LOWEST_BOUND_K)
        if config.max_temperature_K is not None:
            hot = torch.full_like(hot, config.max_temperature_K)
        largest_force, smallest_ratio = config.max_force_eV_per_A, config.min_distance_ratio
        others = [torch.full_like(hot, v) for v in (0.5, largest_force, -smallest_ratio)]
        return torch.stack([others[0], hot, others[1], others[2]], dim=-2)

    # -- every step ----------------------------------------------------------------------------------------------

    def check(self, state: State) -> Tensor:
        """Mark the replicas that failed in the step that led to `state`; returns `alive`. Nothing is synchronised."""
        if self.config.heating_K_per_ps:
            self._bounds = self.bounds_after(state.step)
        measures, beyond = self.measured(state, self.forces.closest(), self._bounds)
        failed = self.alive & beyond.any(0)
        cause = beyond.int().argmax(0)
        self._code = torch.where(failed, cause + 1, self._code)
        self._step = torch.where(failed, torch.full_like(self._step, state.step), self._step)
        self._value = torch.where(failed, measures.gather(0, cause[None])[0], self._value)
        self.alive = self.alive & ~failed
        return self.alive

    def measured(self, state: State, closest: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """What a replica may fail by, and whether it is beyond its bound, (4, n_replicas) each; changes nothing.

        Args:
            state: of the dynamics.
            closest: `ReplicaForces.closest` for it, (n_replicas,).
            bounds: `bounds_after` its steps.
        """
        layout = self.layout
        kinetic = layout.kinetic_energy(state.velocities)
        force2 = (state.forces * state.forces).sum(1)
        # a sum passes on every NaN and infinity
        bad = ~torch.isfinite(kinetic + state.potential_energy + layout.sum(force2))
        measures = torch.stack(
            [bad.double(), layout.temperature(kinetic), torch.sqrt(layout.largest(force2)), -closest]
        )
        return measures, ~(measures <= bounds)

    # -- every sample --------------------------------------------------------------------------------------------

    def remember_bonds(self) -> None:
        """Take the bonds at the latest call of the forces as those of the start."""
        self._bonds = self.forces.bonds(BONDED)

    def sample(self, state: State, gate_excesses: Sequence[Tensor], *, compare: bool) -> Tensor:
        """What is recorded, in the order of `OBSERVABLES`: (n_observables, n_replicas), float64, on the CPU.

        Args:
            state: the state after the latest call of the forces.
            gate_excesses: of that call, see `ReplicaForces.watching_gates`.
            compare: evaluate the bare backbone too.
        """
        layout, n = self.layout, self.layout.n_replicas
        kinetic = layout.kinetic_energy(state.velocities)
        nothing = torch.full((n,), torch.nan, dtype=torch.float64, device=layout.device)
        shift = nothing
        if compare:
            difference = state.forces - self.forces.bare()
            count = torch.tensor(layout.atoms_per_replica, dtype=torch.float64, device=layout.device)
            shift = torch.sqrt(layout.sum((difference * difference).sum(1)) / (3 * count))
        broken, formed = self._bond_changes(state)
        values = {
            "temperature": layout.temperature(kinetic),
            "potential_energy": state.potential_energy,
            "kinetic_energy": kinetic,
            "heat": state.heat,
            "conserved_energy": state.potential_energy + kinetic - state.heat,
            "max_force": torch.sqrt(layout.largest((state.forces * state.forces).sum(1))),
            "min_distance_ratio": self.forces.closest(),
            "broken_bonds": broken,
            "formed_bonds": formed,
            "gate_excess": torch.stack(list(gate_excesses)).amax(0) if gate_excesses else nothing,
            "adapted_minus_bare": shift,
        }
        rows = torch.stack([values[name] for name in OBSERVABLES]).cpu()
        self._tell(state, rows)
        return rows

    def _bond_changes(self, state: State) -> tuple[Tensor, Tensor]:
        """Bonds broken and formed, (n_replicas,) each."""
        assert self._bonds is not None
        bonds, zeros = self._bonds, torch.zeros_like(state.heat)
        ratios2 = bonds.distances2(state.positions) / bonds.radii**2
        broken = zeros.index_add(0, bonds.owner, (ratios2 > BROKEN**2).double())
        still_close = zeros.index_add(0, bonds.owner, (ratios2 < FORMED**2).double())
        return broken, torch.clamp(self.forces.n_closer(FORMED) - still_close, min=0)

    def tell_failures(self) -> None:
        """Make events of failures that are new, those of earlier steps first."""
        alive, steps = self.alive.tolist(), self._step.tolist()
        for i in sorted(range(len(alive)), key=steps.__getitem__):
            name = self.layout.names[i]
            if not alive[i] and (name, "failed") not in self._told:
                self._add(name, steps[i], "failed", self._why(i))

    def _tell(self, state: State, rows: Tensor) -> None:
        """Make events of what is new."""
        self.tell_failures()
        by_name = dict(zip(OBSERVABLES, rows.tolist(), strict=True))
        alive = self.alive.tolist()
        for i, name in enumerate(self.layout.names):
            if not alive[i]:
                continue
            if by_name["broken_bonds"][i] and (name, "bond broken") not in self._told:
                self._add(name, state.step, "bond broken", self._broken(state, i))
            if by_name["formed_bonds"][i] and (name, "bond formed") not in self._told:
                self._add(name, state.step, "bond formed", self._formed(i))
            if by_name["gate_excess"][i] > GATE_EXCESS and (name, "gate out of range") not in self._told:
                times = by_name["gate_excess"][i]
                detail = f"a gate is {times:.2g} widths of its range in training outside of that range"
                self._add(name, state.step, "gate out of range", detail)

    def _add(self, replica: str, step: int, kind: str, detail: str) -> None:
        time_ps = step * self.config.timestep_fs / 1000
        self.events.append(Event(replica, step, time_ps, kind, detail))
        self._told.add((replica, kind))

    def _why(self, i: int) -> str:
        code, value = int(self._code[i]), float(self._value[i])
        bound = float(self._bounds[code - 1, i])
        return {
            NOT_FINITE: "energy, forces or velocities are not finite",
            TOO_HOT: f"the temperature reached {value:.4g} K, bound {bound:.4g} K; a strained start can be relaxed "
            "first (--minimize), and the bound is --max-temperature",
            FORCE_TOO_LARGE: f"the force on an atom reached {value:.4g} eV/A, bound {bound:g} eV/A",
            TOO_CLOSE: f"two atoms came as close as {-value:.2f} times the sum of their covalent radii, "
            f"bound {-bound:g}",
        }[code]

    def _broken(self, state: State, i: int) -> str:
        assert self._bonds is not None
        bonds = self._bonds
        which = (bonds.owner == i) & (bonds.distances2(state.positions) > (BROKEN * bonds.radii) ** 2)
        return self._pair_names(bonds[which], state.positions, i)

    def _formed(self, i: int) -> str:
        pairs, distances2 = self.forces.pairs, self.forces.distances2
        which = (pairs.owner == i) & (distances2 < (FORMED * pairs.radii) ** 2)
        known = self._bonds
        assert known is not None
        seen = {tuple(k) for k in _keys(known)} | {tuple(k) for k in _keys(known, reverse=True)}
        new = [
            j
            for j, key in zip(which.nonzero().squeeze(1).tolist(), _keys(pairs[which]), strict=True)
            if tuple(key) not in seen
        ]
        lengths = torch.sqrt(distances2[new]).tolist()
        return self._names(pairs[torch.tensor(new, dtype=torch.int64, device=pairs.owner.device)], lengths, i)

    def _pair_names(self, pairs: Pairs, positions: Tensor, i: int) -> str:
        return self._names(pairs, torch.sqrt(pairs.distances2(positions)).tolist(), i)

    def _names(self, pairs: Pairs, lengths: Sequence[float], i: int) -> str:
        """ "C1-O4 (2.41 A)": elements and numbers of the atoms in their structure, counted from 0."""
        offset = sum(self.layout.atoms_per_replica[:i])
        numbers = self.layout.replicas[i].atoms.numbers
        words = {}
        for (a, b), length in zip((pairs.index - offset).T.tolist(), lengths, strict=True):
            a, b = sorted((a, b))
            words[f"{chemical_symbols[numbers[a]]}{a}-{chemical_symbols[numbers[b]]}{b}"] = length
        shown = [f"{name} ({length:.2f} A)" for name, length in list(words.items())[:4]]
        return ", ".join(shown) + (f", ... ({len(words)} in all)" if len(words) > 4 else "")

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of the monitor; `events` are kept apart."""
        assert self._bonds is not None
        own = {"alive": self.alive, "code": self._code, "step": self._step, "value": self._value}
        bonds = {f"bonds.{name}": getattr(self._bonds, name) for name in Pairs.__dataclass_fields__}
        return {**own, **bonds}

    def load_state_dict(self, state: dict[str, Tensor], events: Sequence[dict[str, Any]]) -> None:
        self.alive, self._code = state["alive"], state["code"]
        self._step, self._value = state["step"], state["value"]
        self._bonds = Pairs(**{name: state[f"bonds.{name}"] for name in Pairs.__dataclass_fields__})
        self.events = [Event(**e) for e in events]
        self._told = {(e.replica, e.kind) for e in self.events}


def _keys(pairs: Pairs, *, reverse: bool = False) -> list[list[float]]:
    """Sender, receiver and lattice shift of every pair; of the same pairs the other way round."""
    index, shifts = (pairs.index.flip(0), -pairs.unit_shifts) if reverse else (pairs.index, pairs.unit_shifts)
    return torch.cat([index.T.double(), shifts + 0.0], dim=1).tolist()


def stable_ps(events: Sequence[Event], replica: str, length_ps: float) -> float:
    """Time until a replica failed or its bonds changed; `length_ps` if neither happened."""
    ends = [e.time_ps for e in events if e.replica == replica and e.kind != "gate out of range"]
    return min([length_ps, *ends])
