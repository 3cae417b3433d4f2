"""Several steps in a row without a word from the host: recorded once, started as one (`recorded`).

A step of a small molecule is a thousand operations of a few microseconds, integrator and monitor among them, and a GPU
waits for each to be started. Here a whole step is one recording: positions and edges of the network, forces, BAOAB, the
monitor's bounds. To have fixed shapes the edges are all candidates of the neighbour list (`FullTable`). What depends on
the number of a step alone, noise and bounds of a bath that is heated, is a recording of its own, for a block at once.

What a recording cannot do, the ordinary step does. Every step notes whether it would have been one for that: a replica
fails, a network is in doubt (atoms closer than in training), an atom has left the skin. At the end of a block the host
asks once, and where there was trouble the block is thrown away and its steps are taken one by one. The first block of
each recording is compared with the ordinary path in any case. Replicas that have failed make no trouble: they stay
where they are, and the network sees their atoms out of each other's reach.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import first_line
from ..fast.compiled import TOLERANCE
from ..fast.fixed_network import FixedNetwork
from ..fast.full_table import MOST_EDGES, WIDTHS, FullTable, width_of
from ..fast.recorded import Recording
from ..fast.tensor_state import State as Values
from ..fast.tensor_state import same_state
from .integrators import BAOAB, Integrator
from .neighbours import Pairs
from .state import State, where

if TYPE_CHECKING:
    from ..potential import Potential
    from .simulation import Simulation

LONGEST = 16  # steps in a block
# A list is renewed before a block when an atom has moved this share of the skin, within it at a half.
_EARLY = 0.35
_KEPT = 2  # of them at a time


def pays_off(potential: Potential) -> bool:
    """Whether blocks are worth taking: on a GPU, unless the plain path was asked for."""
    return potential.device.type == "cuda" and potential.backbone.fast


class Blocks:
    """The blocks of one simulation.

    Args:
        simulation: its state is taken from there, and put there.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.usable = True
        self.n_taken = 0
        self._kept: dict[int, _Steps] = {}
        self._values = Values()
        self._wait, self._patience = 0, 0

    def take(self, n: int, *, look: bool) -> list[Tensor] | None:
        """The next n steps, at most `LONGEST`; None if they are to be taken one by one, and nothing has changed then.

        Args:
            n: how many.
            look: whether gates are to be watched in the last one.

        Returns:
            if so, how far gates are out of their range (`ReplicaForces.watching_gates`); else nothing.
        """
        if not self.usable:
            return None
        if self._wait:
            self._wait -= 1
            return None
        try:
            found = self._take(n, look)
        except RuntimeError as problem:  # whatever torch says of what cannot be recorded
            self._give_up(f"they cannot be recorded: {first_line(problem)}")
            return None
        # What makes trouble once may do so for a while.
        self._patience = 0 if found is not None else min(2 * self._patience + 1, 63)
        self._wait = self._patience
        return found

    def _take(self, n: int, look: bool) -> list[Tensor] | None:
        simulation, forces = self.simulation, self.simulation.forces
        pairs = forces.neighbours.candidates(simulation.state.positions, _EARLY)
        values = forces.potential.state()
        if not same_state(values, self._values):
            self._values = values
            self.close()
            forces(simulation.state.positions)  # an ordinary call, by which a program is proven before it is recorded
        steps = self._steps(pairs)
        if steps is None:
            self.usable = False
            self.close()
            return None
        found = steps.run(pairs, n, look=look)
        if found is None or not (look in steps.proven or self._proves_right(steps, found, look=look)):
            return None
        simulation.state = found
        forces.move(found.positions)
        self.n_taken += n
        return steps.excesses() if look else []

    def _steps(self, pairs: Pairs) -> _Steps | None:
        """Steps for this list; None if they would not pay."""
        neighbours, n_atoms = self.simulation.forces.neighbours, len(self.simulation.layout.owner)
        width = width_of(pairs.index, n_atoms, 1 if neighbours.made_at is None else WIDTHS)
        if width * n_atoms > MOST_EDGES:
            return None
        # A little wider serves as well: widths that go back and forth would be recorded again and again.
        width = min((w for w in self._kept if width <= w <= width + WIDTHS), default=width)
        kept = self._kept.pop(width, None)
        while kept is None and len(self._kept) >= _KEPT:
            self._kept.pop(next(iter(self._kept))).close()
        self._kept[width] = kept or _Steps(self.simulation, pairs, width)  # the latest last
        return self._kept[width]

    def _proves_right(self, steps: _Steps, state: State, *, look: bool) -> bool:
        """Whether the kind of step that led to `state` gives what an ordinary one gives, where replicas live."""
        before, alive = self.simulation.state, self.simulation.monitor.alive
        of_atoms = alive[self.simulation.layout.owner]
        if not bool(alive.any()):  # nothing moves, and nothing is known of how it would
            return False
        if torch.equal(state.positions, before.positions):  # what does nothing would agree with every step of it
            self._give_up("recorded steps moved nothing")
            return False
        if not steps.is_right_ahead(before.step):
            self._give_up("recorded noise or bounds are not those of single steps")
            return False
        energy, forces = self.simulation.forces(state.positions)
        scale = max(1.0, float(forces[of_atoms].abs().max()))
        apart = (forces - state.forces)[of_atoms], (energy - state.potential_energy)[alive]
        worst = max(float(t.abs().max()) for t in apart)
        allowed = TOLERANCE[self.simulation.forces.potential.dtype] * scale
        if not worst <= allowed:
            self._give_up(
                f"forces differ by {worst:.2g} eV/A from those of single steps, expected at most {allowed:.2g}; "
                "presumably this network does not end at its cutoff"
            )
            return False
        steps.proven.add(look)
        return True

    def close(self) -> None:
        """Forget all recordings, and with them their memory; later blocks are recorded anew."""
        while self._kept:
            self._kept.popitem()[1].close()

    def _give_up(self, why: str) -> None:
        self.usable = False
        self.close()
        warnings.warn(f"steps are taken one by one ({why})", stacklevel=4)


