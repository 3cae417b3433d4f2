"""Errors that a user can cause, as one line and an exit code."""

from __future__ import annotations

import typer

from mmea_calc.errors import MMEAError

INTERRUPTED = 130


def explained(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code; None for an error that is a bug and needs its traceback."""
    if isinstance(error, MMEAError):
        message, code = str(error), 1
    elif isinstance(error, OSError) and error.filename is not None and not isinstance(error, BrokenPipeError):
        message, code = f"{error.filename}: {(error.strerror or type(error).__name__).lower()}", 1
    elif isinstance(error, KeyboardInterrupt):
        message, code = ": ".join(filter(None, ["interrupted", str(error)])), INTERRUPTED
    else:
        return None
    return "mmea: " + " ".join(message.split()), code


def leave(error: BaseException) -> typer.Exit:
    """Print the line, and give the exit to raise. An error that cannot be explained is raised again."""
    if (told := explained(error)) is None:
        raise error
    typer.echo(told[0], err=True)
    return typer.Exit(told[1])
