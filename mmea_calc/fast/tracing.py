"""A network, with what is attached to it, as one graph of operations on tensors that holds for batches of any size.

The network is run once on symbols instead of numbers (`make_fx`), derivatives included, within `arranged`, so that
nothing depends on what is in the batch. All tensors that the network holds become inputs of the graph: it fits every
adapter of this form on every backbone of this shape, and a change of values is a change of inputs.

| graph | gives |
|---|---|
| `trace` | node energies, forces, the gradient of a strain |
| `trace_loss` | the loss of a batch and its gradient with respect to weights |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..graph import Batch, build_graph, collate
from ..loss import Targets
from ..mace_bridge import symmetric_contractions
from .arrangement import Arrangement, Stage, arrange, arranged
from .contraction import TableContraction
from .pair_radial import radial_forms

# Form of a module -> tensors.
Tables = Mapping[Any, Sequence[Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Of one batch: its tensors, its arrangement, the tables of its elements; and, for stresses, a strain of zeros.

    Attributes:
        tables: form of a module -> what it takes in the place of the module's weights: see `tables_of`.
        strain: (n_graphs + 1, 3, 3); None without stresses. One more than there are, since a compiled graph takes a
            dimension of 1 for a special one.
    """

    batch: dict[str, Tensor]
    arrangement: Arrangement
    tables: Tables
    strain: Tensor | None

    @classmethod
    def of(cls, batch: Batch, arrangement: Arrangement, tables: Tables, *, stress: bool) -> Inputs:
        strain = batch.tensors["positions"].new_zeros(batch.n_graphs + 1, 3, 3) if stress else None
        return cls(batch.tensors, arrangement, tables, strain)

    def tensors(self) -> list[Tensor]:
        """In the order of the graph's inputs."""
        fields = ("positions", "node_attrs", "edge_index", "shifts")
        strain = [] if self.strain is None else [self.strain, self.batch["batch"]]
        flat = [table for some in self.tables.values() for table in some]
        return [*(self.batch[key] for key in fields), *self.arrangement.tensors(), *strain, *flat]

    def dynamic(self) -> list[set[int]]:
        """Which dimensions of each tensor differ from batch to batch."""
        strain: list[set[int]] = [] if self.strain is None else [{0}, {0}]
        rows: list[set[int]] = [{0} if t.dim() > 1 else set() for some in self.tables.values() for t in some]
        return [{0}, {0}, {1}, {0}, *Arrangement.DYNAMIC, *strain, *rows]


# Where the values of a tensor are, and how they lie there.
Place = tuple[object, ...]


def place_of(tensor: Tensor) -> Place:
    """Equal for two tensors that are the same values, whatever objects they are."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class Traced:
    """A graph.

    Attributes:
        inputs: the tensors that it was traced with, of a batch first.
        dynamic: which dimensions of each of them differ from batch to batch.
        constants: the tensors of the network that it takes after `inputs`.
    """

    graph: fx.GraphModule
    inputs: list[Tensor]
    dynamic: list[set[int]]
    constants: list[Tensor]


def contraction_forms(network: nn.Module) -> list[TableContraction]:
    """The table forms of the network's symmetric contractions, in their order."""
    forms = [module.__dict__.get("forward") for _, module in symmetric_contractions(network)]
    return [form for form in forms if isinstance(form, TableContraction)]


