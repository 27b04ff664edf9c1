"""The attention ops with options in Triton: clip and bias of scores, dropout, another normaliser, logarithm of the sum.

The kernels are those of the ops without: scores by additive_attention.py and products.py, the rest by softmax.py, few
queries by decode.py. What options change in them is in options.py and normaliser.py. The backward of a clip and of a
normaliser other than softmax computes the scores again: derivatives cannot be made of alignments rounded to 16 bits.

With several score vectors, v (R, A), what is of a row of scores has Tq R of them in the place of Tq. This attention has
no op without options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
from ..scores import AdditiveScore, DotScore, GatedAdditiveScore, ReluScore, Score
from ..types import NORMALIZERS, Masks, Options
from .activations import TANH, Activation, activation_of
from .additive_attention import is_worth_sharing, pair_scores, pair_scores_backward
from .decode import can_decode, decode
from .gated_additive_attention import (
    can_decode_gated,
    gated_pair_scores,
    gated_pair_scores_backward,
    masks_of_rows,
)
from .launch import accumulator
from .options import NO_OPTIONS
from .products import product, values_gradient, weighted_sum
from .softmax import attend, softmax_backward

Gradients = tuple[Tensor, ...]


class _Call(NamedTuple):
    """A score, and the arguments of an attention that all scores have."""

    score: Score
    query: Tensor  # (B, Tq, A)
    keys: Tensor  # (B, Tk, A)
    values: Tensor  # (B, Tk, D)
    options: Options
    masks: Masks

    def activation(self) -> Activation:
        return activation_of(self.score.negative_slope) if isinstance(self.score, ReluScore) else TANH

    def row_masks(self) -> Masks:
        """The masks of the rows of scores."""
        if isinstance(self.score, GatedAdditiveScore):
            return masks_of_rows(self.masks, self.query.shape[1], self.score.v.shape[0])
        return self.masks

    def decodes(self) -> bool:
        """Whether one kernel makes the scores, their softmax and the context."""
        if isinstance(self.score, GatedAdditiveScore):
            return can_decode_gated(self.score, self.query, self.values)
        shares = isinstance(self.score, AdditiveScore) and is_worth_sharing(self.query, self.keys)
        return can_decode(self.query, self.values) and not shares

    def scores(self) -> Tensor:
        """(B, Tq, Tk) in float32 or float64, without clip and bias; undefined where a whole tile is padding."""
        score, query, keys = self.score, self.query, self.keys
        if isinstance(score, DotScore):
            return product(query, keys, score.scale, self.masks.memory_lengths)
        dtype = accumulator(query.dtype)
        if isinstance(score, GatedAdditiveScore):
            return gated_pair_scores(score, query, keys, self.masks.memory_lengths, dtype)
        return pair_scores(query, keys, score.v, score.bias, self.masks, dtype, self.activation())

    def forward(self, need_alignments: bool) -> tuple[Tensor, Tensor, Tensor]:
        """context (B, Tq, D), alignments (B, Tq, Tk) or empty, log_total (B, Tq)."""
        score, query, keys, values, options, masks = self
        rows = query.shape[1] * (score.v.shape[0] if isinstance(score, GatedAdditiveScore) else 1)
        log_total = query.new_empty((query.shape[0], rows), dtype=accumulator(query.dtype))
        if keys.shape[1] == 0:
            log_total.fill_(-float("inf"))
        if self.decodes():
            return *decode(score, query, keys, values, masks, need_alignments, options, log_total), log_total
        return *attend(self.scores(), values, self.row_masks(), need_alignments, options, log_total), log_total

    def backward(
        self,
        grad_context: Tensor | None,
        grad_alignments: Tensor | None,
        grad_log_total: Tensor | None,
        alignments: Tensor,
        need_query: bool,
        need_memory: bool,
    ) -> Gradients:
        """The gradients of query, keys, values, of the score's own arguments, and of score_bias."""
        score, query, keys, values, options, masks = self
        row_masks = self.row_masks()
        biased, drops = options.score_bias is not None, options.dropout_p > 0
        dscore_bias = query.new_empty(alignments.shape if biased and need_query else (0,))
        kept = values.new_empty(alignments.shape) if drops and need_memory and grad_context is not None else None
        dscores = softmax_backward(
            grad_context,
            grad_alignments,
            values,
            row_masks,
            alignments,
            options,
            None if grad_log_total is None else grad_log_total.contiguous(),
            None if NORMALIZERS[options.normalizer] == "softmax" and options.clip == 0 else self.scores(),
            dscore_bias if biased and need_query else None,
            kept,
        )
        if isinstance(score, DotScore):
            empty = query.new_empty(0)
            dquery = weighted_sum(dscores, keys, score.scale, masks, transposed=False) if need_query else empty
            dkeys = weighted_sum(dscores, query, score.scale, masks, transposed=True) if need_memory else empty
            own: Gradients = ()
        elif isinstance(score, GatedAdditiveScore):
            dquery, dkeys, *of_scores = gated_pair_scores_backward(
                dscores, score, query, keys, masks, need_query, need_memory
            )
            own = tuple(of_scores)
        else:
            dquery, dkeys, *own_gradients = pair_scores_backward(
                dscores, query, keys, score.v, score.bias, masks, need_query, need_memory, self.activation()
            )
            own = tuple(own_gradients)
        weights = alignments if kept is None else kept
        dvalues = values_gradient(grad_context, values, weights, row_masks, need_memory, 1 / (1 - options.dropout_p))
        return dquery, dkeys, dvalues, *own, dscore_bias


def _kernels(
    of_op: ops._Score, score: Callable[..., Score]
) -> tuple[Callable[..., Gradients], Callable[..., Gradients]]:
    """The op of a score, and its backward. Arguments: those of their schemas (ops.py)."""
    tensors, numbers = len(of_op.tensors), len(of_op.numbers)

    def call(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> _Call:
        own, (score_bias, *rest) = others[:tensors], others[tensors:]
        of_score, (*options, memory_lengths, mask) = rest[:numbers], rest[numbers:]
        masks = Masks(memory_lengths, mask)
        has_options = score_bias is not None or tuple(options) != NO_OPTIONS[1:]
        given = Options(score_bias, *options) if has_options else NO_OPTIONS  # whose kernels have larger tiles
        return _Call(score(*own, *of_score), query, keys, values, given, masks)

    def forward(*arguments: Any) -> Gradients:
        *inputs, need_alignments = arguments
        return call(*inputs).forward(need_alignments)

    def backward(grad_context: Any, grad_alignments: Any, grad_log_total: Any, *arguments: Any) -> Gradients:
        *inputs, alignments, _, need_query, need_memory = arguments
        grads = (grad_context, grad_alignments, grad_log_total)
        return call(*inputs).backward(*grads, alignments, need_query, need_memory)

    return forward, backward


KERNELS: dict[str, Callable[..., Gradients]] = {}
_OF_SCORES: dict[str, tuple[ops._Score, Callable[..., Score]]] = {
    "additive_attention_with_options": (ops.SCORES["additive"], AdditiveScore),
    "relu_attention_with_options": (ops.SCORES["relu"], ReluScore),
    "dot_attention_with_options": (ops.SCORES["dot"], DotScore),
    "gated_additive_attention": (ops.GATED, GatedAdditiveScore),
}
for _op, (_of_op, _score) in _OF_SCORES.items():
    KERNELS[_op], KERNELS[f"{_op}_backward"] = _kernels(_of_op, _score)
