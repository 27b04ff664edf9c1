"""One direction of a recurrent layer over sentences of different lengths, without autograd: forward, then backward.

Steps are stored one after the other, each with the rows of the sentences that have it, longest first, as in a
``PackedSequence``: no padding is computed. In PyTorch every step is a slice whose backward writes the whole batch;
here all steps share a few arrays, and what waits for no state is one product for all steps.

N rows of all steps, R sentences, T steps, n inputs, H units; G = 4 H in an LSTM, 3 H in a GRU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...gemm import PackedLinear, linear_of_rows
from .cell_steps import find_step
from .inputs import CellWeights

_EXACT, _SMALL = 64, 256  # rows


class Visit(NamedTuple):
    """A step, in the order in which a direction visits them."""

    begin: int  # its first row
    rows: int
    going_on: int  # its first rows, whose sentences have had a step before; the others begin here
    before: int  # the first row of the step visited before


class Direction(NamedTuple):
    """The order of the steps, and where states come from."""

    visits: list[Visit]
    state_before: (
        Tensor  # (N,), the row of the state before each row in arrays of N + R rows: the last are first states
    )
    first: Tensor  # (R,), the row of each sentence that is visited first
    last: Tensor  # (R,), and last


class SavedDirection(NamedTuple):
    """What a backward reads."""

    gates: Tensor  # (N, G), i, f, g, o or r, z, n
    hidden: Tensor  # (N + R, H): the last R are the first states
    third: Tensor  # (N, H), tanh of the cells; GRU: h W_hn + b_hn
    cell: Tensor | None  # (N + R, H); None of a GRU


def forward(
    way: Direction, x: Tensor, weights: CellWeights, hidden: Tensor | None, cell: Tensor | None, out: Tensor
) -> SavedDirection:
    """x: (N, n). hidden, cell: (R, H), the first states; None: zeros. Written: out, (N, H), the states of all rows."""
    run = _run_lstm if weights.is_lstm else _run_gru
    saved = run(way, x, weights, _states(way, x, weights, hidden), cell, hidden is not None)
    out.copy_(saved.hidden[: x.shape[0]])
    return saved


def backward(
    way: Direction, weights: CellWeights, saved: SavedDirection, dhidden: Tensor, dcell: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the gates before their functions: of their parts with x, and of those with h, (N, G) each.

    dhidden: (N + R, H), of the states of all rows, and R zeros. After the call these are the gradients of the first
        states, but for their parts through ``weights.h``.
    dcell: (R, H), of the last cells; after the call, of the first.
    """
    return (_go_back_lstm if weights.is_lstm else _go_back_gru)(way, weights, saved, dhidden, dcell)


def _states(way: Direction, x: Tensor, weights: CellWeights, first: Tensor | None) -> Tensor:
    count = x.shape[0]
    states = x.new_empty(count + way.first.shape[0], weights.h.shape[1])
    states[count:] = 0 if first is None else first
    return states


