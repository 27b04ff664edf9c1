"""The attention ops with options in Triton: bias of the scores, dropout, another normaliser, logarithm of the sum.

The kernels are those of the ops without: scores by additive_attention.py and products.py, the rest by softmax.py, few
queries by decode.py. What options change in them is in options.py and normaliser.py. The backward of a normaliser other
than softmax computes the scores again: its derivative cannot be made of alignments that are rounded to 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..scores import AdditiveScore, DotScore, ReluScore, Score
from ..types import NORMALIZERS, Masks, Options
from .activations import TANH, Activation, activation_of
from .additive_attention import is_worth_sharing, pair_scores, pair_scores_backward
from .decode import can_decode, decode
from .launch import accumulator
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

    def scores(self) -> Tensor:
        """(B, Tq, Tk) in float32 or float64, without their bias; undefined where a whole tile is padding."""
        score, query, keys = self.score, self.query, self.keys
        if isinstance(score, DotScore):
            return product(query, keys, score.scale, self.masks.memory_lengths)
        dtype = accumulator(query.dtype)
        return pair_scores(query, keys, score.v, score.bias, self.masks, dtype, self.activation())

    def forward(self, need_alignments: bool) -> tuple[Tensor, Tensor, Tensor]:
        """context (B, Tq, D), alignments (B, Tq, Tk) or empty, log_total (B, Tq)."""
        score, query, keys, values, options, masks = self
        log_total = query.new_empty(query.shape[:2], dtype=accumulator(query.dtype))
        if keys.shape[1] == 0:
            log_total.fill_(-float("inf"))
        shares = isinstance(score, AdditiveScore) and is_worth_sharing(query, keys)
        if can_decode(query, values) and not shares:
            return *decode(score, query, keys, values, masks, need_alignments, options, log_total), log_total
        return *attend(self.scores(), values, masks, need_alignments, options, log_total), log_total

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
        biased, drops = options.score_bias is not None, options.dropout_p > 0
        dscore_bias = query.new_empty(alignments.shape if biased and need_query else (0,))
        kept = values.new_empty(alignments.shape) if drops and need_memory and grad_context is not None else None
        dscores = softmax_backward(
            grad_context,
            grad_alignments,
            values,
            masks,
            alignments,
            options,
            None if grad_log_total is None else grad_log_total.contiguous(),
            None if NORMALIZERS[options.normalizer] == "softmax" else self.scores(),
            dscore_bias if biased and need_query else None,
            kept,
        )
        of_scores: Gradients
        if isinstance(score, DotScore):
            empty = query.new_empty(0)
            dquery = weighted_sum(dscores, keys, score.scale, masks, transposed=False) if need_query else empty
            dkeys = weighted_sum(dscores, query, score.scale, masks, transposed=True) if need_memory else empty
            own: Gradients = ()
        else:
            dquery, dkeys, *of_scores = pair_scores_backward(
                dscores, query, keys, score.v, score.bias, masks, need_query, need_memory, self.activation()
            )
            own = tuple(of_scores)
        weights = alignments if kept is None else kept
        dvalues = values_gradient(grad_context, values, weights, masks, need_memory, 1 / (1 - options.dropout_p))
        return dquery, dkeys, dvalues, *own, dscore_bias


def additive_attention_with_options(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    score_bias: Tensor | None,
    dropout_p: float,
    seed: int,
    normalizer: int,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_alignments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D), score_bias (B, Tq, Tk) -> as _Call.forward."""
    options, masks = Options(score_bias, dropout_p, seed, normalizer), Masks(memory_lengths, mask)
    return _Call(AdditiveScore(v, bias), query, keys, values, options, masks).forward(need_alignments)


def additive_attention_with_options_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    grad_log_total: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    score_bias: Tensor | None,
    dropout_p: float,
    seed: int,
    normalizer: int,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
    log_total: Tensor,
    need_query: bool,
    need_memory: bool,
) -> Gradients:
    """The gradients of context, alignments and log_total -> as _Call.backward."""
    options, masks = Options(score_bias, dropout_p, seed, normalizer), Masks(memory_lengths, mask)
    grads = (grad_context, grad_alignments, grad_log_total)
    call = _Call(AdditiveScore(v, bias), query, keys, values, options, masks)
    return call.backward(*grads, alignments, need_query, need_memory)


def relu_attention_with_options(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    score_bias: Tensor | None,
    negative_slope: float,
    dropout_p: float,
    seed: int,
    normalizer: int,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_alignments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D), score_bias (B, Tq, Tk) -> as _Call.forward."""
    options, masks = Options(score_bias, dropout_p, seed, normalizer), Masks(memory_lengths, mask)
    return _Call(ReluScore(v, bias, negative_slope), query, keys, values, options, masks).forward(need_alignments)


def relu_attention_with_options_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    grad_log_total: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    score_bias: Tensor | None,
    negative_slope: float,
    dropout_p: float,
    seed: int,
    normalizer: int,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
    log_total: Tensor,
    need_query: bool,
    need_memory: bool,
) -> Gradients:
    """The gradients of context, alignments and log_total -> as _Call.backward."""
    options, masks = Options(score_bias, dropout_p, seed, normalizer), Masks(memory_lengths, mask)
    grads = (grad_context, grad_alignments, grad_log_total)
    call = _Call(ReluScore(v, bias, negative_slope), query, keys, values, options, masks)
    return call.backward(*grads, alignments, need_query, need_memory)


def dot_attention_with_options(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    normalizer: int,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_alignments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D), score_bias (B, Tq, Tk) -> as _Call.forward."""
    options, masks = Options(score_bias, dropout_p, seed, normalizer), Masks(memory_lengths, mask)
    return _Call(DotScore(scale), query, keys, values, options, masks).forward(need_alignments)


def dot_attention_with_options_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    grad_log_total: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score_bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int,
    normalizer: int,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
    log_total: Tensor,
    need_query: bool,
    need_memory: bool,
) -> Gradients:
    """The gradients of context, alignments and log_total -> as _Call.backward."""
    options, masks = Options(score_bias, dropout_p, seed, normalizer), Masks(memory_lengths, mask)
    grads = (grad_context, grad_alignments, grad_log_total)
    call = _Call(DotScore(scale), query, keys, values, options, masks)
    return call.backward(*grads, alignments, need_query, need_memory)
