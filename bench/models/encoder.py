"""Times encoders on sentences of different lengths, alone and in training: ``python -m bench.models.encoder --help``.

It times forward and backward of bidirectional layers, with lengths uniform in 1..S and in S/2..S. Packed:
``pack_padded_sequence`` and the layer. Padded: only the layer. It also computes the padding and gives other results, so
it is only a bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attn_kernels.seq2seq import Encoder, Seq2Seq

from .. import report, results, timing
from ..cli import AllocatorOption, OutputOption, Run, ThreadsOption, application, progress_bars
from ..machine import Allocator
from .loop import QUICK, SHAPES, VOCABULARY, Shape, make_data, ragged_lengths, training_step

app = application()

PACKED, PADDED, OURS = "packed", "padded", "ours"
TOLERANCE = 1e-4  # for results and gradients in float32, relative to their largest element
Gradients = dict[str, Tensor]


def encodings(encoder: Encoder, lengths: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each implementation, a function from inputs to outputs."""

    def packed(x: Tensor) -> Tensor:
        rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(encoder.rnn(rows)[0], batch_first=True, total_length=x.shape[1])[0]

    return {PACKED: packed, PADDED: lambda x: encoder.rnn(x)[0], OURS: lambda x: encoder(x, lengths)[0]}


def forward_and_backward(encoder: Encoder, encode: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Gradients]:
    generator = torch.Generator().manual_seed(3)
    of_outputs = torch.randn(*x.shape[:2], 2 * encoder.rnn.hidden_size, generator=generator).to(x.device)
    inputs = {"inputs": x, **dict(encoder.named_parameters())}

    def call() -> Gradients:
        outputs = encode(x)
        gradients = torch.autograd.grad(outputs, list(inputs.values()), of_outputs)
        return {"outputs": outputs.detach(), **dict(zip(inputs, gradients, strict=True))}

    return call


def check(cell: str, shape: Shape, expected: Gradients, got: Gradients) -> None:
    for name, right in expected.items():
        error = ((got[name] - right).abs().max() / right.abs().max()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"encoder: {cell} {tuple(shape)}: {name} is off by {error}: nothing is timed")


def measure_alone(
    cell: str, shape: Shape, least: float, size: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = Encoder(size, size, cell=cell, bidirectional=True).to(device)
    x = torch.randn(shape.B, shape.S, size, device=device).requires_grad_()
    ways = encodings(encoder, ragged_lengths(shape, least))
    calls: dict[str, Any] = {name: forward_and_backward(encoder, way, x) for name, way in ways.items()}
    check(cell, shape, calls[PACKED](), calls[OURS]())
    return row("encoder", cell, shape, least, timed(calls, device, seconds))


def measure_training(
    cell: str, shape: Shape, least: float, size: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Times a training step with each encoder. All models have the decoder loop."""
    source, _, target = make_data(shape, device)
    calls: dict[str, Any] = {}
    for name in (PACKED, OURS):
        torch.manual_seed(0)
        model = Seq2Seq(VOCABULARY, VOCABULARY, size, size, size, cell=cell).to(device)
        if name == PACKED:
            model.encoder.rnn.register_forward_hook(_look)  # with a hook, the layer gets packed inputs
        calls[name] = training_step(model, (source, ragged_lengths(shape, least), target))
    return row("training step", cell, shape, least, timed(calls, device, seconds))


def _look(module: nn.Module, arguments: Any, result: Any) -> None:
    """A forward hook that changes nothing."""


def timed(calls: dict[str, Any], device: torch.device, seconds: float) -> timing.Samples:
    return timing.interleave(calls, timing.timer_for(device), seconds=seconds, least_rounds=5, most_rounds=60)


def row(kind: str, cell: str, shape: Shape, least: float, samples: timing.Samples) -> dict[str, Any]:
    settings = {"kind": kind, "cell": cell, "B,S,T": list(shape), "lengths": "S/2..S" if least else "1..S"}
    return {**settings, **results.comparison(samples, OURS)}


def table(rows: list[dict[str, Any]]) -> Table:
    title = "Ragged sentences, forward and backward: ms, and times as long as ours"
    shown = report.table(title, "", "cell", "B,S,T", "lengths", OURS, PACKED, PADDED)
    for one in rows:
        cells = [report.figure(one["ms"][OURS]["median"])]
        for name in (PACKED, PADDED):
            if name in one["ms"]:
                text = report.figure(one["ms"][name]["median"])
                cells.append(f"{text}  {report.times(one[f'times {OURS}'][name]['median'])}")
            else:
                cells.append("")
        shown.add_row(one["kind"], one["cell"], ",".join(map(str, one["B,S,T"])), one["lengths"], *cells)
    return shown


@app.command()
def main(
    size: Annotated[int, typer.Option(min=1, help="Size of embedding, states and attention.")] = 256,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each row of the table.")] = 10.0,
    threads: ThreadsOption = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    allocator: AllocatorOption = Allocator.reuse,
    quick: Annotated[bool, typer.Option(help="One shape and few rounds.")] = False,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times LSTM and GRU encoders on ragged sentences: packed, padded and ours, and a training step with them."""
    run = Run(threads, allocator, device)
    shapes = QUICK if quick else SHAPES[:4]
    rows: list[dict[str, Any]] = []
    with progress_bars() as progress:
        task = progress.add_task("shapes", total=8 * len(shapes))
        for measure in (measure_alone, measure_training):
            for cell in ("lstm", "gru"):
                for one, least in itertools.product(shapes, (0.0, 0.5)):
                    progress.update(task, description=f"{cell} {','.join(map(str, one))}")
                    rows.append(measure(cell, one, least, size, run.device, 0.5 if quick else seconds))
                    progress.advance(task)
    settings: dict[str, Any] = {"size": size, "threads": threads, "dtype": "float32", "vocabulary": VOCABULARY}
    run.finish("encoder", rows, table(rows), output, **settings)


if __name__ == "__main__":
    app()