class _Product:
    """Products of rows in the middle of a matrix with a weight.

    oneDNN compiles code for each number of rows, and keeps so many codes. Large numbers are rounded up, to have few of
    them: rows that follow are multiplied, too, and dropped.
    """

    def __init__(self, rows: Tensor, weight: Tensor, way: Direction) -> None:
        most = way.first.shape[0]
        self.rows, self.product = rows, PackedLinear(weight, most, len(way.visits))
        self.rounds = self.product.packed is not None and most > _EXACT

    def __call__(self, begin: int, count: int) -> Tensor:
        if not self.rounds or count <= _EXACT:
            return self.product(self.rows[begin : begin + count])
        multiple = 8 if count <= _SMALL else 32
        return self.product(self.rows[begin : begin + -(-count // multiple) * multiple])[:count]


# LSTM -----------------------------------------------------------------------------------------------------------------


def _run_lstm(
    way: Direction, x: Tensor, weights: CellWeights, hidden: Tensor, first_cell: Tensor | None, has_first: bool
) -> SavedDirection:
    count = x.shape[0]
    cell = _states(way, x, weights, first_cell)
    gates = linear_of_rows(x, weights.x, None if weights.bias_x is None else weights.bias_x + weights.bias_h)
    if has_first:
        gates.index_add_(0, way.first, hidden[count:] @ weights.h.t())
    tanh = torch.empty_like(cell[:count])
    product, step = _Product(hidden, weights.h, way), find_step("lstm_step", gates)
    for begin, rows, going_on, before in way.visits:
        if going_on:
            own, previous = slice(begin, begin + going_on), slice(before, before + going_on)
            own_gates = gates[own].add_(product(before, going_on))
            step(own_gates, cell[previous], cell[own], tanh[own], hidden[own], None)
        if going_on < rows:
            own, previous = slice(begin + going_on, begin + rows), slice(count + going_on, count + rows)
            step(gates[own], cell[previous], cell[own], tanh[own], hidden[own], None)
    return SavedDirection(gates, hidden, tanh, cell)


def _go_back_lstm(
    way: Direction, weights: CellWeights, saved: SavedDirection, dhidden: Tensor, dcell: Tensor | None
) -> tuple[Tensor, Tensor]:
    gates, _, tanh, cell = saved
    assert cell is not None
    assert dcell is not None
    count = gates.shape[0]
    dgates = torch.empty_like(gates)
    product, step = _Product(dgates, weights.h.t(), way), find_step("lstm_step_backward", gates)
    for begin, rows, going_on, before in reversed(way.visits):
        if going_on < rows:
            own, previous = slice(begin + going_on, begin + rows), slice(count + going_on, count + rows)
            step(dhidden[own], gates[own], cell[previous], tanh[own], dcell[going_on:rows], dgates[own])
        if going_on:
            own, previous = slice(begin, begin + going_on), slice(before, before + going_on)
            step(dhidden[own], gates[own], cell[previous], tanh[own], dcell[:going_on], dgates[own])
            dhidden[previous].add_(product(begin, going_on))
    return dgates, dgates


# GRU ------------------------------------------------------------------------------------------------------------------


def _run_gru(
    way: Direction, x: Tensor, weights: CellWeights, hidden: Tensor, _: Tensor | None, has_first: bool
) -> SavedDirection:
    count = x.shape[0]
    gates = linear_of_rows(x, weights.x, weights.bias_x)
    recurrent = torch.empty_like(hidden[:count])
    of_first = hidden[count:] @ weights.h.t() if has_first else gates.new_zeros(way.first.shape[0], gates.shape[1])
    product, step = _Product(hidden, weights.h, way), find_step("gru_step", gates)
    bias = weights.bias_h
    for begin, rows, going_on, before in way.visits:
        if going_on:
            own, previous = slice(begin, begin + going_on), slice(before, before + going_on)
            products = product(before, going_on)
            step(gates[own], products, bias, hidden[previous], recurrent[own], hidden[own], None)
        if going_on < rows:
            own, previous = slice(begin + going_on, begin + rows), slice(count + going_on, count + rows)
            step(gates[own], of_first[going_on:rows], bias, hidden[previous], recurrent[own], hidden[own], None)
    return SavedDirection(gates, hidden, recurrent, None)


def _go_back_gru(
    way: Direction, weights: CellWeights, saved: SavedDirection, dhidden: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    gates, hidden, recurrent = saved[:3]
    count = gates.shape[0]
    dgates, dproducts = torch.empty_like(gates), torch.empty_like(gates)
    product, step = _Product(dproducts, weights.h.t(), way), find_step("gru_step_backward", gates)
    for begin, rows, going_on, before in reversed(way.visits):
        for first, end, start in ((going_on, rows, count), (0, going_on, before)):
            if first < end:
                own, previous = slice(begin + first, begin + end), slice(start + first, start + end)
                of_own = (dhidden[own], gates[own], hidden[previous], recurrent[own])
                step(*of_own, dhidden[previous], dgates[own], dproducts[own])
        if going_on:
            dhidden[before : before + going_on].add_(product(begin, going_on))
    return dgates, dproducts
