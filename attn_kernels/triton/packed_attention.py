"""The attention ops over packed memories in Triton: keys (N, A) and values (N, D), the steps of all sentences one after
the other, and offsets (B + 1,).

The kernels are those of padded memories, and read offsets where these have lengths. There is no work for padding, and
no memory for it, but in alignments (B, Tq, columns). The host never waits for the offsets: how many programs a kernel
has depends on N and B (``packed_tile`` in device.py), and each sentence is split into as many parts as any other.

To the launchers such a memory is one of a single row, (1, N, *), but its batch stride is that of a step: so the stride
times the first step of a sentence is where that is. ``columns``, in launchers and kernels: of the alignments, as the op
got it; None where a memory is padded.
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
    """(N, *) -> (1, N, *), as launchers take it."""
    return rows.as_strided((1, *rows.shape), (rows.stride(0), *rows.stride()))


def _forward(
    score: Score, query: Tensor, keys: Tensor, values: Tensor, columns: int, offsets: Tensor, need_alignments: bool
) -> tuple[Tensor, Tensor]:
    """query (B, Tq, A) -> context (B, Tq, D), alignments (B, Tq, columns), for columns 0 (Tq N,), or empty."""
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
    """grads: of context and alignments -> of query, keys, values and the score's own arguments; empty if not needed."""
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
    """The op of a score with that many arguments of its own, and its backward. Arguments: those of their schemas."""

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
