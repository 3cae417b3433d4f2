"""Which entries of the backbone's weights a sparse adapter leaves unchanged (arXiv 2606.18691).

sparsity(adapter).overall        # 0.968: 96.8 % of the entries that could change do not
sparsity(adapter).by_order()     # order l of what the entries lead to -> the same fraction
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .adapted import Adapter
from .errors import AdapterError


@dataclass(frozen=True)
class PathSparsity:
    """The entries of one path in one tensor.

    Attributes:
        tensor: path of the tensor in the network.
        kind: of the tensor's site, such as "linear".
        path: the irreps that these entries connect, such as "1o -> 1o"; of a symmetric contraction the degree, the
            order and the number of the path. Empty for layers of the radial MLPs, which belong to no one path.
        order: order l of the path's output; None for radial MLPs.
        entries: how many there are.
        unchanged: how many are those of the backbone.
    """

    tensor: str
    kind: str
    path: str
    order: int | None
    entries: int
    unchanged: int


@dataclass(frozen=True)
class Sparsity:
    """Entries left unchanged, path by path; all fractions are of entries that the method could change."""

    paths: tuple[PathSparsity, ...]

    @property
    def overall(self) -> float:
        """Fraction of all entries."""
        return self._fractions(lambda p: "")[""]

    @property
    def n_entries(self) -> int:
        """Number of entries that could change."""
        return sum(p.entries for p in self.paths)

    @property
    def n_changed(self) -> int:
        """Number of entries that do."""
        return self.n_entries - sum(p.unchanged for p in self.paths)

    def by_layer(self) -> dict[str, float]:
        """Path of the tensor -> fraction."""
        return self._fractions(lambda p: p.tensor)

    def by_order(self) -> dict[str, float]:
        """Order l of the output ("0", "1", ...), or "radial" for radial MLPs -> fraction."""
        return self._fractions(lambda p: "radial" if p.order is None else str(p.order))

    def by_path(self) -> dict[str, float]:
        """Path, over all layers; the kind of the tensor for what is of no one path -> fraction."""
        return self._fractions(lambda p: p.path or p.kind)

    def to_dict(self) -> dict[str, Any]:
        """As plain, JSON-ready values."""
        return {"overall": self.overall, "by_order": self.by_order(), "paths": [asdict(p) for p in self.paths]}

    def _fractions(self, key: Callable[[PathSparsity], str]) -> dict[str, float]:
        unchanged: dict[str, int] = {}
        entries: dict[str, int] = {}
        for path in self.paths:
            name = key(path)
            unchanged[name] = unchanged.get(name, 0) + path.unchanged
            entries[name] = entries.get(name, 0) + path.entries
        return {name: unchanged[name] / entries[name] for name in entries}


def sparsity(adapter: Adapter) -> Sparsity:
    """The entries of all updated weights whose update is exactly zero at present.

    Raises:
        AdapterError: the adapter updates no weight.
    """
    if not adapter.updates:
        raise AdapterError(f"method {adapter.config.method!r} updates no weight: expected an adapter such as 'sparse'")
    with torch.no_grad(), adapter.disabled():
        weights = {path: site.value for path, site in adapter.sites.items()}
        return Sparsity(
            tuple(
                PathSparsity(path, site.kind, label, order, part.numel(), int(part.sum()))
                for path, site in adapter.sites.items()
                for label, order, part in site.by_path(adapter.updates[path].difference(weights[path]) == 0)
            )
        )


__all__ = ["PathSparsity", "Sparsity", "sparsity"]
