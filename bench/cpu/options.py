"""Is additive attention with an option ever slower than eager PyTorch? ``python -m bench.cpu.options --help``.

It times one option at a time (activations, a gate, several score vectors and others) against the formula in eager
PyTorch, forward alone and with backward. Packed ragged sentences are compared with eager on padded ones. Results and
gradients are first compared with the formula in float32. With dropout they are compared with the reference, which has
the same dropout mask as the kernels. A cell below the required ratio is timed again for longer, so that noise is not
reported as a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table
from torch import Tensor

from attn_kernels import additive_attention

from .. import cases, eager, report, results, timing
from ..cases import FORWARD, SHORT, TRAINING, Dtype, Problem, Provider, Shape
from ..cli import (
    AllocatorOption,
    OutputOption,
    Run,
    ShapesOption,
    ThreadsOption,
    application,
    parse_shape,
    progress_bars,
)
from ..machine import Allocator
from . import packed
from .sweep import LEAST

app = application()

OURS, EAGER = "ours", "eager"
SHAPES = (Shape(64, 1, 50, 512, 512), Shape(16, 100, 100, 512, 512), Shape(4, 5, 20, 64, 64))
SEED = 0
AGAIN = 4  # a cell below LEAST is timed again, this many times as long


class Option(NamedTuple):
    """Keyword arguments of both functions, names of extra tensor arguments, and the number R of score vectors."""

    keywords: Mapping[str, Any] = MappingProxyType({})
    tensors: tuple[str, ...] = ()
    vectors: int | None = None


OPTIONS = {
    "relu": Option({"activation": "relu"}),
    "leaky_relu": Option({"activation": "leaky_relu"}),
    "sigmoid": Option({"activation": "sigmoid"}),
    "gate": Option(tensors=("gate",)),
    "3 score vectors": Option(vectors=3),
    "score_bias": Option(tensors=("score_bias",)),
    "clip": Option({"clip": 10.0}),
    "dropout": Option({"dropout_p": 0.1}),
    "normalizer sigmoid": Option({"normalizer": "sigmoid"}),
    "extra": Option(tensors=("extra",)),
}
PACKED = "packed"
NAMES = (*OPTIONS, PACKED)


def make_problem(option: Option, shape: Shape, dtype: torch.dtype) -> Problem:
    settings = cases.Settings(dtype, torch.device("cpu"), 0, 1, False, False, cases.Lengths.none, SEED)
    inputs, gradient, _ = cases.make_problem("additive_attention", shape, settings)
    generator = torch.Generator().manual_seed(SEED + 1)
    sizes = {
        "gate": (shape.B, shape.Tk, shape.A),
        "extra": (shape.B, shape.Tk, shape.A),
        "score_bias": (shape.B, shape.Tq, shape.Tk),
    }
    for name in option.tensors:
        inputs[name] = torch.randn(sizes[name], generator=generator).to(dtype)
    if option.vectors is not None:
        rows = torch.randn(option.vectors, shape.A, generator=generator) * shape.A**-0.5
        inputs["v"] = rows.to(dtype)
        gradient = gradient[:, :, None].expand(-1, -1, option.vectors, -1).contiguous()
    return Problem(inputs, gradient, None)


def make_providers(option: Option, problem: Problem) -> dict[str, Provider]:
    def make(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def context(*tensors: Tensor) -> Tensor:
            given = dict(zip(problem.inputs, tensors, strict=True))
            result: Tensor = function(**given, **option.keywords, need_weights=False).context
            return result

        return context

    return {OURS: Provider(OURS, make(additive_attention)), EAGER: Provider(EAGER, make(eager.additive_attention))}


def check(option: Option, problem: Problem, providers: dict[str, Provider], *, training: bool) -> None:
    """Raises RuntimeError if ours is wrong."""
    wide = {name: x.float() for name, x in problem.inputs.items()}
    right = providers[EAGER].function
    if option.keywords.get("dropout_p"):
        of_reference = {**option.keywords, "backend": "reference"}
        right = make_providers(option._replace(keywords=of_reference), problem)[OURS].function
    assert right is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        expected = cases.compute(right, wide, problem.grad_context, training=training)
        torch.manual_seed(SEED)
        cases.check(providers[OURS], problem, expected, training=training)
    if providers[OURS].failure is not None:
        raise RuntimeError(f"options: {providers[OURS].failure}")


def calls_of(name: str, shape: Shape, dtype: torch.dtype, *, training: bool) -> dict[str, Callable[[], object]]:
    """Returns the functions to time, after a check of their results."""
    if name == PACKED:
        return calls_of_packed(shape, dtype, training=training)
    problem = make_problem(OPTIONS[name], shape, dtype)
    providers = make_providers(OPTIONS[name], problem)
    try:
        check(OPTIONS[name], problem, providers, training=training)
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {name} ({shape}) {SHORT[TRAINING if training else FORWARD]}") from error
    return {way: cases.bind(provider, problem, training=training) for way, provider in providers.items()}


def calls_of_packed(shape: Shape, dtype: torch.dtype, *, training: bool) -> dict[str, Callable[[], object]]:
    """Sentences have Tk/2 to Tk steps; A and D are equal."""
    sizes = ("additive_attention", shape.B, shape.Tq, shape.A, max(1, shape.Tk // 2), shape.Tk)
    ragged = packed.Ragged(*sizes, dtype=dtype)
    ragged.check(cases.TOLERANCES[dtype])
    ways = {OURS: packed.PACKED, EAGER: packed.EAGER}
    make = ragged.both if training else ragged.forward
    calls: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        calls[name] = make(way) if training else torch.no_grad()(make(way))
    return calls


def measure(name: str, shape: Shape, dtype: torch.dtype, passes: str, seconds: float) -> dict[str, Any]:
    calls = calls_of(name, shape, dtype, training=passes == TRAINING)

    def timed(seconds: float) -> dict[str, Any]:
        samples = timing.interleave(calls, timing.WallTimer(), seconds=seconds, least_rounds=5, most_rounds=200)
        return results.comparison(samples, OURS)

    row = {"option": name, "shape": shape._asdict(), "passes": passes, **timed(seconds)}
    if ratio_of(row) < LEAST:
        row |= {"first": row[f"times {OURS}"], **timed(AGAIN * seconds)}
    return row


def ratio_of(row: dict[str, Any]) -> float:
    """Time of eager / time of ours."""
    ratio: float = row[f"times {OURS}"][EAGER]["median"]
    return ratio


def table(rows: list[dict[str, Any]], dtype: str) -> Table:
    """One row for each option, one column for each shape and pass."""
    columns = dict.fromkeys((str(Shape(**row["shape"])), row["passes"]) for row in rows)
    least = min(rows, key=ratio_of)
    where = f"{least['option']} ({Shape(**least['shape'])}) {SHORT[least['passes']]}"
    shown = report.table(
        f"Additive attention with an option, {dtype}: how many times as long eager takes",
        "",
        *(f">{shape}\n{SHORT[passes]}" for shape, passes in columns),
        caption=f"Least: {ratio_of(least):.2f}x, {where}. At least {LEAST:g}x is asked for.",
        caption_justify="left",
    )
    for name in dict.fromkeys(row["option"] for row in rows):
        found = {(str(Shape(**row["shape"])), row["passes"]): ratio_of(row) for row in rows if row["option"] == name}
        shown.add_row(name, *(report.times(found[column], lost=found[column] < LEAST) for column in columns))
    return shown


@app.command()
def main(
    option: Annotated[list[str] | None, typer.Option(help=f"May be repeated: {', '.join(NAMES)}.")] = None,
    shapes: ShapesOption = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    quick: Annotated[bool, typer.Option(help="Only the last shape and few rounds.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds per cell of the table; at least 5 rounds.")] = 2.0,
    threads: ThreadsOption = 1,
    allocator: AllocatorOption = Allocator.reuse,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times additive attention with each of its options against eager PyTorch, on the CPU."""
    for name in option or ():
        if name not in NAMES:
            raise typer.BadParameter(f"--option {name}: one of {', '.join(NAMES)}")
    chosen = [parse_shape(text) for text in shapes] if shapes else list(SHAPES[-1:] if quick else SHAPES)
    if any(shape.A != shape.D for shape in chosen):
        raise typer.BadParameter("--shape: B,Tq,Tk,A, with values as wide as A")
    run = Run(threads, allocator)
    cells = [(name, shape, p) for shape in chosen for name in option or NAMES for p in (FORWARD, TRAINING)]
    rows: list[dict[str, Any]] = []
    with progress_bars() as progress:
        task = progress.add_task("options", total=len(cells))
        for name, shape, passes in cells:
            progress.update(task, description=f"{name} ({shape}) {SHORT[passes]}")
            rows.append(measure(name, shape, getattr(torch, dtype.value), passes, 0.1 if quick else seconds))
            progress.advance(task)
    settings: dict[str, Any] = {"threads": threads, "dtype": dtype.value, "least": min(map(ratio_of, rows))}
    variant = "" if dtype is Dtype.float32 else dtype.value
    run.finish("options", rows, table(rows, dtype.value), output, variant=variant, **settings)


if __name__ == "__main__":
    app()
