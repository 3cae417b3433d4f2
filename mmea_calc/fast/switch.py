"""The fast path: exact replacements of the parts of a MACE network that take most of its time.

| part | module | what is saved |
|---|---|---|
| symmetric contraction | `contraction` | products with the zeros of the coupling tensors |
| convolution | `convolution` | tensor products per edge, and the memory of every edge's message |
| self-connections, in compiled networks | `self_connection` | products with the elements that an atom is not |
| linear layers, in compiled networks | `piecewise` | taking features apart, and the gradients of that |
| radial MLPs, in compiled networks | `pair_radial` | the edge of a pair that goes the other way; in calls, the MLP |
| readouts of several heads, in compiled networks | `head_mask` | a mask that comes from the host |

They replace a `forward` on the given network's own modules. They read the parameters that are there, so adapters and
changes of weights are seen, and they can be taken off again.
"""

from __future__ import annotations

import warnings

from torch import nn

from .contraction import remove_table_contraction, use_table_contraction
from .convolution import remove_fast_convolution, use_fast_convolution
from .head_mask import remove_head_masks, use_head_masks
from .pair_radial import remove_pair_radial, use_pair_radial
from .piecewise import remove_pieces, use_pieces
from .self_connection import remove_self_connections, use_self_connections


def use_fast_path(network: nn.Module) -> None:
    """Put `network` on the fast path; a part that it does not cover stays plain, with a warning that says which."""
    use_table_contraction(network)
    use_self_connections(network)
    use_pieces(network)
    use_head_masks(network)
    use_pair_radial(network)
    if kept := use_fast_convolution(network):
        listed = "; ".join(f"{name}: {reason}" for name, reason in kept.items())
        warnings.warn(f"some convolutions run in mace-torch's own, slower form: {listed}", stacklevel=2)


def remove_fast_path(network: nn.Module) -> None:
    """Back to mace-torch's own forms."""
    remove_table_contraction(network)
    remove_self_connections(network)
    remove_pieces(network)
    remove_head_masks(network)
    remove_pair_radial(network)
    remove_fast_convolution(network)
