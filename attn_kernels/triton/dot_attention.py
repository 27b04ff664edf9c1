"""dot_attention in Triton: scores = scale * query . keys, softmax, context. All of it is shared: products, softmax."""

from __future__ import annotations

from torch import Tensor

from .decode import can_decode, decode
from .products import product, weighted_sum
from .softmax import attend, softmax_backward


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_alignments: bool,
) -> tuple[Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D) -> context (B, Tq, D), alignments (B, Tq, Tk) or empty."""
    if can_decode(query, values):
        return decode(query, keys, values, None, None, scale, memory_lengths, mask, need_alignments)
    scores = product(query, keys, scale, memory_lengths)
    return attend(scores, values, memory_lengths, mask, need_alignments)


def dot_attention_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_context (B, Tq, D), grad_alignments (B, Tq, Tk) -> the gradients of query, keys and values."""
    dscores = softmax_backward(grad_context, grad_alignments, values, memory_lengths, mask, alignments)
    dquery = weighted_sum(dscores, keys, scale, memory_lengths, mask, transposed=False)
    dkeys = weighted_sum(dscores, query, scale, memory_lengths, mask, transposed=True)
    if grad_context is None:
        dvalues = values.new_zeros(values.shape)
    else:
        dvalues = weighted_sum(alignments, grad_context, 1.0, memory_lengths, mask, transposed=True)
    return dquery, dkeys, dvalues


def dot_attention_query_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
) -> Tensor:
    """dot_attention_backward without the gradients of keys and values."""
    dscores = softmax_backward(grad_context, grad_alignments, values, memory_lengths, mask, alignments)
    return weighted_sum(dscores, keys, scale, memory_lengths, mask, transposed=False)
