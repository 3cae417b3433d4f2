"""Whether tensors are still what they were: for results that are kept while what they were made of stays the same.

The version counts in-place changes of a tensor and the address tells of a new storage (`tensor.data = ...`), so neither
a new tensor nor an edited one goes unseen; only edits through `tensor.data` (`.data.copy_()`), which hide from the
version by design, do. Tensors of inference mode have no version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import NamedTuple

from torch import Tensor

_versions_of = attrgetter("_version")
_values_of = methodcaller("values")


class State(NamedTuple):
    """What `same_state` compares. It holds the tensors themselves, so that no id is used again."""

    tensors: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    addresses: tuple[int, ...] = ()
    settings: tuple[object, ...] = ()


def state_of(tensors: Iterable[Tensor], *settings: object) -> State:
    """Tensors as they are, and settings that their use depends on. Asked for at every call of a network: no loops."""
    all_of_them = tuple(tensors)
    versions, addresses = tuple(map(_versions_of, all_of_them)), tuple(map(Tensor.data_ptr, all_of_them))
    return State(all_of_them, versions, addresses, settings)


def same_state(one: State, other: State) -> bool:
    """Whether two states are of the same tensors, unchanged, and of equal settings (tensors among them: the same)."""
    return (
        len(one.tensors) == len(other.tensors)
        and all(map(is_, one.tensors, other.tensors))
        and one.versions == other.versions
        and one.addresses == other.addresses
        and len(one.settings) == len(other.settings)
        and all(map(_same_setting, one.settings, other.settings))
    )


def _same_setting(one: object, other: object) -> bool:
    return one is other or (not isinstance(one, Tensor) and one == other)


class Watched:
    """The tensors of modules, and whether any of them has changed; asked for at every call of a network as well.

    Args:
        stores: dictionaries of modules. A module keeps them for life, while a change of precision replaces what is in
            them.
    """

    def __init__(self, stores: Iterable[Mapping[str, Tensor | None]]) -> None:
        self._stores = [store for store in stores if store]
        self._found: Sequence[Tensor | None] = ()
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._addresses: list[int] = []

    def changed(self) -> bool:
        """Whether they are others than at the last call of this; true at the first."""
        found: list[Tensor | None] = list(chain.from_iterable(map(_values_of, self._stores)))
        same = len(found) == len(self._found) and all(map(is_, found, self._found))
        if not same:
            self._found = found
            self._tensors = [t for t in found if t is not None and t.numel()]  # nothing in the others can change
        versions, addresses = list(map(_versions_of, self._tensors)), list(map(Tensor.data_ptr, self._tensors))
        same = same and versions == self._versions and addresses == self._addresses
        self._versions, self._addresses = versions, addresses
        return not same
