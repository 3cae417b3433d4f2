"""A gate whose values no longer train, in as few operations as possible: for inference while an adapter is merged.

What a gate costs in a call for a small molecule is the number of its operations, not their size. So both heads of
`gates` are written as one matrix that has a row for every component of the layer's output, twice: s, which is the
shift where there is one and zero elsewhere, and g, which is the gain where there is one and zero elsewhere. Then

    z -> (s, g) in one product,   y <- s + phi(g) y in two operations,

with nothing to take apart, to spread over the 2l+1 components of a channel, or to join. It is the same function: where
nothing is to be done it adds 0 to 1 times y.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arrangement import stage
from .gates import MagnitudeGate
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
        self._stores: list[dict[str, nn.Parameter | None]] = [
            m._parameters for m in gate.modules() if isinstance(m, nn.Linear)
        ]
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._kept_for: State = ()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As `MagnitudeGate`: x (..., irreps_in.dim), y (..., irreps_out.dim)."""
        gate = self.gate
        asked = gate.recording or gate._forward_pre_hooks or gate._forward_hooks or torch.is_inference_mode_enabled()
        asked = asked or stage() is not None  # a compiled network counts no operations, and spread factors are gathered
        constants = None if asked else self.constants()
        if constants is None:
            return gate(x, y)
        down, down_bias, heads, heads_bias = constants
        z = F.linear(gate.scalars_of(x), down, down_bias)
        if gate.nonlinearity:
            z = F.silu(z)
        if gate.saturate and gate.calibrated:
            z = gate.level_off(z)
        s, g = F.linear(z, heads, heads_bias).chunk(2, dim=-1)
        return torch.addcmul(s, y, torch.exp(g) if gate.phi == "exp" else 1 + g)

    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Weight and bias of the bottlenecks and of both heads, made anew when a value has changed; None: not now."""
        tensors: list[Tensor] = [t for store in self._stores for t in store.values() if t is not None]
        if any(t.is_inference() for t in tensors):
            return None
        state = state_of(tensors)
        if not same_state(state, self._kept_for):
            with torch.no_grad():
                self._kept = self._made()
            self._kept_for = state
        return self._kept

    def _made(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate = self.gate
        downs = [gate.down] if gate.gain_down is None else [gate.down, gate.gain_down]
        down, down_bias = (torch.cat([getattr(d, key) for d in downs]) for key in ("weight", "bias"))
        n_y, width = sum(run.width for run in gate.runs), down.shape[0]
        heads, bias = down.new_zeros(2, n_y, width), down.new_zeros(2, n_y)
        kinds = [run.kind for run in gate.runs for _ in range(run.width)]
        for number, (kind, head) in enumerate((("shift", gate.shift), ("gain", gate.gain))):
            if head is None:
                continue
            rows = torch.tensor([i for i, k in enumerate(kinds) if k == kind], device=down.device)
            seen = slice(0, gate.rank) if number == 0 else slice(width - gate.rank, width)
            source = slice(None) if number == 0 else gate.factor_of
            heads[number, rows, seen] = head.weight[source]
            bias[number, rows] = head.bias[source]
        return down, down_bias, heads.flatten(0, 1), bias.flatten()
