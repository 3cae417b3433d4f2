"""Several trainings on one backbone whose steps are computed in one batch.

    OneBatch(potential).run([finetuning(...), finetuning(...), ...])     # each on a network of its own

Every training goes on until it hands out a step (`steps`). The batches of all steps are then put together and sent
through one more network, the potential's, in which everything frozen is computed once for all, and what is adapted is
given row by row (atoms or edges) to whom the row belongs:

    rows of the first | rows of the second | ...   ->   layer of the first | layer of the second | ...

Gates of one form take all rows in one call, their weights side by side. No structure belongs to two trainings, so the
gradient of the sum of all losses is everybody's own. The first step of each is computed alone as well, and the two
gradients are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..adapted import Adapter
from ..errors import MMEAError
from ..loss import Loss
from ..mace_bridge import symmetric_contractions
from ..methods import LinearPart
from ..potential import Potential, Prediction
from .compiled_training import disagreement
from .steps import Gradients, Step, Training

T = TypeVar("T")


class OneBatch:
    """Trainings that go through their steps side by side.

    Args:
        potential: without an adapter, on the backbone of all trainings but on none of their networks.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        potential.backbone.network.requires_grad_(False)
        self._usable = True
        self._plans: dict[tuple[Adapter, ...], list[_Adapted]] = {}
        self._most: int | None = None  # steps in one batch; None: all of them

    def run(self, trainings: Sequence[Training[T]]) -> list[T]:
        """Run all trainings; what they return, in their order. What one raises is raised when all have ended."""
        results: dict[int, T] = {}
        problems: dict[int, Exception] = {}
        waiting: dict[int, Step] = {}
        proven: set[int] = set()

        def go_on(number: int) -> None:
            waiting.pop(number, None)
            try:
                waiting[number] = next(trainings[number])
            except StopIteration as end:
                results[number] = end.value
            except Exception as problem:
                problems[number] = problem

        try:
            for number in range(len(trainings)):
                go_on(number)
            while waiting:
                self._compute(list(waiting.values()))
                for number, step in list(waiting.items()):
                    if step.found is not None and number not in proven:
                        self._prove(number, step)
                        proven.add(number)
                    go_on(number)
        finally:
            for training in trainings:
                training.close()
        for number in sorted(problems):
            raise problems[number]
        return [results[number] for number in range(len(trainings))]

    def _prove(self, number: int, step: Step) -> None:
        """Compare what was found with what the network itself gives, which is kept where they differ."""
        assert step.found is not None
        alone = step.plainly()
        if problem := disagreement(step.found[1], alone[1], step.potential.dtype):
            self._give_up(f"the gradient of number {number + 1}: {problem}")
            step.found = alone

    def _give_up(self, problem: str) -> None:
        if self._usable:
            warnings.warn(f"these trainings go on one by one: {problem}", stacklevel=3)
        self._usable = False

    def _compute(self, steps: list[Step]) -> None:
        """Fill in `found` of all steps, in as few batches as memory allows; a single one is left to its training."""
        size = self._most or len(steps)
        for start in range(0, len(steps), size):
            some = steps[start : start + size]
            if len(some) < 2 or not self._usable:
                continue
            found: list[tuple[Loss, Gradients]] | None = None
            try:
                found = self._together(some)
            except torch.OutOfMemoryError:
                pass
            except Exception as problem:  # a layer that mixes rows may raise anything
                self._give_up(f"{type(problem).__name__}: {problem}")
                return
            if found is None:  # out of the handler, which would hold all that there was no memory for
                self._most = (len(some) + 1) // 2
                torch.cuda.empty_cache()
                self._compute(steps[start:])
                return
            for step, one in zip(some, found, strict=True):
                step.found = one

    def _together(self, steps: list[Step]) -> list[tuple[Loss, Gradients]]:
        batch = self.potential.collate([graph for step in steps for graph in step.graphs])
        adapters = tuple(step.adapter for step in steps)
        if adapters not in self._plans:
            self._plans[adapters] = _adapted(self.potential.backbone.network, adapters)
        with _shared(self._plans[adapters], steps):
            prediction = self.potential.predict(batch, stress=any(s.stress for s in steps), training=True)
        losses = [step.loss(part) for step, part in zip(steps, _parts(prediction, steps), strict=True)]
        parameters = [step.adapter.parameters() for step in steps]
        total = torch.stack([loss.total for loss in losses]).sum()
        gradients = iter(torch.autograd.grad(total, [p for own in parameters for p in own], allow_unused=True))
        return [(loss, [next(gradients) for _ in own]) for loss, own in zip(losses, parameters, strict=True)]


def _parts(prediction: Prediction, steps: Sequence[Step]) -> Iterator[Prediction]:
    """Each step's part of a prediction, with its own reference energies."""
    n_graphs, n_atoms = [len(step.graphs) for step in steps], [step.batch.n_atoms for step in steps]
    assert prediction.forces is not None
    stresses: Sequence[Tensor | None] = [None] * len(steps)
    if prediction.stress is not None:
        stresses = prediction.stress.split(n_graphs)
    for step, energy, node_energy, forces, stress in zip(
        steps,
        prediction.interaction_energy.split(n_graphs),
        prediction.node_energy.split(n_atoms),
        prediction.forces.split(n_atoms),
        stresses,
        strict=True,
    ):
        reference = step.potential.reference_energy_of(step.on_device[0])
        yield Prediction(reference + energy.double(), energy, node_energy, forces, stress if step.stress else None)


