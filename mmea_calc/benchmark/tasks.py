"""What is trained and tested: published data sets by their files, or a user's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.dataset import Dataset, split
from ..data.reading import read_dataset
from ..errors import DataError

Measure = Literal["mae", "rmse"]

VALID = "valid"


@dataclass(frozen=True)
class Layout:
    """Where the files of a published data set are, and what the published table of it shows.

    Attributes:
        title: its name in headings.
        measure: of the table.
        level_of_theory: of its labels.
        train: file of a system's training structures, with `{system}`.
        tests: name of the test -> file, with `{system}`; a test called "" goes by the system's name.
        systems: those taken where none is named; None: all whose training file is there.
        isolated: files of isolated atoms, where there are some.
        valid_fraction: part of the training structures that validates.
        paper_E0s: reference energies that the published recipe goes with; None: isolated atoms.
    """

    title: str
    measure: Measure
    level_of_theory: str
    train: str
    tests: Mapping[str, str]
    systems: tuple[str, ...] | None = None
    isolated: tuple[str, ...] = ()
    valid_fraction: float = 0.1
    paper_E0s: str | None = None


LAYOUTS: dict[str, Layout] = {
    "rmd17": Layout(
        "revised MD17", "mae", "PBE/def2-SVP", "{system}/train.xyz", {"": "{system}/test.xyz"},
        valid_fraction=0.5, paper_E0s="average",
    ),
    "acac": Layout(
        "AcAc", "rmse", "PBE", "train_{system}.xyz",
        {
            "300 K": "test_MD_300K.xyz",
            "600 K": "test_MD_600K.xyz",
            "dihedral": "test_dihedral.xyz",
            "H transfer": "test_H_transfer.xyz",
        },
        systems=("300K",), isolated=("isolated_atoms.xyz", "iso_atoms.xyz"),
    ),
    "3bpa": Layout(
        "3BPA", "rmse", "wB97X/6-31G(d)", "train_{system}.xyz",
        {
            "300 K": "test_300K.xyz",
            "600 K": "test_600K.xyz",
            "1200 K": "test_1200K.xyz",
            "dihedral": "test_dih.xyz",
        },
        systems=("300K",), isolated=("iso_atoms.xyz", "isolated_atoms.xyz"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """Structures to train on, and to test on.

    Attributes:
        name: in tables and names of files.
        train: structures; without `valid`, a part of them validates.
        valid: structures for validation, the same for every seed.
        tests: name of the test -> structures; "" goes by the system's name.
    """

    name: str
    train: Dataset
    valid: Dataset | None = None
    tests: Mapping[str, Dataset] = field(default_factory=dict)

    def split(self, valid_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Training and validation structures of one seed. Raises DataError."""
        return split(self.train, valid_fraction, seed) if self.valid is None else (self.train, self.valid)


@dataclass(frozen=True)
class Task:
    """What is benchmarked.

    Attributes:
        name: key of `LAYOUTS`, or "comparison".
        title: in headings.
        measure: of the table.
        systems: in the order of the table.
        valid_fraction: part of the training structures that validates.
        level_of_theory: of the labels, if it is known.
        paper_E0s: reference energies under the published recipe.
        with_validation: show validation errors beside those of tests.
        notes: sentences on what is missing.
    """

    name: str
    title: str
    measure: Measure
    systems: tuple[System, ...]
    valid_fraction: float
    level_of_theory: str | None = None
    paper_E0s: str | None = None
    with_validation: bool = False
    notes: tuple[str, ...] = ()


def published_task(name: str, folder: str | Path, systems: Sequence[str] | None = None) -> Task:
    """One of the published data sets, read from `folder`. Test files that are missing are left out and noted.

    Args:
        name: key of `LAYOUTS`.
        folder: with the files that the layout names.
        systems: molecules of rMD17, training temperatures of the others ("300K"); None: the layout's.

    Raises:
        DataError: an unknown name, no training file, or a file that cannot be read.
    """
    folder = Path(folder)
    if name not in LAYOUTS:
        raise DataError(f"unknown data set {name!r}; expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the one with {layout.train.format(system='NAME')}")
    chosen = list(dict.fromkeys(systems or layout.systems or _present(folder, layout)))
    if not chosen:
        raise DataError(f"{folder} has no {layout.train.format(system='NAME')}; is it the folder of {layout.title}?")
    if absent := [s for s in chosen if not (folder / layout.train.format(system=s)).is_file()]:
        there = ", ".join(_present(folder, layout)) or "none"
        files = ", ".join(str(folder / layout.train.format(system=s)) for s in absent)
        raise DataError(f"no such training file: {files}; those that are there: {there}")
    isolated = next(([folder / file] for file in layout.isolated if (folder / file).is_file()), [])
    notes = []
    if layout.isolated and not isolated:
        notes.append(f"{folder / layout.isolated[0]} is missing: reference energies are estimated")
    read = []
    for system in chosen:
        tests = {test: folder / file.format(system=system) for test, file in layout.tests.items()}
        for test in [t for t, file in tests.items() if not file.is_file()]:
            notes.append(f"{tests.pop(test)} is missing: its column is left out")
        if not tests:
            notes.append(f"{system}: no test file is there, so errors on the validation structures are shown")
        train = read_dataset([folder / layout.train.format(system=system), *isolated])
        read.append(System(system, train, tests={test: read_dataset(file) for test, file in tests.items()}))
    return Task(
        name, layout.title, layout.measure, tuple(read), layout.valid_fraction, layout.level_of_theory,
        layout.paper_E0s, notes=tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def own_task(
    train: Dataset,
    *,
    valid: Dataset | None = None,
    test: Dataset | None = None,
    valid_fraction: float,
    level_of_theory: str | None = None,
) -> Task:
    """A comparison on one's own data: mean absolute errors on validation structures and, if given, test structures."""
    name = Path(train.name.split(",")[0]).stem
    system = System(name, train, valid, {} if test is None else {"test": test})
    return Task(
        "comparison", train.name, "mae", (system,), valid_fraction, level_of_theory, with_validation=True
    )  # fmt: skip


def _present(folder: Path, layout: Layout) -> list[str]:
    """Names whose training file is in the folder."""
    before, after = layout.train.split("{system}")
    found = sorted(folder.glob(f"{before}*{after}"))
    return [str(file.relative_to(folder))[len(before) : -len(after)] for file in found]
