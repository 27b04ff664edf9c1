"""Is ours ever slower than eager PyTorch? ``python -m bench.cpu.sweep --help``.

It times both ops, forward alone and with backward, over a grid of sizes. The project requires 0.97x eager or more in
every cell. A cell gets little time, because there are thousands of cells. Cells below the bound are timed again at the
end, for longer, so that noise is not reported as a loss. Each finished cell is stored at once and survives an
interrupt.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attn_kernels.backends import choose

from .. import cases, machine, plots, results, timing
from ..cases import FORWARD, SHORT, TRAINING, Dtype, Op, Shape
from ..cli import AllocatorOption, OutputOption, ThreadsOption, application, console, progress_bars
from ..machine import Allocator
from ..report import figure, table, times
from . import ops
from .grid import (
    LONG_CALL,
    QUICK,
    Cell,
    Grid,
    Limits,
    Measured,
    Settings,
    expected_seconds,
    expected_total,
    plan,
)
from .progress import ProgressFile, as_json, code_digest

CPU = torch.device("cpu")
OPS = tuple(op.value for op in Op)
LEAST = 0.97  # the project's requirement
SEED = 0

AGAIN_SECONDS = 1.0
AGAIN_ROUNDS, AGAIN_ROUNDS_LONG = 21, 5


class Pass(str, Enum):
    forward = "forward"
    training = "training"


PASSES = {Pass.forward: FORWARD, Pass.training: TRAINING}


# Times ----------------------------------------------------------------------------------------------------------------


class Inputs:
    """The inputs of the cells. The large ones, keys and values, are reused while (B, Tk, A) stays the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sizes: tuple[int, int, int] | None = None
        self.memory: list[Tensor] = []

    def problem(self, op: str, shape: Shape) -> cases.Problem:
        batch, queries, steps, units, width = shape
        if self.sizes != (batch, steps, units):
            self.memory = []  # frees the old tensors before new ones are made
            generator = torch.Generator().manual_seed(SEED)
            self.memory = [self._normal(generator, batch, steps, size) for size in (units, width)]
            self.sizes = batch, steps, units
        keys, values = self.memory
        generator = torch.Generator().manual_seed(SEED + 1)
        query = self._normal(generator, batch, queries, units)
        inputs = {"query": query if op == "additive_attention" else query * units**-0.5, "keys": keys, "values": values}
        if op == "additive_attention":
            inputs["v"] = self._normal(generator, units) * units**-0.5
        return cases.Problem(inputs, self._normal(generator, batch, queries, width), None)

    def _normal(self, generator: torch.Generator, *size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(self.dtype)


def time_cell(cell: Cell, inputs: Inputs, settings: Settings, *, again: bool = False) -> None:
    """Compares the contexts, then times ours and eager in turns. A failure of ours is stored in ``cell.failure``."""
    problem = inputs.problem(cell.op, cell.shape)
    training = cell.passes == TRAINING
    plain = cases.Settings(inputs.dtype, CPU, 0, 1, False, False, cases.Lengths.none, SEED)
    name, found = ops.make_providers(cell.op, problem, plain)
    providers = {provider.name: provider for provider in found}
    ours = providers[name]
    start = time.perf_counter()
    try:
        expected = cases.expected_results(cell.op, problem, training=False)
    except (RuntimeError, MemoryError) as error:
        cell.not_run = f"eager failed: {first_line(error)}"
        return
    forward = time.perf_counter() - start
    cases.check(ours, problem, expected, training=False)
    del expected
    if ours.failure is not None:
        cell.failure = ours.failure
        return
    share = expected_seconds(*cell.key) / expected_seconds(cell.op, cell.shape, FORWARD)
    long = forward * share > LONG_CALL
    if again:
        seconds, rounds = AGAIN_SECONDS, AGAIN_ROUNDS_LONG if long else AGAIN_ROUNDS
    else:
        seconds, rounds = settings.seconds, settings.rounds_long if long else settings.rounds
    calls = {"ours": cases.bind(ours, problem, training=training)}
    calls["eager"] = cases.bind(providers["eager"], problem, training=training)
    try:
        samples = timing.interleave(calls, timing.timer_for(CPU), seconds=seconds, least_rounds=rounds)
    except (RuntimeError, MemoryError) as error:
        cell.failure = f"{type(error).__name__}: {first_line(error)}"
        return
    measured = Measured(
        1e3 * timing.spread(samples["ours"]).median,
        1e3 * timing.spread(samples["eager"]).median,
        timing.ratios(samples, "eager", "ours"),
        len(samples["ours"]),
    )
    if again:
        cell.again = measured
    else:
        cell.first = measured


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def run(cells: list[Cell], settings: Settings, least: float, progress_file: ProgressFile) -> None:
    """Times the cells that are not timed yet, then times those below the bound once more."""
    inputs = Inputs(getattr(torch, settings.dtype))
    with progress_bars() as progress:
        for cell in tracked(progress, "sweep", [cell for cell in cells if not cell.done]):
            time_cell(cell, inputs, settings)
            progress_file.add(cell)
        below = [cell for cell in cells if cell.again is None and is_below(cell, least)]
        for cell in tracked(progress, "again", below):
            time_cell(cell, inputs, settings, again=True)
            progress_file.add(cell)


def is_below(cell: Cell, least: float) -> bool:
    return cell.ratio is not None and cell.ratio < least


def tracked(progress: Progress, what: str, cells: list[Cell]) -> Iterator[Cell]:
    if not cells:
        return
    task = progress.add_task(what, total=len(cells))
    for cell in cells:
        progress.update(
            task, description=f"{what}: {cell.op.removesuffix('_attention')} {SHORT[cell.passes]} {cell.shape}"
        )
        yield cell
        progress.advance(task)
    progress.update(task, description=what)


# Output ---------------------------------------------------------------------------------------------------------------


def as_result(
    cells: list[Cell], settings: Settings, limits: Limits, least: float, description: dict[str, str | int]
) -> dict[str, object]:
    return {
        "part": "sweep",
        "machine": description,
        "settings": {
            "dtype": settings.dtype,
            "ours": choose(None, "cpu"),
            "seconds a cell": settings.seconds,
            "least rounds": settings.rounds,
            "least rounds of long calls": settings.rounds_long,
            "most memory, GB": limits.memory_gb,
            "most seconds a call": limits.seconds,
            "least ratio": least,
            "package digest": code_digest(),
            "first, again": "medians in ms; ratio: eager / ours within rounds, median and quartiles; above 1 where "
            "ours is faster. again: the longer measurement of a cell that was below the least ratio; it is what counts",
        },
        "summary": {
            f"{op}, {p}": {"cells": len(ratios), **results.rounded(figures(ratios))}
            for (op, p), ratios in by_panel(cells).items()
            if ratios
        },
        "not run": dict(reasons(cells)),
        "cells": [as_json(cell) for cell in cells],
    }


def ratios_by_panel(cells: list[Cell]) -> dict[tuple[str, str], dict[Shape, float | None]]:
    """The ratios for the heat map: None if ours failed, NaN if the cell was not run."""
    panels: dict[tuple[str, str], dict[Shape, float | None]] = {}
    for cell in cells:
        panel = panels.setdefault((cell.op, cell.passes), {})
        panel[cell.shape] = cell.ratio if cell.ratio is not None or cell.failure is not None else math.nan
    return panels


def by_panel(cells: list[Cell]) -> dict[tuple[str, str], list[float]]:
    panels: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        ratios = panels.setdefault((cell.op, cell.passes), [])
        if cell.ratio is not None:
            ratios.append(cell.ratio)
    return panels


def figures(ratios: list[float]) -> dict[str, float]:
    geometric = math.exp(statistics.fmean(map(math.log, ratios)))
    return {"lowest": min(ratios), "median": statistics.median(ratios), "geometric mean": geometric}


def reasons(cells: list[Cell]) -> Counter[str]:
    return Counter(cell.not_run for cell in cells if cell.not_run is not None)


def report(cells: list[Cell], least: float, description: dict[str, str | int]) -> RenderableType:
    """Tables: all cells below the bound (at least the ten lowest), the summary, and the machine."""
    timed = sorted((cell for cell in cells if cell.ratio is not None), key=lambda cell: cell.ratio or 0.0)
    below = [cell for cell in timed if is_below(cell, least)]
    parts: list[RenderableType] = []
    if timed and len(below) < 10:
        parts.append(cell_table("The ten lowest", timed[:10], least))
    if below:
        parts.append(cell_table(f"All below {least:g}x eager", below, least))
    parts.append(summary_table(cells, least))
    not_run = reasons(cells)
    if not_run:
        listed = "; ".join(f"{reason}: {count}" for reason, count in not_run.most_common())
        parts.append(Text(f"Not run: {not_run.total()} of {len(cells)} cells ({listed})."))
    for cell in cells:
        if cell.failure is not None:
            parts.append(Text(f"No time for ours: {cell.op} ({cell.shape}) {cell.passes}: {cell.failure}", "bold red"))
    once = sum(cell.again is not None for cell in cells)
    parts.append(
        Text(f"x: time of eager / time of ours, median over rounds. Timed again at more length: {once} cells.")
    )
    if below:
        parts.append(Text(f"{len(below)} cells remain below {least:g}x eager.", "bold red"))
    elif timed:
        parts.append(Text(f"No cell is below {least:g}x eager.", "bold green"))
    parts.append(machine.as_text(description))
    return Group(*parts)


def summary_table(cells: list[Cell], least: float) -> Table:
    columns = (">cells", ">not run", ">failed", f"><{least:g}", ">lowest", ">median", ">geo. mean")
    result = table("Eager / ours", "op", "pass", *columns)
    for (op, p), ratios in by_panel(cells).items():
        own = [cell for cell in cells if (cell.op, cell.passes) == (op, p)]
        not_run = sum(cell.not_run is not None for cell in own)
        failed = sum(cell.failure is not None for cell in own)
        below = sum(is_below(cell, least) for cell in own)
        shown = [f"{value:.2f}x" for value in figures(ratios).values()] if ratios else ["-"] * 3
        result.add_row(
            op.removesuffix("_attention"), SHORT[p], str(len(ratios)), str(not_run), str(failed), str(below), *shown
        )
    return result


def cell_table(title: str, cells: list[Cell], least: float) -> Table:
    result = table(title, "op", "pass", "B,Tq,Tk,A", ">ours ms", ">eager ms", ">first", ">again")

    def ratio(measured: Measured | None) -> str:
        if measured is None:
            return ""
        return times(measured.ratio.median, digits=3, lost=measured.ratio.median < least)

    for cell in cells:
        last = cell.again or cell.first
        if last is not None:
            ms = figure(last.ours), figure(last.eager)
            result.add_row(cell.op, SHORT[cell.passes], str(cell.shape), *ms, ratio(cell.first), ratio(cell.again))
    return result


# Command line ---------------------------------------------------------------------------------------------------------


def benchmark(
    *,
    grid: Grid | None = None,
    op_names: Sequence[str] = OPS,
    passes: Sequence[str] = (FORWARD, TRAINING),
    settings: Settings | None = None,
    limits: Limits | None = None,
    least: float = LEAST,
    output: Path = results.LOCAL,
    resume: bool = False,
    quick: bool = False,
) -> tuple[list[Path], list[Cell]]:
    """Runs, prints and stores the sweep; returns the files and all cells. ValueError: it cannot resume."""
    grid = grid or (QUICK if quick else Grid())
    settings, limits = settings or Settings(), limits or Limits()
    torch.set_num_threads(settings.threads)
    stem = "-".join(["sweep-cpu", *([] if settings.dtype == "float32" else [settings.dtype]), *(["quick"] * quick)])
    cells = plan(grid, op_names, passes, limits)
    progress_file = ProgressFile(
        output / f"{stem}.partial.jsonl",
        {
            **vars(settings),
            "package": code_digest(),
            "torch": torch.__version__,
            "processor": machine.processor(),
        },
    )
    if resume and progress_file.path.exists():
        console.print(f"Taken over: {progress_file.resume(cells)} cells")
    else:
        progress_file.start()
    if choose(None, "cpu") == "reference":
        console.print("No fused backend runs on the CPU here; ours is the reference.", style="bold red")
    left_out, minutes = reasons(cells).total(), expected_total(cells, settings) / 60
    to_do = sum(not cell.done for cell in cells)
    console.print(
        f"{to_do} cells to time, about {max(1, round(minutes))} min plus repeats; {left_out} left out",
    )
    in_effect = machine.set_allocator(Allocator(settings.allocator))
    run(cells, settings, least, progress_file)
    description = machine.describe(CPU, in_effect)
    result, picture = output / f"{stem}.json", output / f"{stem}.png"
    results.write_json(result, as_result(cells, settings, limits, least, description))
    plots.sweep(picture, ratios_by_panel(cells), description, settings.dtype, least)
    progress_file.remove()
    console.print(report(cells, least, description))
    return [result, picture], cells


app = application()


@app.command()
def main(
    op: Annotated[list[Op] | None, typer.Option(help="May be repeated; default: both.")] = None,
    pass_: Annotated[list[Pass] | None, typer.Option("--pass", help="May be repeated; default: both.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="B; may be repeated.")] = None,
    queries: Annotated[list[int] | None, typer.Option(min=1, help="Tq; may be repeated.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Tk; may be repeated.")] = None,
    units: Annotated[list[int] | None, typer.Option(min=1, help="A and D; may be repeated.")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    threads: ThreadsOption = 1,
    allocator: AllocatorOption = Allocator.reuse,
    least: Annotated[float, typer.Option(min=0, help="Required eager / ours; lower cells are timed again.")] = LEAST,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for the rounds of one cell.")] = Settings.seconds,
    rounds: Annotated[int, typer.Option(min=1, help="Minimum rounds of a cell; 2 for long calls.")] = Settings.rounds,
    most_memory: Annotated[
        float, typer.Option(min=0, help="GB; cells with a larger working set are left out.")
    ] = Limits.memory_gb,
    most_seconds: Annotated[
        float, typer.Option(min=0, help="Leave out cells where an eager call is expected to take more seconds.")
    ] = Limits.seconds,
    output: OutputOption = results.LOCAL,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted sweep in that folder.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A coarse grid, under two minutes.")] = False,
) -> None:
    """Times additive_attention and dot_attention against eager PyTorch over a grid of sizes. This takes 20 to 30
    minutes on one core. The exit code is 1 if a cell is slower than eager (below --least) or if ours failed in a cell.
    """
    axes = {"batch": batch, "queries": queries, "steps": steps, "units": units}
    chosen = {name: tuple(sorted(set(sizes))) for name, sizes in axes.items() if sizes}
    try:
        written, cells = benchmark(
            grid=(QUICK if quick else Grid())._replace(**chosen),
            op_names=[o.value for o in dict.fromkeys(op or Op)],
            passes=[PASSES[p] for p in dict.fromkeys(pass_ or Pass)],
            settings=Settings(
                dtype.value, threads, allocator.value, seconds, rounds, min(rounds, Settings.rounds_long)
            ),
            limits=Limits(most_memory, most_seconds, 8 if dtype is Dtype.float64 else 4),
            least=least,
            output=output,
            resume=resume,
            quick=quick,
        )
    except ValueError as error:
        raise typer.BadParameter(f"{error}. A new sweep starts without --resume.", param_hint="--resume") from None
    except KeyboardInterrupt:
        console.print("Interrupted. The same command with --resume goes on from here.")
        sys.exit(130)
    console.print("Written: " + ", ".join(results.shown(path) for path in written))
    sys.exit(1 if any(is_below(cell, least) or cell.failure is not None for cell in cells) else 0)


if __name__ == "__main__":
    app()
