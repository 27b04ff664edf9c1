"""Times the ops against eager PyTorch, torch.compile and SDPA: ``python -m bench.cpu.ops --help``.

For every shape, first the results and gradients of each way are compared with the eager formula, and the peak memory of
each is taken; what computes something else gets no time. Then the ways take turns (``timing.py``).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import attn_kernels
from attn_kernels.backends import choose

from .. import eager, machine, plots, results, timing
from ..cases import (
    FORWARD,
    GPU_SHAPES,
    SHAPES,
    TRAINING,
    Lengths,
    Problem,
    Settings,
    Shape,
    Way,
    bind,
    check,
    expected_results,
    make_problem,
)
from ..cli import application, console
from ..machine import Allocator


class Op(str, Enum):
    additive_attention = "additive_attention"
    dot_attention = "dot_attention"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


QUICK_SHAPES = (Shape(64, 1, 50, 512, 512), Shape(32, 50, 50, 512, 512))

SHORT = {FORWARD: "fwd", TRAINING: "fwd+bwd"}
BASELINES = ("eager", "torch.compile", "sdpa")

LEAST_CALLS = 8  # of each way: results, memory, warming up, and three rounds
FEW_ROUNDS = 5  # from fewer, a median is shown with its quartiles


@dataclass
class Cell:
    """One line of the table: an op at one shape, forward or forward and backward."""

    op: str
    shape: Shape
    passes: str
    label: str
    ours: str  # the name of the way that is ours; the backend's name
    ways: list[Way] = field(default_factory=list)
    rounds: int = 0  # that the times are of; 0: it was left out, or nothing in it ran
    left_out: bool = False  # there was no time for it
    seconds_of_check: float = 0.0  # what was spent before the rounds, most of it on compilation
    seconds_a_round: float = 0.0

    @property
    def work(self) -> int:
        """Products of one pass over all pairs of a query and a step."""
        return self.shape.B * self.shape.Tq * self.shape.Tk * (self.shape.A + self.shape.D)

    def way(self, name: str) -> Way | None:
        return next((way for way in self.ways if way.name == name), None)


def make_ways(op: str, problem: Problem, settings: Settings) -> tuple[str, list[Way]]:
    """The name of ours, and all ways: each backend that runs here, eager, torch.compile in its variants, SDPA."""
    masks = {"memory_lengths": problem.memory_lengths, "need_weights": settings.need_weights}

    def way(name: str, function: Callable[..., attn_kernels.Attention], detail: str = "", **keywords: object) -> Way:
        bound = functools.partial(function, **{**masks, **keywords})
        return Way(name, lambda *tensors: bound(*tensors).context, detail)

    def compiled(function: Callable[..., attn_kernels.Attention], detail: str) -> Way:
        plain = way("torch.compile", function, detail)
        assert plain.function is not None
        plain.function = torch.compile(plain.function, dynamic=False)
        return plain

    device_type = settings.device.type
    ours = choose(None, device_type)
    public = getattr(attn_kernels, op)
    backends = [ours]
    if device_type == "cuda":
        backends += [name for name in ("cuda", "triton") if name != ours and attn_kernels.backends()[name].available]
    keywords = {}
    if settings.prepared and op == "additive_attention":
        keywords["prepared"] = attn_kernels.prepare_keys(problem.inputs["keys"], backend=ours)  # once, not in each call
    # Ours as users call it: without a name, which leaves the smallest dot attentions to PyTorch's own calls.
    ways = [way(name, public, backend=None if name == ours else name, **keywords) for name in backends]
    ways.append(way("eager", getattr(eager, op)))
    if settings.compile and op == "additive_attention":
        ways.append(compiled(eager.additive_attention, "sum as tanh(...) @ v"))
        ways.append(compiled(eager.additive_attention_sum, "sum as (tanh(...) * v).sum(-1)"))
    elif settings.compile:
        ways.append(compiled(eager.dot_attention, ""))
    if op == "dot_attention":
        ways.append(way("sdpa", eager.sdpa_dot_attention, "returns no alignments", need_weights=False))
    return ours, ways


def measure(cell: Cell, settings: Settings, allocator: Allocator, budget: timing.Budget) -> str:
    """Compares the results of all ways; takes peak memory and times of those that are right.

    Returns what the allocator was for the times. ``budget`` is for the rounds: what comes before them takes what it
    takes.
    """
    training = cell.passes == TRAINING
    torch.compiler.reset()
    problem = make_problem(cell.op, cell.shape, settings)
    machine.set_allocator_for_memory(allocator)
    start = time.perf_counter()
    expected = expected_results(cell.op, problem, training=training)
    cell.ours, cell.ways = make_ways(cell.op, problem, settings)
    for way in cell.ways:
        check(way, problem, expected, training=training)
    del expected
    calls = {str(i): bind(way, problem, training=training) for i, way in enumerate(cell.ways) if way.failure is None}
    for i, call in calls.items():
        cell.ways[int(i)].memory_mb = machine.peak_memory(call, settings.device)
    cell.seconds_of_check = time.perf_counter() - start
    in_effect = machine.set_allocator(allocator)
    time_ways(cell, calls, settings, budget)
    for way in cell.ways:
        way.function = None  # lets go of the inputs
    cell.ways = one_compiled(cell.ways)
    return in_effect


def time_ways(cell: Cell, calls: dict[str, Callable[[], object]], settings: Settings, budget: timing.Budget) -> None:
    """calls: by the place of their way in the cell."""
    timer = timing.timer_for(settings.device)
    variants = {i: call for i, call in calls.items() if cell.ways[int(i)].name == "torch.compile"}
    if len(variants) > 1:  # only the faster one goes on
        tried = timing.interleave(variants, timer, seconds=0, least_rounds=3, at_most=budget.left / 4)
        fastest = min(variants, key=lambda i: timing.spread(tried[i]).median)
        calls = {i: call for i, call in calls.items() if i not in variants or i == fastest}
    seconds = min(settings.seconds, budget.left)
    samples = timing.interleave(
        calls, timer, seconds=seconds, least_rounds=settings.rounds, at_most=max(settings.seconds, budget.left)
    )
    for i in calls:
        way = cell.ways[int(i)]
        way.milliseconds = timing.Spread(*(1e3 * seconds for seconds in timing.spread(samples[i])))
        if "0" in calls:
            way.times_ours = timing.ratios(samples, i, "0")
        cell.rounds = len(samples[i])
        cell.seconds_a_round += timing.spread(samples[i]).median


def one_compiled(ways: list[Way]) -> list[Way]:
    """Of the variants of torch.compile, the one that was timed; where none was, the first with its reason."""
    compiled = [way for way in ways if way.name == "torch.compile"]
    kept = next((way for way in compiled if way.milliseconds is not None), compiled[0] if compiled else None)
    return [way for way in ways if way.name != "torch.compile" or way is kept]


def plan(ops: list[Op], shapes: dict[Shape, str], passes: list[str]) -> list[Cell]:
    return [Cell(op.value, shape, p, label, "") for op in ops for shape, label in shapes.items() for p in passes]


def run(cells: list[Cell], settings: Settings, allocator: Allocator, budget: timing.Budget) -> str:
    """Fills in the cells, with a progress bar; returns what the allocator was for the times.

    With a budget, a cell that would take longer than what is left is left out, and said to be so.
    """
    in_effect = ""
    with progress_bars() as progress:
        task = progress.add_task("ops", total=budget.seconds or len(cells))
        in_turn = sorted(cells, key=lambda cell: [other.shape for other in cells].index(cell.shape))  # the ops in turn
        for done, cell in enumerate(in_turn):
            progress.update(task, description=f"{cell.op} ({cell.shape}) {cell.passes}")
            cell.left_out = expected_seconds(cell, in_turn[:done]) > budget.left
            if not cell.left_out:
                share = budget.left / (len(cells) - done)
                in_effect = measure(cell, settings, allocator, timing.Budget(max(share, settings.seconds)))
            progress.update(task, completed=done + 1 if budget.seconds is None else min(budget.spent, budget.seconds))
        progress.update(task, description="ops", completed=budget.seconds or len(cells))
    return in_effect


def expected_seconds(cell: Cell, others: list[Cell]) -> float:
    """What a cell will take, from the last one of its kind: compilation as long, and calls by their work."""
    alike = [other for other in others if (other.op, other.passes) == (cell.op, cell.passes) and other.rounds]
    if not alike:
        return 0.0
    round_ = alike[-1].seconds_a_round * cell.work / alike[-1].work
    return min(other.seconds_of_check for other in alike) + LEAST_CALLS * round_


def progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


# Output ---------------------------------------------------------------------------------------------------------------


def as_result(cells: list[Cell], settings: Settings, description: dict[str, str | int]) -> dict[str, object]:
    def spread(values: timing.Spread | None) -> dict[str, float] | None:
        return None if values is None else {k: round(v, 5) for k, v in values._asdict().items()}

    def as_json(way: Way) -> dict[str, object]:
        entry = asdict(way)
        del entry["function"]
        return {**entry, "milliseconds": spread(way.milliseconds), "times_ours": spread(way.times_ours)}

    return {
        "part": "ops",
        "machine": description,
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "seconds a cell": settings.seconds,
            "alignments returned": settings.need_weights,
            "lengths": settings.lengths.value,
            "keys prepared": settings.prepared,
            "seed": settings.seed,
            "memory": "peak during one call beyond what is held before it, MB",
            "milliseconds": "median and quartiles over interleaved rounds",
            "times_ours": "median and quartiles of the ratios within rounds; above 1 where ours is faster",
        },
        "cells": [
            {
                "op": cell.op,
                "shape": cell.shape._asdict(),
                "label": cell.label,
                "passes": cell.passes,
                "ours": cell.ours,
                "rounds": cell.rounds,
                "left out": cell.left_out,
                "ways": [as_json(way) for way in cell.ways],
            }
            for cell in cells
        ],
    }


def tables(cells: list[Cell], description: dict[str, str | int], settings: Settings) -> RenderableType:
    """One table for each op, then what did not run and why, then where all this was measured."""
    parts: list[RenderableType] = []
    notes: list[str] = []
    dtype = str(settings.dtype).removeprefix("torch.")
    for op in dict.fromkeys(cell.op for cell in cells):
        how = ", keys prepared" if settings.prepared and op == "additive_attention" else ""
        parts.append(op_table(op + how, [cell for cell in cells if cell.op == op], dtype, notes))
    parts += [Text(f"[{number}] {note}") for number, note in enumerate(notes, 1)]
    parts.append(Text("ms: median over interleaved rounds. x: time of the other / time of ours, median over rounds."))
    parts.append(Text("Below 1x!: ours loses. MB: peak memory of one call: ours / eager / torch.compile."))
    if any(0 < cell.rounds < FEW_ROUNDS for cell in cells):
        parts.append(Text(f"In parentheses: the quartiles, where there was time for fewer than {FEW_ROUNDS} rounds."))
    if any(cell.left_out for cell in cells):
        parts.append(Text("left out: there was no time for it. python -m bench.cpu.ops measures all."))
    parts.append(machine.as_text(description))
    return Group(*parts)


def op_table(op: str, cells: list[Cell], dtype: str, notes: list[str]) -> Table:
    others = {
        "eager": "eager",
        "torch.compile": "compile",
        **({"sdpa": "SDPA"} if cells[0].op == "dot_attention" else {}),
    }
    ours = next((cell.ours for cell in cells if not cell.left_out), "left out")
    title = f"{op}, {dtype}, ours: {ours}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("B,Tq,Tk,A", "pass"):
        result.add_column(column, no_wrap=True)
    for column in ("ms", *others.values(), "MB"):
        result.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        if cell.left_out:
            result.add_row(str(cell.shape), SHORT[cell.passes], "[yellow]left out[/]")
            continue
        memory = " / ".join(megabytes(cell.way(name)) for name in (cell.ours, "eager", "torch.compile"))
        ratios = [times_ours(cell.way(name), notes, cell.rounds) for name in others]
        result.add_row(str(cell.shape), SHORT[cell.passes], milliseconds(cell.way(cell.ours), notes), *ratios, memory)
        for way in cell.ways:
            if way.name != cell.ours and way.name not in BASELINES:  # another backend of ours
                blanks = [""] * (len(others) - 1)
                row = [f"  {way.name}", "", milliseconds(way, notes), times_ours(way, notes), *blanks, megabytes(way)]
                result.add_row(*row)
    return result


def milliseconds(way: Way | None, notes: list[str]) -> str:
    if way is None or way.milliseconds is None:
        return failed(way, notes)
    return f"{way.milliseconds.median:.3g}"


def times_ours(way: Way | None, notes: list[str], rounds: int = FEW_ROUNDS) -> str:
    """A ratio; one that ours loses stands out, in colour and in plain text. Of few rounds, with its quartiles."""
    if way is None or way.times_ours is None:
        return failed(way, notes)
    ratio, shown = way.times_ours.median, quartiles(way.times_ours, rounds)
    return f"[bold red]{ratio:.2f}x!{shown}[/]" if round(ratio, 2) < 1 else f"{ratio:.1f}x {shown}"


def quartiles(values: timing.Spread, rounds: int) -> str:
    """Beside a median of few rounds, which is not to be taken for more than it is."""
    if rounds >= FEW_ROUNDS:
        return ""
    return " (1 round)" if rounds == 1 else f" ({values.low:.2f}-{values.high:.2f})"


def failed(way: Way | None, notes: list[str]) -> str:
    if way is None or way.failure is None:
        return "-"
    note = f"{way.name}: {way.failure}"
    if note not in notes:
        notes.append(note)
    return rf"[yellow]none \[{notes.index(note) + 1}][/]"


def megabytes(way: Way | None) -> str:
    if way is None or way.memory_mb is None:
        return "-"
    return f"{way.memory_mb:.1f}" if way.memory_mb < 99.5 else f"{way.memory_mb:.0f}"


def wrong_cells(cells: list[Cell]) -> list[str]:
    """Where ours has no time: its results are wrong or it failed."""
    found = []
    for cell in cells:
        way = cell.way(cell.ours)
        if way is not None and way.failure:
            found.append(f"{cell.op} ({cell.shape}) {cell.passes}, backend {cell.ours}: {way.failure}")
    return found


# Command line ---------------------------------------------------------------------------------------------------------


def parse_shape(text: str) -> Shape:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) == 4:
        sizes.append(sizes[3])
    if len(sizes) != 5 or min(sizes) < 1:
        raise typer.BadParameter(f"a shape is B,Tq,Tk,A or B,Tq,Tk,A,D, five positive numbers at most; got {text!r}")
    return Shape(*sizes)


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


def default_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def benchmark(
    *,
    devices: list[str] | None = None,
    shapes: list[Shape] | None = None,
    ops: list[Op] | None = None,
    passes: tuple[str, ...] = (FORWARD, TRAINING),
    dtype: Dtype = Dtype.float32,
    threads: int = 1,
    allocator: Allocator = Allocator.reuse,
    compile: bool = True,
    need_weights: bool = False,
    lengths: Lengths = Lengths.none,
    seconds: float = 1.0,
    rounds: int = 5,
    seed: int = 0,
    prepared: bool = False,
    output: Path = results.LOCAL,
    quick: bool = False,
    budget: float | None = None,
) -> tuple[list[Path], list[str], list[RenderableType]]:
    """Runs, prints and stores the benchmark; returns the files, the cells where ours is wrong, and what it printed.

    budget: seconds for all of it; None: as many as it takes.
    """
    torch.set_num_threads(threads)
    written, wrong, printed = [], [], []
    devices = devices or default_devices()
    for name in devices:
        device = parse_device(name)
        chosen = dict.fromkeys(shapes, "") if shapes else dict(SHAPES)
        if not shapes and quick:
            chosen = {shape: SHAPES[shape] for shape in QUICK_SHAPES}
        elif not shapes and device.type == "cuda":
            chosen |= GPU_SHAPES
        if quick:
            seconds, rounds = min(seconds, 0.5), min(rounds, 3)
        settings = Settings(
            getattr(torch, dtype.value), device, seconds, rounds, compile, need_weights, lengths, seed, prepared
        )
        if choose(None, device.type) == "reference":
            console.print(f"No fused backend runs on {device.type}; ours is the reference:", style="bold red")
            for backend in attn_kernels.backends().values():
                if not backend.available:
                    console.print(f"  {backend.name}: {backend.detail}")
        cells = plan(ops or list(Op), chosen, list(passes))
        in_effect = run(cells, settings, allocator, timing.Budget(None if budget is None else budget / len(devices)))
        description = machine.describe(device, in_effect)
        names = ["ops", device.type]
        names += [] if dtype is Dtype.float32 else [dtype.value]
        names += ["prepared"] * prepared
        names += [] if threads == 1 else [f"{threads}threads"]
        names += [] if allocator is Allocator.reuse else [f"{allocator.value}malloc"]
        stem = "-".join(names)
        results.write_json(output / f"{stem}.json", as_result(cells, settings, description))
        plots.speed(output / f"{stem}.png", [cell for cell in cells if not cell.left_out], description, settings)
        printed.append(tables(cells, description, settings))
        console.print(printed[-1])
        written += [output / f"{stem}.json", output / f"{stem}.png"]
        wrong += wrong_cells(cells)
    for line in wrong:
        console.print(f"No time for ours: {line}", style="bold red")
    return written, wrong, printed


app = application()


@app.command()
def main(
    shape: Annotated[list[str] | None, typer.Option(help="B,Tq,Tk,A or B,Tq,Tk,A,D; may be repeated.")] = None,
    op: Annotated[list[Op] | None, typer.Option(help="May be repeated; both if left out.")] = None,
    forward: Annotated[bool, typer.Option(help="Time the forward alone.")] = True,
    backward: Annotated[bool, typer.Option(help="Time forward and backward together.")] = True,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda; all that are here if left out.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch and of the kernels.")] = 1,
    allocator: Annotated[
        Allocator, typer.Option(help="reuse: freed pages are kept, which favours eager most. default: glibc's own.")
    ] = Allocator.reuse,
    compile: Annotated[bool, typer.Option(help="Time torch.compile as well; needs a C++ compiler.")] = True,
    need_weights: Annotated[bool, typer.Option(help="Ask for the alignments too (not of SDPA).")] = False,
    lengths: Annotated[Lengths, typer.Option(help="random: memory_lengths between Tk/2 and Tk.")] = Lengths.none,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the rounds of one cell.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Least number of rounds of a cell.")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    prepared: Annotated[bool, typer.Option(help="Prepare the keys once (prepare_keys), as decoders do.")] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for the JSON file and the plot.", show_default=results.shown(results.LOCAL))
    ] = results.LOCAL,
    quick: Annotated[bool, typer.Option(help="Two shapes, few rounds.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for all of it: what does not fit is left out.", show_default="none"),
    ] = None,
) -> None:
    """Times additive_attention and dot_attention against eager PyTorch, torch.compile and SDPA."""
    passes = (FORWARD,) * forward + (TRAINING,) * backward
    if not passes:
        raise typer.BadParameter("--no-forward and --no-backward leave nothing to time")
    written, wrong, _ = benchmark(
        devices=device,
        shapes=[parse_shape(text) for text in shape] if shape else None,
        ops=op,
        passes=passes,
        dtype=dtype,
        threads=threads,
        allocator=allocator,
        compile=compile,
        need_weights=need_weights,
        lengths=lengths,
        seconds=seconds,
        rounds=rounds,
        seed=seed,
        prepared=prepared,
        output=output,
        quick=quick,
        budget=budget,
    )
    console.print("Written: " + ", ".join(results.shown(path) for path in written))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
