"""Runs all short examples one after the other, and prints a table of their results: ``python -m examples --help``."""

from __future__ import annotations

import importlib
import json
from typing import Annotated

import typer

from bench.cli import application, console

from . import common
from .common import FOLDER, OutputOption, QuickOption

app = application()

NAMES = ("dates", "pronunciation", "strips", "bags", "sorting", "forecast")


@app.command()
def main(
    quick: QuickOption = False,
    only: Annotated[list[str] | None, typer.Option(help="An example, by name; repeatable. All without.")] = None,
    published: Annotated[bool, typer.Option("--markdown", help="Run nothing: the table of docs/examples.md.")] = False,
    output: OutputOption = FOLDER,
) -> None:
    """Runs the short examples: each trains a model, times its step before and after, and draws a picture."""
    unknown = [name for name in only or () if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"--only must be one of {', '.join(NAMES)}, got {', '.join(unknown)}")
    names = [name for name in NAMES if not only or name in only]
    if not published:
        for name in names:
            console.rule(name)
            importlib.import_module(f".{name}", __package__).main(quick=quick, output=output)
    print(common.markdown([json.loads((output / f"{name}.json").read_text(encoding="utf-8")) for name in names]))


if __name__ == "__main__":
    app()
