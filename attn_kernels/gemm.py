"""Matrix products with a weight, x @ weight.t(), by MKL or oneDNN, whichever is faster on this CPU.

``torch.mm`` multiplies float32 matrices with MKL, which does not use AVX-512 on AMD processors. oneDNN does: on Zen 5
it reaches 250 GFLOP/s per core, MKL 110. On Zen 4, where AVX-512 is no faster than AVX2, oneDNN is faster only with
weights in its packed layout. The operators used here are private to PyTorch (torch.compile calls them); if one is
missing, ``torch.mm`` is used. This file becomes obsolete when ``torch.mm`` itself uses oneDNN on these processors.

On Intel MKL is as fast as oneDNN, and with few rows it multiplies with a transposed copy of the weight, (k, n), up to
twice as fast as with the weight itself or with oneDNN's packed layout.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

_MIN_WORK = 1 << 21  # multiply-adds from which oneDNN is 1.4 times as fast on Zen 5; with half as many it is equal
_MIN_ROWS = 4
_MIN_STEPS = 12  # number of products that make up for packing a weight
_LARGE_WEIGHT = 1 << 22  # elements: packing takes longer than the rest of a decoding step
_BLOCK_ROWS = (512, 128, 32)
_ROUNDED_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.t() + bias, without autograd. x: (m, k). weight: (n, k), any strides. bias: (n,)."""
    if _use_onednn(x, weight):
        return _onednn(x, weight, bias)
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def linear_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` for many rows whose number differs between calls, such as all steps of ragged sentences.

    For oneDNN the number of rows is rounded up, so that it JIT-compiles few kernels: see ``weight_gradient``.
    """
    rows = x.shape[0]
    excess = -rows % _ROUNDED_ROWS
    if excess == 0 or not _use_onednn(x, weight):
        return linear(x, weight, bias)
    return linear(torch.nn.functional.pad(x, (0, 0, 0, excess)), weight, bias)[:rows]


def weight_gradient(x: Tensor, y: Tensor) -> Tensor:
    """x.t() @ y, without autograd: the gradient of a weight. x: (m, k). y: (m, n), any strides.

    oneDNN JIT-compiles a kernel for each number of rows m, in milliseconds, and m varies with the lengths of sentences.
    Blocks of a few fixed sizes avoid that and are as fast: their copies stay in cache.
    """
    total = None
    begin, rows = 0, x.shape[0]
    for size in _BLOCK_ROWS:
        while rows - begin >= size and _use_onednn(x[:size].t(), y[:size].t()):
            block = slice(begin, begin + size)
            part = _onednn(x[block].t(), y[block].t())
            total = part if total is None else total.add_(part)
            begin += size
    if total is None:
        return x.t() @ y
    return total.addmm_(x[begin:].t(), y[begin:])


def prefers_onednn(rows: int, x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` with this number of rows uses oneDNN. x: for its dtype and device."""
    is_large = rows >= _MIN_ROWS and rows * weight.numel() >= _MIN_WORK
    return is_large and _supports(x, weight) and _has_wide_vectors()


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return prefers_onednn(x.shape[0], x, weight)


class Budget:
    """A budget of memory for copies of weights, in bytes."""

    def __init__(self, size: int) -> None:
        self.left: int = size

    def take(self, size: int) -> bool:
        """Takes ``size`` bytes from the budget and returns True, or returns False if fewer are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class PackedLinear:
    """x @ weight.t() in many steps, with a copy of the weight in the layout that is fastest.

    On Intel that is the transposed weight, for MKL. On Sapphire Rapids with 4 to 64 rows and 256 to 1024 columns it
    takes mostly 0.5 to 0.9 of the time of oneDNN's packed layout, and of that of ``linear``.

    On other CPUs it is oneDNN's packed layout. With 4 to 64 rows on Zen 4 it is faster than ``linear`` by a sixth, and
    than MKL by a fifth to a third; with 2 and 3 rows MKL reads the weight once per row. Packing costs as much time as a
    few steps save.

    Args:
        weight: (n, k).
        rows: approximate number of rows of x.
        steps: the number of products, or an upper bound.
        budget: of a search. Weights are packed only if the budget suffices, and a large weight only after as many steps
            as make up for packing it, because a search may end early.
    """

    def __init__(self, weight: Tensor, rows: int, steps: int, budget: Budget | None = None) -> None:
        self.weight = weight
        self.packed: Tensor | None = None  # for oneDNN
        self.transposed: Tensor | None = None  # (k, n), for MKL
        self.budget = budget
        self.steps_to_packing: int = -1  # never
        if rows > 1 and steps >= _MIN_STEPS and weight.numel() >= 1 << 16 and can_copy(weight):
            if budget is None:
                self._pack(rows)
            elif weight.numel() < _LARGE_WEIGHT:
                if budget.take(weight.nbytes):
                    self._pack(rows)
            elif steps >= 2 * _MIN_STEPS:
                self.steps_to_packing = _MIN_STEPS

    @property
    def has_copy(self) -> bool:
        """Whether the weight has been copied into another layout."""
        return self.packed is not None or self.transposed is not None

    def _pack(self, rows: int) -> None:
        if prefers_transposed(self.weight):
            self.transposed = self.weight.t().contiguous()
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.steps_to_packing >= 0:
            self.steps_to_packing -= 1
            if self.steps_to_packing < 0 and self.budget is not None and self.budget.take(self.weight.nbytes):
                self._pack(x.shape[0])
        if self.transposed is not None:
            return x @ self.transposed
        return linear(x, self.weight) if self.packed is None or x.shape[0] == 1 else _call(x, self.packed)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """out += x @ weight.t(), in place. Returns out."""
        return out.add_(self(x)) if self.transposed is None else out.addmm_(x, self.transposed)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # with other strides oneDNN is a thousand times slower
    return _call(x, weight, bias)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _supports(*tensors: Tensor) -> bool:
    """Whether oneDNN supports these tensors and is not disabled by the user."""
    if not all(x.is_cpu and x.dtype == torch.float32 for x in tensors):
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_operators()


def can_copy(weight: Tensor) -> bool:
    """Whether ``PackedLinear`` may multiply with a copy. weight: for its dtype and device."""
    return _supports(weight) or prefers_transposed(weight)


def prefers_transposed(weight: Tensor) -> bool:
    """Whether ``PackedLinear`` multiplies with a transposed copy. weight: for its dtype and device."""
    return weight.is_cpu and weight.dtype in (torch.float32, torch.float64) and _has_fast_mkl()


@functools.cache
def _has_fast_mkl() -> bool:
    """Whether this is an Intel CPU with AVX-512, and torch.mm uses MKL."""
    text = _cpu_information()
    return "GenuineIntel" in text and " avx512f " in text and torch.backends.mkl.is_available()


@functools.cache
def _has_operators() -> bool:
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


@functools.cache
def _has_wide_vectors() -> bool:
    """Whether this is an AMD CPU whose AVX-512 is twice as fast as its AVX2: Zen 5 (family 26) or later."""
    text = _cpu_information()
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    return "AuthenticAMD" in text and " avx512f " in text and family is not None and int(family[1]) >= 26


@functools.cache
def _cpu_information() -> str:
    """/proc/cpuinfo; empty if this is not Linux."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
