"""Code that the examples share: options, training with a progress bar, timing of a step, and the files they write.

Each example is a module with a command ``main`` and trains one model. Then it times two versions of the same training
step in turns: with the attention as PyTorch users write it ("before") and with this package's ("after"). See
bench/timing.py.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench import machine, report, results, timing
from bench.cli import console, progress_bars

BEFORE, AFTER = "before", "after"
FOLDER = Path("examples-results")  # in the working directory
TOLERANCE = 1e-3  # of losses and gradients before and after, in float32, relative to their largest element
CPU = torch.device("cpu")

QuickOption = Annotated[bool, typer.Option("--quick", help="A smaller model and fewer steps: some seconds.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for the picture and the figures.")]

Loss = Callable[[nn.Module], Tensor]  # of a model on one batch, always the same


def prepare() -> None:
    """Before each example: fixes the random seed, so that results repeat, and the number of threads, to 1."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def fit(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batch_of: Callable[[int], Any],
    steps: int,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Trains a model with Adam: the rate rises, then falls to 0. Returns the losses.

    loss_of: the loss of a model on a batch. batch_of: the batch of a step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    losses = []
    with progress_bars() as bars:
        task = bars.add_task("training", total=steps)
        for step in range(steps):
            losses.append(train_step(model, optimizer, loss_of(model, batch_of(step))))
            schedule.step()
            bars.update(task, advance=1, description=f"training (loss {losses[-1]:.3f})")
    return losses


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def compare(what: str, before: nn.Module, after: nn.Module, loss: Loss, seconds: float) -> dict[str, Any]:
    """Time and peak memory of a training step of two models with the same parameters, and prints them.

    Raises RuntimeError if the two do not have the same loss and gradients.
    """
    _check_same(what, before, after, loss)
    steps = {name: _step(model, loss) for name, model in ((BEFORE, before), (AFTER, after))}
    clock = time.process_time  # of one thread: other work on the machine counts less
    timer = timing.WallTimer(clock)
    samples = timing.interleave(steps, timer, seconds=seconds, least_rounds=5, most_rounds=60, clock=clock)
    row = {
        "what": what,
        **results.comparison(samples, AFTER),
        "peak MB": {name: results.rounded(_peak_memory(step)) for name, step in steps.items()},
    }
    console.print(f"{what}: {verdict(row)}")
    return row


def _step(model: nn.Module, loss: Loss) -> Callable[[], float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return lambda: train_step(model, optimizer, loss(model))


def _peak_memory(step: Callable[[], float]) -> float | None:
    """The median of three measurements: memory that malloc kept from the training changes each of them."""
    peaks = [machine.peak_memory(step, CPU) for _ in range(3)]
    return None if None in peaks else statistics.median(peaks)


def _check_same(what: str, before: nn.Module, after: nn.Module, loss: Loss) -> None:
    found: list[dict[str, Tensor]] = []
    for model in (before, after):
        model.zero_grad()
        value = loss(model)
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": value.detach(), **gradients})
        model.zero_grad()
    theirs, ours = found
    largest = max(float(gradient.abs().max()) for name, gradient in theirs.items() if name != "loss")
    for name, expected in theirs.items():
        # Some gradients are 0 except for rounding, such as that of the bias of scores: they have no scale of their own.
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        error = float((ours.get(name, torch.zeros(())) - expected).abs().max()) / scale
        if not error <= TOLERANCE:
            raise RuntimeError(f"{what}: {name} is off by {error} after: nothing is timed")


def verdict(row: dict[str, Any]) -> str:
    """A row of ``compare`` as a sentence. It states when there is no gain."""
    ms, memory, ratio = row["ms"], row["peak MB"], row[f"times {AFTER}"][BEFORE]
    sizes = ", ".join(f"{report.figure(ms[way]['median'])} ms {way}" for way in (BEFORE, AFTER))
    text = f"{sizes} ({ratio['median']:.2f}x, quartiles {ratio['low']:.2f}-{ratio['high']:.2f})"
    if ratio["low"] <= 1.0:
        text += ", NOT FASTER" if ratio["high"] <= 1.05 else ", no clear gain"
    if memory[BEFORE] is not None:
        text += (
            f"; peak memory {report.megabytes(memory[BEFORE])} MB before, {report.megabytes(memory[AFTER])} MB after"
        )
    return text


def markdown(examples: list[dict[str, Any]]) -> str:
    """The table of docs/examples.md: a line for each row of ``compare`` in the files that ``finish`` wrote."""
    lines = ["| | what came of it | the step that is timed | ms before | after | times faster | MB before | after |"]
    lines.append("|---" * 8 + "|")
    for example in examples:
        learnt = "; ".join(f"{name}: {value:.3g}" for name, value in example["learnt"].items())
        for row in example["rows"]:
            ms = [report.figure(row["ms"][way]["median"]) for way in (BEFORE, AFTER)]
            memory = [report.megabytes(row["peak MB"][way]) for way in (BEFORE, AFTER)]
            ratio = row[f"times {AFTER}"][BEFORE]["median"]
            name = f"[{example['example']}](#{example['example']})" if learnt else ""
            lines.append(
                f"| {name} | {learnt} | {row['what']} | {ms[0]} | {ms[1]} | {ratio:.2f}x | {' | '.join(memory)} |"
            )
            learnt = ""
    return "\n".join(lines)


def finish(name: str, figure: Figure, learnt: dict[str, float], rows: list[dict[str, Any]], output: Path) -> None:
    """Writes the picture and the figures: what was learnt, and the rows of ``compare``."""
    picture, figures = output / f"{name}.png", output / f"{name}.json"
    results.write_whole(picture, lambda partial: figure.savefig(partial, dpi=100, metadata={"Software": None}))
    described = machine.describe(CPU, machine.set_allocator(machine.Allocator.default))
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    learnt = results.rounded(learnt)
    results.write_json(
        figures,
        {"example": name, "learnt": learnt, "rows": rows, "clock": "CPU time", "load": load, "machine": described},
    )
    console.print("; ".join(f"{key}: {value:.4g}" for key, value in learnt.items()))
    console.print(f"Written: {results.shown(picture)}, {results.shown(figures)}")


def heat_map(axes: Axes, alignments: Tensor, columns: Any = None, rows: Any = None, **options: Any) -> Any:
    """alignments: (T, S), a row for each step that is written. columns, rows: their labels, such as characters."""
    image = axes.imshow(
        alignments.detach().numpy(), **{"cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto", **options}
    )
    if columns is not None:
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
    if rows is not None:
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("read", fontsize=8)
    axes.set_ylabel("written", fontsize=8)
    return image
