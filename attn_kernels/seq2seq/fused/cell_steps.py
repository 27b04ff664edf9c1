"""A step of a recurrent cell without its matrix products, and its backward: by the CPU op, if it supports the tensors.

The functions write to their arguments. B rows, H units; all rows are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...backends import choose


def find_step(name: str, gates: Tensor) -> Callable[..., Any]:
    """The op of this name, or else the function of this name below."""
    has_op = gates.is_cpu and gates.dtype in (torch.float32, torch.float64) and choose(None, "cpu") == "cpu"
    return ops.kernel(name, "cpu") if has_op else _FORMULAS[name]


def lstm_step(
    gates: Tensor, cell: Tensor, new_cell: Tensor, tanh: Tensor, hidden: Tensor, again: Tensor | None
) -> None:
    """c' = f c + i g, h' = o tanh(c').

    gates: (B, 4 H), i, f, g, o before the activation functions; overwritten by their results. cell: (B, H), before the
    step. Written, all (B, H): new_cell, its tanh, and hidden; ``again`` gets a copy of hidden unless it is None.
    """
    i, f, g, o = gates.chunk(4, dim=1)
    gates[:, : 2 * cell.shape[1]].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    torch.mul(f, cell, out=new_cell).addcmul_(i, g)
    torch.mul(o, torch.tanh(new_cell, out=tanh), out=hidden)
    if again is not None:
        again.copy_(hidden)


def lstm_step_backward(
    dhidden: Tensor, gates: Tensor, cell: Tensor, tanh: Tensor, dcell: Tensor, dgates: Tensor
) -> None:
    """gates, cell, tanh: those of ``lstm_step``, after the call.

    dcell: the gradient of the new cell; overwritten by that of the cell before the step.
    Written: dgates, the gradient of the gates before the activation functions.
    """
    i, f, g, o = gates.chunk(4, dim=1)
    di, df, dg, do = dgates.chunk(4, dim=1)
    _sigmoid_backward(dhidden * tanh, o, do)
    dcell += _tanh_backward(dhidden * o, tanh)
    _sigmoid_backward(dcell * g, i, di)
    _sigmoid_backward(dcell * cell, f, df)
    _tanh_backward(dcell * i, g, dg)
    dcell *= f


def gru_step(
    gates: Tensor,
    products: Tensor,
    bias: Tensor | None,
    before: Tensor,
    recurrent: Tensor,
    hidden: Tensor,
    again: Tensor | None,
) -> None:
    """h' = n + z (h - n), n = tanh(x W_n + b_n + r (h W_hn + b_hn)).

    gates: (B, 3 H), the terms of r, z, n from x, before the activation functions; overwritten by r, z and n.
    products: (B, 3 H), h times the weights. bias: (3 H,), added to the products. before: (B, H), h.
    Written, all (B, H): recurrent, h W_hn + b_hn, and hidden; ``again`` gets a copy of hidden unless it is None.
    """
    size = before.shape[1]
    if bias is not None:
        products = products + bias
    recurrent.copy_(products[:, 2 * size :])
    gates[:, : 2 * size].add_(products[:, : 2 * size]).sigmoid_()
    r, z, n = gates.chunk(3, dim=1)
    n.addcmul_(r, recurrent).tanh_()
    torch.lerp(n, before, z, out=hidden)
    if again is not None:
        again.copy_(hidden)


def gru_step_backward(
    dhidden: Tensor,
    gates: Tensor,
    before: Tensor,
    recurrent: Tensor,
    dbefore: Tensor,
    dgates: Tensor,
    dproducts: Tensor,
) -> None:
    """gates, before, recurrent: those of ``gru_step``, after the call.

    dbefore: (B, H); the gradient of ``before`` is added to it, without the part through the products.
    Written: dgates and dproducts, (B, 3 H), the gradients of the terms from x and from h, before the activation
    functions.
    """
    size = before.shape[1]
    r, z, n = gates.chunk(3, dim=1)
    dr, _, dn = dgates.chunk(3, dim=1)
    _sigmoid_backward(dhidden * (before - n), z, dgates[:, size : 2 * size])
    dh_z = dhidden * z
    _tanh_backward(dhidden - dh_z, n, dn)
    _sigmoid_backward(dn * recurrent, r, dr)
    dproducts[:, : 2 * size] = dgates[:, : 2 * size]
    torch.mul(dn, r, out=dproducts[:, 2 * size :])
    dbefore += dh_z


_FORMULAS = {f.__name__: f for f in (lstm_step, lstm_step_backward, gru_step, gru_step_backward)}


def _sigmoid_backward(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.sigmoid_backward.grad_input(gradient, output, grad_input=out)
    return result


def _tanh_backward(gradient: Tensor, output: Tensor, out: Tensor | None = None) -> Tensor:
    out = gradient if out is None else out
    result: Tensor = torch.ops.aten.tanh_backward.grad_input(gradient, output, grad_input=out)
    return result
