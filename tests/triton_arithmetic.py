"""Triton's interpreter with the arithmetic of NVIDIA GPUs, as tests/cpp/cuda_arithmetic.h for the CUDA kernels.

numpy computes exp and divisions to half a unit in the last place, and sums of products in float32. Code that Triton
compiles for a GPU uses approximate instructions there and, for 16-bit elements, tensor cores. ``install`` adds errors
of that size to the interpreter. The same operands always give the same result; half of the results are too large and
half too small. float64 stays exact.
"""

from __future__ import annotations

import importlib

import numpy as np

EXP2 = 2.0**-22  # ex2.approx.ftz.f32
RECIPROCAL = 2.0**-23  # rcp.approx.ftz.f32
DIVISION = 2.0**-22  # div.full.f32, to which Triton compiles "/"
TINY = np.finfo(np.float32).tiny
LOG2E = np.float32(1.4426950408889634)
AT_ONCE, BITS = 8, 24  # products that a tensor core adds at once; bits that it keeps below the largest product


def with_error(exact: np.ndarray, x: np.ndarray, error: float) -> np.ndarray:
    """``exact`` (float64) with this relative error, rounded to float32. The bits of x decide the sign of the error."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits ^ bits >> 16) * np.uint32(0x7FEB352D)
    bits = (bits ^ bits >> 15) * np.uint32(0x846CA68B)
    sign = 1.0 - 2.0 * ((bits ^ bits >> 16) & 1)
    return flushed((exact * (1 + sign * error)).astype(np.float32))


def flushed(x: np.ndarray) -> np.ndarray:
    """x with subnormal numbers replaced by zeros."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def exp2(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, np.float32(1), with_error(np.exp2(x.astype(np.float64)), x, EXP2))


def exp(x: np.ndarray) -> np.ndarray:
    """As in Triton: 2^(x log2 e), with a rounded product."""
    return exp2(x * LOG2E)


def reciprocal(x: np.ndarray) -> np.ndarray:
    return with_error(1 / flushed(x).astype(np.float64), x, RECIPROCAL)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return with_error(a.astype(np.float64) / b, b, DIVISION)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding; the interpreters of older Triton releases round twice."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fits_16_bits(x: np.ndarray) -> bool:
    """Whether float32 numbers came from bfloat16 or float16: the kernels widen these for the interpreter."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return not (bits & 0xFFFF).any() or not (bits & 0x1FFF).any()


def tensor_core_product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total (M, N) + a (M, X) @ b (X, N), summed as in a tensor core: see tensor_core_sum in cuda_arithmetic.h."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for x in range(0, a.shape[1], AT_ONCE):
        terms = np.concatenate([total[:, None].astype(np.float64), a[:, x : x + AT_ONCE, None] * b[x : x + AT_ONCE]], 1)
        exact = terms.sum(1)
        largest = np.abs(terms).max(1)
        special = ~np.isfinite(exact) | (largest == 0)
        unit = np.ldexp(1.0, np.frexp(np.where(special, 1.0, largest))[1] - 1 - BITS)
        cut = np.trunc(np.where(special[:, None], 0.0, terms) / unit[:, None]).sum(1) * unit
        rounded = cut.astype(np.float32)
        rounded = np.where(np.abs(rounded) > np.abs(cut), np.nextafter(rounded, np.float32(0)), rounded)
        total = np.where(special, exact.astype(np.float32), rounded)
    return total


class _Results:
    """The result type of inline assembly in the interpreter's builder."""

    def __init__(self, *results):
        self.get_result = results.__getitem__


def install() -> None:
    """Installs the arithmetic into the interpreter of this process; TRITON_INTERPRET must have selected it."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def in_float32(function, plain):
        """A method of the builder that calls ``function`` for float32 and the original method for other types."""

        def method(self, *operands):
            with np.errstate(all="ignore"):
                if any(operand.data.dtype != np.float32 for operand in operands):
                    return plain(self, *operands)
                return TensorHandle(function(*(operand.data for operand in operands)), operands[0].dtype.scalar)

        return method

    plain_dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype == np.float32 and a.data.ndim == 2 and fits_16_bits(a.data) and fits_16_bits(b.data):
            with np.errstate(all="ignore"):
                return TensorHandle(tensor_core_product(a.data, b.data, d.data), d.dtype.scalar)
        return plain_dot(self, a, b, d, *options)

    def create_inline_asm(self, asm, constraints, operands, *others):
        function = {"rcp.approx.ftz.f32 $0, $1;": reciprocal, "ex2.approx.ftz.f32 $0, $1;": exp2}[asm]
        with np.errstate(all="ignore"):
            return _Results(TensorHandle(function(operands[0].data), operands[0].dtype.scalar))

    builder = InterpreterBuilder
    builder.create_exp = in_float32(exp, builder.create_exp)
    builder.create_exp2 = in_float32(exp2, builder.create_exp2)
    builder.create_fdiv = in_float32(divide, builder.create_fdiv)
    builder.create_fma = in_float32(multiply_add, builder.create_fma)
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
    for name in (
        "additive_attention",
        "gated_additive_attention",
        "decode",
    ):  # use NVIDIA assembly for CPU tensors too
        launcher = importlib.import_module(f"attn_kernels.triton.{name}")
        launcher.has_approximate_reciprocal = lambda tensor: tensor.element_size() != 8
