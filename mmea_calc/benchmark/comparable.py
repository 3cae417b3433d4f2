"""A column of the table is of one set of structures: what was measured on others is left out of it, and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .cells import CellResult
from .tasks import VALID

# (system, test) -> sha256 of `Dataset.hash`
Hashes = Mapping[tuple[str, str], str]


def comparable(results: Iterable[CellResult], tests: Hashes) -> tuple[list[CellResult], tuple[str, ...]]:
    """Results whose errors on a test are all of the same structures; those on validation structures stay as they are.

    Args:
        results: of cells, finished or not.
        tests: the structures that count; of a test that is not among them, those that most cells were measured on.

    Returns:
        the results without errors on other structures, and a sentence for every test that some were measured on.
    """
    results = list(results)
    counts = {**_most_frequent(results), **tests}
    kept, left_out = [], dict[str, list[str]]()
    for r in results:
        other = [t for t, m in r.errors.items() if t != VALID and m.sha256 != counts[r.system, t]]
        kept.append(replace(r, errors={t: m for t, m in r.errors.items() if t not in other}) if other else r)
        for test in other:
            left_out.setdefault(f"{r.system} → {test}" if test else r.system, []).append(f"{r.method} seed {r.seed}")
    return kept, tuple(_sentence(place, cells) for place, cells in left_out.items())


def _most_frequent(results: Sequence[CellResult]) -> Hashes:
    found: dict[tuple[str, str], Counter[str]] = {}
    for r in results:
        for test, measured in r.errors.items():
            found.setdefault((r.system, test), Counter())[measured.sha256] += 1
    return {place: counter.most_common(1)[0][0] for place, counter in found.items()}


def _sentence(place: str, cells: Sequence[str]) -> str:
    return (
        f"Left out of {place}, since measured on other test structures: {', '.join(cells)}. A call with these "
        "structures measures them anew where their adapters are there."
    )
