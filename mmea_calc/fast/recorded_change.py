"""A change of tensors in place, made again and again with other gradients and other numbers, recorded (`recorded`).

What an optimiser does at every step. Gradients are copied to where the recording reads them, and numbers that the host
works out, such as rates, into one small tensor. The first change that a recording makes is compared with the
function's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import first_line
from .recorded import Recording

Change = Callable[[Mapping[Tensor, Tensor], Sequence[Tensor]], None]

_SIGHTINGS = 3  # changes of one layout, before one is recorded
# Largest difference of a recorded change from the function's own, over its size: SOAP makes steps of full size of what
# is rounding alone, in directions that gradients lack.
_TOLERANCE = 0.1


class RecordedChange:
    """A change that is recorded once its layout has come some times in a row.

    Args:
        change: of gradients by parameter, and numbers, tensors without dimensions in the precision of the parameters.
    """

    def __init__(self, change: Change) -> None:
        self._change = change
        self._layout: object = None
        self._times = 0
        self._made: _Made | None = None
        self._usable = True

    def __call__(
        self,
        gradients: Mapping[Tensor, Tensor],
        numbers: Sequence[float],
        layout: tuple[object, ...],
        changed: Callable[[], Sequence[Tensor]],
    ) -> bool:
        """Make the change; False where nothing was done: it came too rarely, or cannot be recorded.

        Args:
            gradients, numbers: what it is made of.
            layout: equal for calls in which the change takes the same operations with tensors at the same addresses.
            changed: all tensors that it changes.
        """
        if not self._usable or not gradients:
            return False
        if layout != self._layout:
            self.close()
            self._layout = layout
        self._times += 1
        if self._times < _SIGHTINGS:
            return False
        try:
            if self._made is None:
                self._made = _Made(self._change, gradients, numbers, changed())
            self._made(gradients, numbers)
        except RuntimeError as problem:  # whatever torch says of what cannot be recorded
            self._usable = False
            self.close()
            warnings.warn(f"steps of the optimiser are not recorded: {first_line(problem)}", stacklevel=3)
            return False
        return True

    def close(self) -> None:
        """Forget the recording, and give its memory back."""
        if self._made is not None:
            self._made.recording.close()
        self._made, self._layout, self._times = None, None, 0


class _Made:
    """A recording, and the tensors that it reads and changes.

    Raises:
        RuntimeError: see `Recording`. All is as it was then.
    """

    def __init__(
        self, change: Change, gradients: Mapping[Tensor, Tensor], numbers: Sequence[float], changed: Sequence[Tensor]
    ) -> None:
        like = next(iter(gradients))
        self.changed = list(changed)
        self.gradients = {p: torch.empty_like(g) for p, g in gradients.items()}  # as they lie: copied as one
        self.numbers = torch.zeros(len(numbers), dtype=like.dtype, device=like.device)
        self._function = lambda: change(self.gradients, self.numbers.unbind())
        self._proven = False
        self._take(gradients, numbers)
        before = self._values()
        try:
            self.recording = Recording(self._function, like.device)
        finally:
            self._put(before)  # to record a change is to make it

    @torch.no_grad()
    def __call__(self, gradients: Mapping[Tensor, Tensor], numbers: Sequence[float]) -> None:
        self._take(gradients, numbers)
        before = None if self._proven else self._values()
        self.recording()
        # A graph does not count what it writes, and others look there for whether a value has changed.
        torch.autograd.graph.increment_version(self.changed)
        if before is None:
            return
        found = self._values()
        self._put(before)
        self._function()
        if not all(map(_agree, found, self.changed, before)):
            self._put(before)
            raise RuntimeError("what is recorded gives other results")
        self._proven = True

    def _take(self, gradients: Mapping[Tensor, Tensor], numbers: Sequence[float]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.gradients.values()), list(gradients.values()))
            # From memory that is not pinned a copy is queued with its values: nobody waits.
            self.numbers.copy_(torch.tensor(numbers, dtype=self.numbers.dtype), non_blocking=True)

    def _values(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.changed]

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.changed, list(values))


def _agree(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether the change from `before` is the expected one, as far as rounding of the values lets it be seen."""
    size, rounding = (expected - before).norm(), 4 * torch.finfo(before.dtype).eps * before.norm()
    return bool((found - expected).norm() <= _TOLERANCE * size + rounding)


__all__ = ["RecordedChange"]
