"""Times attention over a ragged batch: ``python -m bench.cpu.packed --help``.

It times forward and backward of additive or dot attention over sentences of different lengths. Packed keys and values,
without padding, are compared with padded ones with ``memory_lengths``, and with eager on the padded ones. Peak memory
is measured too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from attn_kernels import additive_attention, dot_attention

from .. import eager, machine, report, results, timing
from ..cli import rows_application
from ..machine import Allocator

PACKED, PADDED, EAGER = "packed", "padded", "eager, padded"
WAYS = (PACKED, PADDED, EAGER)
SHORTEST, LONGEST = 5, 200
SHAPES = ((32, 40, 256), (32, 1, 256))  # B, Tq, A = D
OPS = ("additive_attention", "dot_attention")
TOLERANCE = 1e-4  # for gradients, relative to their largest element


class Ragged:
    """A batch of sentences of ``shortest`` to ``longest`` steps, packed and padded."""

    def __init__(
        self,
        op: str,
        batch: int,
        queries: int,
        units: int,
        shortest: int = SHORTEST,
        longest: int = LONGEST,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rng = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng).to(dtype)

        self.op = op
        self.lengths = torch.randint(shortest, longest + 1, (batch,), generator=rng)
        self.offsets = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        steps = int(self.lengths.sum())
        self.there = torch.arange(int(self.lengths.max())) < self.lengths[:, None]
        self.query = normal(batch, queries, units).requires_grad_()
        self.v = (normal(units) / math.sqrt(units)).requires_grad_()
        self.packed = [normal(steps, units).requires_grad_() for _ in range(2)]
        self.padded = [self._pad(x.detach()).requires_grad_() for x in self.packed]
        self.grad = normal(batch, queries, units)

    def _pad(self, rows: Tensor) -> Tensor:
        return rows.new_zeros((*self.there.shape, rows.shape[1])).masked_scatter(self.there[..., None], rows)

    @property
    def padding(self) -> float:
        """The fraction of the padded memory that is padding."""
        return 1 - self.there.float().mean().item()

    def inputs(self, way: str) -> tuple[Tensor, ...]:
        """Query, keys, values and, for additive attention, v."""
        own = (self.v,) if self.op == "additive_attention" else ()
        return (self.query, *(self.packed if way == PACKED else self.padded), *own)

    def forward(self, way: str) -> Callable[[], Tensor]:
        """Returns a call that computes the context."""
        inputs = self.inputs(way)
        masks = dict(memory_offsets=self.offsets) if way == PACKED else dict(memory_lengths=self.lengths)
        ours: dict[str, Any] = dict(additive_attention=additive_attention, dot_attention=dot_attention)
        function = getattr(eager, self.op) if way == EAGER else ours[self.op]

        return lambda: function(*inputs, **masks, need_weights=False).context

    def both(self, way: str) -> Callable[[], tuple[Tensor, ...]]:
        """Returns a call that runs forward and backward and gives the gradients of the inputs."""
        forward, inputs = self.forward(way), self.inputs(way)
        return lambda: torch.autograd.grad(forward(), inputs, self.grad)

    def check(self, tolerance: float = TOLERANCE) -> None:
        """Raises RuntimeError, so that nothing is timed, unless all ways give the same gradients."""
        dquery, dkeys, dvalues, *own = self.both(PACKED)()
        packed = (dquery, self._pad(dkeys), self._pad(dvalues), *own)
        for way in (PADDED, EAGER):
            for one, other in zip(packed, self.both(way)(), strict=True):
                error = ((one - other).abs().max() / other.abs().max()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"packed: gradients of {way!r} are off by {error}: nothing is timed")


def measure(op: str, shape: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    ragged = Ragged(op, *shape)
    ragged.check()
    calls = {way: ragged.both(way) for way in WAYS}
    samples = timing.interleave(calls, timing.WallTimer(), seconds=seconds, least_rounds=5, most_rounds=200)
    return {
        "op": op,
        "B,Tq,A=D": list(shape),
        "padding": round(ragged.padding, 3),
        **results.comparison(samples, PACKED),
    }


def add_memory(row: dict[str, Any]) -> None:
    """Adds the peak memory of forward and backward: saved tensors, scratch and gradients, without the inputs."""
    ragged = Ragged(row["op"], *row["B,Tq,A=D"])
    row["MB"] = {}
    for way in WAYS:
        call = ragged.both(way)
        call()
        row["MB"][way] = machine.peak_memory(call, torch.device("cpu"))


def table(rows: list[dict[str, Any]]) -> Table:
    title = "Forward and backward of a ragged batch: ms, how many times those of packed, and MB at the peak"
    shown = report.table(title, "", "B,Tq,A=D", "padding", *WAYS, wrap=True)
    for row in rows:
        cells = []
        for way in WAYS:
            ratio = row[f"times {PACKED}"].get(way)
            of_packed = "" if ratio is None else f" ({ratio['median']:.2f}x)"
            memory = row["MB"][way]
            of_memory = "" if memory is None else f", {report.figure(memory)} MB"
            cells.append(f"{report.figure(row['ms'][way]['median'])}{of_packed}{of_memory}")
        shown.add_row(row["op"], ",".join(map(str, row["B,Tq,A=D"])), f"{row['padding']:.0%}", *cells)
    return shown


def measure_all(quick: bool, seconds: float, allocator: Allocator) -> list[dict[str, Any]]:
    rows = [measure(op, shape, seconds) for shape in SHAPES[: 1 if quick else None] for op in OPS]
    machine.set_allocator_for_memory(allocator)
    for row in rows:
        add_memory(row)
    return rows


PURPOSE = "Times attention over sentences of 5 to 200 steps, packed and padded, forward and backward, on the CPU."
app = rows_application("packed", PURPOSE, measure_all, table)


if __name__ == "__main__":
    app()
