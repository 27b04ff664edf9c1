"""fuse(model) on attention in typical user code: ``python -m bench.models.fuse --help``.

It times decoder steps and whole modules in three variants, in turns: plain PyTorch, ``fuse`` and torch.compile. Times
are CPU times of one thread, so that other load on the machine has less effect.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor, nn

from attn_kernels import fuse

from .. import machine, plots, report, results, timing
from ..cli import AllocatorOption, OutputOption, application, console, finish, prepare
from ..machine import Allocator

app = application()

ORIGINAL, FUSED, COMPILED = "original", "fused", "torch.compile"
STEPS = 30
SHORTEST_SAMPLE = 0.05  # seconds: a sample has consecutive decoder steps of one variant
TOLERANCE = 1e-4  # for results, relative to their largest element


class JoinedAttention(nn.Module):
    """State and memory concatenated, one layer for both, returns weights: as in the best-known translation tutorial."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.energy, self.score = nn.Linear(state + memory, units), nn.Linear(units, 1, bias=False)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        rows = state.unsqueeze(1).repeat(1, memory.shape[0], 1)
        energy = torch.tanh(self.energy(torch.cat((rows, memory.permute(1, 0, 2)), 2)))
        return F.softmax(self.score(energy).squeeze(2), 1)


class TranslationStep(nn.Module):
    """A module returns alignments, and its caller computes the context; the memory is time-major."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.attention = JoinedAttention(state, memory, units)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        weights = self.attention(state, memory).unsqueeze(1)
        return torch.bmm(weights, memory.permute(1, 0, 2)).squeeze(1)


class RecognitionCell(nn.Module):
    """Attention and LSTM cell of a text recognition model; each step projects the keys."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.i2h, self.h2h = nn.Linear(memory, units, bias=False), nn.Linear(state, units)
        self.score, self.rnn = nn.Linear(units, 1, bias=False), nn.GRUCell(memory, state)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        e = self.score(torch.tanh(self.i2h(memory) + self.h2h(state).unsqueeze(1)))
        context = torch.bmm(F.softmax(e, 1).permute(0, 2, 1), memory).squeeze(1)
        return self.rnn(context, state)


class CaptionStep(nn.Module):
    """Image captioning: attention over image regions, written with products and sums."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.U, self.W, self.v = nn.Linear(state, units), nn.Linear(memory, units), nn.Linear(units, 1)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        e = self.v(torch.tanh(self.W(memory) + self.U(state).unsqueeze(1))).squeeze(2)
        return (memory * F.softmax(e, 1).unsqueeze(2)).sum(1)


class Pointer(nn.Module):
    """A pointer network: all queries against all positions, with an explicit tensor of pairs."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(state, units), nn.Linear(memory, units), nn.Linear(units, 1)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        e = self.v(torch.tanh(self.q(query).unsqueeze(2) + self.k(memory).unsqueeze(1))).squeeze(3)
        return torch.bmm(F.softmax(e, 2), memory)


