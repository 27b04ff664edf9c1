"""``make bench``: times the ops (``bench.cpu.ops``), then trains a model (``bench.models.g2p``)."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from . import results
from .cli import AllocatorOption, OutputOption, ThreadsOption, application, console
from .cpu import ops
from .machine import Allocator
from .models import g2p

app = application()


BUDGET = 300.0  # seconds; the set-up of a fresh clone takes less than three minutes more
SHARE_OF_OPS = 0.65


@app.command()
def main(
    budget: Annotated[float, typer.Option(min=30, help="Seconds in all; less time means fewer measurements.")] = BUDGET,
    full: Annotated[
        bool, typer.Option("--full", help="Measure as for the committed results: no time limit, about 15 minutes.")
    ] = False,
    threads: ThreadsOption = 1,
    training_threads: Annotated[int, typer.Option(min=1, help="Threads for the training.")] = g2p.THREADS,
    allocator: AllocatorOption = Allocator.reuse,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times the ops, then trains Seq2Seq on CMUdict with fused and with reference attention. This takes five minutes.
    A slower machine measures fewer rounds, shapes and steps, and the tables show this. If there is a GPU, the ops are
    timed on it too. More options: python -m bench.cpu.ops --help, python -m bench.models.g2p --help.
    """
    start = time.perf_counter()
    console.rule("1 of 2: the ops")
    written, wrong, printed = ops.benchmark(
        threads=threads, allocator=allocator, output=output, budget=None if full else SHARE_OF_OPS * budget
    )
    console.rule("2 of 2: a model")
    more, result = g2p.benchmark(
        g2p.Config(),
        threads=training_threads,
        allocator=allocator,
        budget=None if full else max(0.0, budget - (time.perf_counter() - start)),
        output=output,
    )
    console.rule("Summary")
    for table in printed:
        console.print(table)
    console.print(g2p.summary(result))
    if result["training step"]:
        console.print(g2p.step_table(result["training step"]))
    for line in wrong:
        console.print(f"No time for ours: {line}", style="bold red")
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    console.print(f"{minutes} min {seconds} s. Written:")
    for path in written + more:
        console.print(f"  {results.shown(path)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
