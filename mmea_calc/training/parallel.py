"""What training in several processes adds to a step: sums over the batch instead of means of its parts.

The loss of a batch is a mean over its labelled structures and force components. A process that holds a part of the
batch divides the sum over its part by the numbers of the whole batch; the sum of these over all processes is the loss
of the batch, and the sum of their gradients its gradient, whatever the sizes of the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapted import Adapter
from ..errors import TrainingError
from ..graph import Graph
from ..loss import Loss
from ..potential import Potential
from .team import Team


def add_up(
    team: Team, loss: Loss | None, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> tuple[Loss, list[Tensor | None]]:
    """Loss and gradient of the whole batch.

    Args:
        team: the processes.
        loss: of this process's part, divided by the numbers of the whole batch; None where it has no part.
        gradients: of it, one per parameter; None for a parameter that took no part.
        parameters: what is trained.

    Returns:
        The same in every process, to the bit; None for a parameter that took part nowhere.
    """
    like = parameters[0]
    terms = torch.zeros(3, dtype=like.dtype, device=like.device)
    if loss is not None:
        terms = torch.stack([t.detach() for t in (loss.energy, loss.forces, loss.stress)]).to(terms)
    used = torch.tensor([float(g is not None) for g in gradients], dtype=like.dtype, device=like.device)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    # One exchange per step: its cost is mostly that of starting it.
    packed = torch.cat([terms, used, *(part.reshape(-1) for part in parts)])
    team.sum(packed)
    terms, used, *pieces = packed.split([3, len(parts), *(p.numel() for p in parts)])
    summed: list[Tensor | None] = [
        piece.view_as(part) if taken else None
        for part, piece, taken in zip(parts, pieces, (used > 0).tolist(), strict=True)
    ]
    return Loss(terms[0], terms[1], terms[2]), summed


def merge_ranges(team: Team, adapter: Adapter) -> None:
    """Let all processes know the ranges that each has recorded; to be called before `Adapter.recording` ends."""
    if team.size == 1:
        return
    for gate in adapter.gates.values():
        team.lowest(gate.z_low)
        team.highest(gate.z_high)
    if adapter.short_range is not None:
        team.lowest(adapter.short_range.shortest)


def total_energies(team: Team, potential: Potential, graphs: Sequence[Graph], batch_size: int = 16) -> Tensor:
    """Total energies of all structures, (n_structures,), eV, float64, on the CPU; each process computes its share."""
    starts = range(0, len(graphs), batch_size)
    mine = {
        start: potential.predict_graphs(graphs[start : start + batch_size], batch_size=batch_size, forces=False)[0]
        for start in team.mine(starts)
    }
    everyone = {start: energies for part in team.gather(mine) for start, energies in part.items()}
    return torch.cat([everyone[start] for start in starts]) if everyone else torch.zeros(0, dtype=torch.float64)


def check_agreement(team: Team, values: Mapping[str, object], advice: str) -> None:
    """Raise a TrainingError, in every process, that names what differs between the first process and another."""
    first, *others = team.gather(values)
    for rank, other in enumerate(others, start=1):
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            raise TrainingError(
                f"the processes of this training do not agree: process {rank} differs from process 0 in "
                f"{', '.join(differing)}: {advice}"
            )
