"""What makes alignments of the scores of a row, in parts, in the kernels that all scores share: ``NORMALISER``.

There is "softmax" so far. A row has a running maximum m_i and a sum l_i of exp(score - m_i); any_i is above 0 where
something is attended. Not attended steps have scores of -inf and weights of 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import divide

# Not -inf: exp(-inf - -inf) is NaN. Scores that are all -inf sum to 0 then, and 1 / 0 makes them NaN, as in eager.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def add_block(s, allowed, m_i, l_i, NORMALISER: tl.constexpr):
    """Adds a block of scores (Q, K): its weights, what earlier weights are to be multiplied with, new m_i and l_i."""
    tl.static_assert(NORMALISER == "softmax")
    m_new = tl.maximum(m_i, tl.max(s, axis=1))
    rescale = tl.exp(m_i - m_new)
    p = tl.where(allowed, tl.exp(s - m_new[:, None]), 0.0)
    return p, rescale, m_new, l_i * rescale + tl.sum(p, axis=1)


@triton.jit
def merge(m_parts, l_parts, NORMALISER: tl.constexpr):
    """m_i of a row from those of its parts (P,), and the factor of the whole; l is -1 where a part attends nothing."""
    tl.static_assert(NORMALISER == "softmax")
    m_i = tl.max(m_parts, axis=0)
    l_i = tl.sum(tl.where(l_parts == -1.0, 0.0, l_parts * tl.exp(m_parts - m_i)), axis=0)
    any_i = tl.max(tl.where(l_parts == -1.0, 0, 1), axis=0)
    return m_i, tl.where(any_i > 0, divide(1.0, l_i), 0.0)


@triton.jit
def part_factor(m_part, m_i, NORMALISER: tl.constexpr):
    """What the weights of a part are to be multiplied with in the whole."""
    tl.static_assert(NORMALISER == "softmax")
    return tl.exp(m_part - m_i)


@triton.jit
def factor(l_i, any_i, NORMALISER: tl.constexpr):
    """What turns the weights of a row into alignments; 0 where nothing is attended."""
    tl.static_assert(NORMALISER == "softmax")
    return tl.where(any_i > 0, divide(1.0, l_i), 0.0)


@triton.jit
def alignments_of(s, allowed, m_i, factor_i, NORMALISER: tl.constexpr):
    """The alignments of scores, for m_i and the factor of their rows, as far as they broadcast."""
    tl.static_assert(NORMALISER == "softmax")
    return tl.where(allowed, tl.exp(s - m_i) * factor_i, 0.0)


@triton.jit
def mean_gradient(products, total, NORMALISER: tl.constexpr):
    """(Q,) from the sums of p * g and of p, (Q, K): what score_gradient() takes off g.

    The second sum is 1, but for the rounding of alignments to the dtype of the inputs.
    """
    tl.static_assert(NORMALISER == "softmax")
    # Not 0 / 0 where nothing is attended.
    return divide(tl.sum(products, axis=1), tl.maximum(tl.sum(total, axis=1), 1e-30))


@triton.jit
def score_gradient(p, g, mean, NORMALISER: tl.constexpr):
    """The gradient of scores, from alignments p and their gradient g."""
    tl.static_assert(NORMALISER == "softmax")
    return p * (g - mean)
