"""The parts that differ between scores, for the kernels that all scores share.

``SCORE`` is "dot", or for additive attention its activation: "tanh", "relu", "leaky_relu" or "sigmoid".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..scores import ActivatedExtraScore, AdditiveExtraScore, DotScore, GatedAdditiveScore, Score
from .activations import activate, activation_of, sigmoid_and_slope


def parts_of(score: Score) -> tuple[str, Tensor | None, Tensor | None, float]:
    """SCORE, v, bias and number of a score. number: the scale of "dot", the negative slope of "leaky_relu"."""
    if isinstance(score, DotScore):
        return "dot", None, None, score.scale
    name, slope = activation_of(score)
    return name, score.v, score.bias, slope


def extra_of(score: Score) -> Tensor | None:
    """The tensor (B, Tk, A) that a score adds to the keys, if it has one."""
    if isinstance(score, (AdditiveExtraScore, ActivatedExtraScore, GatedAdditiveScore)):
        return score.extra
    return None


@triton.jit
def score_terms(
    q, k, v, bias, gate, number, number_lo, u, A, stride_v, stride_bias, SCORE: tl.constexpr, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """The terms whose sum over the units u < A is the score of query q and key k, both upcast; 0 beyond A.

    v (A,) and bias (A,) or None are those of additive attention; v may also point to several vectors that broadcast
    with u. gate: the gate of k, upcast, or None. number + number_lo: see parts_of; it has two parts for float64.
    """
    if SCORE == "dot":
        terms = q * k
    else:
        hidden = q + k
        if bias is not None:
            hidden += tl.load(bias + u.to(tl.int64) * stride_bias, mask=u < A, other=0.0).to(q.dtype)
        x = tl.load(v + u.to(tl.int64) * stride_v, mask=u < A, other=0.0).to(q.dtype)
        slope = None
        if SCORE == "leaky_relu":
            slope = tl.cast(number, q.dtype) + tl.cast(number_lo, q.dtype)
        hidden = activate(hidden, slope, SCORE, APPROXIMATE)
        if gate is not None:
            s, _ = sigmoid_and_slope(gate, APPROXIMATE)
            hidden *= s
        terms = x * hidden
    return terms


@triton.jit
def finish_scores(sums, number, number_lo, SCORE: tl.constexpr):
    """The scores, from the sums of their terms."""
    if SCORE == "dot":
        sums *= tl.cast(number, sums.dtype) + tl.cast(number_lo, sums.dtype)
    return sums
