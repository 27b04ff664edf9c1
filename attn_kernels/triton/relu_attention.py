"""relu_attention and relu_scores in Triton: scores = v . relu(query + keys + bias), or leaky_relu; softmax, context.

The kernels and most rules are those of additive attention, with another activation: see activations.py.
"""

from __future__ import annotations

from torch import Tensor

from ..scores import ReluScore
from ..types import Masks
from .activations import activation_of
from .additive_attention import padded_gradient, pair_scores, pair_scores_backward
from .decode import can_decode, decode
from .launch import accumulator
from .products import values_gradient
from .softmax import attend, softmax_backward


def relu_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    negative_slope: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_alignments: bool,
) -> tuple[Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D) -> context (B, Tq, D), alignments (B, Tq, Tk) or empty."""
    score, masks = ReluScore(v, bias, negative_slope), Masks(memory_lengths, mask)
    if can_decode(query, values):
        return decode(score, query, keys, values, masks, need_alignments)
    scores = pair_scores(query, keys, v, bias, masks, accumulator(query.dtype), activation_of(negative_slope))
    return attend(scores, values, masks, need_alignments)


def relu_attention_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    negative_slope: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
    need_query: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_context (B, Tq, D), grad_alignments (B, Tq, Tk) -> the gradients of query, keys, values, v and bias."""
    masks = Masks(memory_lengths, mask)
    dscores = softmax_backward(grad_context, grad_alignments, values, masks, alignments)
    dquery, dkeys, dv, dbias = pair_scores_backward(
        dscores, query, keys, v, bias, masks, need_query, need_memory, activation_of(negative_slope)
    )
    dvalues = values_gradient(grad_context, values, alignments, masks, need_memory)
    return dquery, dkeys, dvalues, dv, dbias


def relu_scores(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None, negative_slope: float) -> Tensor:
    """query (B, Tq, A), keys (B, Tk, A) -> scores (B, Tq, Tk)."""
    return pair_scores(query, keys, v, bias, Masks(), query.dtype, activation_of(negative_slope))


def relu_scores_backward(
    grad_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None,
    negative_slope: float,
    need_query: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_scores (B, Tq, Tk) -> the gradients of query, keys, v and bias."""
    return pair_scores_backward(
        padded_gradient(grad_scores),
        query,
        keys,
        v,
        bias,
        Masks(),
        need_query,
        need_memory,
        activation_of(negative_slope),
    )
