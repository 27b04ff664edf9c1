"""The attention ops in Triton with what a step adds to the keys: v . f(query + keys + extra + bias).

Few queries, which is what such a step has, read it beside the keys: decode.py, and the backward of
gated_additive_kernels.py. For many queries the sum is a tensor, and the kernels are those of the ops without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from ..checks import ACTIVATIONS
from ..scores import AdditiveExtraScore, GatedAdditiveScore, ReluExtraScore
from ..types import Masks
from .activations import TANH, Activation, activation_of
from .additive_attention import pair_scores, pair_scores_backward
from .decode import can_decode, decode
from .gated_additive_attention import gated_pair_scores_backward
from .launch import accumulator
from .products import values_gradient
from .softmax import attend, softmax_backward

Gradients = tuple[Tensor, ...]


def _activation(score: AdditiveExtraScore | ReluExtraScore) -> Activation:
    return activation_of(score.negative_slope) if isinstance(score, ReluExtraScore) else TANH


def _forward(
    score: AdditiveExtraScore | ReluExtraScore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: Masks,
    need_alignments: bool,
) -> tuple[Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D) -> context (B, Tq, D), alignments (B, Tq, Tk) or empty."""
    if can_decode(query, values):
        return decode(score, query, keys, values, masks, need_alignments)
    dtype = accumulator(query.dtype)
    scores = pair_scores(query, keys + score.extra, score.v, score.bias, masks, dtype, _activation(score))
    return attend(scores, values, masks, need_alignments)


def _backward(
    grads: tuple[Tensor | None, Tensor | None],
    score: AdditiveExtraScore | ReluExtraScore,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    masks: Masks,
    alignments: Tensor,
    need_query: bool,
    need_keys: bool,
    need_values: bool,
) -> Gradients:
    """grads: of context and alignments -> of query, of the sum of keys and extra, of values, v and bias."""
    v, bias, activation = score.v, score.bias, _activation(score)
    dquery = dkeys = dv = dbias = query.new_empty(0)
    if need_query or need_keys:
        dscores = softmax_backward(*grads, values, masks, alignments)
        if can_decode(query, values):
            rows = GatedAdditiveScore(v[None], bias, None, ACTIVATIONS.index(activation.name), activation.slope)
            dquery, dkeys, dv, dbias, _ = gated_pair_scores_backward(
                dscores, rows, query, keys, masks, need_query, need_keys, score.extra
            )
            dv = dv.view(v.shape) if need_query else dv
        else:
            both = keys + score.extra
            dquery, dkeys, dv, dbias = pair_scores_backward(
                dscores, query, both, v, bias, masks, need_query, need_keys, activation
            )
    dvalues = values_gradient(grads[0], values, alignments, masks, need_values)
    return dquery, dkeys, dvalues, dv, dbias


def _kernels(
    score: type[AdditiveExtraScore] | type[ReluExtraScore],
) -> tuple[Callable[..., Gradients], Callable[..., Gradients]]:
    """The op of a score, and its backward. Arguments: those of their schemas (ops.py)."""
    own = len(score._fields)

    def forward(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Gradients:
        memory_lengths, mask, need_alignments = others[own:]
        masks = Masks(memory_lengths, mask)
        return _forward(score(*others[:own]), query, keys, values, masks, need_alignments)

    def backward(
        grad_context: Any, grad_alignments: Any, query: Tensor, keys: Tensor, values: Tensor, *others: Any
    ) -> Gradients:
        memory_lengths, mask, alignments, *needed = others[own:]
        grads = (grad_context, grad_alignments)
        given = (score(*others[:own]), query, keys, values, Masks(memory_lengths, mask), alignments)
        return _backward(grads, *given, *cast(tuple[bool, bool, bool], tuple(needed)))

    return forward, backward


KERNELS: dict[str, Callable[..., Gradients]] = {}
for _score in (AdditiveExtraScore, ReluExtraScore):
    KERNELS[_score.op], KERNELS[f"{_score.op}_backward"] = _kernels(_score)
