"""Does the time depend on the magnitude of the inputs? ``python -m bench.cpu.magnitudes --help``.

It times additive attention of one shape over the norm of v and the standard deviation of queries and keys. The kernels
select a form of tanh by both (docs/design.md). The time must not jump at these thresholds. The cells of a pass are
timed in turns, so that ratios are reliable on a noisy machine. The project requires a ratio of at most 1.6 between the
slowest and the fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from attn_kernels import additive_attention

from .. import cases, eager, plots, report, results, timing
from ..cli import AllocatorOption, OutputOption, Run, ShapesOption, ThreadsOption, application, console, parse_shape
from ..machine import Allocator

app = application()

SHAPES = (cases.Shape(16, 50, 50, 128, 128), cases.Shape(16, 50, 50, 512, 512))
NORMS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # of v
DEVIATIONS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of queries and keys
QUICK_NORMS, QUICK_DEVIATIONS = (0.5, 64.0), (0.1, 8.0)
MOST = 1.6  # the project's requirement: slowest / fastest
TOLERANCE = 1e-4  # for contexts, relative to their largest element
SEED = 0

Place = tuple[float, float]  # norm of v, standard deviation


class Problem:
    """The arguments of a shape. Cells differ only in two factors of these."""

    def __init__(self, shape: cases.Shape) -> None:
        rng = torch.Generator().manual_seed(SEED)
        B, Tq, Tk, A, D = shape
        self.query, self.keys = torch.randn(B, Tq, A, generator=rng), torch.randn(B, Tk, A, generator=rng)
        self.values, v = torch.randn(B, Tk, D, generator=rng), torch.randn(A, generator=rng)
        self.v = v / v.norm()
        self.gradient = torch.randn(B, Tq, D, generator=rng)

    def arguments(self, norm: float, deviation: float) -> tuple[Tensor, ...]:
        return deviation * self.query, deviation * self.keys, self.values, norm * self.v

    def forward(self, arguments: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            additive_attention(*arguments, need_weights=False)

    def both(self, arguments: tuple[Tensor, ...]) -> None:
        leaves = [t.requires_grad_() for t in arguments]
        torch.autograd.grad(additive_attention(*leaves, need_weights=False).context, leaves, self.gradient)


def check(problem: Problem, place: Place) -> None:
    query, keys, values, v = problem.arguments(*place)
    arguments = query[:1], keys[:1], values[:1], v  # a sentence is enough
    got = additive_attention(*arguments, need_weights=False).context.double()
    exact = eager.additive_attention(*(t.double() for t in arguments), need_weights=False).context
    error = ((got - exact).abs().max() / exact.abs().max()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"magnitudes: |v| = {place[0]:g}, deviation {place[1]:g}: off by {error}")


def measure(shape: cases.Shape, places: list[Place], seconds: float) -> list[dict[str, Any]]:
    """Returns a row for each pass, with the ms of each place. Raises RuntimeError for wrong results."""
    problem = Problem(shape)
    for place in places:
        check(problem, place)
    passes: dict[str, Callable[[tuple[Tensor, ...]], None]] = {
        cases.FORWARD: problem.forward,
        cases.TRAINING: problem.both,
    }
    rows = []
    for name, call in passes.items():
        calls = {place: partial(call, problem.arguments(*place)) for place in places}
        timer = timing.timer_for(torch.device("cpu"))
        samples = timing.interleave(calls, timer, seconds=seconds, least_rounds=3)
        # The fastest round of each cell: with many cells, an interrupt would always make one of them the slowest.
        times = {place: min(values) for place, values in samples.items()}
        fastest, slowest = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
        rows.append(
            {
                "pass": name,
                "shape": shape._asdict(),
                "rounds": len(samples[fastest]),
                "ratio": results.rounded(times[slowest] / times[fastest]),
                "fastest": _place(fastest),
                "slowest": _place(slowest),
                "cells": [{**_place(place), "ms": results.rounded(1e3 * times[place])} for place in places],
            }
        )
    return rows


def _place(place: Place) -> dict[str, float]:
    return {"norm": place[0], "deviation": place[1]}


def table(rows: list[dict[str, Any]]) -> Table:
    columns = ("pass", "B,Tq,Tk,A,D", ">least ms", ">most ms", ">ratio", "slowest: |v|, deviation")
    shown = report.table(f"Time over the sizes of v and of queries and keys; at most {MOST:g} is asked for", *columns)
    for row in rows:
        ms = [cell["ms"] for cell in row["cells"]]
        ratio = report.times(row["ratio"], lost=row["ratio"] > MOST)
        place = ", ".join(f"{x:g}" for x in row["slowest"].values())
        sizes = ",".join(map(str, row["shape"].values()))
        shown.add_row(row["pass"], sizes, report.figure(min(ms)), report.figure(max(ms)), ratio, place)
    return shown


@app.command()
def main(
    shapes: ShapesOption = None,
    quick: Annotated[bool, typer.Option(help="Only the corners of the grid.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds per pass of a shape; at least 3 rounds.")] = 20.0,
    threads: ThreadsOption = 1,
    allocator: AllocatorOption = Allocator.reuse,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times additive attention over the norm of v and the standard deviation of queries and keys, on the CPU."""
    run = Run(threads, allocator)
    norms, deviations = (QUICK_NORMS, QUICK_DEVIATIONS) if quick else (NORMS, DEVIATIONS)
    places = [(norm, deviation) for norm in norms for deviation in deviations]
    rows: list[dict[str, Any]] = []
    with console.status("measuring"):
        for shape in map(parse_shape, shapes) if shapes else SHAPES:
            rows += measure(shape, places, seconds)
    run.finish("magnitudes", rows, table(rows), output, plots.magnitudes, threads=threads)


if __name__ == "__main__":
    app()
