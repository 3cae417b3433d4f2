"""What the commands share for printing: consoles, tables, JSON. rich is imported when something is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# A pipe has no width of its own; tables cut to 80 columns would lose their numbers.
PIPE_WIDTH = 140
# Lists longer than this are summed up in a table; --json prints them whole.
LONGEST_LIST = 12
FINGERPRINT_DIGITS = 16


def out() -> Console:
    """The console of results, standard output as it is now."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    return console


def say(text: str, style: str | None = None) -> None:
    """A sentence, wrapped by the terminal alone: square brackets and long paths stay as they are."""
    out().print(text, style=style, markup=False, soft_wrap=True)


def say_doubts(notes: Iterable[str], warnings: Iterable[str]) -> None:
    """What a user should know of the data, and what is doubtful about them."""
    for note in notes:
        say(f"note: {note}")
    for warning in warnings:
        say(f"warning: {warning}", style="yellow")


def print_json(value: Any) -> None:
    """One JSON document on standard output; numbers that are not finite become null."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, caption: str | None = None
) -> Table:
    """A plain table: the first column is text, the others are right-aligned when they hold numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    result = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for i, name in enumerate(columns):
        numeric = any(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # Text, not markup: names of files and elements may hold square brackets.
        result.add_row(*(Text(show(cell)) for cell in row))
    return result


def pairs_table(name: str, value: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """Names and values, all as text on the left."""
    return table([name, value], [(k, show(v)) for k, v in rows])


def show(value: Any) -> str:
    """A value as a person reads it; numbers that are not whole get two decimals, which align in a column."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        if math.isinf(value):
            return str(value)
        return f"{value:.2f}" if 0.05 <= abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST:
            return f"{', '.join(plain(v) for v in value[:LONGEST_LIST])}, ... ({len(value)})"
        return ", ".join(plain(v) for v in value) or "none"
    return str(value)


def plain(value: Any) -> str:
    """A number as it is, to ten digits: for energies of atoms, settings and everything that is not an error."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def elements_text(numbers: Sequence[int]) -> str:
    """Atomic numbers as symbols; a long list is cut."""
    from ase.data import chemical_symbols

    symbols = [chemical_symbols[z] for z in numbers]
    if len(symbols) > 2 * LONGEST_LIST:
        return f"{len(symbols)} elements, {symbols[0]} to {symbols[-1]}"
    return " ".join(symbols)
