"""Times steps of location-sensitive attention, Tacotron 2's: ``python -m bench.models.location --help``.

It times the steps of a decoder in training, forward and backward. Each step uses the alignments of the previous steps.
The modules that such decoders contain and ``LocationSensitiveAttention`` with the same weights are timed in turns. The
projection of the memory is excluded, because a decoder of hundreds of steps computes it once; its gradient is included.
Times are CPU times of the process: the load of the machine changes them less than wall times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from attn_kernels import Memory
from attn_kernels.mechanisms import LocationSensitiveAttention

from .. import report, results, timing
from ..cli import AllocatorOption, OutputOption, Run, ThreadsOption, application, console
from ..machine import Allocator

app = application()

EAGER, OURS = "eager", "ours"
CHANNELS, TAPS = 32, 31  # the convolution of Tacotron 2
TOLERANCE = 1e-4  # for contexts and gradients, relative to their largest element


class Sizes(NamedTuple):
    """B, Tk, A; memory: size of encoder outputs; query: of decoder states."""

    batch: int
    source: int
    units: int
    memory: int = 512
    query: int = 1024


SIZES = (Sizes(64, 180, 128), Sizes(16, 180, 128), Sizes(64, 60, 128), Sizes(1, 180, 128))


class EagerLocation(nn.Module):
    """Location-sensitive attention in PyTorch's own layers (Shen et al. 2018, section 2.2), without padding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.query = nn.Linear(sizes.query, sizes.units, bias=False)
        self.convolution = nn.Conv1d(2, CHANNELS, TAPS, padding=TAPS // 2, bias=False)
        self.projection = nn.Linear(CHANNELS, sizes.units, bias=False)
        self.score = nn.Linear(sizes.units, 1, bias=False)

    def forward(
        self, query: Tensor, outputs: Tensor, keys: Tensor, before: Tensor, cumulative: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, query), (B, Tk, memory), (B, Tk, A), (B, Tk) twice and (B, Tk) bool. Returns context, alignments."""
        located = self.convolution(torch.stack((before, cumulative), 1))
        hidden = torch.tanh(self.query(query).unsqueeze(1) + keys + self.projection(located.transpose(1, 2)))
        scores = self.score(hidden).squeeze(2).masked_fill(padding, -float("inf"))
        alignments = torch.softmax(scores, 1)
        return torch.bmm(alignments.unsqueeze(1), outputs).squeeze(1), alignments


class Decoding:
    """Queries, memory and weights, the same for both implementations."""

    def __init__(self, sizes: Sizes, steps: int) -> None:
        torch.manual_seed(0)
        self.sizes, self.steps = sizes, steps
        self.eager = EagerLocation(sizes)
        self.ours = LocationSensitiveAttention(
            sizes.query, sizes.memory, sizes.units, CHANNELS, TAPS, cumulative=True, bias=False
        )
        pairs = {
            "query_projection.weight": self.eager.query.weight,
            "location_convolution.weight": self.eager.convolution.weight,
            "location_projection.weight": self.eager.projection.weight,
            "v": self.eager.score.weight[0],
        }
        self.ours.load_state_dict({name: weight.detach() for name, weight in pairs.items()}, strict=False)
        self.ours.memory_projection.requires_grad_(False)
        self.queries = torch.randn(steps, sizes.batch, sizes.query).requires_grad_()
        self.outputs = torch.randn(sizes.batch, sizes.source, sizes.memory).requires_grad_()
        self.keys = torch.randn(sizes.batch, sizes.source, sizes.units).requires_grad_()
        self.lengths = torch.full((sizes.batch,), sizes.source)
        self.gradient = torch.randn(steps, sizes.batch, sizes.memory)

    def by_eager(self) -> Tensor:
        """The contexts of all steps, (T, B, memory)."""
        padding = torch.arange(self.sizes.source) >= self.lengths[:, None]
        alignments = cumulative = self.outputs.new_zeros(self.outputs.shape[:2])
        contexts = []
        for query in self.queries.unbind(0):
            context, alignments = self.eager(query, self.outputs, self.keys, alignments, cumulative, padding)
            cumulative = cumulative + alignments
            contexts.append(context)
        return torch.stack(contexts)

    def by_ours(self) -> Tensor:
        memory = Memory(self.keys, self.outputs, self.lengths)
        state = self.ours.initial_state(memory)
        contexts = []
        for query in self.queries.unbind(0):
            context, _, state = self.ours(query, memory, state)
            contexts.append(context)
        return torch.stack(contexts)

    def leaves(self, module: nn.Module) -> dict[str, Tensor]:
        learned = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        return {"queries": self.queries, "outputs": self.outputs, "keys": self.keys, **learned}

    def calls(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """For each implementation, forward and backward of all steps; a call returns the gradients of ``leaves``."""

        def train(contexts: Callable[[], Tensor], module: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
            leaves = tuple(self.leaves(module).values())
            return lambda: torch.autograd.grad(contexts(), leaves, self.gradient)

        return {EAGER: train(self.by_eager, self.eager), OURS: train(self.by_ours, self.ours)}

    def check(self) -> None:
        """Raises RuntimeError if the two differ in contexts or in the gradients of queries, outputs and keys."""
        of_eager, of_ours = (call() for call in self.calls().values())
        found = {
            "contexts": (self.by_ours(), self.by_eager()),
            "gradients of queries": (of_ours[0], of_eager[0]),
            "gradients of encoder outputs": (of_ours[1], of_eager[1]),
            "gradients of keys": (of_ours[2], of_eager[2]),
        }
        for name, (got, wanted) in found.items():
            error = ((got - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= TOLERANCE:
                raise RuntimeError(f"location: {name} at {tuple(self.sizes)} are off by {error}: nothing is timed")


def measure(sizes: Sizes, steps: int, seconds: float) -> dict[str, Any]:
    decoding = Decoding(sizes, steps)
    decoding.check()
    timer = timing.WallTimer(time.process_time)
    samples = timing.interleave(decoding.calls(), timer, seconds=seconds, least_rounds=3, most_rounds=100)
    return {
        **sizes._asdict(),
        "steps": steps,
        "rounds": len(samples[OURS]),
        "ms a step": {name: results.rounded(timing.spread(samples[name]).scaled(1e3 / steps)) for name in samples},
        f"times {OURS}": timing.ratios(samples, EAGER, OURS)._asdict(),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = report.table(
        "A step of location-sensitive attention, forward + backward: ms", "B,Tk,A", EAGER, OURS, "times"
    )
    for row in rows:
        spreads = (row["ms a step"][name] for name in (EAGER, OURS))
        sizes = ",".join(str(row[name]) for name in ("batch", "source", "units"))
        ratio = report.times(row[f"times {OURS}"]["median"])
        shown.add_row(sizes, *(report.figure(spread["median"]) for spread in spreads), ratio)
    return shown


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="One shape, a few steps and few rounds.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of a sequence.")] = 50,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds for each row of the table.")] = 20.0,
    threads: ThreadsOption = 1,
    allocator: AllocatorOption = Allocator.reuse,
    output: OutputOption = results.LOCAL,
) -> None:
    """Times the steps of Tacotron 2's attention in training on the CPU, in float32: PyTorch's layers against
    LocationSensitiveAttention. The table shows the mean time of a step in a whole sequence.
    """
    run = Run(threads, allocator)
    rows = []
    with console.status("measuring"):
        for sizes in SIZES[: 1 if quick else None]:
            rows.append(measure(sizes, min(steps, 5) if quick else steps, 0.2 if quick else seconds))
    settings: dict[str, Any] = {"threads": threads, "steps": steps, "clock": "CPU time"}
    run.finish("location", rows, table(rows), output, **settings)


if __name__ == "__main__":
    app()
