"""A step of training, handed out before it is computed: so that somebody else can compute it, with others in one batch.

A training is a generator of steps. Whoever runs it may fill in `found`; where it is still empty, the training computes
the step by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, wraps
from inspect import Signature, signature
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..adapted import Adapter
from ..config import TrainConfig
from ..graph import Batch, Graph
from ..loss import Labels, Loss, LossWeights, loss_of
from ..potential import Potential, Prediction

P = ParamSpec("P")
T = TypeVar("T")
OfTensors = TypeVar("OfTensors", Labels, LossWeights)
Gradients = Sequence[Tensor | None]


@dataclass
class Step:
    """What the loss of a batch and its gradient are computed from.

    Attributes:
        potential, adapter: what is trained.
        graphs, batch: the structures.
        labels, weights, config: what the loss is made of. They and the batch may be with the host.
        stress: whether stresses are in it.
        found: the loss and its gradient with respect to `adapter.parameters()`, once somebody has computed them.
    """

    potential: Potential
    adapter: Adapter
    graphs: Sequence[Graph]
    batch: Batch
    labels: Labels
    weights: LossWeights
    config: TrainConfig
    stress: bool
    found: tuple[Loss, Gradients] | None = field(default=None, init=False)

    @cached_property
    def on_device(self) -> tuple[Batch, Labels, LossWeights]:
        """Batch, labels and weights where the potential is."""
        device = self.potential.device
        tensors = {name: t.to(device) for name, t in self.batch.tensors.items()}
        batch = Batch(tensors, self.batch.numbers.to(device), self.batch.atoms_per_graph.to(device))
        return batch, _to(device, self.labels), _to(device, self.weights)

    def loss(self, prediction: Prediction) -> Loss:
        """Of a prediction for the batch."""
        _, labels, weights = self.on_device
        return loss_of(prediction, labels, weights, self.config)

    def plainly(self) -> tuple[Loss, Gradients]:
        """Loss and gradient, by the network itself."""
        loss = self.loss(self.potential.predict(self.on_device[0], stress=self.stress, training=True))
        return loss, torch.autograd.grad(loss.total, self.adapter.parameters(), allow_unused=True)


def _to(device: torch.device, of: OfTensors) -> OfTensors:
    return type(of)(*(getattr(of, f.name).to(device) for f in fields(of)))


Training = Generator[Step, None, T]


def to_the_end(training: Training[T]) -> T:
    """Run a training whose steps nobody else computes; what it returns."""
    try:
        while True:
            next(training)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        training.close()


def whole(training: Callable[P, Training[T]], *, name: str) -> Callable[P, T]:
    """The function of this name that runs a training to the end and returns what it returns; the same arguments."""

    @wraps(training)
    def run(*args: P.args, **options: P.kwargs) -> T:
        return to_the_end(training(*args, **options))

    run.__name__ = run.__qualname__ = name
    run.__signature__ = signature(training).replace(return_annotation=Signature.empty)  # type: ignore[attr-defined]
    return run
