"""Times the ops against eager PyTorch, torch.compile and SDPA: ``python -m bench.cpu.ops --help``.

For every shape, the results and gradients of each provider are compared with the eager formula, and its peak memory is
measured. Providers with wrong results are not timed. The others are then timed in turns (``timing.py``). With an
activation other than tanh, our op with tanh is timed too. It is compared with the eager formula of tanh.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import attn_kernels
from attn_kernels import Attention
from attn_kernels.backends import choose

from .. import eager, machine, plots, results, timing
from ..cases import (
    FORWARD,
    GPU_SHAPES,
    SHAPES,
    SHORT,
    TRAINING,
    Activation,
    Cell,
    Dtype,
    Lengths,
    Op,
    Problem,
    Provider,
    Settings,
    Shape,
    bind,
    check,
    expected_results,
    formula_of,
    make_problem,
)
from ..cli import (
    AllocatorOption,
    OutputOption,
    ShapesOption,
    ThreadsOption,
    application,
    console,
    parse_device,
    parse_shape,
    progress_bars,
)
from ..machine import Allocator
from ..report import FEW_ROUNDS, figure, megabytes, quartiles, table, times

QUICK_SHAPES = (Shape(64, 1, 50, 512, 512), Shape(32, 50, 50, 512, 512))

BASELINES = ("eager", "torch.compile", "sdpa")
OURS_WITH_TANH = "ours with tanh"  # timed in addition to another activation

LEAST_CALLS = 8  # calls of each provider: results, memory, warm-up, and three rounds


def make_providers(op: str, problem: Problem, settings: Settings) -> tuple[str, list[Provider]]:
    """The name of our provider, and all providers: available backends, eager, variants of torch.compile, SDPA."""
    masks = {"memory_lengths": problem.memory_lengths, "need_weights": settings.need_weights}

    def make(name: str, function: Callable[..., Attention], detail: str = "", **keywords: object) -> Provider:
        bound = functools.partial(function, **{**masks, **keywords})
        return Provider(name, lambda *tensors: bound(*tensors).context, detail)

    def compiled(function: Callable[..., Attention], detail: str) -> Provider:
        plain = make("torch.compile", function, detail)
        assert plain.function is not None
        plain.function = torch.compile(plain.function, dynamic=False)
        return plain

    device_type = settings.device.type
    ours = choose(None, device_type)
    public = getattr(attn_kernels, op)
    backends = [ours]
    if device_type == "cuda":
        backends += [name for name in ("cuda", "triton") if name != ours and attn_kernels.backends()[name].available]
    keywords: dict[str, object] = {}
    is_tanh = settings.activation == "tanh"
    if not is_tanh:
        keywords["activation"] = settings.activation
    if settings.prepared and op == "additive_attention":
        keywords["prepared"] = attn_kernels.prepare_keys(problem.inputs["keys"], backend=ours)  # once, not in each call
    # Ours as users call it, without backend=: the smallest dot attentions then run PyTorch's own ops.
    providers = [make(name, public, backend=None if name == ours else name, **keywords) for name in backends]
    if not is_tanh:
        providers.append(make(OURS_WITH_TANH, public))
    providers.append(make("eager", formula_of(op, settings.activation)))
    if settings.compile and op == "additive_attention":
        detail = f"sum as {settings.activation}(...) @ v"
        providers.append(compiled(formula_of(op, settings.activation), detail))
    if settings.compile and op == "additive_attention" and is_tanh:
        providers.append(compiled(eager.additive_attention_sum, "sum as (tanh(...) * v).sum(-1)"))
    if settings.compile and op == "dot_attention":
        providers.append(compiled(eager.dot_attention, ""))
    if op == "dot_attention":
        providers.append(make("sdpa", eager.sdpa_dot_attention, "returns no alignments", need_weights=False))
    return ours, providers


def activation_of(provider: Provider, settings: Settings) -> str:
    return "tanh" if provider.name == OURS_WITH_TANH else settings.activation


def measure(cell: Cell, settings: Settings, allocator: Allocator, budget: timing.Budget) -> str:
    """Compares the results of all providers; measures peak memory and time of the correct ones.

    Returns a description of the allocator during the timing. ``budget`` limits only the rounds, not the checks before
    them.
    """
    training = cell.passes == TRAINING
    torch.compiler.reset()
    problem = make_problem(cell.op, cell.shape, settings)
    machine.set_allocator_for_memory(allocator)
    start = time.perf_counter()
    cell.ours, cell.providers = make_providers(cell.op, problem, settings)
    for activation in dict.fromkeys((settings.activation, "tanh")):
        alike = [p for p in cell.providers if activation == activation_of(p, settings)]
        expected = expected_results(cell.op, problem, training=training, activation=activation) if alike else {}
        for provider in alike:
            check(provider, problem, expected, training=training)
        del expected
    calls = {
        str(i): bind(provider, problem, training=training)
        for i, provider in enumerate(cell.providers)
        if provider.failure is None
    }
    for i, call in calls.items():
        cell.providers[int(i)].memory_mb = machine.peak_memory(call, settings.device)
    cell.seconds_of_check = time.perf_counter() - start
    in_effect = machine.set_allocator(allocator)
    time_providers(cell, calls, settings, budget)
    for provider in cell.providers:
        provider.function = None  # frees the inputs
    cell.providers = one_compiled(cell.providers)
    return in_effect


def time_providers(
    cell: Cell, calls: dict[str, Callable[[], object]], settings: Settings, budget: timing.Budget
) -> None:
    """calls: keys are the indices of the providers in the cell."""
    timer = timing.timer_for(settings.device)
    variants = {i: call for i, call in calls.items() if cell.providers[int(i)].name == "torch.compile"}
    if len(variants) > 1:  # only the faster one is timed further
        tried = timing.interleave(variants, timer, seconds=0, least_rounds=3, at_most=budget.left / 4)
        fastest = min(variants, key=lambda i: timing.spread(tried[i]).median)
        calls = {i: call for i, call in calls.items() if i not in variants or i == fastest}
    seconds = min(settings.seconds, budget.left)
    samples = timing.interleave(
        calls, timer, seconds=seconds, least_rounds=settings.rounds, at_most=max(settings.seconds, budget.left)
    )
    for i in calls:
        provider = cell.providers[int(i)]
        provider.milliseconds = timing.spread(samples[i]).scaled(1e3)
        if "0" in calls:
            provider.times_ours = timing.ratios(samples, i, "0")
        cell.rounds = len(samples[i])
        cell.seconds_a_round += timing.spread(samples[i]).median


def one_compiled(providers: list[Provider]) -> list[Provider]:
    """Keeps one variant of torch.compile: the one that was timed or, if none was, the first with its failure."""
    compiled = [provider for provider in providers if provider.name == "torch.compile"]
    kept = next(
        (provider for provider in compiled if provider.milliseconds is not None), compiled[0] if compiled else None
    )
    return [provider for provider in providers if provider.name != "torch.compile" or provider is kept]


def plan(ops: list[Op], shapes: dict[Shape, str], passes: list[str]) -> list[Cell]:
    return [Cell(op.value, shape, p, label, "") for op in ops for shape, label in shapes.items() for p in passes]


def run(cells: list[Cell], settings: Settings, allocator: Allocator, budget: timing.Budget) -> str:
    """Fills in the cells, with a progress bar; returns a description of the allocator during the timing.

    With a budget, a cell that would take longer than the time left is marked as left out.
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
    """Estimate from the last cell of the same op and passes: equal compilation time, calls proportional to the work."""
    alike = [other for other in others if (other.op, other.passes) == (cell.op, cell.passes) and other.rounds]
    if not alike:
        return 0.0
    round_ = alike[-1].seconds_a_round * cell.work / alike[-1].work
    return min(other.seconds_of_check for other in alike) + LEAST_CALLS * round_