class _Steps:
    """A step on tensors that stay, recorded when it is first taken.

    Args:
        simulation: what it is a step of.
        pairs: a list of the width.
        width: edges of every atom.

    Attributes:
        proven: the kinds of steps that were compared with ordinary ones: with gates watched, or without.
    """

    def __init__(self, simulation: Simulation, pairs: Pairs, width: int) -> None:
        self.simulation, self.layout = simulation, simulation.layout
        self.forces, self.monitor = simulation.forces, simulation.monitor
        state, n_atoms, device = simulation.state, len(self.layout.owner), self.layout.device
        self.table = FullTable.of(pairs.index, n_atoms, width)
        self.pairs = self._pairs_of(pairs)
        self._listed = pairs
        self.reference = self.forces.potential.reference_energy_of(self.forces.batch)
        self.state = _copy(state, 0)
        self.alive = self.monitor.alive.clone()
        self.made_at = torch.zeros_like(state.positions)
        self.listed = self.forces.neighbours.listed
        # an edge of this length weighs nothing, as those that only fill up
        self.apart = state.positions.new_tensor([2 * self.forces.potential.backbone.r_max, 0.0, 0.0])
        # What differs from step to step, from the number of steps done before: the thermostat's part, and bounds.
        self.first = torch.zeros(1, dtype=torch.int64, device=device)
        self.kicks = torch.zeros(LONGEST, n_atoms, 3, dtype=torch.float64, device=device)
        self.bounds = torch.zeros(LONGEST, 4, self.layout.n_replicas, dtype=torch.float64, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.trouble = torch.zeros((), dtype=torch.bool, device=device)
        self.excess: Tensor | None = None
        self.integrator: Integrator = copy.copy(simulation.integrator)
        if isinstance(self.integrator, BAOAB):
            self.integrator.kick = lambda step: self.kicks.index_select(0, self.turn)[0]
        self._closest = self._doubt = self.trouble
        self._ahead: Recording[None] | None = None
        self._recordings: dict[bool, Recording[None]] = {}
        self.proven: set[bool] = set()

    def run(self, pairs: Pairs, n: int, *, look: bool) -> State | None:
        """n steps from where the simulation is, gates watched in the last one if asked for; None in trouble."""
        start = self.simulation.state
        kinds = [look and k == n - 1 for k in range(n)]
        if self._ahead is None:
            self._ahead = Recording(self._look_ahead, self.layout.device)
            self.kicks.zero_()  # one that does nothing leaves them so, and is found out
        self.turn.zero_()  # recording takes steps, and there are kicks for `LONGEST` of them
        for watched in set(kinds) - set(self._recordings):
            network = FixedNetwork(self.forces.potential, self.forces.batch, self.table, plainly=watched)
            function = partial(self._watched_step if watched else self._step, network)
            self._recordings[watched] = Recording(function, self.layout.device)
        self._load(pairs)  # after recording, which takes steps
        self._ahead()
        for watched in kinds:
            self._recordings[watched]()
        if bool(self.trouble):
            return None
        return _copy(self.state, start.step + n)

    def close(self) -> None:
        """Give the recordings' memory back."""
        for recording in (self._ahead, *self._recordings.values()):
            if recording is not None:
                recording.close()

    def excesses(self) -> list[Tensor]:
        """As `ReplicaForces.watching_gates` gives them, of the last step in which they were watched."""
        return [] if self.excess is None else [self.excess.clone()]

    def is_right_ahead(self, step: int) -> bool:
        """Whether the thermostat's part and the bounds after `step` steps are those of single steps."""
        integrator, each = self.simulation.integrator, range(step, step + LONGEST)
        pairs = [(self.bounds, [self.monitor.bounds_after(k + 1) for k in each])]
        if isinstance(integrator, BAOAB):
            pairs.append((self.kicks, [integrator.kick(k) for k in each]))
        return all(torch.allclose(mine, torch.stack(one), rtol=1e-9, atol=1e-12) for mine, one in pairs)

    def _load(self, pairs: Pairs) -> None:
        """Take over where the simulation is."""
        state, neighbours = self.simulation.state, self.forces.neighbours
        for mine, value in zip(_tensors(self.state), _tensors(state), strict=True):
            mine.copy_(value)
        if pairs is not self._listed:
            self.table.take(FullTable.of(pairs.index, len(self.layout.owner), self.table.width))
            new = self._pairs_of(pairs)
            for name in ("unit_shifts", "shifts", "radii"):
                getattr(self.pairs, name).copy_(getattr(new, name))
            self._listed = pairs
        if neighbours.made_at is not None:
            self.made_at.copy_(neighbours.made_at)
        self.first.fill_(state.step)
        self.alive.copy_(self.monitor.alive)
        self.turn.zero_()
        self.trouble.zero_()

    def _pairs_of(self, pairs: Pairs) -> Pairs:
        """The edges of the table as pairs; those that only fill up are far apart."""
        table, owner = self.table, self.layout.owner[self.table.index[1]]
        shifts = table.shifts(pairs.shifts, self.forces.potential.backbone.r_max)
        radii = table.spread(pairs.radii) + table.filling.squeeze(1).double()
        return Pairs(table.index, table.spread(pairs.unit_shifts), shifts, radii, owner)

    # -- what is recorded ----------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        """What the next `LONGEST` steps need that follows from their numbers."""
        done = self.first + torch.arange(LONGEST, device=self.first.device)
        self.bounds.copy_(self.monitor.bounds_after(done + 1))
        if isinstance(self.simulation.integrator, BAOAB):
            self.kicks.copy_(self.simulation.integrator.kick(done))

    def _watched_step(self, network: FixedNetwork) -> None:
        with self.forces.watching_gates() as found:
            self._step(network)
        if found:
            largest = torch.stack(found).amax(0)
            self.excess = largest if self.excess is None else self.excess.copy_(largest)

    def _step(self, network: FixedNetwork) -> None:
        new = self.integrator.step(self.state, partial(self._forces_of, network))
        _, beyond = self.monitor.measured(new, self._closest, self.bounds.index_select(0, self.turn)[0])
        trouble = (self.alive & beyond.any(0)).any() | self._doubt
        neighbours = self.forces.neighbours
        if neighbours.made_at is not None:
            moved2 = self.layout.largest(((new.positions - self.made_at) ** 2).sum(1))
            trouble = trouble | (self.alive & self.listed & (moved2 > (0.5 * neighbours.skin) ** 2)).any()
        self.trouble.logical_or_(trouble)
        kept = where(self.alive, self.layout.owner, new, self.state)
        for mine, value in zip(_tensors(self.state), _tensors(kept), strict=True):
            mine.copy_(value)
        self.turn.add_(1)

    def _forces_of(self, network: FixedNetwork, positions: Tensor) -> tuple[Tensor, Tensor]:
        potential = self.forces.potential
        near, _, shifts = self.forces.placed(positions, self.pairs)
        # A replica often fails where the network is in doubt, of all replicas at once, and would be so at every step.
        near = near.masked_fill(~self.alive[self.layout.owner][:, None], 0)
        shifts = shifts + self.table.far(potential.backbone.r_max)
        shifts = torch.where(self.alive[self.pairs.owner][:, None], shifts, self.apart)
        node_energy, forces, _, self._doubt = network(near.to(potential.dtype), shifts.to(potential.dtype))
        self._closest = self.pairs.closest(self.pairs.distances2(positions), self.layout.n_replicas)
        return self.reference + self.layout.sum(node_energy.double()), forces.double()


def _copy(state: State, step: int) -> State:
    x, v, f, energy, heat = (t.clone() for t in _tensors(state))
    return State(x, v, f, energy, heat, step)


def _tensors(state: State) -> tuple[Tensor, ...]:
    return state.positions, state.velocities, state.forces, state.potential_energy, state.heat


__all__ = ["LONGEST", "Blocks"]
