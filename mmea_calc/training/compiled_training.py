"""A step of training compiled to machine code: the loss of a batch and its gradient in one call.

`tracing.trace_loss` makes one graph of the network, its forces, the loss and its gradient. It takes the *updated*
weights as inputs, whatever they are made of, and gives the gradient with respect to them; torch's autograd carries it
on from there, through the few operations by which an update makes a weight (`updates`) and a weight the tables of the
elements (`contraction`). So one program serves all methods that change the same tensors, and only gates are part of it.

    gradient = CompiledGradient(potential, adapter, config)    # minutes, once
    found = gradient(batch, labels, weights, plainly)         # loss and gradient; None where it does not hold

The first batch is computed by `plainly` too, and the two are compared.

On a GPU shapes of batches that come again are recorded, as CUDA graphs (`recorded`), compiled or not: batches of one
molecule have one shape, since their edges stand in tables that are filled up (`full_table`). Tables are made where the
batch is: with the host there is no operation to start for them, and all goes to the device in one copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..adapted import Adapter
from ..config import TrainConfig
from ..errors import CompilationError, first_line
from ..fast.arrangement import Arrangement, arrange, arrange_elements, arrange_structures
from ..fast.compiled import FILLED, MANY_SLOTS, mostly_empty
from ..fast.full_table import WIDTHS, FullTable, width_of
from ..fast.machine_code import Program, being_made, build, is_made, named_tensors, path_of
from ..fast.recorded import Recordings
from ..fast.tracing import Inputs, contraction_forms, example, inputs_of, loss_evaluator, trace_loss
from ..graph import Batch
from ..loss import Labels, Loss, LossWeights, Targets, delta_of
from ..potential import Potential
from .steps import Gradients

# Largest difference to the plain gradient, relative to its norm.
_ALIGNED = 64  # bytes, as those tensors are that a program is made by
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


class CompiledGradient:
    """Loss and gradient of the trained tensors of an adapter.

    Args:
        potential: on the fast path.
        adapter: what is trained; on the network of `potential`, neither merged nor switched off.
        config: of the loss.
        compiled: by a program; else by the network's own operations, which is for recordings.
        recorded: record them; None: on a GPU.

    Raises:
        CompilationError: it cannot be made here, or not for this: stresses are trained, say.
    """

    def __init__(
        self,
        potential: Potential,
        adapter: Adapter,
        config: TrainConfig,
        *,
        compiled: bool = True,
        recorded: bool | None = None,
    ) -> None:
        backbone = potential.backbone
        if not backbone.fast:
            raise CompilationError("this backbone was loaded with fast=False: load it without")
        if config.stress_weight > 0:
            raise CompilationError("stresses are trained, which compiled steps do not do: set stress_weight to 0")
        if adapter.merged or not adapter.enabled:
            raise CompilationError("the adapter is merged or switched off")
        self.potential, self.adapter, self.delta = potential, adapter, delta_of(config)
        self._forms = contraction_forms(backbone.network)
        # Weights of contractions act by way of the tables alone.
        self._updated = [path for path, site in adapter.sites.items() if not site.kind.startswith("contraction")]
        own = {id(p) for part in adapter.on_linears.values() for p in part.parameters()}
        named = [(name, p) for name, p in backbone.network.named_parameters() if id(p) in own]
        self._gates, self._of_gates = [name for name, _ in named], [p for _, p in named]
        self._parameters = adapter.parameters()
        trained = {id(p) for p in self._parameters}
        stores = [module._parameters for module in backbone.network.modules()]
        self._places = [(store, name) for store in stores for name, p in store.items() if id(p) in trained]
        self._has_gradient: list[bool] = []
        self._compiled = compiled
        self._program: Callable[[list[Tensor], list[Tensor]], list[Tensor]]
        self._values: list[Tensor] = []
        if compiled:
            self._program = program = Program(self._made(), backbone.device)
            with self._folded():
                self._values = program.values(dict(named_tensors(backbone.network)))
        else:
            self._program = self._network_itself()
        self._recordings: Recordings | None = None
        if backbone.device.type == "cuda" if recorded is None else recorded:
            self._recordings = Recordings(self._from_parameters, backbone.device)
        self._recorded_for: tuple[object, ...] = ()
        self._usable, self._proven = True, False

    def _example(self) -> Batch:
        backbone = self.potential.backbone
        return example(
            backbone.elements,
            backbone.r_max,
            head_index=backbone.head_index,
            dtype=backbone.dtype,
            device=backbone.device,
        )

    def _network_itself(self) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
        """What a program computes, by the operations that it would be made of."""
        network, head_index = self.potential.backbone.network, self.potential.backbone.head_index
        weights = self.adapter.weights
        names = [*map(weights.name_of_own, self._updated), *self._gates]
        inputs = inputs_of(network, self._example(), stress=False, compiled=False)
        evaluate = loss_evaluator(network, inputs, head_index, names, compiled=False)

        def run(inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
            with weights.bare():  # updated weights are given, in the place of those that the updates are applied to
                return list(evaluate(*inputs))

        return run

    def _made(self) -> Path:
        """The program's path; it is compiled unless it is there."""
        backbone, names = self.potential.backbone, [*self._updated, *self._gates]
        network, head_index = backbone.network, backbone.head_index
        with self._folded():
            path = path_of(network, head_index, "loss", names)
            if is_made(path):
                return path
            batch = self._example()
            known = dict(named_tensors(network))
            trained = {name: known[name] for name in names}
            with being_made(path) as made:
                build(trace_loss(network, batch, _example_targets(batch), head_index, trained), known, made)
        return path

    @contextmanager
    def _folded(self) -> Iterator[None]:
        """The network with its updated weights in the place of its own, as the graph sees it."""
        weights = self.adapter.weights
        weights.fold()
        try:
            yield
        finally:
            weights.unfold()

    def __call__(
        self, batch: Batch, labels: Labels, weights: LossWeights, plainly: Callable[[], tuple[Loss, Gradients]]
    ) -> tuple[Loss, Gradients] | None:
        """Of one batch, with the host or on the device.

        None where it must be computed plainly: no neighbours, atoms too close, tables mostly empty.
        """
        if not self._usable or batch.tensors["edge_index"].shape[1] == 0 or batch.n_atoms < 2:
            return None
        if self._proven:
            return self._computed(batch, labels, weights)
        try:
            found = self._computed(batch, labels, weights)
            if found is None:  # this batch says nothing: the next one will be asked
                return None
            problem = disagreement(found[1], plainly()[1], batch.tensors["positions"].dtype)
            self._proven = not problem
        except Exception as failure:  # whatever a program for something else makes torch raise
            problem = str(failure)
        if self._proven:
            return found
        self._usable = False
        warnings.warn(f"the compiled gradient is not used: {problem}", stacklevel=2)
        return None

    def _computed(self, batch: Batch, labels: Labels, weights: LossWeights) -> tuple[Loss, Gradients] | None:
        batch, arrangement = self._arranged(batch)
        if arrangement is None:
            return None
        inputs = Inputs.of(batch, arrangement, {}, stress=False)
        targets = targets_of(batch, labels, weights, self.potential.reference_energy_of(batch), self.delta)
        given = on_device([*inputs.tensors(), *targets.tensors()], self.potential.device)
        energy, forces, doubt, *found = self._run(given)
        if bool(doubt):
            return None
        rest = iter(found)
        gradients = [next(rest) if has else None for has in self._has_gradient]
        return Loss(energy, forces, energy.new_zeros(())), gradients

    def _from_parameters(self, given: list[Tensor]) -> list[Tensor]:
        """Tensors of a batch and its targets -> terms of the loss, doubt, gradients of parameters that have one."""
        end = len(given) - len(Targets.DYNAMIC)
        present = Arrangement.from_tensors(given[end - len(Arrangement.DYNAMIC) : end]).present
        with self._aliases() as own, torch.enable_grad():
            updated = [self.adapter.sites[path].value for path in self._updated]
            gates = [own[id(p)] for p in self._of_gates]
            tables = _joined([form.tables_of(present, compiled=self._compiled) for form in self._forms])
        flat = [t.detach() for t in (*updated, *gates, *given[:end], *tables, *given[end:])]
        energy, forces, doubt, *found = self._program(flat, self._values)
        made = [(t, g) for t, g in zip([*updated, *gates, *tables], found, strict=True) if t.requires_grad]
        parameters = [own[id(p)] for p in self._parameters]
        gradients: Gradients = torch.autograd.grad(
            [t for t, _ in made], parameters, [g for _, g in made], allow_unused=True
        )
        self._has_gradient = [g is not None for g in gradients]
        return [energy, forces, doubt, *(g for g in gradients if g is not None)]

    @contextmanager
    def _aliases(self) -> Iterator[dict[int, Tensor]]:
        """Within this context tensors made here stand for the parameters, in the same memory: by `id` of parameters.

        What autograd keeps of a parameter belongs to the stream where it was first used, which a recording on another
        stream must not touch.
        """
        before = [cast(nn.Parameter, store[name]) for store, name in self._places]
        aliases = {id(p): p.detach().requires_grad_() for p in before}
        try:
            for (store, name), p in zip(self._places, before, strict=True):
                store[name] = cast(nn.Parameter, aliases[id(p)])
            yield aliases
        finally:
            for (store, name), p in zip(self._places, before, strict=True):
                store[name] = p

    def _arranged(self, batch: Batch) -> tuple[Batch, Arrangement | None]:
        """The batch and its arrangement; None where most of the tables would be empty. Filled up for a recording."""
        if self._recordings is None:
            arrangement = arrange(batch.tensors)
            return batch, None if mostly_empty(arrangement) else arrangement
        index = batch.tensors["edge_index"]
        width = width_of(index, batch.n_atoms, WIDTHS)
        if width * batch.n_atoms > max(MANY_SLOTS, FILLED * index.shape[1]):
            return batch, None
        table = FullTable.of(index, batch.n_atoms, width)
        shifts = table.shifts(batch.tensors["shifts"], self.potential.backbone.r_max)
        unit_shifts = table.spread(batch.tensors["unit_shifts"])
        tensors = {**batch.tensors, "edge_index": table.index, "shifts": shifts, "unit_shifts": unit_shifts}
        elements = arrange_elements(batch.tensors["node_attrs"])
        return Batch(tensors, batch.numbers, batch.atoms_per_graph), table.arrangement(elements)

    def _run(self, inputs: list[Tensor]) -> list[Tensor]:
        if self._recordings is not None:
            # A recording reads parameters where they were, by the network as it was.
            now = (*self.adapter.situation(), *map(Tensor.data_ptr, self._parameters))
            if now != self._recorded_for:
                self._recordings.close()
                self._recorded_for = now
            try:
                return self._recordings(inputs)
            except RuntimeError as problem:  # whatever torch says of what cannot be recorded
                self._recordings.close()
                self._recordings = None
                warnings.warn(f"training steps are not recorded: {first_line(problem)}", stacklevel=2)
        return self._from_parameters(inputs)

    def close(self) -> None:
        """Give the memory of recordings back."""
        if self._recordings is not None:
            self._recordings.close()


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors where they are needed; those of the host come there in one copy, which nobody waits for."""
    if all(t.device == device for t in tensors):
        return list(tensors)
    together = packed(tensors)
    if device.type == "cuda":
        together = together.pin_memory()
    return unpacked(together.to(device, non_blocking=True), tensors)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """All bytes of tensors in a row, each from a multiple of `_ALIGNED` bytes on: programs copy what is not there."""
    return torch.cat([_filled_up(t.contiguous().view(-1).view(torch.uint8)) for t in tensors])


def unpacked(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, in the same memory."""
    sizes = [t.numel() * t.element_size() for t in like]
    pieces = together.split([n + _lacking(n) for n in sizes])
    return [p[:n].view(t.dtype).view(t.shape) for p, n, t in zip(pieces, sizes, like, strict=True)]


