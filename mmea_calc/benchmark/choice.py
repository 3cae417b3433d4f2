"""One method out of several, chosen by validation errors; test errors have no say.

Of the methods whose validation error is within a few per cent of the lowest, or within one standard deviation of it
over seeds, the one with the fewest trained values is recommended: the smallest file, and the least to go astray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import TrainingError
from ..methods import METHODS
from .cells import CellResult, stem_of
from .table import Quantity, Statistic, bare_cells
from .tasks import VALID

UNITS: dict[Quantity, str] = {"energy": "meV", "forces": "meV/Å"}


@dataclass(frozen=True)
class Candidate:
    """A method that could be recommended: its validation error (MAE) and its size."""

    method: str
    error: Statistic
    parameters: int
    file_bytes: int

    def __str__(self) -> str:
        return f"{self.method} ({self.error} with {self.parameters:,} trained values)"


@dataclass(frozen=True)
class Choice:
    """What is recommended.

    Attributes:
        method: label of the method; None: the bare backbone, since no method is better.
        equal: all that count as equal to the best, the best first.
        quantity: whose validation error decided: of the forces, or of the energies where there are no forces.
        reason: sentences with the figures.
        stem: of the files of its training with the lowest validation error, where trainings are known.
    """

    method: str | None
    equal: tuple[Candidate, ...]
    quantity: Quantity
    reason: str
    stem: str | None = None


def recommend(results: Iterable[CellResult], *, tolerance: float) -> Choice:
    """Choose among the methods of a comparison.

    Args:
        results: of its cells, all of one system.
        tolerance: see `choose`.

    Raises:
        TrainingError: no method finished with all seeds, or their validation structures have no label in common.
    """
    results = list(results)
    done = [r for r in results if r.finished]
    seeds = {r.seed for r in results}
    quantity = _compared(done)
    candidates, left_out = [], []
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in done if r.method == method]
        values = [getattr(r.errors[VALID].fine_tuned, f"{quantity}_mae") for r in own]
        if not _is_equivariant(method):
            left_out.append(f"{method} is not considered: turning a structure changes its energy")
        elif {r.seed for r in own} != seeds:
            left_out.append(f"{method} is not considered: {len(own)} of {len(seeds)} trainings finished")
        else:
            largest = max(own, key=lambda r: r.parameters)
            candidates.append(Candidate(method, Statistic.of(values), largest.parameters, largest.file_bytes))
    if not candidates:
        raise TrainingError(f"no method can be recommended: {'; '.join(left_out)}")
    bare = Statistic.of([getattr(r.errors[VALID].zero_shot, f"{quantity}_mae") for r in bare_cells(done, VALID)])
    choice = choose(candidates, bare.mean, tolerance=tolerance, quantity=quantity)
    sentences = [choice.reason, *(f"{sentence}." for sentence in left_out)]
    own = [r for r in done if r.method == choice.method]
    lowest = min(own, key=lambda r: getattr(r.errors[VALID].fine_tuned, f"{quantity}_mae"), default=None)
    stem = None if lowest is None else stem_of(lowest.system, lowest.method, lowest.seed)
    return Choice(choice.method, choice.equal, choice.quantity, " ".join(sentences), stem)


def choose(candidates: Sequence[Candidate], bare: float, *, tolerance: float, quantity: Quantity = "forces") -> Choice:
    """The smallest of the methods that are as good as the best.

    Args:
        candidates: at least one.
        bare: validation error of the bare backbone, in the unit of the candidates'.
        tolerance: fraction of the lowest error within which others count as equal; one standard deviation over seeds
            of the lowest does so too.
        quantity: what the errors are of.
    """
    unit = UNITS[quantity]
    best = min(candidates, key=lambda c: (c.error.mean, c.parameters))
    if not best.error.mean < bare:
        reason = (
            f"No method is better on the validation structures than the backbone alone ({quantity} {bare:.1f} {unit}); "
            f"the best is {best}. Use the backbone as it is, or look at the data and the reference energies."
        )
        return Choice(None, (best,), quantity, reason)
    spread = best.error.std or 0.0
    margin = max(tolerance * best.error.mean, spread)
    within = [c for c in candidates if c is not best and c.error.mean <= best.error.mean + margin]
    equal = (best, *sorted(within, key=lambda c: c.error.mean))
    chosen = min(equal, key=lambda c: (c.parameters, c.file_bytes, c.error.mean))
    rule = f"{100 * tolerance:g} %" + (
        f" or one standard deviation over seeds ({spread:.2f} {unit})" if best.error.std is not None else ""
    )
    sentences = [
        f"{chosen.method} has a validation error of the {quantity} of {chosen.error} {unit}, the backbone alone "
        f"{bare:.1f}; it trains {chosen.parameters:,} values, a file of {chosen.file_bytes / 1000:,.0f} kB."
    ]
    if chosen is not best:
        sentences.append(
            f"The lowest is {best}; of the methods within {rule} of it, {', '.join(str(c) for c in equal)}, "
            f"{chosen.method} trains the fewest values."
        )
    elif within:
        sentences.append(
            f"It is the lowest, and smaller than those within {rule} of it: {', '.join(str(c) for c in within)}."
        )
    elif others := [c for c in candidates if c is not best]:
        second = min(others, key=lambda c: c.error.mean)
        sentences.append(f"It is the lowest; no other is within {rule} of it, the next is {second}.")
    if best.error.std is None:
        sentences.append("One seed: differences of a few per cent may be chance.")
    return Choice(chosen.method, equal, quantity, " ".join(sentences))


def _compared(done: Sequence[CellResult]) -> Quantity:
    """The forces, where the validation structures of all trainings have some, else the energy. Raises TrainingError."""
    quantities: tuple[Quantity, ...] = ("forces", "energy")
    for quantity in quantities:
        if all(getattr(r.errors[VALID].fine_tuned, f"{quantity}_mae") is not None for r in done):
            return quantity
    raise TrainingError(
        "with some seeds no validation structure has forces, with others none has an energy, so that methods cannot be "
        "compared: give validation structures with --valid"
    )


def _is_equivariant(label: str) -> bool:
    return METHODS[label.partition(":")[0]].equivariant
