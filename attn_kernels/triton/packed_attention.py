"""The attention ops over packed memories in Triton: keys (N, A) and values (N, D), the steps of all sentences one after
the other, and offsets (B + 1,).

The kernels are those of padded memories; they read offsets in place of lengths. There is no work and no memory for
padding, except in alignments (B, Tq, columns). The host never waits for the offsets: the number of programs of a kernel
depends on N and B only (``packed_tile`` in device.py), and all sentences are split into the same number of parts.

Launchers see such a memory as a single row, (1, N, *), but its batch stride is the stride of a step. So the batch
stride times the index of the first step of a sentence is the offset of the sentence. ``columns``, in launchers and
kernels: the columns of the alignments, an argument of the op; None for a padded memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import ops
from ..scores import ActivatedScore, AdditiveScore, DotScore, Score
from ..types import Masks
from .additive_attention import is_worth_sharing
from .attention import Gradients, scores_backward, scores_of
from .decode import can_decode, decode
from .inputs import Inputs
from .launch import accumulator, alignments_shape
from .products import values_gradient
from .softmax import attend, softmax_backward


def _as_row(rows: Tensor) -> Tensor:
    """(N, *) -> (1, N, *), the form for launchers."""
    return rows.as_strided((1, *rows.shape), (rows.stride(0), *rows.stride()))


def _forward(
    score: Score, query: Tensor, keys: Tensor, values: Tensor, columns: int, offsets: Tensor, need_alignments: bool
) -> tuple[Tensor, Tensor]:
    """query (B, Tq, A) -> context (B, Tq, D), alignments (B, Tq, columns), or (Tq N,) if columns is 0, or empty."""
    (B, Tq, _), (N, D) = query.shape, values.shape
    if B * Tq * N == 0:
        shape = alignments_shape(B, Tq, N, columns) if need_alignments else (0,)
        return query.new_zeros((B, Tq, D)), query.new_zeros(shape)
    keys, values, masks = _as_row(keys), _as_row(values), Masks(offsets)
    shares = isinstance(score, AdditiveScore) and is_worth_sharing(query, keys)
    if can_decode(query, values) and not shares:
        return decode(Inputs(score, query, keys, values, masks), need_alignments, columns=columns)
    scores = scores_of(score, query, keys, masks, accumulator(query.dtype), packed=True)
    return attend(scores, values, masks, need_alignments, columns=columns)


def _backward(
    grads: tuple[Tensor | None, Tensor | None],
    score: Score,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    alignments: Tensor,
    need_query: bool,
    need_memory: bool,
) -> Gradients:
    """The gradients of query, keys, values and the score's own arguments; empty if not needed.

    grads: the gradients of context and alignments.
    """
    own: tuple[Any, ...] = score[: score.gradients]
    if query.shape[0] * query.shape[1] * keys.shape[0] == 0 or not (need_query or need_memory):
        given = [(query, need_query), (keys, need_memory), (values, need_memory), *((x, need_query) for x in own)]
        return tuple(query.new_zeros(x.shape if need and x is not None else (0,)) for x, need in given)
    columns = 0 if alignments.dim() == 1 else alignments.shape[2]
    keys, values, masks = _as_row(keys), _as_row(values), Masks(offsets)
    dscores = softmax_backward(*grads, values, masks, alignments, columns=columns)
    dquery, dkeys, *own_gradients = scores_backward(
        dscores, score, query, keys, masks, need_query, need_memory, packed=True
    )
    dvalues = values_gradient(grads[0], values, alignments, masks, need_memory, columns=columns)
    if need_memory:
        dkeys, dvalues = dkeys[0], dvalues[0]
    return dquery, dkeys, dvalues, *own_gradients


def _kernels(score: Callable[..., Score], own: int) -> tuple[Callable[..., Gradients], Callable[..., Gradients]]:
    """The op of a score with ``own`` arguments, and its backward. Arguments: those of their schemas."""

    def forward(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Gradients:
        columns, offsets, need_alignments = others[own:]
        return _forward(score(*others[:own]), query, keys, values, columns, offsets, need_alignments)

    def backward(
        grad_context: Any, grad_alignments: Any, query: Tensor, keys: Tensor, values: Tensor, *others: Any
    ) -> Gradients:
        _, offsets, alignments, *needed = others[own:]
        grads = (grad_context, grad_alignments)
        return _backward(grads, score(*others[:own]), query, keys, values, offsets, alignments, *needed)

    return forward, backward


KERNELS: dict[str, Callable[..., Gradients]] = {}
for _name, _score in (("additive", AdditiveScore), ("activated", ActivatedScore), ("dot", DotScore)):
    _op, _of_op = f"{_name}_attention_packed", ops.SCORES[_name]
    KERNELS[_op], KERNELS[f"{_op}_backward"] = _kernels(_score, len(_of_op.tensors) + len(_of_op.numbers))
