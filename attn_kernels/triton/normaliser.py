"""Normalisers (``NORMALISER``): from parts of a row of scores to alignments, for the kernels that all scores share.

"softmax", or "sigmoid": sigmoid(score) over their sum. The latter is computed as the softmax of log sigmoid(score),
which does not underflow. So both are a softmax of ``log_weights``; for "softmax" these are the scores themselves. A row
has a running maximum m_i of its log weights and a sum l_i of exp(log weight - m_i). any_i is above 0 if something is
attended. Steps that are not attended have log weights of -inf and weights of 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import divide

# Not -inf: exp(-inf - -inf) is NaN. With this maximum, the sum for scores that are all -inf is 0, and 1 / 0 gives NaN,
# as in eager PyTorch.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def log_weights(s, NORMALISER: tl.constexpr):
    """The logarithms of unnormalised alignments, from scores; -inf for -inf."""
    if NORMALISER == "sigmoid":
        s = tl.minimum(s, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(s)))  # the second term passes a NaN in s on
    else:
        tl.static_assert(NORMALISER == "softmax")
    return s


@triton.jit
def add_block(s, allowed, m_i, l_i):
    """Adds a block of log weights (Q, K). Returns its weights, a factor for earlier weights, and the new m_i, l_i."""
    m_new = tl.maximum(m_i, tl.max(s, axis=1))
    rescale = tl.exp(m_i - m_new)
    p = tl.where(allowed, tl.exp(s - m_new[:, None]), 0.0)
    return p, rescale, m_new, l_i * rescale + tl.sum(p, axis=1)


@triton.jit
def merge(m_parts, l_parts):
    """m_i of a row from those of its parts (P,), and the factor of the row; l is -1 if a part attends nothing."""
    m_i = tl.max(m_parts, axis=0)
    l_i = tl.sum(tl.where(l_parts == -1.0, 0.0, l_parts * tl.exp(m_parts - m_i)), axis=0)
    any_i = tl.max(tl.where(l_parts == -1.0, 0, 1), axis=0)
    return m_i, tl.where(any_i > 0, divide(1.0, l_i), 0.0)


@triton.jit
def part_factor(m_part, m_i):
    """The factor that rescales the weights of a part to the maximum of the whole row."""
    return tl.exp(m_part - m_i)


@triton.jit
def factor(l_i, any_i):
    """The factor that turns the weights of a row into alignments; 0 if nothing is attended."""
    return tl.where(any_i > 0, divide(1.0, l_i), 0.0)


@triton.jit
def alignments_of(s, allowed, m_i, factor_i):
    """The alignments from log weights, and m_i and the factor of their rows, which must broadcast."""
    return tl.where(allowed, tl.exp(s - m_i) * factor_i, 0.0)


@triton.jit
def log_total_of(m_i, factor_i):
    """The logarithm of the divisor of the weights of a row; -inf if nothing is attended."""
    return tl.where(factor_i == 0.0, -float("inf"), m_i - tl.log(factor_i))


@triton.jit
def mean_gradient(products, total):
    """(Q,): the mean that the gradient of scores subtracts from g; from the sums of p * g and of p, (Q, K).

    The second sum would be 1 if alignments were not rounded to the dtype of the inputs.
    """
    # The maximum avoids 0 / 0 if nothing is attended.
    return divide(tl.sum(products, axis=1), tl.maximum(tl.sum(total, axis=1), 1e-30))


@triton.jit
def log_weight_derivative(s, NORMALISER: tl.constexpr):
    """The derivative of log_weights with respect to the scores, for normalisers for which it is not 1."""
    tl.static_assert(NORMALISER == "sigmoid")
    return divide(1.0, 1.0 + tl.exp(s))
