"""The weights of a network that carry updates: live, folded, or put back.

Live, each weight is a torch parametrization (`torch.nn.utils.parametrize`) that applies its update at every use.
Folded, the updated tensor stands in its place and the backbone's own is kept aside. Either way single updates can be
switched off, and `remove` puts everything back, the order of names included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .methods import Site
from .updates import Update


class UpdatedWeights:
    """Weights and their updates; live at first.

    Args:
        sites: tensor path -> where the tensor is.
        updates: tensor path -> its update.

    Attributes:
        originals: while folded: tensor path -> the backbone's own tensor.
    """

    def __init__(self, sites: Mapping[str, Site], updates: Mapping[str, Update]) -> None:
        self.sites, self.updates = dict(sites), dict(updates)
        self.originals: dict[str, Tensor] = {}
        self._folded: dict[str, Tensor] = {}
        self._orders = {path: _names_in_order(site.module) for path, site in self.sites.items()}
        try:
            self._parametrize()
        except BaseException:
            self._unparametrize()
            raise

    @property
    def folded(self) -> list[str]:
        """Paths of the tensors that are folded at present."""
        return list(self._folded)

    def switch(self, value: bool, paths: Iterable[str] | None = None) -> None:
        """Use the updates of `paths` (all of them if not given), or the backbone's own tensors."""
        for path in self.updates if paths is None else paths:
            if self._folded:
                _put(self.sites[path], (self._folded if value else self.originals)[path])
            self.updates[path].active = value

    @torch.no_grad()
    def fold(self) -> None:
        """Put the updated tensors in place; they are switched on then. Nothing can be trained until `unfold`."""
        if self._folded or not self.updates:
            return
        self.switch(True)
        values = {path: site.value.detach().clone() for path, site in self.sites.items()}
        self._unparametrize()
        self.originals = {path: site.value for path, site in self.sites.items()}
        self._folded = {
            path: nn.Parameter(value, requires_grad=False) if isinstance(self.originals[path], nn.Parameter) else value
            for path, value in values.items()
        }
        self.switch(True)

    def unfold(self) -> None:
        """Undo `fold`; the updates are switched on then."""
        if self._folded:
            self._unparametrize()  # what an interruption of this left
            for path, tensor in self.originals.items():
                _put(self.sites[path], tensor)
                self.updates[path].to(tensor)  # put aside as well, while the network may have moved
            self._parametrize()
            self._folded, self.originals = {}, {}
            self.switch(True)

    @torch.no_grad()
    def refold(self) -> None:
        """Follow a change of the updates while folded."""
        for path, folded in self._folded.items():  # in place: the tensors in use stay the same objects
            update = self.updates[path]
            folded.copy_(update.applied(self.originals[path].to(next(update.parameters()))))

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within this context all updates are switched off, and then as they were."""
        before = {path: update.active for path, update in self.updates.items()}
        self.switch(False)
        try:
            yield
        finally:
            for path, active in before.items():
                self.switch(active, [path])

    def name_of_own(self, path: str) -> str:
        """Name in the network, while live, of the tensor that the update of `path` is applied to."""
        tensor = self.sites[path].tensor
        return f"{path.removesuffix(tensor)}parametrizations.{tensor}.original"

    def remove(self) -> None:
        """Leave the network's own tensors, as they were."""
        self.unfold()
        self._unparametrize()

    def _parametrize(self) -> None:
        for path, site in self.sites.items():
            parametrize.register_parametrization(site.module, site.tensor, self.updates[path])

    def _unparametrize(self) -> None:
        for site in self.sites.values():
            if parametrize.is_parametrized(site.module, site.tensor):
                parametrize.remove_parametrizations(site.module, site.tensor, leave_parametrized=False)
        for path, site in self.sites.items():
            _restore_order(site.module, self._orders[path])


def _put(site: Site, tensor: Tensor) -> None:
    """Make `tensor` the site's parameter or buffer, in its old place."""
    where: Any = site.module._parameters if site.tensor in site.module._parameters else site.module._buffers
    if (here := where[site.tensor]).dtype != tensor.dtype or here.device != tensor.device:
        tensor.data = tensor.data.to(here)  # what was put aside did not move with the network (`.to`)
    where[site.tensor] = tensor


def _names_in_order(module: nn.Module) -> tuple[list[str], list[str]]:
    return list(module._parameters), list(module._buffers)


def _restore_order(module: nn.Module, order: tuple[list[str], list[str]]) -> None:
    # torch puts a tensor that was parametrized back at the end; the order of a state_dict should not change.
    stores: tuple[Any, Any] = (module._parameters, module._buffers)
    for names, where in zip(order, stores, strict=True):
        for name in names:
            where[name] = where.pop(name)