# Output ---------------------------------------------------------------------------------------------------------------


def as_result(cells: list[Cell], settings: Settings, description: dict[str, str | int]) -> dict[str, object]:
    def as_json(provider: Provider) -> dict[str, object]:
        entry = asdict(provider)
        del entry["function"]
        spreads = {
            "milliseconds": results.rounded(provider.milliseconds),
            "times_ours": results.rounded(provider.times_ours),
        }
        return {**entry, **spreads}

    return {
        "part": "ops",
        "machine": description,
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "seconds a cell": settings.seconds,
            "alignments returned": settings.need_weights,
            "lengths": settings.lengths.value,
            "keys prepared": settings.prepared,
            "activation": settings.activation,
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
                "ways": [as_json(provider) for provider in cell.providers],
            }
            for cell in cells
        ],
    }


def tables(cells: list[Cell], description: dict[str, str | int], settings: Settings) -> RenderableType:
    """One table for each op, then the failures with their reasons, then the machine."""
    parts: list[RenderableType] = []
    notes: list[str] = []
    dtype = str(settings.dtype).removeprefix("torch.")
    for op in dict.fromkeys(cell.op for cell in cells):
        how = ", keys prepared" if settings.prepared and op == "additive_attention" else ""
        parts.append(op_table(op + how, [cell for cell in cells if cell.op == op], dtype, notes))
    parts += [Text(f"[{number}] {note}") for number, note in enumerate(notes, 1)]
    parts.append(Text("ms: median over interleaved rounds. x: time of the other / time of ours, median over rounds."))
    parts.append(Text("Below 1x!: ours is slower. MB: peak memory of one call: ours / eager / torch.compile."))
    if any(0 < cell.rounds < FEW_ROUNDS for cell in cells):
        parts.append(Text(f"In parentheses: quartiles, if there was time for fewer than {FEW_ROUNDS} rounds."))
    if any(cell.left_out for cell in cells):
        parts.append(Text("left out: not timed for lack of time. python -m bench.cpu.ops measures all."))
    parts.append(machine.as_text(description))
    return Group(*parts)


