"""A gate whose values no longer train, in as few operations as possible: for inference while an adapter is merged.

What a gate costs in a call for a small molecule is the number of its operations, not their size. So both heads of
`gates` are written as one matrix that has a row for every component of the layer's output, twice: s, which is the
shift where there is one and zero elsewhere, and g, which is the gain where there is one and zero elsewhere. Then

    z -> (s, g) in one product,   y <- s + phi(g) y in two operations,

with nothing to take apart, to spread over the 2l+1 components of a channel, or to join. It is the same function: where
nothing is to be done it adds 0 to 1 times y.

In a compiled network operations cost nothing, and calls of a library of matrix products do, of which a gate would take
four. There they are sums (`WrittenOut`) that the compiler joins with what stands before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..gates import Bounds, MagnitudeGate, Packed
from .arrangement import stage
from .tensor_state import State, same_state, state_of


class FrozenGate:
    """Stands for `gate` while its values are constants: no gradient reaches them, one of its input and output does.

    Values that change in spite of that are seen at the next call.

    Args:
        gate: the gate; while it records, while hooks are on it, and in inference mode, it is computed as ever.
    """

    def __init__(self, gate: MagnitudeGate) -> None:
        self.gate = gate
        # A module keeps its dictionaries for life, while a change of precision replaces what is in them.
        self._stores: list[Mapping[str, Tensor | None]] = [
            *(m._parameters for m in gate.modules() if isinstance(m, nn.Linear)),
            gate._buffers,
        ]
        self._written: WrittenOut
        self._spread: Packed
        self._kept_for = State()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As `MagnitudeGate`: x (..., irreps_in.dim), y (..., irreps_out.dim)."""
        gate = self.gate
        asked = gate.recording or gate._forward_pre_hooks or gate._forward_hooks or torch.is_inference_mode_enabled()
        if asked or not self._renewed():
            return gate(x, y)
        if now := stage():
            return gate.by_irrep(now, x, y, self._written)
        down, down_bias, heads, heads_bias = self._spread
        z = F.linear(gate.scalars_of(x), down, down_bias)
        if gate.nonlinearity:
            z = F.silu(z)
        if gate.saturate and gate.calibrated:
            z = gate.level_off(z)
        s, g = F.linear(z, heads, heads_bias).chunk(2, dim=-1)
        return torch.addcmul(s, y, torch.exp(g) if gate.phi == "exp" else 1 + g)

    def constants(self) -> dict[str, Tensor]:
        """Name -> the weights that a compiled network computes with, as they are now."""
        return {"values": self._written.values} if self._renewed() else {}

    def _renewed(self) -> bool:
        """Have all weights as they are now; False where that cannot be told."""
        tensors: list[Tensor] = [t for store in self._stores for t in store.values() if t is not None]
        if any(t.is_inference() for t in tensors):
            return False
        state = state_of(tensors)
        if not same_state(state, self._kept_for):
            with torch.no_grad():
                packed = Packed(*(t.detach() for t in self.gate.packed()))
                self._written, self._spread = WrittenOut(packed, self.gate.bounds()), self._spread_out(packed)
            self._kept_for = state
        return True

    def _spread_out(self, packed: Packed) -> Packed:
        """Heads with two rows for every component of y."""
        gate = self.gate
        n_shifts = gate.shift.out_features if gate.shift is not None else 0
        kinds = [run.kind for run in gate.runs for _ in range(run.width)]
        heads, bias = (
            packed.heads.new_zeros(2, len(kinds), packed.heads.shape[1]),
            packed.heads.new_zeros(2, len(kinds)),
        )
        of_shift = torch.arange(n_shifts, device=heads.device)
        for number, (kind, source) in enumerate((("shift", of_shift), ("gain", n_shifts + gate.factor_of))):
            rows = torch.tensor([i for i, k in enumerate(kinds) if k == kind], device=heads.device, dtype=torch.int64)
            heads[number, rows], bias[number, rows] = packed.heads[source], packed.heads_bias[source]
        return Packed(packed.down, packed.down_bias, heads.flatten(0, 1), bias.flatten())


# A sum of more terms than this is made of several, which a processor works on at once: in one each waits for the last.
_TERMS = 16


class WrittenOut:
    """The layers of a gate (`gates.Layers`) with their products as sums, and no gradient for their weights.

    All of their values are one tensor: every tensor that a program takes costs a call part of a microsecond.

    Args:
        packed: the weights.
        bounds: where z levels off.

    Attributes:
        values: one after the other, (n,): `down` (width of z, m0), its bias, `heads` (k0 + k1, width of z), their bias,
            the bounds, then `down` and `heads` transposed. A sum and its gradient run over different sides of a
            matrix, and what is not summed over must lie side by side to be computed side by side.
    """

    def __init__(self, packed: Packed, bounds: Bounds) -> None:
        parts = [*packed, *bounds, packed.down.T, packed.heads.T]
        self._shapes = [part.shape for part in parts]
        self.values = torch.cat([part.flatten() for part in parts])

    def _parts(self) -> list[Tensor]:
        """Views, made anew each time: what looks at them sees one tensor."""
        sizes = [shape.numel() for shape in self._shapes]
        return [part.view(shape) for part, shape in zip(self.values.split(sizes), self._shapes, strict=True)]

    def bounds(self) -> Bounds:
        return Bounds(*self._parts()[4:7])

    def bottleneck(self, h0: Tensor) -> Tensor:
        down, bias, *_, up, _ = self._parts()
        return _Sum.apply(h0, up, down) + bias

    def parts(self, z: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        _, _, heads, bias, *_, from_heads = self._parts()
        return (_Sum.apply(z, from_heads, heads) + bias).split(list(sizes), dim=-1)


class _Sum(torch.autograd.Function):
    """x W for x (..., n) and W (n, m), given with its transpose (m, n): (..., m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, transposed: Tensor) -> Tensor:
        ctx.weights = w, transposed
        if len(w) <= _TERMS or len(w) % _TERMS:
            return (x.unsqueeze(-1) * w).sum(-2)
        size = (len(w) // _TERMS, _TERMS)
        return (x.unflatten(-1, size).unsqueeze(-1) * w.unflatten(0, size)).sum(-2).sum(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        w, transposed = ctx.weights
        return _Sum.apply(grad, transposed, w), None, None
