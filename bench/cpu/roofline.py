"""How far the kernels are from the limits of this CPU: ``python -m bench.cpu.roofline --help``.

It first measures the machine (``ceilings``), then the ops. Each pass is compared with its bound, the larger of two
times:

- bytes: every input read once and every output written once, at the bandwidth of the cache level that holds all of
  them together;
- arithmetic: the sum of the times of pairs, exponentials and multiply-adds, each at the speed of its bare loop.

The arithmetic is float32 for every dtype: the bound does not include conversions. It also omits small terms: the
softmax, and sums over a vector. The bound holds for this form of the arithmetic; another form has another bound.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Group, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import attn_kernels
from attn_kernels.activations import ACTIVATIONS
from attn_kernels.ops import kernel

from .. import cases, cli, machine, results, timing
from ..cases import BACKWARD, FORWARD, RELU, WITH_VECTOR, Dtype, Op, Shape, Work, work_of
from ..cli import application, console
from ..machine import Allocator
from ..report import figure, table
from . import ceilings
from .ceilings import MEMORY, Cache, Ceilings, CompilerError, level_of

CPU = torch.device("cpu")


class Timed(str, Enum):
    additive_attention = Op.additive_attention.value
    activated_attention = RELU
    dot_attention = Op.dot_attention.value


# Bounds ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    level: str  # the cache level that holds inputs and outputs
    streaming: bool  # whether outputs are written with non-temporal stores
    bytes_ms: float
    arithmetic_ms: float

    @property
    def milliseconds(self) -> float:
        return max(self.bytes_ms, self.arithmetic_ms)

    @property
    def by(self) -> str:
        return "bytes" if self.bytes_ms >= self.arithmetic_ms else "math"


def bound_of(op: str, work: Work, passes: str, limits: Ceilings, caches: list[Cache]) -> Bound:
    level = level_of(work.read + work.written, caches, limits.threads)
    # Outputs larger than the last cache leave it in any case. Smaller ones may stay there for the next reader.
    streaming = level == MEMORY and work.written > caches[-1].capacity(limits.threads)
    streaming = streaming and limits.bandwidth[level].streaming_copy is not None
    pairs = limits.forward_pairs if passes == FORWARD else limits.backward_pairs
    if op == RELU and passes == FORWARD:  # the backward of relu has no loop: tanh's is used, which is not a bound
        pairs = limits.relu_pairs
    arithmetic = work.pairs / pairs + work.exponentials / limits.exponentials + work.macs / limits.macs
    return Bound(
        level,
        streaming,
        limits.bandwidth[level].milliseconds(work.read, work.written, streaming=streaming),
        arithmetic / 1e6,
    )


# The ops --------------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One line of the table: one pass of an op at one shape."""

    op: str
    shape: Shape
    label: str
    passes: str
    work: Work
    bound: Bound
    milliseconds: timing.Spread
    best: float  # ms, fastest sample

    @property
    def times_bound(self) -> float:
        return self.milliseconds.median / self.bound.milliseconds

    @property
    def gigabytes_a_second(self) -> float:
        """Counts only the bytes that must move; the kernels may move more."""
        return (self.work.read + self.work.written) / self.milliseconds.median / 1e6

    @property
    def pairs_per_ns(self) -> float:
        return self.work.pairs / self.milliseconds.median / 1e6


def calls_of(op: str, problem: cases.Problem) -> dict[str, Callable[[], object]]:
    """The functions to time: the kernels as autograd calls them. Only this function knows the signatures of the ops."""
    query, keys, values, *v = problem.inputs.values()
    others: dict[str, tuple[object, ...]] = {
        Op.additive_attention.value: (*v, None, None),
        RELU: (*v, None, ACTIVATIONS.index("relu"), 0.0),
    }
    parameters = others.get(op, (1.0,))
    masks = (problem.memory_lengths, None)
    forward, backward = kernel(op, "cpu"), kernel(f"{op}_backward", "cpu")
    alignments = forward(query, keys, values, *parameters, *masks, True)[1]
    inputs = (query, keys, values, *parameters, *masks)
    return {
        FORWARD: lambda: forward(*inputs, False),
        BACKWARD: lambda: backward(problem.grad_context, None, *inputs, alignments, True, True),
    }