class GeneralStep(nn.Module):
    """Dot product of the state and the projected memory, without tanh."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.W = nn.Linear(memory, state, bias=False)

    def forward(self, state: Tensor, memory: Tensor) -> Tensor:
        weights = F.softmax(torch.bmm(self.W(memory), state.unsqueeze(2)).squeeze(2), 1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)


class Bag(nn.Module):
    """Attention pooling of a bag of instances, without a query: fusing gains nothing and must not make it slower."""

    def __init__(self, state: int, memory: int, units: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(memory, units), nn.Tanh(), nn.Linear(units, 1))

    def forward(self, _: Tensor, memory: Tensor) -> Tensor:
        return (F.softmax(self.attention(memory), 1) * memory).sum(1)


# name, class, B, Tq (0: one query, as a 2-D tensor), Tk, A, memory, time-major
CASES: tuple[tuple[str, type[nn.Module], int, int, int, int, int, bool], ...] = (
    ("translation", TranslationStep, 128, 0, 40, 512, 1024, True),
    ("text in images", RecognitionCell, 192, 0, 26, 256, 256, False),
    ("captions", CaptionStep, 32, 0, 196, 512, 2048, False),
    ("pointer", Pointer, 64, 31, 240, 512, 512, False),
    ("general", GeneralStep, 64, 0, 50, 512, 512, False),
    ("bag", Bag, 1, 0, 10000, 128, 500, False),
    ("small", CaptionStep, 1, 0, 10, 16, 16, False),
)


class Problem:
    """A module (original, fused and compiled) and arguments for several steps on one memory."""

    def __init__(self, case: tuple[str, type[nn.Module], int, int, int, int, int, bool]) -> None:
        self.name, cls, batch, queries, steps, units, memory, time_major = case
        torch.manual_seed(0)
        state = 512 if units > 64 else units
        original = cls(state, memory, units)
        fused = copy.deepcopy(original)
        self.report = fuse(fused)
        self.models: dict[str, Any] = {ORIGINAL: original, FUSED: fused, COMPILED: torch.compile(original)}
        shape = (batch, queries, state) if queries else (batch, state)
        self.queries = [torch.randn(shape) for _ in range(4)]
        self.memory = torch.randn((steps, batch, memory) if time_major else (batch, steps, memory))
        self.shape = (batch, max(queries, 1), steps, units, memory)
        self.is_step = queries == 0

    def forward(self, variant: str) -> Callable[[], Tensor]:
        """One step, on the same memory as the previous step."""
        model, turn = self.models[variant], iter(range(1 << 60))

        def call() -> Tensor:
            with torch.no_grad():
                return model(self.queries[next(turn) % 4], self.memory)

        return call

    def training(self, variant: str) -> Callable[[], Tensor]:
        """Forward and backward over the steps of a sentence; each call has a new memory."""
        model, steps = self.models[variant], STEPS if self.is_step else 1

        def call() -> Tensor:
            memory = (self.memory.detach().requires_grad_() * 1.0).requires_grad_()
            total = torch.zeros(())
            for step in range(steps):
                total = total + model(self.queries[step % 4], memory).square().mean()
            total.backward()
            return total.detach()

        return call


def measure(problem: Problem, passes: str, seconds: float, compiled: bool) -> dict[str, Any]:
    make = problem.forward if passes == "forward" else problem.training
    variants = [ORIGINAL, FUSED, *([COMPILED] if compiled else [])]
    calls = {variant: make(variant) for variant in variants}
    expected = calls[ORIGINAL]()
    for variant in variants[1:]:
        for _ in range(8 if variant == FUSED else 1):  # the fused module captures, compares and times the call
            make(variant)()
        error = ((make(variant)() - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"fuse: {variant!r} of {problem.name!r} is off by {error}: nothing is timed")
    timer = timing.WallTimer(time.process_time)
    timer.shortest_sample = SHORTEST_SAMPLE
    samples = timing.interleave(calls, timer, seconds=seconds, least_rounds=3, most_rounds=200)
    added = [1e6 * (ours - theirs) for ours, theirs in zip(samples[FUSED], samples[ORIGINAL], strict=True)]
    device = torch.device("cpu")
    return {
        "case": problem.name,
        "passes": passes,
        "steps": STEPS if passes == "training" and problem.is_step else 1,
        "B,Tq,Tk,A,M": list(problem.shape),
        "found": [f"{fused.name or '(model)'}: {fused.what}" for fused in problem.report.fused],
        "left alone": [skipped.reason for skipped in problem.report.skipped],
        **results.comparison(samples, FUSED),
        "added us": results.rounded(timing.spread(added)),
        "peak MB": {variant: machine.peak_memory(calls[variant], device) for variant in variants},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = report.table(
        "fuse(model): ms of the fused, and how many times as long the others take",
        *("", "", "B,Tq,Tk,A,M", "fused, ms", ORIGINAL, COMPILED, "MB: fused / original"),
        wrap=True,
    )
    for row in rows:
        ratios = {variant: f"{spread['median']:.2f}x" for variant, spread in row["times fused"].items()}
        memory = [row["peak MB"][variant] for variant in (FUSED, ORIGINAL)]
        shown.add_row(
            row["case"],
            row["passes"] if row["steps"] == 1 else f"{row['passes']}, {row['steps']} steps",
            ",".join(map(str, row["B,Tq,Tk,A,M"])),
            report.figure(row["ms"][FUSED]["median"]),
            ratios[ORIGINAL],
            ratios.get(COMPILED, "-"),
            " / ".join(map(report.megabytes, memory)),
        )
    return shown


TITLES = {
    "translation": "translation, time-major, layer on joined rows",
    "text in images": "cell of a reader of text in images",
    "captions": "captioning, regions of an image",
    "pointer": "pointer network, all pairs",
    "general": 'Luong\'s "general"',
    "bag": "bag of instances, no query",
    "small": "small",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/fuse.md: one row for each case."""
    lines = [
        f"| | (B,Tq,Tk,A,M) | forward, ms | {ORIGINAL} | {COMPILED} | training, ms | {ORIGINAL} | {COMPILED} | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, title in TITLES.items():
        cells = [title]
        for passes in ("forward", "training"):
            row = next(row for row in rows if row["case"] == case and row["passes"] == passes)
            if passes == "forward":
                cells.append("({})".format(",".join(map(str, row["B,Tq,Tk,A,M"]))))
            median = row["ms"][FUSED]["median"]
            text = f"{median:.0f}" if median >= 100 else f"{median:.3g}"
            cells.append(text + (f" ({row['steps']} steps)" if row["steps"] > 1 else ""))
            for variant in (ORIGINAL, COMPILED):
                ratio = row["times fused"].get(variant)
                cells.append("-" if ratio is None else f"{ratio['median']:.3g}x")
        memory = [row["peak MB"][variant] for variant in (FUSED, ORIGINAL)]
        cells.append(" / ".join("-" if x is None else f"{x:.0f}" for x in memory))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@app.command()
def main(
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each row of the table.")] = 8.0,
    only: Annotated[list[str] | None, typer.Option(help="Names of cases; default: all.")] = None,
    compiled: Annotated[bool, typer.Option(help="torch.compile, too.")] = True,
    published: Annotated[bool, typer.Option("--markdown", help="Only print the table of docs/fuse.md.")] = False,
    allocator: AllocatorOption = Allocator.reuse,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times modules in plain PyTorch, fused and with torch.compile, on one thread of the CPU. This takes about ten
    minutes, most of it for torch.compile. It writes a JSON file and, if all cases run, a plot.
    """
    path = output / "fuse-cpu.json"
    if published:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        print(markdown(rows))
        return
    start = time.perf_counter()
    in_effect = prepare(1, allocator)
    rows = []
    for case in CASES:
        if only and case[0] not in only:
            continue
        problem = Problem(case)
        for passes in ("forward", "training"):
            with console.status(f"{case[0]}, {passes}"):
                rows.append(measure(problem, passes, seconds, compiled))
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    described = machine.describe(torch.device("cpu"), in_effect)
    results.write_json(path, {"part": "fuse", "machine": described, "clock": "CPU time", "load": load, "rows": rows})
    if rows and not only:
        plots.fuse(path.with_suffix(".png"), rows, described)
    finish([table(rows)], described, start, path)
    for row in rows:
        if row["case"] == "small":
            added = row["added us"]["median"] / row["steps"]
            console.print(f"A small call takes {added:+.1f} us ({row['passes']}) compared with the original.")


if __name__ == "__main__":
    app()
