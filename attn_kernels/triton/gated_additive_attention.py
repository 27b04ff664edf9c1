"""Additive attention with a gate and several score vectors in Triton.

    v_r . (f(query + keys + extra + bias) * sigmoid(gate))

Launchers and their rules. The kernels are in gated_additive_kernels.py, softmax.py and decode.py. For the last two, the
rows of a query with several score vectors are like rows of different queries.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..scores import GatedAdditiveScore
from ..types import Masks
from .activations import activation_of
from .arguments import extra_arguments, mask_strides, mask_tensors, rows_aligned, strides_of
from .decode import can_decode
from .gated_additive_kernels import gated_backward_kernel, gated_scores_kernel
from .launch import accumulator, has_approximate_reciprocal, launch, sum_splits
from .tiles import power_of_two

MAX_ROWS = 8  # rows of scores of a sentence: up to this number, decode.py is used for any number of steps
MIN_LONG = 2048  # with at least this many steps softmax.attend is slower: each of its programs processes whole rows
MAX_SMALL_R = 8  # up to this many score vectors, the backward multiplies element by element
MAX_VECTORS = 32  # the maximum number of score vectors whose gradients a program keeps in registers


def can_decode_gated(score: GatedAdditiveScore, query: Tensor, values: Tensor) -> bool:
    """Whether one kernel should compute the scores, their softmax and the context of query (B, Tq, A)."""
    few = query.shape[1] * score.v.shape[0] <= MAX_ROWS or values.shape[1] >= MIN_LONG
    return few and can_decode(query, values)


def masks_of_rows(masks: Masks, queries: int, vectors: int) -> Masks:
    """The masks with a mask (B, Tq, Tk) repeated for the rows of scores: (B, Tq R, Tk)."""
    memory_lengths, mask = masks
    if mask is None or mask.dim() == 2 or vectors == 1:
        return masks
    if queries == 1:
        return Masks(memory_lengths, mask.expand(-1, vectors, -1))
    return Masks(memory_lengths, mask.repeat_interleave(vectors, 1))


def gated_pair_scores(
    score: GatedAdditiveScore, query: Tensor, keys: Tensor, memory_lengths: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(B, Tq R, Tk) in the given dtype, the rows of a query one after the other; undefined beyond the lengths."""
    v, bias, gate, extra = score[:4]
    B, Tq, A = query.shape
    Tk, R = keys.shape[1], v.shape[0]
    double = query.dtype == torch.float64
    # One warp with 32 units of a step per thread, 16 in float64: with more, no registers are left for the gates.
    block_a = power_of_two(A, 32, 512 if double else 1024)
    block_k = max(1, (512 if double else 1024) // block_a)
    several = block_a < A
    scores = query.new_empty((B, Tq * R, Tk), dtype=accumulator(query.dtype) if several else dtype)
    if scores.numel() == 0:
        return scores.to(dtype)
    if A == 0:
        return scores.zero_()
    queries = power_of_two(Tq, 1, 8)
    launch(
        gated_scores_kernel,
        B * triton.cdiv(Tq, queries) * triton.cdiv(Tk, block_k),
        (scores, query, keys, v, bias, gate, *extra_arguments(extra), memory_lengths, Tq, Tk, A, R),
        (*_strides(score, query, keys), *strides_of(memory_lengths, 1), *activation_of(score).slope_arguments(query)),
        dict(
            ACTIVATION=activation_of(score).name,
            APPROXIMATE=has_approximate_reciprocal(query),
            FLOAT64=double,
            ALIGNED=_aligned(score, query, keys),
            SEVERAL=several,
            QUERIES=queries,
            BLOCK_K=block_k,
            BLOCK_A=block_a,
        ),
        1,
    )
    return scores.to(dtype)


def gated_pair_scores_backward(
    dscores: Tensor,
    score: GatedAdditiveScore,
    query: Tensor,
    keys: Tensor,
    masks: Masks,
    need_query: bool,
    need_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, keys, v, bias and gate.

    dscores: (B, Tq R, Tk), made by padded_scores, 0 where not attended. Gradients that are not needed (of keys; of the
    others) are empty. masks: of queries, not of rows. The gradient of extra equals that of the keys.
    """
    v, bias, gate, extra = score[:4]
    B, Tq, A = query.shape
    Tk, R = keys.shape[1], v.shape[0]
    dtype, wide = query.dtype, accumulator(query.dtype)
    double = wide == torch.float64
    empty = query.new_empty(0)
    if B * Tq * Tk * A == 0 or not (need_query or need_memory):
        own = (torch.zeros_like(x) if need_query and x is not None else empty for x in (query, v, bias, gate))
        of_query, of_v, of_bias, of_gate = own
        return of_query, torch.zeros_like(keys) if need_memory else empty, of_v, of_bias, of_gate
    small_m, block_r, block_k, block_a, warps = _backward_tile(query, R)
    tiles = triton.cdiv(A, block_a)
    steps_per_split, splits = _backward_splits(B * tiles * warps, Tq + R, Tk, block_k)
    dquery = dv = dgate = None
    if need_query:
        dquery = query.new_empty((splits, B, Tq, A), dtype=wide)
        dv = query.new_empty((B * splits, R, A), dtype=wide)
        if Tq > 1:
            dquery.zero_()
        if block_r < R:
            dv.zero_()
        dgate = None if gate is None else keys.new_empty((B, Tk, A))
    dkeys = keys.new_empty((B, Tk, A)) if need_memory else None
    launch(
        gated_backward_kernel,
        B * tiles * splits,
        (
            *(dquery, dkeys, dgate, dv, dscores, query, keys, v, bias, gate),
            *(*extra_arguments(extra), *mask_tensors(masks)),
        ),
        (
            *(B, Tq, Tk, A, R, steps_per_split, dscores.stride(2)),
            *_strides(score, query, keys),
            *(*mask_strides(masks), *activation_of(score).slope_arguments(query)),
        ),
        dict(
            ACTIVATION=activation_of(score).name,
            APPROXIMATE=has_approximate_reciprocal(query),
            FLOAT64=double,
            ALIGNED=_aligned(score, query, keys),
            ONE_QUERY=Tq == 1,
            ONE_BLOCK=block_r >= R,
            SMALL_M=small_m,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            BLOCK_A=block_a,
        ),
        warps,
    )
    return (
        empty if dquery is None else sum_splits(dquery, dtype),
        empty if dkeys is None else dkeys,
        empty if dv is None else sum_splits(dv, dtype),
        empty if dquery is None or bias is None else dquery.view(-1, A).sum(0).to(dtype),
        empty if dgate is None else dgate,
    )


def _backward_tile(query: Tensor, vectors: int) -> tuple[bool, int, int, int, int]:
    """SMALL_M, BLOCK_R, BLOCK_K, BLOCK_A, warps of the backward, for query (B, Tq, A)."""
    A, double = query.shape[2], query.dtype == torch.float64
    if vectors > MAX_SMALL_R and not double:
        return False, power_of_two(vectors, 16, MAX_VECTORS), 16, power_of_two(A, 32, 64), 4
    block_r = power_of_two(vectors, 1, MAX_SMALL_R)
    block_a = power_of_two(A, 32, 32 * 16 // query.element_size())  # 16 bytes of a step per thread
    elements = (128 if double else 512) if block_r == 1 else (64 if double else 256)
    return True, block_r, max(1, elements // block_a), block_a, 1


def _backward_splits(warps: int, rows: int, Tk: int, block_k: int) -> tuple[int, int]:
    """How the steps are split: steps of a split, a multiple of block_k, and the number of splits.

    warps: of a program. rows: a split has its own partial sums for this many rows of query and v. All partial sums have
    at most a quarter of the size of the keys, or more if a GPU would idle otherwise.
    """
    few = max(Tk // (4 * rows), triton.cdiv(1024, warps))
    splits = max(1, min(2048 // warps, triton.cdiv(Tk, 32), few))
    steps_per_split = triton.cdiv(triton.cdiv(Tk, splits), block_k) * block_k
    return steps_per_split, triton.cdiv(Tk, steps_per_split)


def _aligned(score: GatedAdditiveScore, query: Tensor, keys: Tensor) -> bool:
    return rows_aligned(query, keys, score.gate, score.extra)


def _strides(score: GatedAdditiveScore, query: Tensor, keys: Tensor) -> tuple[int, ...]:
    """The strides of query, keys, v, bias and gate."""
    v, bias, gate = score[:3]
    return *query.stride(), *keys.stride(), *v.stride(), *strides_of(bias, 1), *strides_of(gate)
