"""What the benchmarks print on, and how their commands read arguments: the same for all of them."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text


class Terminal(Console):
    """Lines of text are printed as they are: they often hold a path or a command, to be copied as a whole.

    No line is broken, which the terminal does itself in a way that copying undoes, and nothing in them is read as
    markup: a path may have brackets. Tables have the width of the terminal.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        if all(isinstance(thing, (str, Text)) for thing in objects):
            options = {"soft_wrap": True, "highlight": False, "markup": False, **options}
        super().print(*objects, **{"crop": False, **options})


console = Terminal()
errors = Terminal(stderr=True)


def application(**options: Any) -> typer.Typer:
    """A command line whose errors and tracebacks are plain lines, without the frames that would break a path."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **options)
