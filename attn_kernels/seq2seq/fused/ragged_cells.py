"""One direction of a recurrent layer over sentences of different lengths, without autograd: forward, then backward.

Steps are stored one after the other, as in a ``PackedSequence``. Each has the rows of the sentences that are long
enough, longest first, so that no padding is computed. In PyTorch every step is a slice, whose backward writes the whole
batch. Here all steps share a few arrays, and all products that need no state are one product over all steps.

N rows of all steps, R sentences, T steps, n inputs, H units; G = 4 H for an LSTM, 3 H for a GRU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...gemm import PackedLinear, linear_of_rows
from .cell_steps import find_step
from .distinct import gather

_EXACT, _SMALL = 64, 256  # rows


class Part(NamedTuple):
    """Rows of one step: those whose sentences continue, or those whose sentences begin with this step."""

    number: int  # in the order of rows
    rows: int
    begin: int  # its first row
    before: int  # the first row of the states before it, in arrays of N + R rows; the last R rows are the first states
    sentence: int  # the index, 0..R-1, of the sentence of its first row; the others follow
    goes_on: bool


class Direction(NamedTuple):
    """The order of the steps, and the rows of the previous states."""

    parts: list[Part]  # in the order in which they are processed
    sizes: list[int]  # rows of the parts, in the order of rows
    before: Tensor  # (N,), for each row the row of the previous state
    first: Tensor  # (R,), the row of each sentence that is processed first
    last: Tensor  # (R,), the row of each sentence that is processed last


class DirectionWeights(NamedTuple):
    """The parameters of a direction of an LSTM or GRU layer; G = 4 H or 3 H."""

    x: Tensor  # (G, n)
    h: Tensor  # (G, H)
    bias_x: Tensor | None = None  # (G,); a layer may have no biases
    bias_h: Tensor | None = None  # (G,)

    @property
    def is_lstm(self) -> bool:
        return self.h.shape[0] == 4 * self.h.shape[1]


class SavedDirection(NamedTuple):
    """The results of a forward that its backward reads."""

    gates: Tensor  # (N, G), i, f, g, o or r, z, n
    hidden: Tensor  # (N + R, H): the last R are the first states
    third: Tensor  # (N, H), tanh of the cells; GRU: h W_hn + b_hn
    cell: Tensor | None  # (N + R, H); None for a GRU


def forward(
    way: Direction, gates: Tensor, weights: DirectionWeights, hidden: Tensor | None, cell: Tensor | None, out: Tensor
) -> SavedDirection:
    """gates: (N, G), of ``products_with_inputs``; overwritten. hidden, cell: (R, H), the first states; None: zeros.

    Written: out, (N, H), the states of all rows.
    """
    run = _run_lstm if weights.is_lstm else _run_gru
    saved = run(way, gates, weights, _states(way, gates, weights, hidden), cell, hidden is not None)
    out.copy_(saved.hidden[: gates.shape[0]])
    return saved


def products_with_inputs(x: Tensor, index: Tensor | None, weights: DirectionWeights) -> Tensor:
    """(N, G), with the biases that may be added before the steps. x: (N, n), or (U, n) with an index (N,) of rows."""
    bias = weights.bias_x
    if weights.is_lstm and bias is not None and weights.bias_h is not None:
        bias = bias + weights.bias_h
    return gather(linear_of_rows(x, weights.x, bias), index)


def backward(
    way: Direction, weights: DirectionWeights, saved: SavedDirection, dhidden: Tensor, dcell: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the gates before the activation functions: of the terms from x and from h, (N, G) each.

    dhidden: (N + R, H), the gradients of the states of all rows, and R zeros. The call overwrites the last R rows with
        the gradients of the first states, without their parts through ``weights.h``.
    dcell: (R, H), the gradient of the last cells; overwritten by that of the first cells.
    """
    return (_go_back_lstm if weights.is_lstm else _go_back_gru)(way, weights, saved, dhidden, dcell)


def _states(way: Direction, gates: Tensor, weights: DirectionWeights, first: Tensor | None) -> Tensor:
    count = gates.shape[0]
    states = gates.new_empty(count + way.first.shape[0], weights.h.shape[1])
    states[count:] = 0 if first is None else first
    return states