def time_ops(
    chosen: list[str],
    shapes: dict[Shape, str],
    dtype: torch.dtype,
    limits: Ceilings,
    caches: list[Cache],
    seconds: float,
    progress: Progress,
) -> Iterator[Cell]:
    settings = cases.Settings(dtype, CPU, seconds, 5, False, False, cases.Lengths.none, 0)
    task = progress.add_task("ops", total=len(chosen) * len(shapes))
    for op in chosen:
        for shape, label in shapes.items():
            progress.update(task, description=f"ops: {op} ({shape})")
            calls = calls_of(op, cases.make_problem(op, shape, settings))
            for passes, call in calls.items():
                # One after the other, not in turns: each call must find in the caches what its previous call left.
                samples = timing.interleave({passes: call}, timing.timer_for(CPU), seconds=seconds, most_rounds=1000)
                taken = [1e3 * sample for sample in samples[passes]]
                work = work_of(op, shape, passes, dtype.itemsize)
                bound = bound_of(op, work, passes, limits, caches)
                yield Cell(op, shape, label, passes, work, bound, timing.spread(taken), min(taken))
            progress.advance(task)
    progress.update(task, description="ops")


# Output ---------------------------------------------------------------------------------------------------------------


def as_result(
    cells: list[Cell],
    limits: Ceilings,
    caches: list[Cache],
    dtype: Dtype,
    seconds: float,
    description: dict[str, str | int],
) -> dict[str, object]:
    def entry(cell: Cell) -> dict[str, object]:
        additive = cell.op in WITH_VECTOR
        return {
            "op": cell.op,
            "shape": cell.shape._asdict(),
            "label": cell.label,
            "passes": cell.passes,
            "milliseconds": {**cell.milliseconds._asdict(), "best": cell.best},
            "work": cell.work._asdict(),
            "GB/s": cell.gigabytes_a_second,
            "share of the bandwidth": cell.bound.bytes_ms / cell.milliseconds.median,
            "pairs per ns": cell.pairs_per_ns if additive else None,
            "cycles per 16 pairs": limits.cycles(cell.pairs_per_ns, 16) if additive else None,
            "bound": {**asdict(cell.bound), "milliseconds": cell.bound.milliseconds, "by": cell.bound.by},
            "times the bound": cell.times_bound,
            "times the bound, best": cell.best / cell.bound.milliseconds,
        }

    return results.rounded(
        {
            "part": "limits",
            "machine": description,
            "caches": [cache._asdict() for cache in caches],
            "units": "GB/s, of a copy bytes read and bytes written; others a ns; of all threads, but the clock of one",
            "limits": asdict(limits),
            "settings": {"dtype": dtype.value, "seconds": seconds, "milliseconds": "median, quartiles and best"},
            "cells": [entry(cell) for cell in cells],
        }
    )


def tables(cells: list[Cell], limits: Ceilings, dtype: Dtype, description: dict[str, str | int]) -> RenderableType:
    parts: list[RenderableType] = [bandwidth_table(limits), Text(), rates_table(limits), Text()]
    for op, passes in dict.fromkeys((cell.op, cell.passes) for cell in cells):
        parts += [op_table([cell for cell in cells if (cell.op, cell.passes) == (op, passes)], limits, dtype), Text()]
    parts.append(
        Text(
            "forward: only the context; backward: only the backward op. ms: median, and best\n"
            "sample. GB/s: counts each input and output once; %: the share of the time that\n"
            "these need at least. /ns: pairs per ns; cyc.: cycles of one thread for 16 pairs.\n"
            "in: the level that holds inputs and outputs: L1, L2, half of the last cache,\n"
            "mem: memory, nt: memory with non-temporal stores. bound: ms, by b: bytes or\n"
            "m: math (arithmetic). x: median / bound, and best / bound: if they differ much,\n"
            "other programs were using the machine."
        )
    )
    parts.append(machine.as_text(description))
    return Group(*parts)


def bandwidth_table(limits: Ceilings) -> Table:
    columns = (">buffer", ">read", ">write", ">copy", ">streaming\nwrite", ">streaming\ncopy")
    result = table(f"GB/s, {_threads(limits.threads)}", "in", *columns, show_edge=False)
    for level, rates in limits.bandwidth.items():
        size = f"{rates.buffer >> 10} KB" if rates.buffer < 1 << 20 else f"{rates.buffer >> 20} MB"
        figures = (rates.read, rates.write, rates.copy, rates.streaming_write, rates.streaming_copy)
        result.add_row(level, size, *("" if figure is None else f"{figure:.1f}" for figure in figures))
    return result


