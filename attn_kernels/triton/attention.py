"""The ops of ops.py in Triton, for all scores: attention, with options or with a term added to the keys, and scores.

``KERNELS`` has each op and its backward, with the arguments of their schemas. additive_attention.py,
gated_additive_attention.py and products.py compute scores, and softmax.py computes alignments and context from them.
For few queries, decode.py computes everything in one kernel. options.py and normaliser.py have the code for options in
the kernels. The backward of a clip, and of a normaliser other than softmax, recomputes the scores: alignments rounded
to 16 bits are not accurate enough for the derivatives.

With several score vectors, v (R, A), tensors with a row for each row of scores have Tq R rows, not Tq.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..scores import (
    ActivatedExtraScore,
    ActivatedScore,
    AdditiveExtraScore,
    AdditiveScore,
    DotScore,
    GatedAdditiveScore,
    Score,
)
from ..types import NORMALIZERS, Masks, Options
from .activations import activation_of
from .additive_attention import is_worth_sharing, pair_scores, pair_scores_backward
from .decode import MAX_DECODE_QUERIES, can_decode, decode
from .gated_additive_attention import can_decode_gated, gated_pair_scores, gated_pair_scores_backward, masks_of_rows
from .inputs import Inputs
from .launch import accumulator
from .options import NO_OPTIONS
from .products import product, values_gradient, weighted_sum
from .softmax import attend, padded_gradient, softmax_backward

Gradients = tuple[Tensor, ...]


def scores_of(
    score: Score, query: Tensor, keys: Tensor, masks: Masks, dtype: torch.dtype, packed: bool = False
) -> Tensor:
    """(B, Tq, Tk) in the given dtype, without clip and bias; undefined if a whole tile is padding.

    packed: as in packed_attention.py; then the result is (1, Tq, N).
    """
    if isinstance(score, DotScore):
        return product(query, keys, score.scale, masks.memory_lengths, packed)
    if isinstance(score, GatedAdditiveScore):
        return gated_pair_scores(score, query, keys, masks.memory_lengths, dtype)
    return pair_scores(score, query, keys, masks, dtype, packed)


def scores_backward(
    dscores: Tensor,
    score: Score,
    query: Tensor,
    keys: Tensor,
    masks: Masks,
    need_query: bool,
    need_keys: bool,
    packed: bool = False,
) -> Gradients:
    """The gradients of query, keys and the score's own arguments, from those of the scores.

    dscores: (B, Tq, Tk), made by padded_scores, 0 where not attended. A term added to the keys has their gradient.
    """
    needed = (need_query, need_keys)
    if isinstance(score, DotScore):
        dquery = weighted_sum(dscores, keys, score.scale, masks, False, packed) if need_query else query.new_empty(0)
        dkeys = weighted_sum(dscores, query, score.scale, masks, True, packed) if need_keys else query.new_empty(0)
        return dquery, dkeys
    if isinstance(score, GatedAdditiveScore):
        return gated_pair_scores_backward(dscores, score, query, keys, masks, *needed)
    if isinstance(score, (AdditiveExtraScore, ActivatedExtraScore)) and query.shape[1] <= MAX_DECODE_QUERIES:
        rows = GatedAdditiveScore(score.v[None], score.bias, None, score.extra, *activation_of(score).numbers())
        dquery, dkeys, dv, dbias, _ = gated_pair_scores_backward(dscores, rows, query, keys, masks, *needed)
        return dquery, dkeys, dv.view(score.v.shape) if need_query else dv, dbias
    return pair_scores_backward(dscores, score, query, keys, masks, *needed, packed)


class _Call(Inputs):
    """An attention, computed by one or several kernels."""

    __slots__ = ()

    def row_masks(self) -> Masks:
        """The masks of the rows of scores."""
        if isinstance(self.score, GatedAdditiveScore):
            return masks_of_rows(self.masks, self.query.shape[1], self.score.v.shape[0])
        return self.masks

    def decodes(self) -> bool:
        """Whether one kernel computes the scores, their softmax and the context."""
        if isinstance(self.score, GatedAdditiveScore):
            return can_decode_gated(self.score, self.query, self.values)
        shares = isinstance(self.score, AdditiveScore) and is_worth_sharing(self.query, self.keys)
        return can_decode(self.query, self.values) and not shares

    def scores(self) -> Tensor:
        """(B, Tq, Tk) in float32 or float64."""
        return scores_of(self.score, self.query, self.keys, self.masks, accumulator(self.query.dtype))

    def forward(self, need_alignments: bool, log_total: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """context (B, Tq, D), alignments (B, Tq, Tk) or empty. log_total (B, Tq): an output buffer."""
        if self.decodes():
            return decode(self, need_alignments, log_total)
        return attend(self.scores(), self.values, self.row_masks(), need_alignments, self.options, log_total)

    def forward_with_log_total(self, need_alignments: bool) -> tuple[Tensor, Tensor, Tensor]:
        query, rows = self.query, self.query.shape[1]
        if isinstance(self.score, GatedAdditiveScore):
            rows *= self.score.v.shape[0]
        log_total = query.new_empty((query.shape[0], rows), dtype=accumulator(query.dtype))
        if self.keys.shape[1] == 0:
            log_total.fill_(-float("inf"))
        return *self.forward(need_alignments, log_total), log_total

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None],
        alignments: Tensor,
        need_query: bool,
        need_keys: bool,
        need_values: bool,
        grad_log_total: Tensor | None = None,
    ) -> tuple[Gradients, Tensor]:
        """The gradients of query, keys, values and the score's own arguments, from those of context and alignments.

        Also returns the gradient of score_bias, (0,) if it is not needed.
        """
        score, query, keys, values, masks, options = self
        row_masks = self.row_masks()
        dscore_bias = kept = None
        if options.score_bias is not None and need_query:
            dscore_bias = query.new_empty(alignments.shape)
        if options.dropout_p > 0 and need_values and grads[0] is not None:
            kept = values.new_empty(alignments.shape)
        gradients: Gradients = tuple(query.new_empty(0) for _ in range(2 + score.gradients))  # outputs share no memory
        if need_query or need_keys:
            again = options.clip != 0 or NORMALIZERS[options.normalizer] != "softmax"
            scores = self.scores() if again else None
            dscores = softmax_backward(
                *grads, values, row_masks, alignments, options, grad_log_total, scores, dscore_bias, kept
            )
            gradients = scores_backward(dscores, score, query, keys, masks, need_query, need_keys)
        dquery, dkeys, *own = gradients
        weights, factor = alignments if kept is None else kept, 1 / (1 - options.dropout_p)
        dvalues = values_gradient(grads[0], values, weights, row_masks, need_values, factor)
        return (dquery, dkeys, dvalues, *own), query.new_empty(0) if dscore_bias is None else dscore_bias


Kernels = tuple[Callable[..., Any], Callable[..., Any]]  # for an op and its backward


def _scores(score: Callable[..., Score], own: int) -> Kernels:
    """own: the number of the score's own arguments."""

    def forward(query: Tensor, keys: Tensor, *of_score: Any) -> Tensor:
        return scores_of(score(*of_score), query, keys, Masks(), query.dtype)

    def backward(grad_scores: Tensor, query: Tensor, keys: Tensor, *others: Any) -> Gradients:
        dscores = padded_gradient(grad_scores)
        return scores_backward(dscores, score(*others[:own]), query, keys, Masks(), *others[own:])

    return forward, backward


