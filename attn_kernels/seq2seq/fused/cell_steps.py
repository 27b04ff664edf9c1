"""What a step of a recurrent cell computes besides its products, and its backward: the op where there is one.

They write into their arguments. B rows, H units; all rows are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...backends import choose


def find_step(name: str, gates: Tensor) -> Callable[..., Any]:
    """The function of this name below, or the op that stands for it."""
    has_op = gates.is_cpu and gates.dtype in (torch.float32, torch.float64) and choose(None, "cpu") == "cpu"
    return ops.kernel(name, "cpu") if has_op else _FORMULAS[name]


def lstm_step(
    gates: Tensor, cell: Tensor, new_cell: Tensor, tanh: Tensor, hidden: Tensor, again: Tensor | None
) -> None:
    """c' = f c + i g, h' = o tanh(c').

    gates: (B, 4 H), i, f, g, o before their functions; after the call, behind them. cell: (B, H), before the step.
    Written: new_cell, tanh of it, and hidden, twice unless ``again`` is None; (B, H).
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
    """gates, cell, tanh: of ``lstm_step``, after the call. dcell: of the new cell; after the call, of the one before.

    Written: dgates, of the gates before their functions.
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

    gates: (B, 3 H), the parts of r, z, n with x, before their functions; after the call, r, z and n.
    products: (B, 3 H), h with the weights. bias: (3 H,), is added to them. before: (B, H), h.
    Written: recurrent, h W_hn + b_hn, and hidden, twice unless ``again`` is None; (B, H).
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
    """gates, before, recurrent: of ``gru_step``, after the call.

    dbefore: (B, H), to which that of ``before`` is added, but for its part through the products.
    Written: dgates and dproducts, (B, 3 H), of the parts with x and with h of the gates before their functions.
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
