"""Times and rates as they are typed: 20ps, 0.5fs, 0.01/fs."""

from __future__ import annotations

import math

import typer

FEMTOSECONDS = {"fs": 1.0, "ps": 1e3, "ns": 1e6}


def femtoseconds(text: str, option: str) -> float:
    """A time with its unit. Raises typer.BadParameter."""
    words = text.strip().replace(" ", "")
    for unit, factor in FEMTOSECONDS.items():
        if words.endswith(unit):
            return (
                _number(words.removesuffix(unit), text, option, "a time with its unit, such as 20ps or 0.5fs") * factor
            )
    raise typer.BadParameter(f"expected a time with its unit, such as 20ps or 0.5fs, got {text!r}", param_hint=option)


def per_femtosecond(text: str, option: str) -> float:
    """A rate with its unit. Raises typer.BadParameter."""
    expected = "a rate with its unit, such as 0.01/fs or 10/ps"
    number, slash, unit = text.strip().replace(" ", "").partition("/")
    if not slash or unit not in FEMTOSECONDS:
        raise typer.BadParameter(f"expected {expected}, got {text!r}", param_hint=option)
    return _number(number, text, option, expected) / FEMTOSECONDS[unit]


def _number(word: str, text: str, option: str, expected: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected {expected}, got {text!r}", param_hint=option)
    return value
