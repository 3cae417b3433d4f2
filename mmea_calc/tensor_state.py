"""Whether tensors are still what they were: for results that are kept while what they were made of stays the same.

The version counts in-place changes of a tensor and the address tells of a new storage (`tensor.data = ...`), so neither
a new tensor nor an edited one goes unseen; only edits through `tensor.data` (`.data.copy_()`), which hide from the
version by design, do. Tensors of inference mode have no version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

State = tuple[object, ...]


def state_of(tensors: Iterable[Tensor]) -> State:
    """What `same_state` compares. It holds the tensors themselves, so that no id is used again."""
    return tuple((t, t._version, t.data_ptr()) for t in tensors)


def same_state(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two states are of the same tensors, unchanged; other objects among them must be identical."""
    return len(one) == len(other) and all(
        a[0] is b[0] and a[1:] == b[1:] if isinstance(a, tuple) and isinstance(b, tuple) else a is b
        for a, b in zip(one, other, strict=True)
    )
