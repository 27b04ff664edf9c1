"""gru_step and its backward, which GRU layers call on the CPU, against PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_kernels  # noqa: F401 (registers the ops)
from attn_kernels.seq2seq.fused import cell_steps
from test_lstm_step import SIZES, TOLERANCES, strided

pytestmark = pytest.mark.every_level


def step(gates: Tensor, products: Tensor, before: Tensor) -> Tensor:
    """The formula: h'."""
    (xr, xz, xn), (hr, hz, hn) = gates.chunk(3, dim=1), products.chunk(3, dim=1)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return n + torch.sigmoid(xz + hz) * (before - n)


def op(name: str, function: str) -> object:
    return getattr(torch.ops.attn_kernels, name).cpu if function == "op" else getattr(cell_steps, name)


@pytest.mark.parametrize("function", ["op", "formula"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", [torch.clone, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step_and_back(
    compiled: str, size: tuple[int, int], dtype: torch.dtype, layout: object, has_bias: bool, function: str
) -> None:
    torch.manual_seed(0)
    batch, units = size
    x, h = (3 * torch.randn(batch, 3 * units, dtype=dtype) for _ in range(2))
    bias = torch.randn(3 * units, dtype=dtype) if has_bias else None
    before, dhidden, dbefore = (torch.randn(size, dtype=dtype) for _ in range(3))
    exact = [t.double().clone().requires_grad_() for t in (x, h, before)]
    with_bias = exact[1] if bias is None else exact[1] + bias.double()
    expected = step(exact[0], with_bias, exact[2])
    dx, dh, db = torch.autograd.grad(expected, exact, dhidden.double())

    gates, before = layout(x), layout(before)
    recurrent, hidden, again, total = (layout(torch.zeros_like(dbefore)) for _ in range(4))
    op("gru_step", function)(gates, layout(h), bias, before, recurrent, hidden, again)
    total.copy_(dbefore)
    dgates, dproducts = layout(torch.zeros_like(x)), layout(torch.zeros_like(x))
    op("gru_step_backward", function)(layout(dhidden), gates, before, recurrent, total, dgates, dproducts)
    results = (hidden, again, recurrent, dgates, dproducts, total)
    rights = (expected, expected, with_bias[:, 2 * units :], dx, dh, db + dbefore.double())
    for result, right in zip(results, rights, strict=True):
        torch.testing.assert_close(result.double(), right, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_huge_and_not_a_number(compiled: str, dtype: torch.dtype) -> None:
    extremes = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 89.0, -89.0, 0.0], dtype=dtype)
    gates = torch.cat([torch.stack([extremes.roll(n) for n in range(8)]), torch.ones(8, 16, dtype=dtype)], dim=1)
    gates = torch.cat([gates, gates.roll(8, 1), gates.roll(16, 1)])
    before, products = torch.full((24, 8), 0.5, dtype=dtype), torch.full((24, 24), 0.25, dtype=dtype)
    expected = step(gates, products, before)
    recurrent, hidden = torch.zeros_like(before), torch.zeros_like(before)
    torch.ops.attn_kernels.gru_step.cpu(gates, products, None, before, recurrent, hidden, None)
    torch.testing.assert_close(hidden, expected, equal_nan=True, atol=TOLERANCES[dtype], rtol=0)


def test_refusals(compiled: str) -> None:
    good = [torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(9), *(torch.zeros(2, 3) for _ in range(3)), None]
    for place, bad, words in (
        (0, torch.zeros(2, 10), "3 H"),
        (0, torch.zeros(2, 9, dtype=torch.bfloat16), "float32 or float64"),
        (1, torch.zeros(2, 8), "products does not have the shape"),
        (2, torch.zeros(3), "bias does not have the shape"),
        (2, torch.zeros(9, dtype=torch.float64), "bias does not have the dtype"),
        (2, torch.zeros(18)[::2], "bias must be contiguous"),
        (3, torch.zeros(2, 3, dtype=torch.float64), "before does not have the dtype"),
        (5, torch.zeros(3, 2).t(), "hidden must have contiguous rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.attn_kernels.gru_step.cpu(*good[:place], bad, *good[place + 1 :])