def evaluator(
    network: nn.Module, inputs: Inputs, head_index: int, *, compiled: bool = True
) -> Callable[..., tuple[Tensor, ...]]:
    """The function that is traced: `Inputs.tensors` -> node energies, forces, (gradient of the strain), doubt.

    It takes what is made like `inputs`: with or without stresses. With `compiled=False` it is the same for those who
    call it as it is: the fewer operations, the better.
    """
    stress, run = inputs.strain is not None, _runner(network, inputs, head_index, compiled=compiled)

    def evaluate(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(inputs)
        with torch.enable_grad():
            node_energy, wanted, now = run(rest, {}, stress)
            gradients = torch.autograd.grad(node_energy.sum(), wanted)
        return node_energy.detach(), -gradients[0], *gradients[1:], now.doubt()

    return evaluate


def loss_evaluator(
    network: nn.Module, inputs: Inputs, head_index: int, names: Sequence[str], *, compiled: bool = True
) -> Callable[..., tuple[Tensor, ...]]:
    """The function that is traced: the tensors `names` of the network, `Inputs.tensors`, `Targets.tensors` ->
    terms of energy and forces of the loss, doubt, its gradients with respect to `names` and to the tables of elements.

    `compiled`: see `evaluator`.
    """
    run = _runner(network, inputs, head_index, compiled=compiled)
    n_tables = sum(map(len, inputs.tables.values()))

    def evaluate(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            trained = [t.detach().requires_grad_() for t in inputs[: len(names)]]
            # Tables stand last among the inputs of the batch; targets come after them.
            end = len(inputs) - len(Targets.DYNAMIC)
            tables = [t.detach().requires_grad_() for t in inputs[end - n_tables : end]]
            rest = iter([*inputs[len(names) : end - n_tables], *tables])
            node_energy, (positions,), now = run(rest, dict(zip(names, trained, strict=True)), False)
            (gradient,) = torch.autograd.grad(node_energy.sum(), [positions], create_graph=True)
            target = Targets(*inputs[end:])
            energy, forces = target.energy_term(node_energy), target.forces_term(-gradient)
            gradients = torch.autograd.grad(
                energy + forces, [*trained, *tables], allow_unused=True, materialize_grads=True
            )
        return energy.detach(), forces.detach(), now.doubt(), *gradients

    return evaluate


def _runner(
    network: nn.Module, inputs: Inputs, head_index: int, *, compiled: bool = True
) -> Callable[[Iterator[Tensor], dict[str, Tensor], bool], tuple[Tensor, list[Tensor], Stage]]:
    """What both do first: the network on (tensors of a batch, tensors in the place of its own, whether with a strain).

    It returns node energies, and the positions, and the strain, with respect to which they can be differentiated.
    """
    n_tables = {form: len(some) for form, some in inputs.tables.items()}

    def run(rest: Iterator[Tensor], own: dict[str, Tensor], stress: bool) -> tuple[Tensor, list[Tensor], Stage]:
        positions, node_attrs, edge_index, shifts = (next(rest) for _ in range(4))
        arrangement = Arrangement.from_tensors([next(rest) for _ in Arrangement.DYNAMIC])
        positions = positions.detach().requires_grad_()
        moved, wanted = positions, [positions]
        if stress:
            strain, owner = next(rest).detach().requires_grad_(), next(rest)
            symmetric = 0.5 * (strain + strain.transpose(1, 2))
            moved = positions + (positions.unsqueeze(1) @ symmetric.index_select(0, owner)).squeeze(1)
            of_edge = symmetric.index_select(0, owner.index_select(0, edge_index[0]))
            shifts = shifts + (shifts.unsqueeze(1) @ of_edge).squeeze(1)
            wanted = [positions, strain]
        tables = {form: [next(rest) for _ in range(n)] for form, n in n_tables.items()}
        one = torch.zeros(2, dtype=torch.int64, device=positions.device)
        batch = {
            **dict(positions=moved, node_attrs=node_attrs, edge_index=edge_index, shifts=shifts),
            # All structures pass for one: their number would be fixed, and energies of atoms are all that is used.
            **dict(unit_shifts=shifts, cell=positions.new_zeros(3, 3), batch=torch.zeros_like(arrangement.element)),
            **dict(ptr=one, head=one[:1] + head_index),
        }
        with arranged(Stage(arrangement, tables, compiled)) as now:
            out = functional_call(network, own, (batch,), {"training": False, "compute_force": False})
        return out["node_energy"], wanted, now

    return run


def example(
    elements: Sequence[int], r_max: float, *, head_index: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Three structures, one of them a crystal, whose atoms are farther apart than in any molecule."""
    rng = np.random.default_rng(0)
    kinds = list(elements[:4])

    def some(n: int) -> Atoms:
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)[:n]
        at = 0.45 * r_max * (grid + 0.1 * rng.standard_normal((n, 3)))
        return Atoms(numbers=[kinds[i % len(kinds)] if i % 3 else kinds[0] for i in range(n)], positions=at)

    crystal = some(4)
    crystal.set_cell(np.eye(3) * 1.35 * r_max)
    crystal.set_pbc(True)
    graphs = [build_graph(atoms, r_max) for atoms in (some(7), crystal, some(12))]
    return collate(graphs, elements, head_index=head_index, dtype=dtype, device=device)


def trace(network: nn.Module, batch: Batch, head_index: int, *, stress: bool) -> Traced:
    """The graph of `evaluator` for this network as it is now."""
    inputs = inputs_of(network, batch, stress=stress, frozen=True)
    return _trace(evaluator(network, inputs, head_index), inputs.tensors(), inputs.dynamic())


def trace_loss(
    network: nn.Module, batch: Batch, targets: Targets, head_index: int, trained: Mapping[str, Tensor]
) -> Traced:
    """The graph of `loss_evaluator` for this network as it is now, with respect to the tensors `trained` of it."""
    inputs = inputs_of(network, batch, stress=False)
    function = loss_evaluator(network, inputs, head_index, list(trained))
    tensors = [*(t.detach() for t in trained.values()), *inputs.tensors(), *targets.tensors()]
    return _trace(function, tensors, [*(set() for _ in trained), *inputs.dynamic(), *Targets.DYNAMIC])


def inputs_of(network: nn.Module, batch: Batch, *, stress: bool, compiled: bool = True, frozen: bool = False) -> Inputs:
    """What a graph of this network takes of a batch; `compiled`: see `evaluator`; `frozen`: see `tables_of`."""
    arrangement = arrange(batch.tensors)
    tables = tables_of(network, arrangement.present, compiled=compiled, frozen=frozen)
    return Inputs.of(batch, arrangement, tables, stress=stress)


def tables_of(network: nn.Module, present: Tensor, *, compiled: bool, frozen: bool) -> Tables:
    """Tables of the symmetric contractions for these elements, and, in a compiled network that is not trained
    (`frozen`), those of the radial MLPs that can be given like this.
    """
    with torch.no_grad():
        of_contractions = {f: f.tables_of(present, compiled=compiled) for f in contraction_forms(network)}
        of_radial = {f: f.table() for f in radial_forms(network)} if compiled and frozen else {}
    return {**of_contractions, **{form: table for form, table in of_radial.items() if table is not None}}


def _trace(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], dynamic: list[set[int]]) -> Traced:
    from torch.fx.experimental import _config as symbols
    from torch.fx.experimental.proxy_tensor import make_fx

    function(*tensors)  # so that whatever modules keep for later calls is made of numbers, not of symbols
    with cast(Any, symbols).patch(use_duck_shape=False):  # two dimensions may be equal by accident
        graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tensors)
    return Traced(graph, tensors, dynamic, _lift(graph))


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into further inputs of it; returns them in their order."""
    graph = module.graph
    graph.eliminate_dead_code()
    found: dict[Place, tuple[fx.Node, Tensor]] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor: Any = module
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        key = place_of(tensor)
        if key not in found:
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(found)}")
            last.meta["val"] = node.meta.get("val", tensor)
            found[key] = (last, tensor.detach())
        node.replace_all_uses_with(found[key][0])
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())  # all inputs in a row, where make_fx had one list
    module.recompile()
    return [tensor for _, tensor in found.values()]