class _Product:
    """Products of consecutive rows of a matrix with a weight.

    oneDNN compiles code for each number of rows, and its code cache is limited. So large numbers of rows are rounded up
    to get few different ones: the rows after them are multiplied, too, and their results are dropped.
    """

    def __init__(self, x: Tensor, weight: Tensor, way: Direction) -> None:
        most = way.first.shape[0]
        self.x, self.product = x, PackedLinear(weight, most, len(way.parts))
        self.rounds = self.product.packed is not None and most > _EXACT

    def __call__(self, begin: int, rows: int) -> Tensor:
        if not self.rounds or rows <= _EXACT:
            return self.product(self.x[begin : begin + rows])
        multiple = 8 if rows <= _SMALL else 32
        return self.product(self.x[begin : begin + -(-rows // multiple) * multiple])[:rows]

    def add_to(self, out: Tensor, begin: int, rows: int) -> None:
        """out, (rows, *), += the product."""
        if self.rounds:
            out.add_(self(begin, rows))
        else:
            self.product.add_to(out, self.x[begin : begin + rows])


# LSTM -----------------------------------------------------------------------------------------------------------------


def _run_lstm(
    way: Direction, gates: Tensor, weights: DirectionWeights, hidden: Tensor, first_cell: Tensor | None, has_first: bool
) -> SavedDirection:
    count = gates.shape[0]
    cell = _states(way, gates, weights, first_cell)
    if has_first:
        gates.index_add_(0, way.first, hidden[count:] @ weights.h.t())
    tanh = torch.empty_like(cell[:count])
    product, step = _Product(hidden, weights.h, way), find_step("lstm_step", gates)
    gates_of, cell_of, tanh_of, hidden_of = (y[:count].split(way.sizes) for y in (gates, cell, tanh, hidden))
    for n, rows, _, before, _, goes_on in way.parts:
        of_part = gates_of[n]
        if goes_on:
            product.add_to(of_part, before, rows)
        step(of_part, cell[before : before + rows], cell_of[n], tanh_of[n], hidden_of[n], None)
    return SavedDirection(gates, hidden, tanh, cell)


def _go_back_lstm(
    way: Direction, weights: DirectionWeights, saved: SavedDirection, dhidden: Tensor, dcell: Tensor | None
) -> tuple[Tensor, Tensor]:
    gates, _, tanh, cell = saved
    assert cell is not None
    assert dcell is not None
    count = gates.shape[0]
    dgates = torch.empty_like(gates)
    product, step = _Product(dgates, weights.h.t(), way), find_step("lstm_step_backward", gates)
    dhidden_of, gates_of, tanh_of, dgates_of = (y[:count].split(way.sizes) for y in (dhidden, gates, tanh, dgates))
    for n, rows, begin, before, sentence, goes_on in reversed(way.parts):
        of_cell = cell[before : before + rows], tanh_of[n], dcell[sentence : sentence + rows]
        step(dhidden_of[n], gates_of[n], *of_cell, dgates_of[n])
        if goes_on:
            product.add_to(dhidden[before : before + rows], begin, rows)
    return dgates, dgates


# GRU ------------------------------------------------------------------------------------------------------------------


def _run_gru(
    way: Direction, gates: Tensor, weights: DirectionWeights, hidden: Tensor, no_cell: Tensor | None, has_first: bool
) -> SavedDirection:
    count = gates.shape[0]
    recurrent = torch.empty_like(hidden[:count])
    of_first = hidden[count:] @ weights.h.t() if has_first else gates.new_zeros(way.first.shape[0], gates.shape[1])
    product, step = _Product(hidden, weights.h, way), find_step("gru_step", gates)
    gates_of, recurrent_of, hidden_of = (y[:count].split(way.sizes) for y in (gates, recurrent, hidden))
    for n, rows, _, before, sentence, goes_on in way.parts:
        products = product(before, rows) if goes_on else of_first[sentence : sentence + rows]
        states = hidden[before : before + rows], recurrent_of[n], hidden_of[n]
        step(gates_of[n], products, weights.bias_h, *states, None)
    return SavedDirection(gates, hidden, recurrent, None)


def _go_back_gru(
    way: Direction, weights: DirectionWeights, saved: SavedDirection, dhidden: Tensor, no_cell: Tensor | None
) -> tuple[Tensor, Tensor]:
    gates, hidden, recurrent = saved[:3]
    count = gates.shape[0]
    dgates, dproducts = torch.empty_like(gates), torch.empty_like(gates)
    product, step = _Product(dproducts, weights.h.t(), way), find_step("gru_step_backward", gates)
    of_rows = (dhidden, gates, recurrent, dgates, dproducts)
    dhidden_of, gates_of, recurrent_of, dgates_of, dproducts_of = (y[:count].split(way.sizes) for y in of_rows)
    for n, rows, begin, before, _, goes_on in reversed(way.parts):
        there = slice(before, before + rows)
        dbefore = dhidden[there]
        step(dhidden_of[n], gates_of[n], hidden[there], recurrent_of[n], dbefore, dgates_of[n], dproducts_of[n])
        if goes_on:
            product.add_to(dbefore, begin, rows)
    return dgates, dproducts