def rates_table(limits: Ceilings) -> Table:
    title = f"float32 in L1, {_threads(limits.threads)}; {limits.clock:.2f} GHz"
    result = table(title, "loop", ">per ns", ">cycles for 16", show_edge=False)
    for name, rate in (
        ("multiply-adds", limits.macs),
        ("exponentials", limits.exponentials),
        ("pairs, forward: three units share a division", limits.forward_pairs_divided),
        ("pairs, forward: three units share an estimate", limits.forward_pairs_estimated),
        ("pairs, forward: relu", limits.relu_pairs),
        ("pairs, backward: two queries share a division", limits.backward_pairs_shared),
        ("pairs, backward: a division each", limits.backward_pairs_single),
        ("pairs, backward: an estimate each", limits.backward_pairs_estimated),
    ):
        result.add_row(name, f"{rate:.1f}", f"{limits.cycles(rate, 16):.2f}")
    return result


def op_table(cells: list[Cell], limits: Ceilings, dtype: Dtype) -> Table:
    op, passes = cells[0].op, cells[0].passes
    additive = op in WITH_VECTOR
    title = f"{op}, {passes}, {dtype.value}, {_threads(limits.threads)}"
    of_pairs = [">/ns", ">cyc."] if additive else []
    columns = ("B,Tq,Tk,A", ">ms", ">best", ">GB/s", ">%", *of_pairs, "in", ">bound", ">by", ">x", ">best")
    result = table(title, *columns, show_edge=False)
    for cell in cells:
        pairs = [figure(cell.pairs_per_ns), figure(limits.cycles(cell.pairs_per_ns, 16))] if additive else []
        result.add_row(
            str(cell.shape),
            figure(cell.milliseconds.median),
            figure(cell.best),
            figure(cell.gigabytes_a_second),
            f"{100 * cell.bound.bytes_ms / cell.milliseconds.median:.0f}",
            *pairs,
            "nt" if cell.bound.streaming else "mem" if cell.bound.level == MEMORY else cell.bound.level,
            figure(cell.bound.milliseconds),
            cell.bound.by[0],
            figure(cell.times_bound),
            figure(cell.best / cell.bound.milliseconds),
        )
    return result


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


# Command line ---------------------------------------------------------------------------------------------------------

app = application()


@app.command()
def main(
    shape: cli.ShapesOption = None,
    op: Annotated[list[Timed] | None, typer.Option(help="May be repeated; default: all.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the ops; the loops compute in float32.")] = Dtype.float32,
    threads: cli.ThreadsOption = 1,
    allocator: cli.AllocatorOption = Allocator.reuse,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds for each figure of the machine, and for each line of the tables.")
    ] = 0.5,
    output: cli.OutputOption = results.LOCAL,
) -> None:
    """Measures the limits of this CPU, and compares the kernels with them. Needs a C compiler."""
    if dtype is Dtype.float64:
        raise typer.BadParameter("--dtype float64: the bounds are for float32 arithmetic")
    shapes = dict.fromkeys(map(cli.parse_shape, shape), "") if shape else cases.SHAPES
    backend = attn_kernels.backends()["cpu"]
    if not backend.available:
        _stop(f"the C++ kernels do not run here: {backend.detail}")
    try:
        loops = ceilings.compile_loops()
    except CompilerError as error:
        _stop(str(error))
    in_effect = cli.prepare(threads, allocator)
    found = ceilings.caches()
    with cli.progress_bars() as progress:
        limits = ceilings.measure(loops, found, threads, seconds, progress)
        cells = list(
            time_ops(
                [o.value for o in op or Timed], shapes, getattr(torch, dtype.value), limits, found, seconds, progress
            )
        )
    description = {**machine.describe(CPU, in_effect), "compiler of loops.c": loops.compiler}
    path = output / f"{'-'.join(['limits', 'cpu', *([] if dtype is Dtype.float32 else [dtype.value])])}.json"
    results.write_json(path, as_result(cells, limits, found, dtype, seconds, description))
    console.print(tables(cells, limits, dtype, description))
    console.print(f"Written: {results.shown(path)}")


def _stop(reason: str) -> NoReturn:
    console.print(f"No limits: {reason}", style="bold red")
    sys.exit(2)


if __name__ == "__main__":
    app()
