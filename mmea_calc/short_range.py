"""Below the shortest distances of the training data, radial functions fade back to the backbone's own.

A radial function R(r), an MLP of the Bessel functions of a distance, is trained where the data have atoms. Its weight
updates say nothing about two atoms that come closer, and what they do there is arbitrary: forces on a carbon and an
oxygen atom at 0.3 A were 38 times the backbone's under an adapter trained on aspirin, 3 times with the fade. With
R0 the backbone's function and r_ab the shortest distance of elements a and b in the training set,

    R(r) <- R0(r) + s(r / r_ab) (R(r) - R0(r)),

where s is 1 from 1 upwards (R is left alone there, to the last bit), 0 up to `FADED`, and twice continuously
differentiable between. Pairs of elements that the data do not hold take the shortest distance of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fast.arrangement import stage

# Where the backbone is reached, in units of the shortest distance. Largest forces below it are the same for 0.6 and
# 0.8; the wider fade adds less force of its own (test error of aspirin 70.595 and 70.639 meV/A, without it 70.579).
FADED = 0.6


def smooth_step(x: Tensor) -> Tensor:
    """0 up to `FADED`, 1 from 1 upwards, a polynomial of fifth degree between."""
    u = torch.clamp((x - FADED) / (1 - FADED), 0, 1)
    return u**3 * (10 - 15 * u + 6 * u**2)


@dataclass(frozen=True)
class _ShortEdges:
    """Edges of the batch at hand that are shorter than the training data."""

    n_edges: int
    where: Tensor  # (n_short,) their numbers
    share: Tensor  # (n_short, 1) s, the adapter's share
    features: Tensor  # (n_short, n_basis) the backbone's radial basis


class ShortRange(nn.Module):
    """The fade of one network; registered under the radial embedding it watches.

    Args:
        embedding: mace's radial embedding: (lengths, node_attrs, edge_index, atomic_numbers) -> (features, cutoff).
        nets: the MLPs that take its features.
        n_elements: width of node_attrs, which are one-hot.
        bare: context within which `embedding` and `nets` are those of the backbone.

    Attributes:
        shortest: r_ab, (n_elements, n_elements), A; 0 before anything was recorded.
    """

    shortest: Tensor

    def __init__(
        self,
        embedding: nn.Module,
        nets: Sequence[nn.Module],
        *,
        n_elements: int,
        like: Tensor,
        bare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self.register_buffer("shortest", torch.zeros(n_elements, n_elements, dtype=like.dtype, device=like.device))
        self.calibrated, self.recording, self.active = False, False, True
        self._bare, self._within = bare, False
        self._now: _ShortEdges | None = None
        self._hooks = [embedding.register_forward_hook(self._embedding_called)]
        self._hooks += [net.register_forward_hook(self._net_called) for net in nets]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._now = None

    def set_shortest(self, shortest: Tensor) -> None:
        """Take `shortest` (A) as the shortest distances of the training set; zeros: nothing is known."""
        with torch.no_grad():
            self.shortest.copy_(shortest)
        self.calibrated = bool((self.shortest > 0).any())

    def start_recording(self) -> None:
        """Forget the distances, and take the shortest of all that pass from now on."""
        self.shortest.fill_(torch.inf)
        self.calibrated, self.recording = False, True

    def stop_recording(self) -> None:
        """Keep what was recorded since `start_recording`."""
        self.recording = False
        least = self.shortest.min()
        known = torch.isfinite(self.shortest)
        self.set_shortest(torch.where(known, self.shortest, least) if known.any() else torch.zeros_like(self.shortest))

    def _embedding_called(self, embedding: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        if self._within:
            return
        self._now = None
        if not self.active:
            return
        lengths, node_attrs, edge_index, numbers = inputs
        element = node_attrs.argmax(dim=1)
        first, second = element[edge_index[0]], element[edge_index[1]]
        if self.recording:
            n = self.shortest.shape[0]
            flat = lengths.detach().reshape(-1).to(self.shortest)
            self.shortest.view(-1).scatter_reduce_(0, first * n + second, flat, "amin")
        elif self.calibrated:
            limit = self.shortest[first, second].to(lengths).unsqueeze(1)
            short = (lengths < limit).squeeze(1)
            if now := stage():  # which of them cannot be asked there: none, or the result does not hold
                now.doubts.append(short.any())
                return
            where = short.nonzero().squeeze(1)
            if where.numel():
                with self._as_backbone():
                    features, _ = embedding(lengths[where], node_attrs, edge_index[:, where], numbers)
                share = smooth_step(lengths[where] / limit[where])
                self._now = _ShortEdges(lengths.shape[0], where, share, features)

    def _net_called(self, net: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        now, x = self._now, inputs[0]
        if now is None or self._within or x.shape[0] != now.n_edges:
            return None
        # Some blocks append features of the two atoms to those of the distance.
        rest = x[now.where, now.features.shape[1] :]
        with self._as_backbone():
            bare = net(torch.cat([now.features, rest], dim=1))
        return output.index_put((now.where,), bare + now.share * (output[now.where] - bare))

    @contextmanager
    def _as_backbone(self) -> Iterator[None]:
        self._within = True  # these calls are not to be faded again
        try:
            with self._bare():
                yield
        finally:
            self._within = False