def op_table(op: str, cells: list[Cell], dtype: str, notes: list[str]) -> Table:
    others = {
        "eager": "eager",
        "torch.compile": "compile",
        **({"sdpa": "SDPA"} if cells[0].op == "dot_attention" else {}),
    }
    ours = next((cell.ours for cell in cells if not cell.left_out), "left out")
    numbers = (f">{column}" for column in ("ms", *others.values(), "MB"))
    result = table(f"{op}, {dtype}, ours: {ours}", "B,Tq,Tk,A", "pass", *numbers)
    for cell in cells:
        if cell.left_out:
            result.add_row(str(cell.shape), SHORT[cell.passes], "[yellow]left out[/]")
            continue
        memory = " / ".join(memory_of(cell.provider(name)) for name in (cell.ours, "eager", "torch.compile"))
        ratios = [times_ours(cell.provider(name), notes, cell.rounds) for name in others]
        result.add_row(
            str(cell.shape), SHORT[cell.passes], milliseconds(cell.provider(cell.ours), notes), *ratios, memory
        )
        for provider in cell.providers:
            if provider.name != cell.ours and provider.name not in BASELINES:  # ours with another backend, or with tanh
                blanks = [""] * (len(others) - 1)
                ms, ratio = milliseconds(provider, notes), times_ours(provider, notes)
                result.add_row(f"  {provider.name}", "", ms, ratio, *blanks, memory_of(provider))
    return result


def milliseconds(provider: Provider | None, notes: list[str]) -> str:
    if provider is None or provider.milliseconds is None:
        return failed(provider, notes)
    return figure(provider.milliseconds.median)


