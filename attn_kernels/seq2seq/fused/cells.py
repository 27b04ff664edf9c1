"""Layers of recurrent cells over a whole sequence, without autograd: forward step by step, then backward.

A layer keeps [x_t | h_{t-1}] of all steps side by side, so that a step is one product and so is the gradient of the
weights of all steps. T steps, B rows, n inputs, H units; (T, B, *) is contiguous for each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ...backends import choose
from .gemm import PackedLinear, weight_gradient


class Layer:
    """What LSTM and GRU layers share: their inputs, and the gradients that are one product for all steps.

    base: (T, B, G), what the steps add to the pre-activations of their gates: biases, and inputs that are known before
        the loop. The layer computes in it.
    weight_x: (G, n). weight_h: (G, H). hidden: (B, H), the first state.
    """

    dgates: Tensor  # (T, B, G), of the backward that runs

    def __init__(self, base: Tensor, weight_x: Tensor, weight_h: Tensor, hidden: Tensor) -> None:
        steps, batch, _ = base.shape
        self.gates = base
        self.size = hidden.shape[1]
        self.n = weight_x.shape[1]
        self.weight = torch.cat([weight_x, weight_h], dim=1)
        self.inputs = hidden.new_empty(steps + 1, batch, self.n + self.size)
        self.inputs[0, :, self.n :] = hidden

    def x(self, t: int) -> Tensor:
        """(B, n): where the input of step t is to be written."""
        return self.inputs[t, :, : self.n]

    def h(self, t: int) -> Tensor:
        """(B, H): the state before step t."""
        return self.inputs[t, :, self.n :]

    def start_backward(self) -> None:
        self.dgates = torch.empty_like(self.gates)

    def weight_gradients(self) -> tuple[Tensor, ...]:
        """Of weight_x, weight_h, and of the biases added to the products with x and with h."""
        gradient = weight_gradient(self.dgates.flatten(0, 1), self.inputs[:-1].flatten(0, 1))
        bias = self.dgates.sum((0, 1))
        return gradient[:, : self.n], gradient[:, self.n :], bias, bias


class LSTMLayer(Layer):
    """Gates i, f, g, o: c' = f c + i g, h' = o tanh(c')."""

    product: PackedLinear  # with the weight in the forward, with its transpose in the backward
    dcell: Tensor  # (B, H), of the cell after the step that comes next; a buffer of its own

    def __init__(
        self, base: Tensor, weight_x: Tensor, weight_h: Tensor, bias_h: Tensor, hidden: Tensor, cell: Tensor
    ) -> None:
        super().__init__(base, weight_x, weight_h, hidden)
        self.gates += bias_h
        steps, batch, _ = base.shape
        self.cells = cell.new_empty(steps + 1, batch, self.size)
        self.cells[0] = cell
        self.tanhs = cell.new_empty(steps, batch, self.size)
        self.product = PackedLinear(self.weight, batch, steps)
        self.fused = base.is_cpu and base.dtype in (torch.float32, torch.float64) and choose(None, "cpu") == "cpu"

    def step(self, t: int, again: Tensor | None = None) -> Tensor:
        """Returns h' of step t, (B, H), and writes it to ``again``, too."""
        gates = self.gates[t].add_(self.product(self.inputs[t]))
        if self.fused:
            hidden = self.h(t + 1)
            ops.kernel("lstm_step", "cpu")(gates, self.cells[t], self.cells[t + 1], self.tanhs[t], hidden, again)
            return hidden
        i, f, g, o = gates.chunk(4, dim=1)
        gates[:, : 2 * self.size].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        cell = torch.mul(f, self.cells[t], out=self.cells[t + 1]).addcmul_(i, g)
        return _copied(torch.mul(o, torch.tanh(cell, out=self.tanhs[t]), out=self.h(t + 1)), again)

    def start_backward(self) -> None:
        super().start_backward()
        self.dcell = torch.zeros_like(self.cells[0])
        self.product = PackedLinear(self.weight.t(), self.dcell.shape[0], self.gates.shape[0])

    def step_back(self, t: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh: (B, H), of h' of step t. Returns the gradients of x_t and of the state before."""
        if self.fused:
            parts = (self.gates[t], self.cells[t], self.tanhs[t], self.dcell, self.dgates[t])
            ops.kernel("lstm_step_backward", "cpu")(dh, *parts)
            return self.product(self.dgates[t]).split([self.n, self.size], dim=1)
        i, f, g, o = self.gates[t].chunk(4, dim=1)
        di, df, dg, do = self.dgates[t].chunk(4, dim=1)
        tanh, dcell = self.tanhs[t], self.dcell
        _sigmoid_backward(dh * tanh, o, do)
        dcell += _tanh_backward(dh * o, tanh)
        _sigmoid_backward(dcell * g, i, di)
        _sigmoid_backward(dcell * self.cells[t], f, df)
        _tanh_backward(dcell * i, g, dg)
        dcell *= f
        return self.product(self.dgates[t]).split([self.n, self.size], dim=1)

    def first_gradients(self) -> tuple[Tensor, ...]:
        return (self.dcell,)


class GRULayer(Layer):
    """Gates r, z, n with n = tanh(x W_n + b + r (h W_hn + b_hn)): h' = n + z (h - n)."""

    drecurrent: Tensor  # (T, B, 3 H): as dgates, of the products with h; the part of n has the factor r

    product_x: PackedLinear  # with the weights in the forward, with their transposes in the backward
    product_h: PackedLinear

    def __init__(self, base: Tensor, weight_x: Tensor, weight_h: Tensor, bias_h: Tensor, hidden: Tensor) -> None:
        super().__init__(base, weight_x, weight_h, hidden)
        self.bias_h = bias_h
        self._make_products(weight_x, weight_h)
        self.recurrent = hidden.new_empty(base.shape[0], base.shape[1], self.size)  # h W_hn + b_hn

    def step(self, t: int, again: Tensor | None = None) -> Tensor:
        """Returns h' of step t, (B, H), and writes it to ``again``, too."""
        gates, size, before = self.gates[t], self.size, self.h(t)
        gates.add_(self.product_x(self.x(t)))
        products = self.product_h(before).add_(self.bias_h)
        self.recurrent[t] = products[:, 2 * size :]
        gates[:, : 2 * size].add_(products[:, : 2 * size]).sigmoid_()
        r, z, n = gates.chunk(3, dim=1)
        n.addcmul_(r, self.recurrent[t]).tanh_()
        return _copied(torch.lerp(n, before, z, out=self.h(t + 1)), again)

    def start_backward(self) -> None:
        super().start_backward()
        self.drecurrent = torch.empty_like(self.gates)
        self._make_products(self.weight[:, : self.n].t(), self.weight[:, self.n :].t())

    def _make_products(self, weight_x: Tensor, weight_h: Tensor) -> None:
        steps, rows = self.gates.shape[:2]
        self.product_x, self.product_h = PackedLinear(weight_x, rows, steps), PackedLinear(weight_h, rows, steps)

    def step_back(self, t: int, dh: Tensor) -> tuple[Tensor, Tensor]:
        """dh: (B, H), of h' of step t. Returns the gradients of x_t and of the state before."""
        r, z, n = self.gates[t].chunk(3, dim=1)
        dr, dz, dn = self.dgates[t].chunk(3, dim=1)
        size = self.size
        _sigmoid_backward(dh * (self.h(t) - n), z, dz)
        kept = dh * z
        _tanh_backward(dh - kept, n, dn)
        _sigmoid_backward(dn * self.recurrent[t], r, dr)
        self.drecurrent[t, :, : 2 * size] = self.dgates[t, :, : 2 * size]
        torch.mul(dn, r, out=self.drecurrent[t, :, 2 * size :])
        return self.product_x(self.dgates[t]), kept.add_(self.product_h(self.drecurrent[t]))

    def weight_gradients(self) -> tuple[Tensor, ...]:
        """Of weight_x, weight_h, and of the biases added to the products with x and with h."""
        dgates, drecurrent, inputs = (x.flatten(0, 1) for x in (self.dgates, self.drecurrent, self.inputs[:-1]))
        dx, dh = weight_gradient(dgates, inputs[:, : self.n]), weight_gradient(drecurrent, inputs[:, self.n :])
        return dx, dh, dgates.sum(0), drecurrent.sum(0)

    def first_gradients(self) -> tuple[Tensor, ...]:
        return ()


def _copied(x: Tensor, to: Tensor | None) -> Tensor:
    if to is not None:
        to.copy_(x)
    return x


def _sigmoid_backward(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward.grad_input(gradient, output, grad_input=out)


def _tanh_backward(gradient: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
    out = gradient if out is None else out
    return torch.ops.aten.tanh_backward.grad_input(gradient, output, grad_input=out)
