"""What is particular to a score in the kernels that all scores share: ``SCORE`` is "additive" or "dot"."""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_math import tanh


@triton.jit
def score_terms(q, k, v, bias, u, A, stride_v, stride_bias, SCORE: tl.constexpr, APPROXIMATE: tl.constexpr):
    """The terms of which a score is the sum over the units u < A, from query q and key k, widened; 0 beyond A.

    v (A,) and bias (A,) or None are those of "additive".
    """
    if SCORE == "additive":
        hidden = q + k
        if bias is not None:
            hidden += tl.load(bias + u.to(tl.int64) * stride_bias, mask=u < A, other=0.0).to(q.dtype)
        x = tl.load(v + u.to(tl.int64) * stride_v, mask=u < A, other=0.0).to(q.dtype)
        terms = x * tanh(hidden, APPROXIMATE)
    else:
        tl.static_assert(SCORE == "dot")
        terms = q * k
    return terms


@triton.jit
def finish_scores(sums, scale, scale_lo, SCORE: tl.constexpr):
    """The scores, from the sums of their terms; scale + scale_lo is that of "dot", in two parts for float64."""
    if SCORE == "dot":
        sums *= tl.cast(scale, sums.dtype) + tl.cast(scale_lo, sums.dtype)
    return sums