def times_ours(provider: Provider | None, notes: list[str], rounds: int = FEW_ROUNDS) -> str:
    """A ratio; with its quartiles if there were few rounds."""
    if provider is None or provider.times_ours is None:
        return failed(provider, notes)
    ratio, beside = provider.times_ours.median, quartiles(provider.times_ours, rounds)
    return times(ratio, digits=1) + (beside if round(ratio, 2) < 1 else f" {beside}")


def failed(provider: Provider | None, notes: list[str]) -> str:
    if provider is None or provider.failure is None:
        return "-"
    note = f"{provider.name}: {provider.failure}"
    if note not in notes:
        notes.append(note)
    return rf"[yellow]none \[{notes.index(note) + 1}][/]"


def memory_of(provider: Provider | None) -> str:
    return "-" if provider is None else megabytes(provider.memory_mb)


def wrong_cells(cells: list[Cell]) -> list[str]:
    """Cells in which ours was not timed, because it failed or its results were wrong."""
    found = []
    for cell in cells:
        provider = cell.provider(cell.ours)
        if provider is not None and provider.failure:
            found.append(f"{cell.op} ({cell.shape}) {cell.passes}, backend {cell.ours}: {provider.failure}")
    return found


# Command line ---------------------------------------------------------------------------------------------------------


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
    activation: Activation = Activation.tanh,
    output: Path = results.LOCAL,
    quick: bool = False,
    budget: float | None = None,
) -> tuple[list[Path], list[str], list[RenderableType]]:
    """Runs, prints and stores the benchmark; returns the files, the cells where ours is wrong, and what it printed.

    budget: seconds in all; None: no limit.
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
            getattr(torch, dtype.value),
            device,
            seconds,
            rounds,
            compile,
            need_weights,
            lengths,
            seed,
            prepared,
            activation.value,
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
        names += [] if activation is Activation.tanh else [activation.value]
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
    shape: ShapesOption = None,
    op: Annotated[list[Op] | None, typer.Option(help="May be repeated; default: both.")] = None,
    forward: Annotated[bool, typer.Option(help="Time the forward pass alone.")] = True,
    backward: Annotated[bool, typer.Option(help="Time forward and backward together.")] = True,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[list[str] | None, typer.Option(help="cpu or cuda; default: all devices of this machine.")] = None,
    threads: ThreadsOption = 1,
    allocator: AllocatorOption = Allocator.reuse,
    compile: Annotated[bool, typer.Option(help="Time torch.compile as well; needs a C++ compiler.")] = True,
    need_weights: Annotated[bool, typer.Option(help="Return the alignments too (without SDPA).")] = False,
    lengths: Annotated[Lengths, typer.Option(help="random: memory_lengths between Tk/2 and Tk.")] = Lengths.none,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for the rounds of one cell.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Minimum number of rounds of a cell.")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    prepared: Annotated[bool, typer.Option(help="Prepare the keys once (prepare_keys), as decoders do.")] = False,
    activation: Annotated[Activation, typer.Option(help="Of additive_attention.")] = Activation.tanh,
    output: OutputOption = results.LOCAL,
    quick: Annotated[bool, typer.Option(help="Two shapes, few rounds.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds in all; cells that do not fit are left out.", show_default="none"),
    ] = None,
) -> None:
    """Times additive_attention and dot_attention against eager PyTorch, torch.compile and SDPA."""
    passes = (FORWARD,) * forward + (TRAINING,) * backward
    if not passes:
        raise typer.BadParameter("--no-forward and --no-backward leave nothing to time")
    if activation is not Activation.tanh:
        if prepared or (op and op != [Op.additive_attention]):
            raise typer.BadParameter(f"--activation {activation.value} needs additive_attention without --prepared")
        op = [Op.additive_attention]
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
        activation=activation,
        output=output,
        quick=quick,
        budget=budget,
    )
    console.print("Written: " + ", ".join(results.shown(path) for path in written))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
