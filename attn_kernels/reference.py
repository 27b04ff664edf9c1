"""The specification: every op in plain PyTorch, with the signature of its public function.

This file is what the other backends are tested against (in float64) and what runs where none of them can. It is written
to be read, not to be fast: additive attention materialises the [B, Tq, Tk, A] tensor that the kernels never make.

Rules that hold for every op here and in every backend:

- Scores, softmax and sums are computed in float32 or wider; results have the dtype of the inputs.
- A step that may not be attended (beyond ``memory_lengths``, or False in ``mask``) is padding. Padding contributes
  nothing to results or gradients, whatever it holds: NaN and Inf included.
- A row of a query with nothing to attend has zero alignments, zero context and zero gradients.
- NaN and Inf in steps that are attended spread as the formulas say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .types import Attention, attention_mask, upcast

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "tanh": lambda x, negative_slope: torch.tanh(x),
    "sigmoid": lambda x, negative_slope: torch.sigmoid(x),
    "relu": lambda x, negative_slope: torch.relu(x),
    "leaky_relu": torch.nn.functional.leaky_relu,
}


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    extra: Tensor | None = None,
) -> Tensor:
    """scores[b, i, j] = v . activation(query[b, i] + keys[b, j] + extra[b, j] + bias)."""
    queries, keys, v, bias, extra = upcast(_with_query_axis(query), keys, v, bias, extra)
    if extra is not None:
        keys = keys + extra
    activate = partial(ACTIVATIONS[activation], negative_slope=negative_slope)
    return _as_query(_additive_scores(queries, keys, v, bias, activate, None), query)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    extra: Tensor | None = None,
    scale: float = 1.0,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
) -> Attention:
    """Bahdanau et al. 2015, appendix A.1.2: scores = scale * v . activation(query + keys + extra + bias)."""
    activate = partial(ACTIVATIONS[activation], negative_slope=negative_slope)
    queries, keys, values, v, bias, extra = upcast(_with_query_axis(query), keys, values, v, bias, extra)
    if extra is not None:
        keys = keys + extra
    allowed = attention_mask(keys, memory_lengths, mask)
    queries, keys, values = _zero_padding(queries, keys, values, allowed)
    scores = scale * _additive_scores(queries, keys, v, bias, activate, allowed)
    return _attend(scores, values, allowed, need_weights, query)


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    scale: float = 1.0,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
) -> Attention:
    """Luong et al. 2015, section 3.1 ("dot"): scores = scale * query . keys."""
    queries, keys, values = upcast(_with_query_axis(query), keys, values)
    allowed = attention_mask(keys, memory_lengths, mask)
    queries, keys, values = _zero_padding(queries, keys, values, allowed)
    if _per_query(allowed):  # a step may be padding for one query and not for another: a product per pair
        scores = (_mask_pairs(queries[:, :, None], allowed) * _mask_pairs(keys[:, None], allowed)).sum(-1)
    else:
        scores = queries @ keys.transpose(1, 2)
    return _attend(scale * scores, values, allowed, need_weights, query)


def _additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None,
    activate: Callable[[Tensor], Tensor],
    allowed: Tensor | None,
) -> Tensor:
    hidden = query[:, :, None] + keys[:, None]
    if bias is not None:
        hidden = hidden + bias
    if _per_query(allowed):
        hidden = _mask_pairs(hidden, allowed)
    return activate(hidden) @ v


def _attend(
    scores: Tensor, values: Tensor | None, allowed: Tensor | None, need_weights: bool, query: Tensor
) -> Attention:
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
        scores = scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # softmax of a row of -inf would be NaN
    alignments = torch.softmax(scores, dim=-1)
    if allowed is not None:
        alignments = alignments.masked_fill(~allowed, 0.0)
    context = None
    if values is not None and _per_query(allowed):
        context = (alignments[..., None] * _mask_pairs(values[:, None], allowed)).sum(2)
    elif values is not None:
        context = alignments @ values
    if values is not None and not need_weights:
        alignments = None
    return Attention(_as_query(context, query), _as_query(alignments, query))


def _with_query_axis(query: Tensor) -> Tensor:
    return query if query.dim() == 3 else query[:, None]


def _as_query(result: Tensor | None, query: Tensor) -> Tensor | None:
    """In the dtype of the query, and without the axis of queries if that has none."""
    if result is None:
        return None
    return (result if query.dim() == 3 else result[:, 0]).to(query.dtype)


def _zero_padding(
    query: Tensor, keys: Tensor, values: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zeros in the steps that no query attends and in the queries that attend no step: 0 * NaN would be NaN."""
    if allowed is None:
        return query, keys, values
    unused_query = ~allowed.any(2)[..., None]
    unused_step = ~allowed.any(1)[..., None]
    return (
        query.masked_fill(unused_query, 0.0),
        keys.masked_fill(unused_step, 0.0),
        None if values is None else values.masked_fill(unused_step, 0.0),
    )


def _per_query(allowed: Tensor | None) -> bool:
    return allowed is not None and allowed.shape[1] != 1


def _mask_pairs(x: Tensor, allowed: Tensor) -> Tensor:
    """x, broadcast to (B, Tq, Tk, *), with zeros in the pairs that are not attended."""
    return torch.where(allowed[..., None], x, 0.0)
