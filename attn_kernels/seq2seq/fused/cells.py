"""Layers of recurrent cells over a whole sequence, without autograd: forward step by step, then backward.

A layer keeps [x_t | h_{t-1}] of all steps side by side: the gradient of its weights is one product for all steps, and
a step of an LSTM is one, too. T steps, B rows, n inputs, H units; (T, B, *) is contiguous for each step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...backends import choose
from ...gemm import PackedLinear, weight_gradient
from .inputs import CellWeights


class SavedLSTM(NamedTuple):
    """What the backward of an LSTM layer reads."""

    inputs: Tensor  # (T + 1, B, n + H), [x | h] before each step
    gates: Tensor  # (T, B, 4 H): i, f, g, o
    cells: Tensor  # (T + 1, B, H)
    tanh_cells: Tensor  # (T, B, H)
    weight: Tensor  # (4 H, n + H), of x and h side by side


class SavedGRU(NamedTuple):
    """What the backward of a GRU layer reads."""

    inputs: Tensor  # (T + 1, B, n + H), [x | h] before each step
    gates: Tensor  # (T, B, 3 H): r, z, n
    recurrent: Tensor  # (T, B, H), h W_hn + b_hn


class _Forward:
    """The inputs of a layer, which both cells have alike."""

    def __init__(self, weights: CellWeights, hidden: Tensor, steps: int) -> None:
        self.n, self.size = weights.x.shape[1], hidden.shape[1]
        self.inputs = hidden.new_empty(steps + 1, hidden.shape[0], self.n + self.size)
        self.inputs[0, :, self.n :] = hidden

    def x(self, t: int) -> Tensor:
        """(B, n): where the input of step t is to be written."""
        return self.inputs[t, :, : self.n]

    def h(self, t: int) -> Tensor:
        """(B, H): the state before step t."""
        return self.inputs[t, :, self.n :]


class LSTMForward(_Forward):
    """Gates i, f, g, o: c' = f c + i g, h' = o tanh(c').

    base: (T, B, 4 H), what is added to the products with x and h of each step but for ``weights.bias_h``: the other
        bias, and inputs that are known before the loop. The layer computes in it.
    weights: of the inputs that become known in the loop. hidden, cell: (B, H), the first state.
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
        self.product = PackedLinear(weight, batch, steps)
        self.has_op = _has_lstm_op(base)

    def step(self, t: int, hidden_copy: Tensor | None = None) -> Tensor:
        """Returns h' of step t, (B, H), and writes it to ``hidden_copy``, too."""
        _, gates, cells, tanh_cells, _ = self.saved
        step_gates = gates[t].add_(self.product(self.inputs[t]))
        hidden = self.h(t + 1)
        if self.has_op:
            ops.kernel("lstm_step", "cpu")(step_gates, cells[t], cells[t + 1], tanh_cells[t], hidden, hidden_copy)
            return hidden
        i, f, g, o = step_gates.chunk(4, dim=1)
        step_gates[:, : 2 * self.size].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        cell = torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g)
        return _copied(torch.mul(o, torch.tanh(cell, out=tanh_cells[t]), out=hidden), hidden_copy)


