"""Options that take several values: `--temperature 300 600 1200`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typer.core import TyperCommand


def several_values(options: Mapping[str, Callable[[str], bool]]) -> type[TyperCommand]:
    """A class of commands whose `options` take every word that follows, as long as the word suits the option."""

    class SeveralValues(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            spread: list[str] = []
            option: str | None = None
            for word in args:
                if word in options:
                    option = word
                elif option is not None and options[option](word):
                    if spread[-1] != option:
                        spread.append(option)
                else:
                    option = None
                spread.append(word)
            return super().parse_args(ctx, spread)

    return SeveralValues


def is_number(word: str) -> bool:
    """Whether the word is a number, also a negative one."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def is_setting(word: str) -> bool:
    """Whether the word gives a setting a value."""
    return not word.startswith("-") and "=" in word


def any_word(word: str) -> bool:
    """Whether the word is no option: arguments stand before such an option, or after another one."""
    return not word.startswith("-")
