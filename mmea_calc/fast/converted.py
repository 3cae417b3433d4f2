"""A network of cuEquivariance's layers in the place of e3nn's: an optional extra, for GPUs.

    MMEACalculator("aspirin.adapter", kernels="cuequivariance")        # pip install 'mmea[cue]'

mace-torch makes the other network of the one at hand, with the adapter's weight updates folded. Gates move over as they
are: they sit on cuEquivariance's linear layers, whose features lie with the components outermost, (2l+1, multiplicity).

What holds of a compiled network holds here (the table in `compiled`): the first batch is computed by both networks and
compared, versions of all tensors are compared at every call, and what is not covered is computed plainly. That is a
batch in which atoms are closer than in training: radial functions fade to the backbone's there, and here there is one
set of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted import Adapter, attach
from ..adapter_state import SHORTEST
from ..backbone import Backbone
from ..errors import AdapterError, BackboneError, CompilationError
from ..graph import Batch, Found
from ..mace_bridge import is_radial_embedding, of_cuequivariance
from ..mace_networks import accept_neutral_graphs, repeat_to_the_bit
from .arrangement import stage
from .head_mask import use_head_masks
from .tensor_state import Watched

# Families of an adapter's tensors that move over (`adapter_file`); the others are folded into weights.
_MOVED = ("gates", "ranges")


class ConvertedNetwork:
    """The other network, with the values of one network as they are at each call.

    Args:
        backbone: whose network it stands for.
        adapter: what is on it, merged; None if there is none or it is switched off.

    Raises:
        CompilationError: there is no such network for this one.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter | None) -> None:
        self.backbone, self.adapter = backbone, adapter
        self._watched = Watched(store for m in backbone.network.modules() for store in (m._parameters, m._buffers))
        self._too_close = _TooClose(None)
        self.network()

    def network(self) -> nn.Module:
        """It, made anew where values have changed."""
        if self._watched.changed():
            try:
                self._network = self._made()
            except (AdapterError, BackboneError) as problem:
                raise CompilationError(
                    f"there is no network of cuEquivariance's layers for this one: {problem}"
                ) from problem
        return self._network

    def __call__(self, batch: Batch, *, stress: bool) -> Found | None:
        """Results of a batch; None where they would not hold."""
        network, tensors = self.network(), dict(batch.tensors)
        tensors["positions"] = tensors["positions"].detach().clone()
        with torch.enable_grad():
            out = network(tensors, compute_force=True, compute_stress=stress)
        if self._too_close.found is not None and bool(self._too_close.found):
            return None
        return Found(out["node_energy"].detach(), out["forces"].detach(), out["stress"].detach() if stress else None)

    def _made(self) -> nn.Module:
        network = of_cuequivariance(self.backbone.network).to(self.backbone.device, self.backbone.dtype)
        network.requires_grad_(False).eval()
        accept_neutral_graphs(network)
        repeat_to_the_bit(network)
        use_head_masks(network)
        adapter = self.adapter
        if adapter is None or adapter.foldable:
            return network
        if len(adapter.gates) != len(adapter.on_linears):
            raise AdapterError(f"an adapter of method {adapter.config.method!r} has parts other than gates")
        config = replace(adapter.config, method="gates", targets=tuple(adapter.gates))
        moved = attach(network, config, start=False)
        state = adapter.state_dict()
        moved.load_state_dict({k: t for k, t in state.items() if k.split(".")[0] in _MOVED and k != SHORTEST})
        moved.merge()
        fade = adapter.short_range
        self._too_close = _TooClose(fade.shortest.clone() if fade is not None and fade.calibrated else None)
        for module in network.modules():
            if is_radial_embedding(module):
                module.register_forward_hook(self._too_close)
        return network


class _TooClose:
    """Notes whether two atoms are closer than in training. Args: `ShortRange.shortest`; None: nothing is known."""

    def __init__(self, shortest: Tensor | None) -> None:
        self.shortest = shortest
        self.found: Tensor | None = None

    def __call__(self, embedding: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        if self.shortest is None:
            return
        lengths, node_attrs, edge_index, _ = inputs
        element = node_attrs.argmax(dim=1)
        limit = self.shortest[element[edge_index[0]], element[edge_index[1]]]
        short = (lengths.detach().squeeze(1) < limit).any()
        if now := stage():
            now.doubts.append(short)
        else:
            self.found = short