# Whose a row is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapted:
    """One layer that some training adapts.

    Attributes:
        path: of the layer.
        shared: it, in the network that all go through.
        own: it, in the network of each training.
        gates: what acts on its output in each training, if that is all, and of one form.
        kind: what its rows are, "atoms" or "edges".
    """

    path: str
    shared: nn.Module
    own: list[nn.Module]
    gates: list[LinearPart] | None
    kind: str


def _adapted(network: nn.Module, adapters: Sequence[Adapter]) -> list[_Adapted]:
    """All layers that one of the adapters changes. Raises MMEAError where something else is changed than layers."""
    kinds = {path: kind for adapter in adapters for path, kind in adapted_layers(adapter).items()}
    updated = {site.name for adapter in adapters for site in adapter.sites.values()}
    found = []
    for path, kind in kinds.items():
        gates = [adapter.on_linears[path] for adapter in adapters if path in adapter.on_linears]
        alike = path not in updated and len(gates) == len(adapters) and len({_form(gate) for gate in gates}) == 1
        own = [adapter.network.get_submodule(path) for adapter in adapters]
        found.append(_Adapted(path, network.get_submodule(path), own, gates if alike else None, kind))
    return found


@contextmanager
def _shared(layers: Sequence[_Adapted], steps: Sequence[Step]) -> Iterator[None]:
    """Within this context what is adapted is each step's own, for the rows of its batch."""
    rows = {
        "atoms": [step.batch.n_atoms for step in steps],
        "edges": [step.batch.tensors["edge_index"].shape[1] for step in steps],
    }
    with ExitStack() as stack:
        for layer in layers:
            forward: Callable[..., Tensor] = _Layers(layer.path, layer.own, rows[layer.kind])
            if layer.gates is not None:
                forward = _Gated(layer.shared.forward, layer.gates, rows[layer.kind])
            stack.enter_context(_replaced(layer.shared, forward))
        yield


def adapted_layers(adapter: Adapter) -> dict[str, str]:
    """Path of every layer that an adapter changes -> what the rows of its input are, "atoms" or "edges".

    Raises:
        MMEAError: something else is changed than layers.
    """
    # Their parts are never called: the table form reads the weights of all of them at once.
    contractions = [name for name, _ in symmetric_contractions(adapter.network)]
    found = dict.fromkeys(adapter.on_linears, "atoms")
    for site in adapter.sites.values():
        path = next((name for name in contractions if site.name.startswith(f"{name}.")), site.name)
        if not path:
            raise MMEAError(f"{site.path} belongs to no layer")
        found[path] = "edges" if site.kind.startswith("radial") else "atoms"
    return found


class _Layers:
    """Calls everybody's layer with their rows."""

    def __init__(self, path: str, layers: Sequence[nn.Module], rows: list[int]) -> None:
        self.path, self.layers, self.rows = path, layers, rows

    def __call__(self, *inputs: Tensor) -> Tensor:
        if wrong := [tuple(x.shape) for x in inputs if x.shape[0] != sum(self.rows)]:
            raise MMEAError(f"{self.path} takes an input of shape {wrong[0]}, expected {sum(self.rows)} rows")
        pieces = zip(*(x.split(self.rows) for x in inputs), strict=True)
        return torch.cat([layer(*piece) for layer, piece in zip(self.layers, pieces, strict=True)])


class _Gated:
    """Calls the frozen layer with all rows, and gates of one form with everybody's, filled up to one number."""

    def __init__(self, frozen: Callable[..., Tensor], parts: Sequence[LinearPart], rows: list[int]) -> None:
        self.frozen, self.part, self.rows = frozen, parts[0], rows
        own = [dict(part.named_parameters()) for part in parts]
        self.weights = {name: torch.stack([each[name] for each in own]) for name in own[0]}
        self.even = len(set(rows)) == 1

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        y = self.frozen(x, *others)
        out = vmap(self._one)(self.weights, self._side_by_side(x), self._side_by_side(y))
        if self.even:
            return out.flatten(0, 1)
        return torch.cat([of_one[:n] for of_one, n in zip(out, self.rows, strict=True)])

    def _one(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = functional_call(self.part, weights, (x, y))
        return result

    def _side_by_side(self, x: Tensor) -> Tensor:
        """(all rows, ...) -> (trainings, most rows, ...)."""
        if self.even:
            return x.unflatten(0, (len(self.rows), -1))
        return nn.utils.rnn.pad_sequence(list(x.split(self.rows)), batch_first=True)


def _form(part: LinearPart) -> tuple[object, ...]:
    """Equal for parts that differ in their weights alone."""
    shapes = tuple((name, tuple(p.shape)) for name, p in part.named_parameters())
    fixed = tuple((name, tuple(b.flatten().tolist())) for name, b in part.named_buffers())
    return type(part), part.extra_repr(), part.active, shapes, fixed


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within this context `module` alone has another `forward`."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
