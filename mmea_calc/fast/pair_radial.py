"""Radial functions once for a pair of atoms, not for the edges each way, in compiled networks.

The radial MLP of a convolution (MACE, arXiv 2206.07697, eq. 8) sees the distance of two atoms, and of their elements at
most what is the same for both: the edges j -> i and i -> j of a pair have the same weights. Where it sees nothing but
the distance and is not trained, it is not computed at all (`radial_table`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..mace_bridge import of_distance_alone, radial_networks
from . import radial_table
from .arrangement import stage
from .tensor_state import State, same_state, state_of


def use_pair_radial(network: nn.Module) -> None:
    """Let every radial MLP of `network` use the form of this module where it can. Parameters stay."""
    embedding = of_distance_alone(network)
    if embedding is not None:
        embedding.__dict__["forward"] = _Lengths(embedding)
    for module, width in radial_networks(network):
        module.__dict__["forward"] = PairRadial(module, width, embedding)


def remove_pair_radial(network: nn.Module) -> None:
    """Back to mace's own."""
    modules = [*(module for module, _ in radial_networks(network)), of_distance_alone(network)]
    for module in modules:
        if module is not None and isinstance(module.__dict__.get("forward"), PairRadial | _Lengths):
            del module.__dict__["forward"]


def radial_forms(network: nn.Module) -> list[PairRadial]:
    """The forms in `network`, in the order of its interaction blocks, whose MLPs see nothing but a distance."""
    forms = [module.__dict__.get("forward") for module, _ in radial_networks(network)]
    return [form for form in forms if isinstance(form, PairRadial) and form.sees_distance_alone]


class PairRadial:
    """The `forward` of one radial MLP.

    Args:
        stock: the MLP, whose layers are called as it calls them.
        width: of what is the same for both edges of a pair; elsewhere the stock MLP is called.
        embedding: the network's radial embedding, if distances are all that this one sees.
    """

    def __init__(self, stock: Any, width: int, embedding: Any = None) -> None:
        self.stock, self.width, self.embedding = stock, width, embedding
        self.sees_distance_alone = embedding is not None and list(getattr(stock, "hs", ()))[:1] == [width]
        modules = [m for part in (stock, embedding) if part is not None for m in part.modules()]
        self._stores = [store for m in modules for store in (m._parameters, m._buffers)]
        self._kept: list[Tensor] | None = None
        self._kept_for = State()

    def __call__(self, x: Tensor) -> Tensor:
        """As mace's: radial features of the edges (n_edges, width) -> weights of paths (n_edges, paths * channels)."""
        now = stage()
        if now is None or not now.compiled or x.shape[1] != self.width:
            return type(self.stock).forward(self.stock, x)
        pairs, first = now.arrangement.pairs, now.arrangement.first_edges()
        if self in now.tables and now.lengths is not None and now.lengths[0] is x:
            coefficients, intervals = now.tables[self]
            u = first.gather(now.lengths[1]).flatten() * intervals[0]
            weights = radial_table.evaluate(u, coefficients, intervals[1])
        else:
            weights = type(self.stock).forward(self.stock, first.gather(x).squeeze(0))
        return pairs.gather(weights).squeeze(0)

    def table(self) -> list[Tensor] | None:
        """What a compiled network takes in the place of the MLP, as that one is now; None where it cannot be given.

        Coefficients (n_intervals + 5, paths * channels) and (intervals per A, number of intervals).
        """
        tensors = [t for store in self._stores for t in store.values() if t is not None]
        state = state_of(tensors)
        if not same_state(state, self._kept_for):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = self._fitted()
            self._kept_for = state
        return self._kept

    def _fitted(self) -> list[Tensor] | None:
        like = next(self.stock.parameters())
        r_max = float(self.embedding.cutoff_fn.r_max)
        embedding, mlp = _in_float64(self.embedding), _in_float64(self.stock)

        def function(r: Tensor) -> Tensor:
            features, _ = embedding(r.clamp(min=1e-9 * r_max).unsqueeze(1), None, None, None)  # 0 / 0 at 0
            return mlp(features)

        coefficients = radial_table.fit(function, r_max, like.dtype)
        if coefficients is None:
            return None
        n = len(coefficients) - radial_table.DEGREE
        return [coefficients.to(like), like.new_tensor([n / r_max, n])]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is made again."""
        return {**self.__dict__, "_kept": None, "_kept_for": State()}


class _Lengths:
    """The `forward` of a radial embedding, which notes the distances that its features are of."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, edge_lengths: Tensor, *others: Any) -> Any:
        features, cutoff = type(self.stock).forward(self.stock, edge_lengths, *others)
        if now := stage():
            now.lengths = features, edge_lengths
        return features, cutoff


class _Stock(nn.Module):
    """A module's own forward alone, without hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return type(self.module).forward(self.module, *inputs)


def _in_float64(module: nn.Module) -> Callable[..., Any]:
    """The own forward of a module on the host, with its values in float64."""
    stock = _Stock(module)
    own = {name: t.detach().cpu() for name, t in (*stock.named_parameters(), *stock.named_buffers())}
    own = {name: t.double() if t.is_floating_point() else t for name, t in own.items()}
    return lambda *inputs: functional_call(stock, own, inputs)


__all__ = ["PairRadial", "radial_forms", "remove_pair_radial", "use_pair_radial"]
