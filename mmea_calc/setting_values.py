"""Values from files and command lines as the types that settings have."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal


def as_type(value: Any, wanted: Any) -> Any:
    """`value` as the type that a setting has; YAML reads 1e-3 as text, and this makes it the number it is.

    Raises:
        ValueError: it cannot be one; the message goes on after the setting's name.
    """
    options = _alternatives(wanted)
    for option in options:
        try:
            return _as(option, value)
        except (OverflowError, TypeError, ValueError):
            continue
    expected = " or ".join(_describe(option) for option in options)
    raise ValueError(f"must be {expected}, got {value!r}")


def from_text(text: str, wanted: Any) -> Any:
    """The same for a word of a command line: `true`, `null` and `1e-3` are what YAML takes them for.

    Raises:
        ValueError: it cannot be one.
    """
    import yaml

    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        read = text
    if any(typing.get_origin(option) is tuple for option in _alternatives(wanted)) and read is not None:
        return as_type(text.split(","), wanted)
    # Only what text cannot express is taken from YAML: a word that is meant as a word may look like a number.
    return as_type(read if read is None or isinstance(read, bool) else text, wanted)


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return typing.get_args(wanted)
    return (wanted,)


def _as(wanted: Any, value: Any) -> Any:
    """`value` as `wanted`, by the rules a person expects: no number from a truth value, no 1.5 for an integer."""
    if typing.get_origin(wanted) is Literal:
        if value in typing.get_args(wanted):
            return value
        raise ValueError(value)
    if typing.get_origin(wanted) is tuple:
        return tuple(str(v) for v in ([value] if isinstance(value, str) else value))
    if wanted is type(None):
        if value is None:
            return None
        raise ValueError(value)
    if wanted is bool or isinstance(value, bool):
        if wanted is bool and isinstance(value, bool):
            return value
        raise ValueError(value)
    if wanted is int and float(value) == int(float(value)):
        return int(float(value))
    if wanted is float:
        return float(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if isinstance(wanted, type) and wanted in (str, dict) and isinstance(value, wanted):
        return value
    raise ValueError(value)


def _describe(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        return "a list of text"
    names = {
        float: "a number",
        int: "an integer",
        bool: "true or false",
        str: "text",
        Path: "a path",
        dict: "a mapping",
        type(None): "null",
    }
    return names.get(wanted, str(wanted))
