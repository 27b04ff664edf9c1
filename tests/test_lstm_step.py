"""lstm_step and its backward, which the decoder's loop calls on the CPU, against PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_kernels  # noqa: F401 (registers the ops)

pytestmark = pytest.mark.every_level
SIZES = ((1, 1), (3, 5), (2, 16), (4, 33), (0, 4), (2, 0), (70, 300))
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6}


def step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The formula: h', c'."""
    i, f, g, o = gates.chunk(4, dim=1)
    new = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * new.tanh(), new


def strided(x: Tensor) -> Tensor:
    """The same numbers in rows that are further apart, with NaN between them."""
    room = x.new_full((x.shape[0], x.shape[1] + 3), torch.nan)
    room[:, 1:-2] = x
    return room[:, 1:-2]


@pytest.mark.parametrize("layout", [torch.clone, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step_and_back(compiled: str, size: tuple[int, int], dtype: torch.dtype, layout: object) -> None:
    torch.manual_seed(0)
    batch, units = size
    before, cell = 3 * torch.randn(batch, 4 * units, dtype=dtype), torch.randn(size, dtype=dtype)
    dhidden, dcell = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
    exact = [t.double().requires_grad_() for t in (before, cell)]
    expected = step(*exact)
    gradients = torch.autograd.grad(expected, exact, (dhidden.double(), dcell.double()), allow_unused=True)

    gates, dgates = layout(before), layout(torch.zeros_like(before))
    new, tanh, hidden, again, dc = (layout(torch.zeros_like(cell)) for _ in range(5))
    dc.copy_(dcell)
    torch.ops.attn_kernels.lstm_step.cpu(gates, layout(cell), new, tanh, hidden, again)
    torch.ops.attn_kernels.lstm_step_backward.cpu(layout(dhidden), gates, layout(cell), tanh, dc, dgates)
    results = (hidden, again, new, dgates, dc)
    for result, right in zip(results, (expected[0], *expected, *gradients), strict=True):
        torch.testing.assert_close(result.double(), right, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_huge_and_not_a_number(compiled: str, dtype: torch.dtype) -> None:
    extremes = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 89.0, -89.0, 0.0], dtype=dtype)
    gates = torch.stack([torch.cat([extremes.roll(n), *[torch.ones(8, dtype=dtype)] * 3]) for n in range(8)])
    gates = torch.cat([gates, gates.roll(8, 1), gates.roll(16, 1), gates.roll(24, 1)])
    cell = torch.ones(32, 8, dtype=dtype)
    expected = step(gates, cell)
    new, tanh, hidden = (torch.zeros_like(cell) for _ in range(3))
    torch.ops.attn_kernels.lstm_step.cpu(gates, cell, new, tanh, hidden, None)
    for result, right in zip((hidden, new), expected, strict=True):
        torch.testing.assert_close(result, right, equal_nan=True, atol=TOLERANCES[dtype], rtol=0)


def test_refusals(compiled: str) -> None:
    good = [torch.zeros(2, 12), *(torch.zeros(2, 3) for _ in range(4)), None]
    for place, bad, words in (
        (0, torch.zeros(2, 10), "4 H"),
        (0, torch.zeros(2, 12, dtype=torch.bfloat16), "float32 or float64"),
        (1, torch.zeros(2, 4), "cell does not have the shape"),
        (2, torch.zeros(2, 3, dtype=torch.float64), "new_cell does not have the dtype"),
        (4, torch.zeros(3, 2).t(), "hidden must have contiguous rows"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.attn_kernels.lstm_step.cpu(*good[:place], bad, *good[place + 1 :])
