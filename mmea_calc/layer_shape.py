"""What a gate must know of a linear layer: the irreps of its input and output, and how components lie in memory.

| layer | components of one irrep | told by |
|---|---|---|
| `e3nn.o3.Linear`, `e3nn.o3.TensorProduct` | (multiplicity, 2l+1) | its class |
| `cuequivariance_torch.Linear` | as its layout says, often (2l+1, multiplicity) | the name of its class |

cuEquivariance is never imported from here: where it is not imported, nothing can be of its classes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ._e3nn import o3


@dataclass(frozen=True)
class LayerShape:
    """Of one linear layer.

    Attributes:
        irreps_in: of the features that it maps; of the first of the two inputs of a tensor product.
        irreps_out: of its output.
        components_first: components of an irrep of the output lie as (2l+1, multiplicity).
    """

    irreps_in: o3.Irreps
    irreps_out: o3.Irreps
    components_first: bool = False

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """Of a layer of one of the classes above, whose irreps are of O(3) (`reason_unreadable`)."""
        if is_cue_linear(layer):
            outermost = layer.transpose_out.target == sys.modules["cuequivariance"].ir_mul
            return cls(o3.Irreps(str(layer.irreps_in)), o3.Irreps(str(layer.irreps_out)), outermost)
        return cls(layer.irreps_in1 if isinstance(layer, o3.TensorProduct) else layer.irreps_in, layer.irreps_out)


def blocks(irreps: o3.Irreps) -> tuple[tuple[int, int], ...]:
    """Channels of each piece of features, and their 2l+1: neighbours of the same irrep are one piece."""
    return tuple((mul, ir.dim) for mul, ir in irreps.simplify())


def is_cue_linear(module: object) -> bool:
    """Whether `module` is a linear layer of cuEquivariance."""
    known = getattr(sys.modules.get("cuequivariance_torch"), "Linear", None)
    return known is not None and isinstance(module, known)


def reason_unreadable(layer: Any) -> str | None:
    """Why `LayerShape.of` cannot be had of a layer; None if it can."""
    if is_cue_linear(layer):
        try:
            LayerShape.of(layer)
        except ValueError:
            return f"its irreps {layer.irreps_in} -> {layer.irreps_out} are not those of O(3), which have a parity"
    return None
