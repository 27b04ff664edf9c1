"""The baseline that users write today: the formulas in eager PyTorch, in the dtype of the inputs, with all
intermediates in memory.

The functions take the arguments of ``attn_kernels.reference``. That file is the specification: sums in float32 or
wider, padding that may hold NaN, fully masked rows. This file is the code that the package replaces. The benchmarks
time it, and the tests derive the error allowed at a given precision from it. As in such code, a fully masked row gives
NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_kernels.types import Attention

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    extra: Tensor | None = None,
    **activation: Any,
) -> Tensor:
    """scores[b, i, j] = v . activation(query[b, i] + keys[b, j] + bias), where the sum over A is a product with v.

    With a gate, activation(...) * sigmoid(gate[b, j]); with extra, keys + extra; with v (R, A), scores[b, i, r, j].
    """
    if extra is not None:
        keys = keys + extra
    queries = query[:, None] if query.dim() == 2 else query
    hidden = _activate(_sum(queries, keys, bias), **activation)
    if gate is not None:
        hidden = hidden * torch.sigmoid(gate)[:, None]
    scores = hidden @ v if v.dim() == 1 else (hidden @ v.mT).mT
    return scores[:, 0] if query.dim() == 2 else scores


def additive_scores_sum(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same scores with an explicit sum: slower in eager mode, but torch.compile can fuse all of it."""
    if query.dim() == 2:
        return additive_scores_sum(query[:, None], keys, v, bias)[:, 0]
    return (torch.tanh(_sum(query, keys, bias)) * v).sum(-1)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    gate: Tensor | None = None,
    extra: Tensor | None = None,
    negative_slope: float = 0.01,
    **options: Any,
) -> Attention:
    """Additive attention with :func:`additive_scores`. Here and below, options are the keywords of ``_attend``."""
    of_score: dict[str, Any] = dict(gate=gate, extra=extra, activation=activation, negative_slope=negative_slope)
    scores = additive_scores(query, keys, v, bias, **of_score)
    if v.dim() == 1:
        return _attend(scores, values, **options)
    rows = scores.shape[1:-1]  # queries and score vectors become one axis for softmax and context
    mask = options.get("mask")
    if mask is not None and mask.dim() == 3 and query.dim() == 3:
        options["mask"] = mask.repeat_interleave(len(v), 1)
    bias = options.get("score_bias")
    if bias is not None:
        bias = bias if query.dim() == 3 else bias[:, None]
        options["score_bias"] = bias.repeat_interleave(len(v), 1) if bias.dim() == 3 else bias.flatten(1, 2)
    results = _attend(scores.flatten(1, -2), values, **options)
    return Attention(*(None if x is None else x.unflatten(1, rows) for x in results))


def additive_attention_sum(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> Attention:
    """Additive attention with :func:`additive_scores_sum`."""
    return _attend(additive_scores_sum(query, keys, v, bias), values, **options)


def dot_attention(query: Tensor, keys: Tensor, values: Tensor, *, scale: float = 1.0, **options: Any) -> Attention:
    """Dot-product attention as two batched matrix products."""
    queries = query[:, None] if query.dim() == 2 else query
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if scale != 1.0:
        scores = scores * scale
    return _attend(scores[:, 0] if query.dim() == 2 else scores, values, **options)


def sdpa_dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    need_weights: bool = False,
    scale: float = 1.0,
    mask: Tensor | None = None,
    memory_lengths: Tensor | None = None,
) -> Attention:
    """Dot-product attention by PyTorch's fused ``scaled_dot_product_attention``, which returns no alignments."""
    if need_weights:
        raise ValueError("sdpa_dot_attention: scaled_dot_product_attention returns no alignments")
    queries = query[:, None] if query.dim() == 2 else query
    allowed = _allowed(keys.shape[1], keys.device, memory_lengths, mask)
    if allowed is not None:
        allowed = allowed[:, None]  # one head
    context = torch.nn.functional.scaled_dot_product_attention(
        queries[:, None], keys[:, None], values[:, None], attn_mask=allowed, scale=scale
    )[:, 0]
    return Attention(context[:, 0] if query.dim() == 2 else context, None)


def _sum(query: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    hidden = query[:, :, None] + keys[:, None]
    return hidden if bias is None else hidden + bias


def _activate(hidden: Tensor, activation: str = "tanh", negative_slope: float = 0.01) -> Tensor:
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(hidden, negative_slope)
    return ACTIVATIONS[activation](hidden)


def _attend(
    scores: Tensor,
    values: Tensor,
    *,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    clip: float | None = None,
    score_bias: Tensor | None = None,
    normalizer: str = "softmax",
    dropout_p: float = 0.0,
) -> Attention:
    if clip is not None:
        scores = clip * torch.tanh(scores)
    if score_bias is not None:
        scores = scores + score_bias
    if normalizer == "sigmoid":  # sigmoid(s) over their sum is the softmax of its logarithm
        scores = torch.nn.functional.logsigmoid(scores)
    if scores.dim() == 2:
        masks: dict[str, Any] = {"memory_lengths": memory_lengths, "mask": mask}
        context, alignments = _attend(scores[:, None], values, **masks, dropout_p=dropout_p)
        return Attention(context[:, 0], alignments[:, 0] if need_weights else None)
    allowed = _allowed(values.shape[1], values.device, memory_lengths, mask)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    alignments = torch.softmax(scores, dim=-1)
    weights = alignments if dropout_p == 0 else torch.nn.functional.dropout(alignments, dropout_p)
    return Attention(torch.bmm(weights, values), alignments if need_weights else None)


def _allowed(steps: int, device: torch.device, memory_lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, 1, Tk) or (B, Tq, Tk) bool; None if nothing is masked."""
    allowed = None
    if memory_lengths is not None:
        allowed = (torch.arange(steps, device=device) < memory_lengths[:, None])[:, None]
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[:, None]
        allowed = mask if allowed is None else allowed & mask
    return allowed
