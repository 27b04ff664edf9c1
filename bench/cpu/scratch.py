"""Compares the kernels with specialized kernels written from scratch: ``python -m bench.cpu.scratch --help``.

``roofline`` compares the kernels with bare loops. This module compares additive attention with complete kernels, those
of scratch.c. They compute the same results for float32, one thread, contiguous tensors and sizes that are multiples of
their tiles. They have no overflow guards and are correct only for moderate inputs. They should be nearly as fast as
this processor allows. Each kernel has several forms, which differ in how they compute reciprocals; the fastest form
counts. The results of all forms are compared with the eager formula before anything is timed.

For one query there are also forms that write gradients with non-temporal stores ("streamed"). These are faster here
because nothing reads the gradients afterwards.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import attn_kernels

from .. import cases, cli, report, results, timing
from ..cases import BACKWARD, FORWARD, TRAINING, Op, Problem, Shape
from ..cli import application, console
from ..machine import Allocator
from .ceilings import CompilerError, Data, compile_for_here
from .roofline import CPU, calls_of

SOURCE = Path(__file__).with_name("scratch.c")
OP = Op.additive_attention.value
SHAPES = [cli.parse_shape(name) for name in ("64,1,50,512", "64,1,200,1024", "32,50,50,512", "16,100,100,512")]
LEAST = 0.95  # the project's requirement: time of the scratch kernel / time of ours
OURS, SCRATCH, STREAMED = "ours", "scratch", "scratch, streamed"

_FORWARDS = ("three_divided", "three_estimated", "four_divided", "four_estimated", "four_mixed")
_BACKWARDS = {
    "many": ("one_estimated", "two_estimated", "two_mixed", "three_divided"),
    "one": ("divided", "estimated", "streamed_divided", "streamed_estimated"),
}
Call = Callable[[], Any]


class Kernels:
    """The functions of scratch.c."""

    def __init__(self) -> None:
        self._library, self.compiler = compile_for_here(SOURCE)
        self._library.scratch_size.restype = ctypes.c_int64

        def constant(name: str) -> int:
            return ctypes.c_int32.in_dll(self._library, name).value

        self.rows, self.units, self.can_stream = constant("rows"), constant("units"), bool(constant("can_stream"))

    def fits(self, shape: Shape) -> bool:
        rows = shape.Tq == 1 or shape.Tq % self.rows == shape.Tk % self.rows == 0
        return rows and shape.A % self.units == shape.D % self.units == 0

    def forwards(self, problem: Problem) -> dict[str, Call]:
        """For each form, a call that returns context and alignments."""
        query, _, values, _ = problem.inputs.values()
        context, alignments = (*query.shape[:2], values.shape[2]), (*query.shape[:2], values.shape[1])
        inputs = tuple(problem.inputs.values())
        return {
            form: self._call(
                f"forward_{form}", problem, inputs, lambda: (torch.empty(context), torch.empty(alignments))
            )
            for form in _FORWARDS
        }

    def backwards(self, problem: Problem, alignments: Tensor) -> dict[str, Call]:
        """For each form, a call that returns the gradients of the inputs."""
        kind = "one" if alignments.shape[1] == 1 else "many"
        inputs = (*problem.inputs.values(), alignments, problem.grad_context)
        return {
            form: self._call(
                f"backward_{kind}_{form}",
                problem,
                inputs,
                lambda: tuple(torch.empty_like(x) for x in problem.inputs.values()),
            )
            for form in _BACKWARDS[kind]
            if self.can_stream or not form.startswith("streamed")
        }

    def _call(self, name: str, problem: Problem, inputs: tuple[Tensor, ...], outputs: Callable[[], Any]) -> Call:
        """Each call allocates its outputs, as ours does; other buffers are allocated once, before the calls."""
        query, keys, values, _ = problem.inputs.values()
        sizes = [ctypes.c_int64(size) for size in (*query.shape[:2], *keys.shape[1:], values.shape[2])]
        scratch = torch.empty(self._library.scratch_size(*sizes[1:]))
        function = getattr(self._library, name)
        function.restype = None

        def run() -> Any:
            made = outputs()
            function(*sizes, *map(Data.from_param, (*inputs, *made, scratch)))
            return made

        return run


def check(name: str, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    error, where = cases.largest_error(got, expected)
    if not error <= cases.TOLERANCES[torch.float32]:
        raise RuntimeError(f"scratch: {name}: {where} differs by {error:.1e} of its largest value")


def fastest(calls: dict[str, Call], seconds: float) -> tuple[str, dict[str, float]]:
    """The form with the smallest median time, and the ms of all forms."""
    samples = timing.interleave(calls, timing.WallTimer(time.process_time), seconds=seconds, least_rounds=3)
    ms = {form: 1e3 * statistics.median(taken) for form, taken in samples.items()}
    return min(ms, key=ms.__getitem__), ms


class Ways:
    """Ours and the scratch forms at one shape; their results are compared with the eager formula first."""

    def __init__(self, kernels: Kernels, shape: Shape) -> None:
        settings = cases.Settings(torch.float32, CPU, 0, 1, False, False, cases.Lengths.none, 0)
        problem = cases.make_problem(OP, shape, settings)
        expected = cases.expected_results(OP, problem, training=True)
        self.ours = calls_of(OP, problem)
        self.forwards = kernels.forwards(problem)
        for form, call in {OURS: self.ours[FORWARD], **self.forwards}.items():
            check(form, {"context": call()[0]}, {"context": expected["context"]})
        del expected["context"]
        alignments = self.forwards[_FORWARDS[0]]()[1]
        self.backwards = kernels.backwards(problem, alignments)
        for form, call in {OURS: self.ours[BACKWARD], **self.backwards}.items():
            check(form, dict(zip(expected, call(), strict=False)), expected)


def measure(kernels: Kernels, shape: Shape, seconds: float, progress: Progress) -> list[dict[str, Any]]:
    """Returns a row for each pass."""
    ways = Ways(kernels, shape)
    task = progress.add_task(str(shape), total=4)

    def step(what: str) -> None:
        progress.update(task, description=f"{shape}: {what}", advance=1)

    step("forms, forward")
    forward, of_forwards = fastest(ways.forwards, seconds / 2)
    step("forms, backward")
    backwards, of_backwards = {}, {}
    for name in (SCRATCH, STREAMED):
        group = {
            form: call for form, call in ways.backwards.items() if form.startswith("streamed") == (name == STREAMED)
        }
        if group:
            backwards[name], ms = fastest(group, seconds / 2)
            of_backwards.update(ms)

    def both(first: Call, second: Call) -> Call:
        return lambda: (first(), second())

    passes = {
        FORWARD: {OURS: ways.ours[FORWARD], SCRATCH: ways.forwards[forward]},
        TRAINING: {
            OURS: both(ways.ours[FORWARD], ways.ours[BACKWARD]),
            **{name: both(ways.forwards[forward], ways.backwards[form]) for name, form in backwards.items()},
        },
    }
    rows = []
    for name, calls in passes.items():
        step(name)
        # Process CPU time: on one thread it excludes the time of other programs.
        samples = timing.interleave(calls, timing.WallTimer(time.process_time), seconds=seconds, most_rounds=1000)
        training = name == TRAINING
        rows.append(
            {
                "pass": name,
                "shape": shape._asdict(),
                "forms": {FORWARD: forward} | ({BACKWARD: backwards} if training else {}),
                "ms of all forms": results.rounded(of_backwards if training else of_forwards),
                **results.comparison(samples, OURS),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    title = f"{OP}, float32, one thread: ms, and scratch / ours; at least {LEAST} is asked for"
    shown = report.table(title, "B,Tq,Tk,A", "", "form from scratch", ">ours", ">scratch", ">ratio")
    for row in rows:
        for name, ratio in row["times ours"].items():
            form = row["forms"][BACKWARD][name] if row["pass"] == TRAINING else row["forms"][FORWARD]
            shown.add_row(
                str(Shape(**row["shape"])),
                cases.SHORT[row["pass"]],
                form.replace("_", " "),
                *(report.figure(row["ms"][way]["median"]) for way in (OURS, name)),
                report.times(ratio["median"], lost=ratio["median"] < LEAST),
            )
    return shown


app = application()


@app.command()
def main(
    shape: cli.ShapesOption = None,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each pass, and again for choosing a form.")] = 4.0,
    allocator: cli.AllocatorOption = Allocator.reuse,
    output: cli.OutputOption = results.LOCAL,
) -> None:
    """Times additive attention against the kernels of scratch.c, on one thread of this CPU. Needs a C compiler."""
    backend = attn_kernels.backends()["cpu"]
    if not backend.available:
        _stop(f"the C++ kernels do not run here: {backend.detail}")
    try:
        kernels = Kernels()
    except CompilerError as error:
        _stop(str(error))
    shapes = [cli.parse_shape(text) for text in shape] if shape else SHAPES
    for one in shapes:
        if not kernels.fits(one):
            raise typer.BadParameter(
                f"--shape {one}: A and D must be multiples of {kernels.units}, "
                f"and Tq and Tk of {kernels.rows} unless Tq is 1"
            )
    run = cli.Run(1, allocator)
    with cli.progress_bars() as progress:
        rows = [row for one in shapes for row in measure(kernels, one, seconds, progress)]
    run.finish("scratch", rows, table(rows), output, seconds=seconds, threads=1, compiler=kernels.compiler)


def _stop(reason: str) -> NoReturn:
    console.print(f"No comparison possible: {reason}", style="bold red")
    sys.exit(2)


if __name__ == "__main__":
    app()
