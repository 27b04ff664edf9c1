"""Layers of recurrent cells over a whole sequence, without autograd: forward step by step, then backward.

A layer stores [x_t | h_{t-1}] of all steps in one array. So the weight gradient is one product over all steps, and a
step of an LSTM is also one product. T steps, B rows, n inputs, H units; (T, B, *) is contiguous for each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gemm import PackedLinear, weight_gradient
from .cell_steps import find_step
from .inputs import CellWeights


class SavedLSTM(NamedTuple):
    """The results of the forward that the backward of an LSTM layer reads."""

    inputs: Tensor  # (T + 1, B, n + H), [x | h] before each step
    gates: Tensor  # (T, B, 4 H): i, f, g, o
    cells: Tensor  # (T + 1, B, H)
    tanh_cells: Tensor  # (T, B, H)
    weight: Tensor  # (4 H, n + H), of x and h side by side


class SavedGRU(NamedTuple):
    """The results of the forward that the backward of a GRU layer reads."""

    inputs: Tensor  # (T + 1, B, n + H), [x | h] before each step
    gates: Tensor  # (T, B, 3 H): r, z, n
    recurrent: Tensor  # (T, B, H), h W_hn + b_hn


class _Forward:
    """The inputs of a layer, which are the same for both kinds of cells."""

    def __init__(self, weights: CellWeights, hidden: Tensor, steps: int) -> None:
        self.n: int = weights.x.shape[1]
        self.size: int = hidden.shape[1]
        self.inputs: Tensor = hidden.new_empty(steps + 1, hidden.shape[0], self.n + self.size)
        self.inputs[0, :, self.n :] = hidden
        # Views of all steps, which are made faster at once. x: those into which inputs are written. h: states before.
        self.both: tuple[Tensor, ...] = self.inputs.unbind(0)
        self.x: tuple[Tensor, ...] = self.inputs[:, :, : self.n].unbind(0)  # (B, n)
        self.h: tuple[Tensor, ...] = self.inputs[:, :, self.n :].unbind(0)  # (B, H)


class LSTMForward(_Forward):
    """Gates i, f, g, o: c' = f c + i g, h' = o tanh(c').

    base: (T, B, 4 H), added to the products with x and h of each step: the bias other than ``weights.bias_h``, and the
        products of inputs that are known before the loop. The layer overwrites it.
    weights: for the inputs that become known in the loop. hidden, cell: (B, H), the first state.
    """

    saved: SavedLSTM

    def __init__(self, base: Tensor, weights: CellWeights, hidden: Tensor, cell: Tensor) -> None:
        steps, batch, _ = base.shape
        super().__init__(weights, hidden, steps)
        base += weights.bias_h
        cells = cell.new_empty(steps + 1, batch, self.size)
        cells[0] = cell
        weight = torch.cat([weights.x, weights.h], dim=1)
        self.saved = SavedLSTM(self.inputs, base, cells, cell.new_empty(steps, batch, self.size), weight)
        self.product: PackedLinear = PackedLinear(weight, batch, steps)
        self.compute: Callable[..., Any] = find_step("lstm_step", base)
        self.gates: tuple[Tensor, ...] = base.unbind(0)
        self.cells: tuple[Tensor, ...] = cells.unbind(0)
        self.tanh_cells: tuple[Tensor, ...] = self.saved.tanh_cells.unbind(0)

    def step(self, t: int, hidden_copy: Tensor | None = None) -> Tensor:
        """Returns h' of step t, (B, H), and writes it to ``hidden_copy``, too."""
        gates, cells, hidden = self.product.add_to(self.gates[t], self.both[t]), self.cells, self.h[t + 1]
        self.compute(gates, cells[t], cells[t + 1], self.tanh_cells[t], hidden, hidden_copy)
        return hidden


class LSTMBackward:
    """weights: those of the forward."""

    def __init__(self, saved: SavedLSTM, weights: CellWeights) -> None:
        self.saved = saved
        self.sizes: list[int] = [weights.x.shape[1], weights.h.shape[1]]
        self.dgates: Tensor = torch.empty_like(saved.gates)
        self.dcell: Tensor = torch.zeros_like(saved.cells[0])  # of the cell after the step that is processed next
        steps, batch, _ = saved.gates.shape
        self.product: PackedLinear = PackedLinear(saved.weight.t(), batch, steps)
        self.compute: Callable[..., Any] = find_step("lstm_step_backward", saved.gates)
        self.of_steps: tuple[tuple[Tensor, ...], ...] = tuple(
            x.unbind(0) for x in (saved.gates, saved.cells, saved.tanh_cells, self.dgates)
        )

    def step(self, t: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh: (B, H), of h' of step t. Returns the gradients of x_t and of the state before."""
        gates, cell, tanh_cell, dgates = (x[t] for x in self.of_steps)
        self.compute(dh, gates, cell, tanh_cell, self.dcell, dgates)
        gradients: tuple[Tensor, Tensor] = self.product(dgates).split(self.sizes, dim=1)
        return gradients

    def weight_gradients(self) -> CellWeights:
        gradient = weight_gradient(self.dgates.flatten(0, 1), self.saved.inputs[:-1].flatten(0, 1))
        bias = self.dgates.sum((0, 1))
        dx, dh = gradient.split(self.sizes, dim=1)
        return CellWeights(dx, dh, bias, bias)


class GRUForward(_Forward):
    """Gates r, z, n with n = tanh(x W_n + b + r (h W_hn + b_hn)): h' = n + z (h - n). Arguments as for LSTMForward."""

    saved: SavedGRU

    def __init__(self, base: Tensor, weights: CellWeights, hidden: Tensor) -> None:
        steps, batch, _ = base.shape
        super().__init__(weights, hidden, steps)
        self.bias_h: Tensor = weights.bias_h
        self.saved = SavedGRU(self.inputs, base, hidden.new_empty(steps, batch, self.size))
        self.product_x: PackedLinear = PackedLinear(weights.x, batch, steps)
        self.product_h: PackedLinear = PackedLinear(weights.h, batch, steps)
        self.compute: Callable[..., Any] = find_step("gru_step", base)

    def step(self, t: int, hidden_copy: Tensor | None = None) -> Tensor:
        """Returns h' of step t, (B, H), and writes it to ``hidden_copy``, too."""
        gates, before, hidden = self.saved.gates[t], self.h[t], self.h[t + 1]
        self.product_x.add_to(gates, self.x[t])
        products = self.product_h(before)
        self.compute(gates, products, self.bias_h, before, self.saved.recurrent[t], hidden, hidden_copy)
        return hidden


class GRUBackward:
    """weights: those of the forward."""

    def __init__(self, saved: SavedGRU, weights: CellWeights) -> None:
        self.saved = saved
        self.n: int = weights.x.shape[1]
        self.size: int = weights.h.shape[1]
        self.dgates: Tensor = torch.empty_like(saved.gates)  # of the products with x
        # Gradients of the products with h. The part of n has the factor r.
        self.drecurrent: Tensor = torch.empty_like(saved.gates)
        steps, batch, _ = saved.gates.shape
        self.product_x: PackedLinear = PackedLinear(weights.x.t(), batch, steps)
        self.product_h: PackedLinear = PackedLinear(weights.h.t(), batch, steps)
        self.compute: Callable[..., Any] = find_step("gru_step_backward", saved.gates)

    def step(self, t: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh: (B, H), of h' of step t. Returns the gradients of x_t and of the state before."""
        inputs, gates, recurrent = self.saved
        dgates, drecurrent = self.dgates[t], self.drecurrent[t]
        dbefore = torch.zeros_like(dh)
        self.compute(dh, gates[t], inputs[t, :, self.n :], recurrent[t], dbefore, dgates, drecurrent)
        return self.product_x(dgates), self.product_h.add_to(dbefore, drecurrent)

    def weight_gradients(self) -> CellWeights:
        dgates, drecurrent, inputs = (x.flatten(0, 1) for x in (self.dgates, self.drecurrent, self.saved.inputs[:-1]))
        dx, dh = weight_gradient(dgates, inputs[:, : self.n]), weight_gradient(drecurrent, inputs[:, self.n :])
        return CellWeights(dx, dh, dgates.sum(0), drecurrent.sum(0))
