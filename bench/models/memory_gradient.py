"""Times the work that decoding steps share: ``python -m bench.models.memory_gradient --help``.

First, the backward of many steps on one memory: the gradient of the memory is computed once for all steps, or once per
step, or by eager. Second, a step of five beams, which reads the memory once, against a step of one beam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from attn_kernels import Memory, additive_attention, prepare_keys
from attn_kernels.attending import attend
from attn_kernels.scores import AdditiveScore

from .. import eager, report, results, timing
from ..cli import rows_application
from ..machine import Allocator

EAGER, DENSE, DEFERRED = "eager", "gradient per step", "gathered"
STEPS = 50
BACKWARD_SHAPES = ((64, 50, 512), (64, 200, 512), (16, 200, 256), (1, 200, 512))  # B, Tk, A = D
BEAM_SHAPES = ((8, 200, 512), (64, 50, 512), (1, 200, 512), (64, 200, 1024))  # the last one exceeds the caches
BEAMS = 5
TOLERANCE = 1e-4  # for gradients, relative to their largest element


class Steps:
    """The attention of a decode loop: T queries, one after the other, on one memory. A = D."""

    def __init__(self, batch: int, source: int, units: int, steps: int = STEPS) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.queries = normal(steps, batch, units).requires_grad_()
        self.keys, self.values = normal(batch, source, units).requires_grad_(), normal(batch, source, units)
        self.values.requires_grad_()
        self.v = (normal(units) / units**0.5).requires_grad_()
        self.gradient = normal(steps, batch, units)

    def forward(self, variant: str) -> Tensor:
        """The contexts of all steps, (T, B, D)."""
        memory = Memory(self.keys, self.values)
        prepared = None if variant == EAGER else prepare_keys(self.keys)
        contexts = []
        for query in self.queries.unbind(0):
            if variant == EAGER:
                attention = eager.additive_attention(query, self.keys, self.values, self.v)
            elif variant == DENSE:
                attention = additive_attention(query, self.keys, self.values, self.v, prepared=prepared)
            else:
                attention = attend(AdditiveScore(self.v, None, prepared), query, memory, True, None)
            contexts.append(attention.context)
        return torch.stack(contexts)

    def backward(self, variant: str) -> Callable[[], tuple[Tensor, ...]]:
        """Returns a call of the backward alone: the graph is built once and retained."""
        contexts = self.forward(variant)
        leaves = (self.queries, self.keys, self.values, self.v)
        return lambda: torch.autograd.grad(contexts, leaves, self.gradient, retain_graph=True)

    def both(self, variant: str) -> Callable[[], tuple[Tensor, ...]]:
        leaves = (self.queries, self.keys, self.values, self.v)
        return lambda: torch.autograd.grad(self.forward(variant), leaves, self.gradient)


def measure_backward(shape: tuple[int, int, int], seconds: float) -> list[dict[str, Any]]:
    """Times the backward alone and with the forward, each over all steps."""
    steps = Steps(*shape)
    expected = steps.backward(EAGER)()
    for variant in (DENSE, DEFERRED):
        for got, wanted in zip(steps.backward(variant)(), expected, strict=True):
            error = ((got - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"memory_gradient: gradients of {variant!r} at {shape} are off by {error}: nothing is timed"
                )
    variants = (EAGER, DENSE, DEFERRED)
    kinds = {f"backward, {STEPS} steps": steps.backward, f"forward + backward, {STEPS} steps": steps.both}
    return [
        _row(kind, shape, {variant: make(variant) for variant in variants}, DEFERRED, seconds)  # type: ignore[operator]
        for kind, make in kinds.items()
    ]


def measure_beams(shape: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """Times a step with one query per sentence and a step with several, on prepared keys, without gradients."""
    batch, source, units = shape
    steps = Steps(batch, source, units, BEAMS)
    queries = steps.queries.detach().transpose(0, 1).contiguous()  # (B, K, A)
    keys, values, v = steps.keys.detach(), steps.values.detach(), steps.v.detach()
    prepared = prepare_keys(keys)

    def step(count: int) -> Callable[[], object]:
        few = queries[:, :count].contiguous()
        return lambda: additive_attention(few, keys, values, v, prepared=prepared)

    calls = {f"{count} queries": step(count) for count in (1, BEAMS)}
    return _row("a step, forward", shape, calls, "1 queries", seconds)


def _row(
    kind: str, shape: tuple[int, int, int], calls: dict[str, Callable[[], object]], against: str, seconds: float
) -> dict[str, Any]:
    samples = timing.interleave(calls, timing.WallTimer(), seconds=seconds, least_rounds=5, most_rounds=200)
    return {
        "kind": kind,
        "B,Tk,A=D": list(shape),
        **results.comparison(samples, against),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = report.table("Steps on one memory: ms, and how many times the last one's", "", "B,Tk,A=D", "ms", wrap=True)
    for row in rows:
        shown.add_row(row["kind"], ",".join(map(str, row["B,Tk,A=D"])), report.compared(row))
    return shown


def measure_all(quick: bool, seconds: float, allocator: Allocator) -> list[dict[str, Any]]:
    most = 1 if quick else None
    rows = [row for shape in BACKWARD_SHAPES[:most] for row in measure_backward(shape, seconds)]
    return rows + [measure_beams(shape, seconds) for shape in BEAM_SHAPES[:most]]


PURPOSE = "Times the backward of 50 steps on one memory, and a step of five beams against one of one, on the CPU."
app = rows_application("steps", PURPOSE, measure_all, table, quick_help="One shape of each and few rounds.")


if __name__ == "__main__":
    app()
