"""Times pooling with a gate, and several score vectors, on the CPU: ``python -m bench.cpu.pooling --help``.

It compares the formulas in eager PyTorch with one fused call and, for several score vectors, with one call per vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from attn_kernels import additive_attention

from .. import eager, report, results, timing
from ..cases import Shape
from ..cli import rows_application
from ..machine import Allocator

EAGER, CALLS, ONE = "eager", "a call for each vector", "one call"
TOLERANCE = 1e-4  # for results and gradients, relative to their largest element


class Case(NamedTuple):
    """vectors: R; None for one score vector without the axis R."""

    shape: Shape
    vectors: int | None
    gate: bool


CASES = (
    Case(Shape(1, 1, 20_000, 256, 256), None, True),
    Case(Shape(1, 1, 50_000, 256, 512), None, True),
    Case(Shape(32, 20, 80, 128, 128), 10, False),
    Case(Shape(512, 1, 200, 100, 100), 10, False),
    Case(Shape(64, 1, 50, 64, 64), 4, True),
)


class Problem:
    """The arguments of a case, and the ways to compute contexts from them: (B, Tq, R, D) or (B, Tq, D)."""

    def __init__(self, case: Case) -> None:
        rng = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=rng)

        (B, Tq, Tk, A, D), vectors, gate = case
        self.vectors = vectors
        self.tensors = {"query": normal(B, Tq, A), "keys": normal(B, Tk, A), "values": normal(B, Tk, D)}
        self.tensors |= {"v": normal(*(() if vectors is None else (vectors,)), A) / A**0.5, "bias": normal(A)}
        if gate:
            self.tensors["gate"] = normal(B, Tk, A)
        self.gradient = torch.randn_like(self.compute(EAGER))

    def ways(self) -> tuple[str, ...]:
        return (EAGER, ONE) if self.vectors is None else (EAGER, CALLS, ONE)

    def compute(self, way: str) -> Tensor:
        if way == CALLS:
            others = {name: t for name, t in self.tensors.items() if name != "v"}
            parts = [additive_attention(**others, v=v, need_weights=False).context for v in self.tensors["v"]]
            return torch.stack(parts, 2)
        function = eager.additive_attention if way == EAGER else additive_attention
        return function(**self.tensors, need_weights=False).context

    def forward(self, way: str) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (self.compute(way),)

        return call

    def both(self, way: str) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            leaves = [t.requires_grad_() for t in self.tensors.values()]
            return torch.autograd.grad(self.compute(way), leaves, self.gradient)

        return call


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Times forward alone and with backward, after a check that all ways give the same results."""
    problem = Problem(case)
    rows = []
    for kind, make in (("forward", problem.forward), ("forward + backward", problem.both)):
        expected = make(EAGER)()
        for way in problem.ways()[1:]:
            for got, wanted in zip(make(way)(), expected, strict=True):
                error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item()
                if not error <= TOLERANCE:
                    raise RuntimeError(f"pooling: {kind} of {way!r} at {tuple(case)} is off by {error}")
        calls = {way: make(way) for way in problem.ways()}
        samples = timing.interleave(calls, timing.WallTimer(), seconds=seconds, least_rounds=5, most_rounds=200)
        shape = case.shape._asdict() | {"vectors": case.vectors, "gate": case.gate}
        rows.append({"kind": kind, "shape": shape, **results.comparison(samples, ONE)})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = report.table(
        "Gate and score vectors: ms, and how many times one call's",
        "",
        "B,Tq,Tk,A,D",
        "vectors",
        "gate",
        "ms",
        wrap=True,
    )
    for row in rows:
        *sizes, vectors, gate = row["shape"].values()
        shape = ",".join(map(str, sizes))
        shown.add_row(row["kind"], shape, str(vectors or 1), "yes" if gate else "no", report.compared(row))
    return shown


def measure_all(quick: bool, seconds: float, allocator: Allocator) -> list[dict[str, Any]]:
    return [row for case in (CASES[-1:] if quick else CASES) for row in measure(case, seconds)]


PURPOSE = "Times gated pooling and several score vectors against eager PyTorch, forward and backward, on the CPU."
app = rows_application("pooling", PURPOSE, measure_all, table, quick_help="Only the last case and few rounds.")


if __name__ == "__main__":
    app()
