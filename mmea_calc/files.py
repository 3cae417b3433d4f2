"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is there when the context ends well takes the place of `path`."""
    check_no_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as problem:
        if problem.filename is not None and Path(os.fsdecode(problem.filename)) == temporary:
            problem.filename = str(path)  # the name that was asked for
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_no_folder(path: Path) -> None:
    """Raise an IsADirectoryError where a file is to be written and a folder is, such as `.`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def check_place(*paths: Path | None) -> None:
    """Raise an OSError where a file could not be written: better known before what is to be in it is computed."""
    for path in paths:
        if path is None:
            continue
        check_no_folder(path)
        folder = path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


@contextmanager
def alone_in(folder: Path, problem: Callable[[str], Exception]) -> Iterator[None]:
    """Within this context no other process is in the same one for `folder`, which exists.

    What a killed process left there half written is removed.

    Args:
        problem: makes the error that is raised where another one is.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise problem(f"another process is writing into {folder}: wait for it to end, or stop it") from None
    except (OSError, NotImplementedError):  # a file system that knows no locks, or lets nobody write
        yield
        return
    try:
        _remove_left(folder)
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()


def _remove_left(folder: Path) -> None:
    """Remove the temporary files (`replacing`) of processes that are no more."""
    for left in folder.glob(".*.part"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether there may be such a process on this machine."""
    if os.name != "posix":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text`; an existing file is replaced only by the complete new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_ready(value: Any) -> Any:
    """`value` with what JSON lacks put into its terms: numpy numbers become plain, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item") and callable(value.item):
        return json_ready(value.item())
    return value
