"""The console of the benchmarks, and the options that their commands share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from . import machine, results
from .cases import Shape
from .machine import Allocator


class Terminal(Console):
    """Prints lines of text unchanged: they often contain a path or a command that users copy.

    Rich does not wrap lines: the terminal wraps them in a way that copying undoes. Rich does not interpret markup in
    them: a path may contain brackets. Tables have the width of the terminal.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        if all(isinstance(thing, (str, Text)) for thing in objects):
            options = {"soft_wrap": True, "highlight": False, "markup": False, **options}
        super().print(*objects, **{"crop": False, **options})


console = Terminal()
errors = Terminal(stderr=True)


def application(**options: Any) -> typer.Typer:
    """A command line that prints errors and tracebacks as plain lines, without frames, which would split a path."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **options)


def progress_bars(**options: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        **options,
    )


# Options --------------------------------------------------------------------------------------------------------------

ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Number of threads for PyTorch and the kernels.")]
AllocatorOption = Annotated[
    Allocator,
    typer.Option("--allocator", help="reuse: keep freed pages, which helps eager most. default: malloc's settings."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", help="Folder for JSON and plots.", show_default=results.shown(results.LOCAL))
]
ShapesOption = Annotated[list[str] | None, typer.Option("--shape", help="B,Tq,Tk,A or B,Tq,Tk,A,D; may be repeated.")]


def parse_shape(text: str) -> Shape:
    sizes = parse_sizes(text)
    if len(sizes) == 4:
        sizes.append(sizes[3])
    if len(sizes) != 5:
        raise typer.BadParameter(f"a shape is B,Tq,Tk,A or B,Tq,Tk,A,D, five positive numbers at most; got {text!r}")
    return Shape(*sizes)


def parse_sizes(text: str) -> list[int]:
    """Parses positive numbers separated by commas; returns an empty list for anything else."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        return []
    return sizes if min(sizes) > 0 else []


def parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0]) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{name}: PyTorch finds no GPU here")
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name}: cpu or cuda")
    return device


def prepare(threads: int, allocator: Allocator) -> str:
    """Sets threads and allocator for the timing; returns a description of the allocator for the results."""
    torch.set_num_threads(threads)
    return machine.set_allocator(allocator)


def finish(tables: Iterable[Any], description: dict[str, str | int], start: float, *written: Path) -> None:
    """Prints the last lines of a command: its tables, the machine, the duration, and the files."""
    for table in tables:
        console.print(table)
    console.print(machine.as_text(description))
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s. Written: {', '.join(map(results.shown, written))}")


class Run:
    """A run of a command with one table: starts the clock and sets threads, allocator and device."""

    def __init__(self, threads: int, allocator: Allocator, device: str = "cpu") -> None:
        self.start = time.perf_counter()
        self.device = parse_device(device)
        self.allocator = prepare(threads, allocator)

    def finish(
        self,
        part: str,
        rows: list[dict[str, Any]],
        table: Any,
        output: Path,
        plot: Callable[[Path, list[dict[str, Any]], dict[str, str | int]], None] | None = None,
        variant: str = "",
        **settings: Any,
    ) -> None:
        """Writes the rows to ``<part>-<device>[-<variant>].json`` and prints the last lines.

        plot: draws the rows into a file beside it.
        """
        described = machine.describe(self.device, self.allocator)
        path = output / f"{'-'.join(filter(None, (part, self.device.type, variant)))}.json"
        results.write_json(path, {"part": part, "machine": described, "settings": settings, "rows": rows})
        written = [path]
        if plot is not None:
            written.append(path.with_suffix(".png"))
            plot(written[1], rows, described)
        finish([table], described, self.start, *written)


def rows_application(
    part: str,
    purpose: str,
    measure: Callable[[bool, float, Allocator], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], Any],
    quick_help: str = "One shape and few rounds.",
) -> typer.Typer:
    """A command for a CPU benchmark with one table: it parses the options and writes the rows to a result file.

    measure: returns the rows; its arguments are quick, seconds for each row, and the allocator.
    """
    app = application()

    @app.command(help=purpose)
    def main(
        quick: bool = typer.Option(False, help=quick_help),
        seconds: Annotated[float, typer.Option(min=0, help="Seconds for each row of the table.")] = 8.0,
        threads: ThreadsOption = 1,
        allocator: AllocatorOption = Allocator.reuse,
        output: OutputOption = results.LOCAL,
    ) -> None:
        run = Run(threads, allocator)
        with console.status("measuring"):
            rows = measure(quick, 0.2 if quick else seconds, allocator)
        run.finish(part, rows, table(rows), output, threads=threads)

    return app
