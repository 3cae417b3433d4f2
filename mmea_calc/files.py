"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is there when the context ends well takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
