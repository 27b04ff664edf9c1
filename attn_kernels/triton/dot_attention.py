"""dot_attention in Triton: scores = scale * query . keys, softmax, context. All of it is shared: products, softmax."""

from __future__ import annotations

from torch import Tensor

from ..scores import DotScore
from ..types import Masks
from .decode import can_decode, decode
from .products import product, values_gradient, weighted_sum
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
        return decode(DotScore(scale), query, keys, values, Masks(memory_lengths, mask), need_alignments)
    scores = product(query, keys, scale, memory_lengths)
    return attend(scores, values, Masks(memory_lengths, mask), need_alignments)


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
    need_query: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_context (B, Tq, D), grad_alignments (B, Tq, Tk) -> the gradients of query, keys and values."""
    masks = Masks(memory_lengths, mask)
    dscores = softmax_backward(grad_context, grad_alignments, values, masks, alignments)
    dquery, dkeys = query.new_empty(0), query.new_empty(0)
    if need_query:
        dquery = weighted_sum(dscores, keys, scale, masks, transposed=False)
    if need_memory:
        dkeys = weighted_sum(dscores, query, scale, masks, transposed=True)
    dvalues = values_gradient(grad_context, values, alignments, masks, need_memory)
    return dquery, dkeys, dvalues