class LSTMBackward:
    """weights: as of the forward."""

    def __init__(self, saved: SavedLSTM, weights: CellWeights) -> None:
        self.saved = saved
        self.sizes = [weights.x.shape[1], weights.h.shape[1]]
        self.dgates = torch.empty_like(saved.gates)
        self.dcell = torch.zeros_like(saved.cells[0])  # of the cell after the step that comes next
        steps, batch, _ = saved.gates.shape
        self.product = PackedLinear(saved.weight.t(), batch, steps)
        self.has_op = _has_lstm_op(saved.gates)

    def step(self, t: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh: (B, H), of h' of step t. Returns the gradients of x_t and of the state before."""
        _, gates, cells, tanh_cells, _ = self.saved
        tanh, dcell, dgates = tanh_cells[t], self.dcell, self.dgates[t]
        if self.has_op:
            ops.kernel("lstm_step_backward", "cpu")(dh, gates[t], cells[t], tanh, dcell, dgates)
        else:
            i, f, g, o = gates[t].chunk(4, dim=1)
            di, df, dg, do = dgates.chunk(4, dim=1)
            _sigmoid_backward(dh * tanh, o, do)
            dcell += _tanh_backward(dh * o, tanh)
            _sigmoid_backward(dcell * g, i, di)
            _sigmoid_backward(dcell * cells[t], f, df)
            _tanh_backward(dcell * i, g, dg)
            dcell *= f
        return self.product(dgates).split(self.sizes, dim=1)

    def weight_gradients(self) -> CellWeights:
        gradient = weight_gradient(self.dgates.flatten(0, 1), self.saved.inputs[:-1].flatten(0, 1))
        bias = self.dgates.sum((0, 1))
        dx, dh = gradient.split(self.sizes, dim=1)
        return CellWeights(dx, dh, bias, bias)


class GRUForward(_Forward):
    """Gates r, z, n with n = tanh(x W_n + b + r (h W_hn + b_hn)): h' = n + z (h - n). Arguments as of LSTMForward."""

    saved: SavedGRU

    def __init__(self, base: Tensor, weights: CellWeights, hidden: Tensor) -> None:
        steps, batch, _ = base.shape
        super().__init__(weights, hidden, steps)
        self.bias_h = weights.bias_h
        self.saved = SavedGRU(self.inputs, base, hidden.new_empty(steps, batch, self.size))
        self.product_x = PackedLinear(weights.x, batch, steps)
        self.product_h = PackedLinear(weights.h, batch, steps)

    def step(self, t: int, hidden_copy: Tensor | None = None) -> Tensor:
        """Returns h' of step t, (B, H), and writes it to ``hidden_copy``, too."""
        gates, size, before = self.saved.gates[t], self.size, self.h(t)
        gates.add_(self.product_x(self.x(t)))
        products = self.product_h(before).add_(self.bias_h)
        recurrent = self.saved.recurrent[t].copy_(products[:, 2 * size :])
        gates[:, : 2 * size].add_(products[:, : 2 * size]).sigmoid_()
        r, z, n = gates.chunk(3, dim=1)
        n.addcmul_(r, recurrent).tanh_()
        return _copied(torch.lerp(n, before, z, out=self.h(t + 1)), hidden_copy)


class GRUBackward:
    """weights: as of the forward."""

    def __init__(self, saved: SavedGRU, weights: CellWeights) -> None:
        self.saved = saved
        self.n, self.size = weights.x.shape[1], weights.h.shape[1]
        self.dgates = torch.empty_like(saved.gates)  # of the products with x
        self.drecurrent = torch.empty_like(saved.gates)  # of the products with h; the part of n has the factor r
        steps, batch, _ = saved.gates.shape
        self.product_x = PackedLinear(weights.x.t(), batch, steps)
        self.product_h = PackedLinear(weights.h.t(), batch, steps)

    def step(self, t: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh: (B, H), of h' of step t. Returns the gradients of x_t and of the state before."""
        inputs, gates, recurrent = self.saved
        dgates, drecurrent, size = self.dgates[t], self.drecurrent[t], self.size
        r, z, n = gates[t].chunk(3, dim=1)
        dr, dz, dn = dgates.chunk(3, dim=1)
        _sigmoid_backward(dh * (inputs[t, :, self.n :] - n), z, dz)
        dh_z = dh * z
        _tanh_backward(dh - dh_z, n, dn)
        _sigmoid_backward(dn * recurrent[t], r, dr)
        drecurrent[:, : 2 * size] = dgates[:, : 2 * size]
        torch.mul(dn, r, out=drecurrent[:, 2 * size :])
        return self.product_x(dgates), dh_z.add_(self.product_h(drecurrent))

    def weight_gradients(self) -> CellWeights:
        dgates, drecurrent, inputs = (x.flatten(0, 1) for x in (self.dgates, self.drecurrent, self.saved.inputs[:-1]))
        dx, dh = weight_gradient(dgates, inputs[:, : self.n]), weight_gradient(drecurrent, inputs[:, self.n :])
        return CellWeights(dx, dh, dgates.sum(0), drecurrent.sum(0))


def _has_lstm_op(gates: Tensor) -> bool:
    return gates.is_cpu and gates.dtype in (torch.float32, torch.float64) and choose(None, "cpu") == "cpu"


def _copied(x: Tensor, to: Tensor | None) -> Tensor:
    if to is not None:
        to.copy_(x)
    return x


def _sigmoid_backward(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward.grad_input(gradient, output, grad_input=out)


def _tanh_backward(gradient: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
    out = gradient if out is None else out
    return torch.ops.aten.tanh_backward.grad_input(gradient, output, grad_input=out)
