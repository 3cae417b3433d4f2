"""The errors that a user can cause; the command line prints them as one line and exits with 1.

Every message says what was expected, what came, and what to do.
"""

from __future__ import annotations


class MMEAError(Exception):
    """Base of every error raised on purpose by this package."""


class AdapterError(MMEAError):
    """An adapter cannot be attached to this network, or its tensors do not fit."""


class AdapterFileError(MMEAError):
    """An adapter file is damaged, too new, or belongs to another backbone."""


class BackboneError(MMEAError):
    """A backbone is unknown, cannot be read, or lacks what was asked for."""


class BackboneNotFoundError(BackboneError):
    """There is no file and no known backbone of a name."""


class DataError(MMEAError):
    """Structures or labels cannot be used."""


class TrainingError(MMEAError):
    """Training cannot start, or had to stop."""


class CheckpointError(TrainingError):
    """The checkpoint of a training cannot be read, or is of another one."""


class DynamicsError(MMEAError):
    """A run of molecular dynamics cannot start, go on, or be resumed."""


class TrajectoryError(MMEAError):
    """A trajectory cannot be read or written."""


class EngineError(MMEAError):
    """Another simulation engine cannot be reached, started or driven, or does not keep to its protocol."""


class CompilationError(MMEAError):
    """A network cannot be compiled here, or a compiled one cannot be used."""


def first_line(problem: BaseException) -> str:
    """The first line of what an exception says; empty if it says nothing."""
    return next(iter(str(problem).strip().splitlines()), "")
