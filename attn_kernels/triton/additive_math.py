"""The factored form of additive scores, and its limits: the numbers of csrc/additive_math.h, which explains them.

    tanh(q + k) = 1 - 2 / (1 + E) = (E - 1) / (E + 1),   E = e^{2q} e^{2k}

``bound`` is the largest |q| (and |bias|) of a query plus the largest |k| of a step. A test compares each number with
the header's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import exp2_flushed, reciprocal

MAX_BOUND_THREE = tl.constexpr(19.0)  # three units share a reciprocal, v folded in
MAX_BOUND_ONE = tl.constexpr(43.0)  # e^{2q}, e^{2k} and their product are in range
MAX_ABS_EXPONENTIAL = tl.constexpr(43.0)  # of |q| + |bias|, and of |k|: e^{2q} and e^{2k} are in range
MAX_ABS_BACKWARD = tl.constexpr(16.0)  # of |q| + |bias|, and of |k|, in the backward, where nothing is clamped
MAX_EXPONENTIAL_BACKWARD = tl.constexpr(2.0**78)  # clamped: of E
MIN_ABS_MAX_V = tl.constexpr(1e-30)  # of the largest |v|
MAX_ABS_MAX_V = tl.constexpr(1e30)
MIN_RELATIVE_V = tl.constexpr(2.0**-24)  # smaller |v| are below the rounding error of the largest, and are dropped
DENOMINATOR_SCALE = tl.constexpr(2.0**-40)  # of d: the least product of three, 2^-120, is in range
DENOMINATOR_SCALE_OF_ROW = tl.constexpr(2.0**-20)  # its square root: the scale of a query's and of a step's factor
DROPPED_DENOMINATOR = tl.constexpr(256.0)  # d of a dropped unit: 1 / d is 2^-48 of that of the largest
MAX_BOUND_UNCLAMPED = tl.constexpr(24.0)  # compensated: the product of two is in range
MAX_ABS_CLAMPED = tl.constexpr(36.0)  # of |q| + |bias|, and of |k|: both exponentials are normal numbers, scaled
MAX_SCALED_NUMERATOR = tl.constexpr(2.0**20)  # of (E - 1) / v, scaled: from there on tanh is 1

# min_abs_bound
NORM2_OF_ANY_BOUND = tl.constexpr(4.0)
NORM2_OF_SMALL_BOUND = tl.constexpr(64.0)
SMALL_BOUND = tl.constexpr(2.0)
NORM2_PER_UNIT_OF_MEDIUM_BOUND = tl.constexpr(1.3)
MEDIUM_BOUND = tl.constexpr(5.0)
LARGE_BOUND = tl.constexpr(10.0)
MIN_UNITS_OF_LARGE_BOUND = tl.constexpr(256)


@triton.jit
def min_abs_bound(norm2, units):
    """The bound from which on the factored form is as accurate as the formula; inf if it never is.

    norm2: the sum of the squares of v. units: the size of v.
    """
    bound = tl.where(units >= MIN_UNITS_OF_LARGE_BOUND, LARGE_BOUND, float("inf"))
    # The tensor must come first: in the interpreter of Triton 3.7, a constant times a tensor is not a tensor.
    bound = tl.where(norm2 <= units * NORM2_PER_UNIT_OF_MEDIUM_BOUND, MEDIUM_BOUND, bound)
    bound = tl.where(norm2 <= NORM2_OF_SMALL_BOUND, SMALL_BOUND, bound)
    return tl.where(norm2 <= NORM2_OF_ANY_BOUND, 0.0, bound)


@triton.jit
def exp2x_of_size(x, APPROXIMATE: tl.constexpr):
    """exp(2 |x|), as the GPU computes it: in float32 the error grows with x."""
    if APPROXIMATE:
        e = exp2_flushed(tl.abs(x) * 2.8853900817779268)
    else:
        e = tl.exp(2.0 * tl.abs(x))
    return e


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """tanh(x), to two units in the last place in float32; in float64 with an absolute error of one rounding of 1."""
    return tanh_from(x, reciprocal(1.0 + exp2x_of_size(x, APPROXIMATE), APPROXIMATE))


@triton.jit
def tanh_from(x, r):
    """tanh(x) from r = 1 / (1 + exp(2 |x|))."""
    result = 1.0 - 2.0 * r
    if x.dtype == tl.float32:  # 1 - 2 r cancels for small x: a polynomial, with relative error 1.4e-8 on [0, 0.9]
        # The sign of x as one operation on bits. Where it is used, the result is positive.
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        result = (result.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        s = x * x
        p = 0.00131424297 * s - 0.00688467104
        p = p * s + 0.0209260591
        p = p * s - 0.0537303689
        p = p * s + 0.133305171
        p = p * s - 0.333332212
        result = tl.where(tl.abs(x) < 0.9, x + x * s * p, result)
    else:
        result = tl.where(x < 0.0, -result, result)
    return result


@triton.jit
def _reduced(x):
    """2 x = n ln 2 + 2 f: a number with n in its last bits, and f."""
    rounded = x * 2.8853900817779268 + 12582912.0  # adding 1.5 * 2^23 rounds to an integer, which is in the last bits
    n = rounded - 12582912.0
    return rounded, (x - n * 0.3465728759765625) - n * 7.14303385e-07


@triton.jit
def exp2x_in_range(x):
    """exp(2 x) in float32 to one unit in the last place, for |x| <= MAX_BOUND_ONE; undefined for others.

    2 x = n ln 2 + 2 f with n ln 2 exact, so that the error does not grow with x; that of exp2(2 x log2 e) would.
    """
    rounded, f = _reduced(x)
    p = 0.08931904 * f + 0.26800416
    p = p * f + 0.66665728
    p = p * f + 1.3333132
    p = p * f + 2.00000008
    p = p * f + 2.0
    p = p * f + 1.0
    # Times 2^n, by adding n to the exponent.
    return (p.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2x(x):
    """exp2x_in_range(x) for |x| <= MAX_BOUND_ONE; a finite number for others."""
    return exp2x_in_range(tl.where(tl.abs(x) <= MAX_BOUND_ONE, x, 0.0))


@triton.jit
def exp2x_and_rest(x):
    """e, the rounded exp(2 x), and r, such that e = exp(2 (x - r)) to the rounding of x; like exp2x for others.

    exp(2 f) - 1 is computed to its own rounding error, so that the rounding error of adding 1 is known.
    """
    rounded, f = _reduced(tl.where(tl.abs(x) <= MAX_BOUND_ONE, x, 0.0))
    p = 0.08925756 * f + 0.26773155
    p = p * f + 0.6666605
    p = p * f + 1.3333235
    p = p * f + 2.0
    less_1 = (p * f) * f + (f + f)
    mantissa = less_1 + 1.0
    lost = less_1 - (mantissa - 1.0)
    e = (mantissa.to(tl.int32, bitcast=True) + (rounded.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return e, lost * (0.5 - f)  # lost / (2 exp(2 f))


@triton.jit
def multiply_add(a, b, c):
    """a b + c with one rounding, independent of the compiler's choices."""
    a, b = tl.broadcast(a, b)
    a, c = tl.broadcast(a, c)
    a, b = tl.broadcast(a, b)
    return tl.fma(a, b, c)