def _attention(score: type[Score]) -> Kernels:
    own = len(score._fields)

    def call(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> _Call:
        return _Call(score(*others[:own]), query, keys, values, Masks(*others[own:]))

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return call(*arguments[:-1]).forward(arguments[-1])

    def backward(grad_context: Any, grad_alignments: Any, *arguments: Any) -> Gradients:
        inputs, (alignments, *needed) = arguments[: own + 5], arguments[own + 5 :]  # keys and values: one flag, or two
        grads = (grad_context, grad_alignments)
        return call(*inputs).backward(grads, alignments, needed[0], needed[1], needed[-1])[0]

    return forward, backward


def _attention_with_options(score: Callable[..., Score], of_op: ops._Score) -> Kernels:
    tensors, addends, numbers = len(of_op.tensors), len(of_op.addends), len(of_op.numbers)

    def call(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> _Call:
        own, (score_bias, *rest) = others[:tensors], others[tensors:]
        added, rest = rest[:addends], rest[addends:]
        of_score, (*options, memory_lengths, mask) = rest[:numbers], rest[numbers:]
        masks = Masks(memory_lengths, mask)
        has_options = score_bias is not None or tuple(options[:3]) != NO_OPTIONS[1:4]  # the seed does not count
        given = Options(score_bias, *options) if has_options else NO_OPTIONS  # kernels without options use larger tiles
        of_gate = score is GatedAdditiveScore  # has a field for extra; others have a class for scores with extra
        made = score(*own, *added, *of_score) if of_gate else score(*own, *of_score)
        if isinstance(made, AdditiveScore | ActivatedScore) and added[0] is not None:
            made = made.with_extra(added[0])
        return _Call(made, query, keys, values, masks, given)

    def forward(*arguments: Any) -> Gradients:
        return call(*arguments[:-1]).forward_with_log_total(arguments[-1])

    def backward(grad_context: Any, grad_alignments: Any, grad_log_total: Any, *arguments: Any) -> Gradients:
        *inputs, alignments, _, need_query, need_memory = arguments
        rows = None if grad_log_total is None else grad_log_total.contiguous()
        needed = (need_query, need_memory, need_memory)
        gradients, dscore_bias = call(*inputs).backward((grad_context, grad_alignments), alignments, *needed, rows)
        return *gradients, dscore_bias

    return forward, backward


_OPS: dict[str, Kernels] = {
    "additive_scores": _scores(AdditiveScore, 2),
    "activated_scores": _scores(ActivatedScore, 4),
    "gated_additive_scores": _scores(GatedAdditiveScore, 6),
    "gated_additive_attention": _attention_with_options(GatedAdditiveScore, ops.GATED),  # the only op of this score
}
_plain: tuple[type[Score], ...] = (AdditiveScore, ActivatedScore, DotScore, AdditiveExtraScore, ActivatedExtraScore)
for _score in _plain:
    _OPS[_score.op] = _attention(_score)
_named: dict[str, type[Score]] = {"additive": AdditiveScore, "activated": ActivatedScore, "dot": DotScore}
for _name, _score in _named.items():
    _OPS[f"{_name}_attention_with_options"] = _attention_with_options(_score, ops.SCORES[_name])
KERNELS: dict[str, Callable[..., Any]] = {
    f"{_op}{_end}": _kernel
    for _op, _both in _OPS.items()
    for _end, _kernel in zip(("", "_backward"), _both, strict=True)
}