def _filled_up(piece: Tensor) -> Tensor:
    return torch.nn.functional.pad(piece, (0, _lacking(len(piece))))


def _lacking(n: int) -> int:
    """Bytes from n to the next multiple of `_ALIGNED`."""
    return -n % _ALIGNED


def _joined(tables: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [table for some in tables for table in some]


def targets_of(batch: Batch, labels: Labels, weights: LossWeights, reference: Tensor, delta: float) -> Targets:
    """What a graph takes of labels; `reference` energies of the structures are taken from theirs in float64."""
    atoms, none = arrange_structures(batch.tensors["batch"], batch.n_graphs + 1)

    def and_one(values: Tensor, value: float) -> Tensor:
        return torch.cat([values, values.new_full((1,), value)])

    return Targets(
        atoms=atoms,
        none=none,
        n_atoms=and_one(labels.atoms_per_graph, 1.0),
        energy=and_one(labels.energy - reference, 0.0),
        energy_weight=and_one(weights.energy, 0.0),
        forces=labels.forces,
        forces_weight=weights.forces,
        delta=labels.forces.new_tensor(delta),
    )


def _example_targets(batch: Batch) -> Targets:
    like, n = batch.tensors["positions"], batch.n_graphs
    one = like.new_ones
    labels = Labels(
        energy=one(n).double(),
        energy_mask=one(n),
        forces=torch.ones_like(like),
        forces_mask=one(len(like), 1),
        stress=one(n, 3, 3),
        stress_mask=one(n, 1, 1),
        atoms_per_graph=torch.bincount(batch.tensors["batch"]).to(like),
    )
    weights = LossWeights(labels.energy_mask, labels.forces_mask, labels.stress_mask)
    return targets_of(batch, labels, weights, torch.zeros_like(labels.energy), 1.0)


def disagreement(found: Gradients, plain: Gradients, dtype: torch.dtype) -> str:
    """What is wrong with a gradient of this precision that should be `plain`; empty if it agrees."""
    apart, allowed = difference(found, plain), _TOLERANCE[dtype]
    if apart <= allowed:
        return ""
    return f"it differs from the network's own by {apart:.2g} of its norm, expected at most {allowed:.2g}"


def difference(one: Gradients, other: Gradients) -> float:
    """Norm of the difference of two gradients, in units of the norm of the second."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None or b is not None]
    apart = sum(float((_of(a, b) - _of(b, a)).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs if b is not None)
    return float(apart / size) ** 0.5 if size else float(apart > 0)


def _of(gradient: Tensor | None, other: Tensor | None) -> Tensor:
    if gradient is not None:
        return gradient.double()
    assert other is not None
    return torch.zeros_like(other, dtype=torch.float64)
