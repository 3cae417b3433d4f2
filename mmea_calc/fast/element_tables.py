"""Gated layers that see nothing but an atom's element, as tables with one row per element.

In a MACE network the embedding takes one-hot elements, and the first interaction takes the embedding. What such a layer
and its gate make of an atom is known beforehand, so that a call is to look a row up. Each layer makes sure of its input
at every call: the first that it is one-hot, a later one that it is, untouched, the tensor that the layer before gave.
Where this does not hold, and while gates are off or recording, layer and gate are computed as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..gates import MagnitudeGate
from .arrangement import stage
from .tensor_state import State, same_state, state_of


class ElementTables:
    """Tables in the place of linear layers and their gates, for inference: no gradient reaches the gates.

    Args:
        layers: `o3.Linear` layers in the order of their calls, with their gates (None for a layer without one). The
            first takes one-hot rows, each later one takes what the one before gives. The layers' `forward` is replaced
            on these instances alone, and applies the gate; whoever else applies it must not.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, MagnitudeGate | None]]) -> None:
        gates = [gate for _, gate in layers if gate is not None]
        self._layers: list[_Layer] = []
        for linear, gate in layers:
            before = self._layers[-1] if self._layers else None
            self._layers.append(_Layer(linear, gate, before, gates))
        self._before = [layer.linear.__dict__.get("forward") for layer in self._layers]
        for layer in self._layers:
            layer.linear.__dict__["forward"] = layer

    def tables(self) -> dict[str, Tensor]:
        """The tables of the layers, by name, as they are now."""
        found = {f"element table {i}": layer.table() for i, layer in enumerate(self._layers)}
        return {name: table for name, table in found.items() if table is not None}

    def remove(self) -> None:
        """Back to what the layers' forward was before."""
        for layer, before in zip(self._layers, self._before, strict=True):
            del layer.linear.__dict__["forward"]
            if before is not None:
                layer.linear.__dict__["forward"] = before


class _Layer:
    """The `forward` of one layer."""

    def __init__(
        self, linear: Any, gate: MagnitudeGate | None, before: _Layer | None, gates: Sequence[MagnitudeGate]
    ) -> None:
        self.linear, self.gate, self.before, self.gates = linear, gate, before, gates
        # A module keeps its dictionaries for life, while a change of precision replaces the buffers in them.
        self._stores = [store for m in linear.modules() for store in (m._parameters, m._buffers)]
        self._given: tuple[Tensor, int, Tensor] | None = None  # result, its version, rows
        self._seen: tuple[Tensor, int, Tensor | None] | None = None  # one-hot tensor, its version, rows
        self._kept: Tensor | None = None
        self._kept_for = State()

    def __call__(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        """As `o3.Linear`: (n_atoms, irreps_in.dim) -> (n_atoms, irreps_out.dim), gated."""
        self._given = None
        rows = None if others or options else self._rows(x)
        table = None if rows is None else self.table()
        if rows is None or table is None:
            y = type(self.linear).forward(self.linear, x, *others, **options)
            return self.gate(x, y) if self.gate is not None and self.gate.active else y
        result = table.index_select(0, rows)
        self._given = (result, result._version, rows)
        return result

    def _rows(self, x: Tensor) -> Tensor | None:
        """The row of each atom, or None where the input does not tell."""
        if self.before is not None:
            given = self.before._given
            # The version tells of changes in place: mace adds embeddings of charge and spin like that.
            return given[2] if given is not None and given[0] is x and given[1] == x._version else None
        if any(g.recording or not g.active for g in self.gates) or x.requires_grad or x.dim() != 2:
            return None
        if now := stage():
            return now.arrangement.element
        # Tensors of inference mode have no version, and tables made there could not enter a later gradient.
        if x.is_inference() or torch.is_inference_mode_enabled():
            return None
        if self._seen is None or self._seen[0] is not x or self._seen[1] != x._version:
            element = x.argmax(dim=1)
            one_hot = torch.equal(F.one_hot(element, x.shape[1]).to(x), x)
            self._seen = (x, x._version, element if one_hot else None)
        return self._seen[2]

    def table(self) -> Tensor | None:
        """What layer and gate give for each element, (n_elements, irreps_out.dim); made anew when anything changed."""
        tensors = [t for store in self._stores for t in store.values() if t is not None]
        if any(t.is_inference() for t in tensors):
            return None
        source = None if self.before is None else self.before._kept
        state = state_of(tensors, source, *self._settings())
        if not same_state(state, self._kept_for):
            like = self.linear.weight
            with torch.no_grad():
                x = torch.eye(self.linear.irreps_in.dim, dtype=like.dtype, device=like.device)
                x = x if source is None else source
                y = type(self.linear).forward(self.linear, x)
                self._kept = y if self.gate is None else self.gate(x, y)
            self._kept_for = state
        return self._kept

    def _settings(self) -> tuple[object, ...]:
        return () if self.gate is None else (self.gate.saturate, self.gate.calibrated)
