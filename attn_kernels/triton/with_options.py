"""The attention ops with options in Triton: bias of the scores, dropout, another normaliser, logarithm of the sum.

The kernels are those of the ops without: scores by additive_attention.py and products.py, the rest by softmax.py, few
queries by decode.py. What options change in them is in options.py and normaliser.py. The backward of a normaliser other
than softmax computes the scores again: its derivative cannot be made of alignments that are rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import ops
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
        if isinstance(score, DotScore):
            empty = query.new_empty(0)
            dquery = weighted_sum(dscores, keys, score.scale, masks, transposed=False) if need_query else empty
            dkeys = weighted_sum(dscores, query, score.scale, masks, transposed=True) if need_memory else empty
            own: Gradients = ()
        else:
            dquery, dkeys, *own_gradients = pair_scores_backward(
                dscores, query, keys, score.v, score.bias, masks, need_query, need_memory, self.activation()
            )
            own = tuple(own_gradients)
        weights = alignments if kept is None else kept
        dvalues = values_gradient(grad_context, values, weights, masks, need_memory, 1 / (1 - options.dropout_p))
        return dquery, dkeys, dvalues, *own, dscore_bias


def _kernels(name: str, score: Callable[..., Score]) -> tuple[Callable[..., Gradients], Callable[..., Gradients]]:
    """The op of a score, and its backward. Arguments: those of their schemas (ops.py)."""
    tensors, numbers = len(ops.SCORES[name].tensors), len(ops.SCORES[name].numbers)

    def call(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> _Call:
        own, (score_bias, *rest) = others[:tensors], others[tensors:]
        of_score, (*options, memory_lengths, mask) = rest[:numbers], rest[numbers:]
        masks = Masks(memory_lengths, mask)
        return _Call(score(*own, *of_score), query, keys, values, Options(score_bias, *options), masks)

    def forward(*arguments: Any) -> Gradients:
        *inputs, need_alignments = arguments
        return call(*inputs).forward(need_alignments)

    def backward(grad_context: Any, grad_alignments: Any, grad_log_total: Any, *arguments: Any) -> Gradients:
        *inputs, alignments, _, need_query, need_memory = arguments
        grads = (grad_context, grad_alignments, grad_log_total)
        return call(*inputs).backward(*grads, alignments, need_query, need_memory)

    return forward, backward


KERNELS: dict[str, Callable[..., Gradients]] = {}
_OF_SCORES: dict[str, Callable[..., Score]] = {"additive": AdditiveScore, "relu": ReluScore, "dot": DotScore}
for _name, _score in _OF_SCORES.items():
    _op = f"{_name}_attention_with_options"
    KERNELS[_op], KERNELS[f"{_op}_backward"] = _kernels(_name, _score)
