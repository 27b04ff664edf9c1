"""The specification: every op in plain PyTorch, with the arguments of its public function.

The other backends are tested against this file (in float64), and it runs where none of them can. It is written to be
read, not to be fast: additive attention materialises the (B, Tq, Tk, A) tensor, which the kernels never store.

Rules that hold for every op here and in every backend:

- Scores, softmax and sums are computed in float32 or wider; results have the dtype of the inputs.
- A step that may not be attended (beyond ``memory_lengths``, or False in ``mask``) is padding. Padding contributes
  nothing to results or gradients, even if it holds NaN or Inf.
- A row of a query with nothing to attend has zero alignments, zero context and zero gradients.
- NaN and Inf in attended steps propagate as in the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from . import activations
from .types import Attention, AttentionWithLogTotal, attention_mask, upcast


def additive_scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    gate: Tensor | None = None,
    extra: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """scores[b, i, j] = v . (activation(query[b, i] + keys[b, j] + extra[b, j] + bias) * sigmoid(gate[b, j])).

    With v (R, A): scores[b, i, r, j], of v[r]. clip: as of additive_attention.
    """
    queries, wide, vectors, bias, extra = upcast(_with_query_axis(query), keys, v, bias, extra)
    wide = wide if extra is None else wide + extra
    activate = partial(activations.FORMULAS[activation], negative_slope=negative_slope)
    scores = _clipped(_additive_scores(_sums(queries, wide, bias), vectors, gate, None, activate), clip)
    return _without_query_axis(_split_rows(scores, v), query).to(query.dtype)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    negative_slope: float = 0.01,
    gate: Tensor | None = None,
    extra: Tensor | None = None,
    scale: float = 1.0,
    **options: Any,
) -> Attention | AttentionWithLogTotal:
    """Bahdanau et al. 2015, appendix A.1.2: scores = scale * v . activation(query + keys + extra + bias).

    With a gate, scale * v . (activation(...) * sigmoid(gate)): Ilse et al. 2018, section 2.4, equation 9. With v
    (R, A), each query has a row of scores for each v[r]: Lin et al. 2017, section 2. options: as of :func:`_attend`.
    """
    vectors, bias, gate, extra = upcast(v, bias, gate, extra)
    if extra is not None:
        (keys,) = upcast(keys)
        keys = keys + extra
    activate = partial(activations.FORMULAS[activation], negative_slope=negative_slope)

    def score(queries: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
        gates = gate if gate is None or allowed is None else gate.masked_fill(~allowed.any(1)[..., None], 0.0)
        return scale * _additive_scores(_sums(queries, keys, bias), vectors, gates, allowed, activate)

    return _attend(score, query, keys, values, v, **options)


def dot_attention(
    query: Tensor, keys: Tensor, values: Tensor | None, *, scale: float = 1.0, **options: Any
) -> Attention | AttentionWithLogTotal:
    """Luong et al. 2015, section 3.1 ("dot"): scores = scale * query . keys. options: as of :func:`_attend`."""

    def score(queries: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
        if _per_query(allowed):  # a step may be padding for one query and not for another: a product per pair
            return scale * (_mask_pairs(queries[:, :, None], allowed) * _mask_pairs(keys[:, None], allowed)).sum(-1)
        return scale * (queries @ keys.transpose(1, 2))

    return _attend(score, query, keys, values, **options)


def _sums(query: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """query + keys + bias for each pair of a query and a step: (B, Tq, Tk, A)."""
    sums = query[:, :, None] + keys[:, None]
    return sums if bias is None else sums + bias


def _additive_scores(
    sums: Tensor, v: Tensor, gate: Tensor | None, allowed: Tensor | None, activate: Callable[[Tensor], Tensor]
) -> Tensor:
    """(B, Tq, Tk), or with v (R, A) (B, Tq R, Tk), where the R rows of a query are adjacent."""
    hidden = activate(_mask_pairs(sums, allowed) if _per_query(allowed) else sums)
    if gate is not None:
        gates = torch.sigmoid(*upcast(gate))[:, None]
        hidden = hidden * (_mask_pairs(gates, allowed) if _per_query(allowed) else gates)
    if v.dim() == 1:
        return hidden @ v
    return (hidden @ v.resolve_neg().mT).mT.flatten(1, 2)  # a lazily negated v would give another rounding


def _clipped(scores: Tensor, clip: float | None) -> Tensor:
    return scores if clip is None else clip * torch.tanh(scores)


def _attend(
    score: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None = None,
    *,
    clip: float | None = None,
    memory_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    normalizer: str = "softmax",
    need_weights: bool = True,
    need_log_total: bool = False,
) -> Attention | AttentionWithLogTotal:
    """The part that all attentions share: padding, scores, alignments and context.

    score: queries (B, Tq, A), keys and which pairs are allowed to the scores, (B, Tq, Tk); with several score vectors,
    v (R, A), to (B, Tq R, Tk). With a clip C they become C tanh(scores), to which score_bias is added: Bello et al.
    2017, appendix A.2, equation 16.
    """
    queries, keys, values = upcast(_with_query_axis(query), keys, values)
    allowed = attention_mask(keys, memory_lengths, mask)
    queries, keys, values = _zero_padding(queries, keys, values, allowed)
    scores = score(queries, keys, allowed)
    vectors = 1 if v is None or v.dim() == 1 else len(v)
    if vectors > 1 and _per_query(allowed):
        allowed = allowed.repeat_interleave(vectors, 1)
    if clip is not None:  # at a NaN in padding, the gradient 0 times the derivative would be NaN
        scores = _clipped(scores if allowed is None else scores.masked_fill(~allowed, 0.0), clip)
    if score_bias is not None:
        bias = (score_bias if query.dim() == 3 else score_bias[:, None]).to(scores.dtype)
        bias = bias.repeat_interleave(vectors, 1) if bias.dim() == 3 else bias.flatten(1, 2)
        scores = scores + (bias if allowed is None else bias.masked_fill(~allowed, 0.0))
    if normalizer == "sigmoid":
        # Normalised sigmoid(s) is the softmax of log sigmoid(s), which does not underflow.
        scores = torch.nn.functional.logsigmoid(scores)
    empty = None
    if allowed is not None:
        empty = ~allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed, float("-inf"))
        scores = scores.masked_fill(empty, 0.0)  # softmax of a row of -inf would be NaN
    alignments = torch.softmax(scores, dim=-1)
    if allowed is not None:
        alignments = alignments.masked_fill(~allowed, 0.0)
    context: Tensor | None = None
    weights = alignments if dropout_p == 0 else alignments * dropout_factors(alignments.shape, dropout_p, seed, scores)
    if values is not None and _per_query(allowed):
        context = (weights[..., None] * _mask_pairs(values[:, None], allowed)).sum(2)
    elif values is not None:
        context = weights @ values

    def shape(x: Tensor | None) -> Any:
        return x if x is None else _without_query_axis(_split_rows(x, v), query)

    returned = alignments if need_weights or values is None else None
    attention = Attention(*(shape(x if x is None else x.to(query.dtype)) for x in (context, returned)))
    if not need_log_total:
        return attention
    log_total = torch.logsumexp(scores, -1)
    if empty is not None:
        log_total = log_total.masked_fill(empty.squeeze(-1), float("-inf"))
    return AttentionWithLogTotal(*attention, shape(log_total))


def dropout_factors(shape: tuple[int, ...], p: float, seed: int | Tensor, like: Tensor) -> Tensor:
    """The factors of dropout: 0 with probability p, else 1 / (1 - p).

    They depend on 24 bits of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014,
    figure 17), of the seed, an integer or an int64 tensor (), and the index of the weight. So they are the same on
    every backend and in the backward.
    """

    def as_signed(number: int) -> int:  # modulo 2^64
        return (number + 2**63) % 2**64 - 2**63

    def shifted(z: Tensor, bits: int) -> Tensor:  # without sign
        shifted: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
        return shifted

    index = torch.arange(1, math.prod(shape) + 1, device=like.device)
    z = index * as_signed(0x9E3779B97F4A7C15) + (seed if isinstance(seed, Tensor) else as_signed(seed))
    z = (z ^ shifted(z, 30)) * as_signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * as_signed(0x94D049BB133111EB)
    kept = shifted(z ^ shifted(z, 31), 40) >= math.ceil(p * 2**24)  # ceil, because PyTorch would round a float
    return kept.view(shape).to(like.dtype) / (1 - p)


def _with_query_axis(query: Tensor) -> Tensor:
    return query if query.dim() == 3 else query[:, None]


def _without_query_axis(result: Tensor, query: Tensor) -> Tensor:
    return result if query.dim() == 3 else result[:, 0]


def _split_rows(result: Tensor, v: Tensor | None) -> Tensor:
    """Splits (B, Tq R, *) into (B, Tq, R, *) if there are several score vectors, v (R, A)."""
    return result if v is None or v.dim() == 1 else result.unflatten(1, (result.shape[1] // len(v), len(v)))


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


def _per_query(allowed: Tensor | None) -> TypeGuard[Tensor]:
    return allowed is not None and allowed.shape[1] != 1


def _mask_pairs(x: Tensor, allowed: Tensor) -> Tensor:
    """x, broadcast to (B, Tq, Tk, *), with zeros in the pairs that are not attended."""
    return torch.where(allowed[..., None], x, 0.0)
