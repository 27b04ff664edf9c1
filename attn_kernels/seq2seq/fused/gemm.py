"""Products with a weight, x @ weight.t(), on a CPU by whichever of PyTorch's libraries is faster there.

PyTorch multiplies float32 matrices with MKL, which on processors of other makers keeps to AVX2. oneDNN, which PyTorch
has too, uses AVX-512 on all of them: on Zen 5, 250 GFLOP/s a core against 110; on Zen 4, whose AVX-512 is no wider than
its AVX2, there is nothing to gain but from weights in oneDNN's own layout. (The operators are those that torch.compile
calls.)
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

_LEAST_WORK = 1 << 21  # multiply-adds: where the products of Zen 5 become 1.4 times as fast; half of it, the same
_LEAST_ROWS = 4
_LEAST_STEPS = 12  # from which a packed weight gains
_LARGE = 1 << 22  # elements: what takes longer to pack than the rest of a step takes waits until it is sure to pay
_BLOCKS = (512, 128, 32)  # rows that are summed over at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.t() + bias, without autograd. x: (m, k). weight: (n, k), any strides. bias: (n,)."""
    if _use_onednn(x, weight):
        return _onednn(x, weight, bias)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def weight_gradient(x: Tensor, y: Tensor) -> Tensor:
    """x.t() @ y, without autograd: the gradient of a weight. x: (m, k). y: (m, n), any strides.

    oneDNN compiles code for each m, in milliseconds, and the m of training change with the lengths of sentences. Blocks
    of a few sizes serve them all, and are as fast: what they copy stays in cache.
    """
    total = None
    begin, rows = 0, x.shape[0]
    for size in _BLOCKS:
        while rows - begin >= size and _use_onednn(x[:size].t(), y[:size].t()):
            block = slice(begin, begin + size)
            part = _onednn(x[block].t(), y[block].t())
            total = part if total is None else total.add_(part)
            begin += size
    if total is None:
        return x.t() @ y
    return total.addmm_(x[begin:].t(), y[begin:])


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    rows = x.shape[0]
    is_large = rows >= _LEAST_ROWS and rows * weight.numel() >= _LEAST_WORK
    return is_large and _supports(x, weight) and _has_wide_vectors()


class Budget:
    """Bytes that may yet be taken for copies of weights."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes were left, which are then taken."""
        if size > self.left:
            return False
        self.left -= size
        return True


class PackedLinear:
    """x @ weight.t() for the x of many steps, of about so many rows; weight: (n, k).

    oneDNN's form of the weight, made once, is faster than ``linear`` by a sixth, and than MKL by a fifth to a third on
    Zen 4, at 4 to 64 rows; at 2 and 3 MKL reads the weight for each of them. Making it costs as much as a few steps
    gain.

    steps: how many there will be, or at most. With a budget, of a search that may end early, the form is made after as
    many steps as make up for it, and only within the budget.
    """

    def __init__(self, weight: Tensor, rows: int, steps: int, budget: Budget | None = None) -> None:
        self.weight = weight
        self.packed: Tensor | None = None
        self.budget = budget
        self.waits = -1  # steps until the form is made; never where it is not worth it
        if rows > 1 and steps >= _LEAST_STEPS and weight.numel() >= 1 << 16 and _supports(weight):
            if budget is None:
                self._pack(rows)
            elif weight.numel() < _LARGE:
                if budget.take(weight.numel() * 4):
                    self._pack(rows)
            elif steps >= 2 * _LEAST_STEPS:
                self.waits = _LEAST_STEPS

    def _pack(self, rows: int) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.waits >= 0:
            self.waits -= 1
            if self.waits < 0 and self.budget is not None and self.budget.take(self.weight.numel() * 4):
                self._pack(x.shape[0])
        return linear(x, self.weight) if self.packed is None or x.shape[0] == 1 else _call(x, self.packed)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # of other strides oneDNN multiplies number by number, a thousand times as slow
    return _call(x, weight, bias)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _supports(*tensors: Tensor) -> bool:
    """Whether oneDNN may compute with them."""
    if not all(x.is_cpu and x.dtype == torch.float32 for x in tensors):
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_operators()


@functools.cache
def _has_operators() -> bool:
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


@functools.cache
def _has_wide_vectors() -> bool:
    """Whether this is a CPU of AMD whose AVX-512 does twice the work of AVX2: Zen 5, family 26, or later."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    return "AuthenticAMD" in text and " avx512f " in text and family is not None and int(family[1]) >= 26
