"""The sizes of the sweep: all cells, and which of them are too large to run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .. import timing
from ..cases import FORWARD, TRAINING, Shape
from ..machine import Allocator


class Grid(NamedTuple):
    """The sizes of the sweep; the width D of the values is A."""

    batch: tuple[int, ...] = (1, 4, 16, 64, 256)
    queries: tuple[int, ...] = (1, 2, 5, 8, 32, 128)
    steps: tuple[int, ...] = (1, 10, 50, 200, 1000, 4000)
    units: tuple[int, ...] = (16, 64, 256, 1024)


QUICK = Grid(batch=(1, 64), queries=(1, 8, 32), steps=(10, 200, 1000), units=(64, 1024))

LONG_CALL = 0.3  # seconds; longer calls get few rounds, as their times vary little
# Approximate times of eager on one core, from measurements. They only decide which cells are left out, and give the
# expected total time.
NANOSECONDS_A_PAIR = {FORWARD: 1.0, TRAINING: 3.0}  # additive: B*Tq*Tk*A
NANOSECONDS_A_PRODUCT = {FORWARD: 0.03, TRAINING: 0.08}  # dot: B*Tq*Tk*(A+D)
NANOSECONDS_A_BYTE = {FORWARD: 0.07, TRAINING: 0.25}  # keys and values


@dataclass(frozen=True)
class Limits:
    """Cells that need more than this are left out."""

    memory_gb: float = 4.0
    seconds: float = 2.0
    item_size: int = 4  # also for 16-bit dtypes: their results are compared with eager in float32


@dataclass(frozen=True)
class Settings:
    """The conditions of a sweep. An interrupted sweep continues only under the same conditions."""

    dtype: str = "float32"
    threads: int = 1
    allocator: str = Allocator.reuse.value
    seconds: float = 0.15
    rounds: int = 5
    rounds_long: int = 2


@dataclass
class Measured:
    """Medians in milliseconds, and the ratio eager time / our time per round: above 1 if ours is faster."""

    ours: float
    eager: float
    ratio: timing.Spread
    rounds: int


@dataclass
class Cell:
    op: str
    shape: Shape
    passes: str
    not_run: str | None = None  # why it was left out
    failure: str | None = None  # why ours was not timed
    first: Measured | None = None
    again: Measured | None = None  # a second, longer measurement of a cell that was below the bound

    @property
    def key(self) -> tuple[str, Shape, str]:
        return self.op, self.shape, self.passes

    @property
    def ratio(self) -> float | None:
        """The ratio that counts: from the longer measurement if there is one."""
        measured = self.again or self.first
        return None if measured is None else measured.ratio.median

    @property
    def done(self) -> bool:
        return self.first is not None or self.failure is not None or self.not_run is not None


def plan(grid: Grid, op_names: Sequence[str], passes: Sequence[str], limits: Limits) -> list[Cell]:
    """All cells. Cells beyond the limits have a reason in ``not_run``. Cells with the same keys and values are
    adjacent.
    """
    cells = []
    for batch, steps, units in itertools.product(grid.batch, grid.steps, grid.units):
        for op, p, queries in itertools.product(op_names, passes, grid.queries):
            cell = Cell(op, Shape(batch, queries, steps, units, units), p)
            cell.not_run = beyond(cell, limits)
            cells.append(cell)
    return cells


def beyond(cell: Cell, limits: Limits) -> str | None:
    if working_set(cell) * limits.item_size > limits.memory_gb * 1e9:
        return f"more than {limits.memory_gb:g} GB"
    if expected_seconds(cell.op, cell.shape, cell.passes) > limits.seconds:
        return f"more than {limits.seconds:g} s a call"
    return None


def working_set(cell: Cell) -> int:
    """Peak number of elements that eager (or ours) holds, inputs included."""
    batch, queries, steps, units, width = cell.shape
    training = cell.passes == TRAINING
    scores = batch * queries * steps
    memory = batch * steps * (units + width)  # keys and values; gradients or a prepared copy need the same again
    rest = 2 * memory + 4 * batch * queries * (units + width) + (5 if training else 3) * scores
    return rest + ((5 if training else 3) * scores * units if cell.op == "additive_attention" else 0)


def expected_seconds(op: str, shape: Shape, passes: str) -> float:
    """Approximate time of an eager call."""
    batch, queries, steps, units, width = shape
    scores = batch * queries * steps
    own = (
        scores * units * NANOSECONDS_A_PAIR[passes]
        if op == "additive_attention"
        else scores * (units + width) * NANOSECONDS_A_PRODUCT[passes]
    )
    return 1e-9 * (own + 4 * batch * steps * (units + width) * NANOSECONDS_A_BYTE[passes])


def expected_total(cells: Iterable[Cell], settings: Settings) -> float:
    """Approximate seconds for all cells that are not timed yet."""
    total = 0.0
    for cell in cells:
        if not cell.done:
            call = expected_seconds(cell.op, cell.shape, cell.passes)
            rounds = settings.rounds_long if call > LONG_CALL else settings.rounds
            total += 0.05 + 5 * call + max(settings.seconds, 1.5 * rounds * call)
    return total
