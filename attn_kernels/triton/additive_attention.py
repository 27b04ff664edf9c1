"""Scores with a score vector in Triton, v . f(query + keys + extra + bias), and their gradients.

Launchers and their rules. The kernels: additive_attention_*.py. f is tanh, or an activation of activations.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..scores import ActivatedExtraScore, ActivatedScore, AdditiveExtraScore, AdditiveScore
from ..types import Masks
from .activations import TANH, activation_of
from .additive_attention_bwd import backward_kernel
from .additive_attention_exponentials import CHUNK, ROW, exponentials_kernel, key_exponentials_kernel
from .additive_attention_fwd import small_q_scores_kernel, tiled_scores_kernel
from .arguments import extra_arguments, mask_strides, mask_tensors, rows_aligned, strides_of
from .configurations import Configuration, configuration
from .launch import accumulator, has_approximate_reciprocal, launch, sum_splits
from .scores import extra_of
from .tiles import NUM_SMS, is_small_m, packed_split, power_of_two, small_m_block, small_m_tile, step_tiles

VectorScore = AdditiveScore | ActivatedScore | AdditiveExtraScore | ActivatedExtraScore


def pair_scores(
    score: VectorScore, query: Tensor, keys: Tensor, masks: Masks, dtype: torch.dtype, packed: bool = False
) -> Tensor:
    """(B, Tq, Tk) in the given dtype; undefined if a whole tile is padding.

    packed: as in packed_attention.py; then the result is (1, Tq, N).
    """
    v, bias, extra, activation = score.v, score.bias, extra_of(score), activation_of(score)
    B, Tq, A = query.shape
    Tk = keys.shape[1]
    scores = query.new_empty((keys.shape[0], Tq, Tk), dtype=dtype)
    if scores.numel() == 0:
        return scores
    approximate = has_approximate_reciprocal(query)
    row_strides = (*query.stride(), *keys.stride(), v.stride(0), *strides_of(bias, 1))
    aligned = rows_aligned(query, keys, extra)
    name, (slope, slope_lo) = activation.name, activation.slope_arguments(query)
    if is_small_m(query):
        block_q, block_k, block_a = small_m_tile(query)
        launch(
            small_q_scores_kernel,
            triton.cdiv(Tq, block_q) * step_tiles(Tk, B, block_k, packed),
            (scores, query, keys, *extra_arguments(extra), v, bias, masks.memory_lengths, Tq, Tk, A),
            (*row_strides, *strides_of(masks.memory_lengths, 1), slope, slope_lo),
            dict(
                ACTIVATION=name,
                APPROXIMATE=approximate,
                FLOAT64=query.dtype == torch.float64,
                ALIGNED=aligned,
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                BLOCK_A=block_a,
                B=B,
                PACKED=packed,
            ),
            4,
        )
        return scores
    tile = dict(_pair_tile(query, keys))
    warps, block_q, block_k = tile.pop("warps"), tile["BLOCK_Q"], tile["BLOCK_K"]
    padded_q, tiles_k = triton.cdiv(Tq, block_q) * block_q, step_tiles(Tk, B, block_k, packed)
    units = triton.cdiv(A, CHUNK.value) * CHUNK.value
    eq = query.new_empty((B, padded_q, units), dtype=torch.float32)
    ek = query.new_empty((tiles_k * block_k, units), dtype=torch.float32)
    prepared: tuple[Tensor | None, ...]
    exact: tuple[Any, ...]  # the inputs of the exact form
    if activation == TANH:
        of_rows = (query.new_empty(x.shape[:2], dtype=torch.float32) for x in (query, keys) * 2)
        prepared = (
            eq,
            ek,
            *of_rows,
            query.new_empty((units // CHUNK.value + 1) * ROW.value + 2 * units, dtype=torch.float32),
        )
        exact = (query, keys, *extra_arguments(extra), v, bias)
    else:
        prepared = (eq, ek, None, None, None, None, query.new_empty(units, dtype=torch.float32))
        exact = (None,) * 8
    block_t = 16
    launch(
        exponentials_kernel,
        B * triton.cdiv(padded_q, block_t) + tiles_k * (block_k // block_t) + 1,
        (*prepared, query, keys, *extra_arguments(extra), v, bias, B, Tq, Tk, A, units),
        row_strides,
        dict(
            ACTIVATION=name,
            ALIGNED=aligned,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_T=block_t,
            BLOCK_A=128,
            offsets=masks.memory_lengths if packed else None,
            stride_offsets=strides_of(masks.memory_lengths, 1)[0] if packed else None,
        ),
        4,
    )
    launch(
        tiled_scores_kernel,
        triton.cdiv(Tq, block_q) * tiles_k,
        (scores, *prepared, *exact, *mask_tensors(masks), Tq, Tk, A, units),
        (*row_strides, *mask_strides(masks), slope),
        dict(ACTIVATION=name, APPROXIMATE=approximate, **tile, B=B, PACKED=packed),
        warps,
    )
    return scores


def pair_scores_backward(
    dscores: Tensor,
    score: VectorScore,
    query: Tensor,
    keys: Tensor,
    masks: Masks,
    need_query: bool,
    need_memory: bool,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, keys, v and bias from dscores (B, Tq, Tk), made by padded_scores, 0 where not attended.

    Gradients that are not needed (of query, v and bias; of keys) are empty. More than 16 queries need a scratch buffer
    of (B, Tk, A) in float32. The gradient of extra equals that of the keys. packed: as in packed_attention.py.
    """
    v, bias, extra, activation = score.v, score.bias, extra_of(score), activation_of(score)
    B, Tq, A = query.shape
    Tk = keys.shape[1]
    dtype, wide = query.dtype, accumulator(query.dtype)
    if B * Tq * Tk * A == 0 or not (need_query or need_memory):
        shapes = (query.shape, v.shape, v.shape if bias is not None else (0,)) if need_query else ((0,),) * 3
        of_query, of_v, of_bias = (query.new_zeros(shape) for shape in shapes)
        return of_query, keys.new_zeros(keys.shape if need_memory else (0,)), of_v, of_bias
    block_q, block_k, block_a, warps = _backward_tile(query)
    blocks = triton.cdiv(Tq, block_q)
    of_row = triton.cdiv(Tk, B) if packed else Tk
    blocks_per_split, splits_q, steps_per_split, splits_k = _backward_splits(
        B * triton.cdiv(A, block_a), blocks, of_row, block_k
    )
    if packed:
        steps_per_split, splits_k = packed_split(splits_k, Tk)
    dquery = dkeys = dv = dbias = None
    if need_query:
        dquery = query.new_empty((splits_k, B, Tq, A), dtype=dtype if splits_k == 1 else wide)
        dv = query.new_empty((B, splits_q, splits_k, A), dtype=wide)
        dbias = torch.empty_like(dv)
    if need_memory:
        dkeys = query.new_empty((splits_q, *keys.shape), dtype=dtype if blocks == 1 else wide)
    # With fewer queries, writing and reading the exponentials takes more time than they save.
    guarded = not is_small_m(query) and (activation == TANH or masks.mask is not None)
    ek = _key_exponentials(keys, extra) if guarded and activation == TANH and Tq > 16 else None
    launch(
        backward_kernel,
        B * splits_q * splits_k * triton.cdiv(A, block_a),
        (
            *(dquery, dkeys, dv, dbias, dscores, query, keys, *extra_arguments(extra), ek, v, bias),
            *(*mask_tensors(masks), B, Tq, Tk, A),
        ),
        (
            blocks_per_split,
            steps_per_split,
            dscores.stride(2) // block_q,
            *query.stride(),
            *keys.stride(),
            v.stride(0),
            *strides_of(bias, 1),
            *mask_strides(masks),
            *activation.slope_arguments(query),
        ),
        dict(
            ACTIVATION=activation.name,
            SEVERAL=blocks_per_split > 1,
            GUARDED=guarded,
            APPROXIMATE=has_approximate_reciprocal(query),
            FLOAT64=dtype == torch.float64,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_A=block_a,
            PACKED=packed,
        ),
        warps,
    )
    return (
        query.new_empty(0) if dquery is None else sum_splits(dquery, dtype),
        query.new_empty(0) if dkeys is None else sum_splits(dkeys, dtype),
        query.new_empty(0) if dv is None else dv.view(-1, A).sum(0).to(dtype),
        query.new_empty(0) if dbias is None or bias is None else dbias.view(-1, A).sum(0).to(dtype),
    )


def _key_exponentials(keys: Tensor, extra: Tensor | None) -> Tensor:
    """exp(2 (keys + extra)) in float32, (B, Tk, A), contiguous; 1 where the sum is too large or NaN."""
    B, Tk, A = keys.shape
    ek = keys.new_empty((B, Tk, A), dtype=torch.float32)
    block_k, block_a = 16, power_of_two(A, 32, 128)
    launch(
        key_exponentials_kernel,
        B * triton.cdiv(Tk, block_k) * triton.cdiv(A, block_a),
        (ek, keys, *extra_arguments(extra), Tk, A),
        keys.stride(),
        dict(ALIGNED=rows_aligned(keys, extra), BLOCK_K=block_k, BLOCK_A=block_a),
        4,
    )
    return ek


# Tile sizes: simple rules, so that a first call is fast and the order of summation is the same in every call ----------


def is_worth_sharing(query: Tensor, keys: Tensor) -> bool:
    """Whether exponentials shared by the pairs of a row save time for at most 8 queries, in tiles of 8 by 32 pairs.

    query: (B, Tq, A).
    """
    # A tile of tanh takes 17 * 8 instructions per unit, distributed over the GPU. A tile of shared reciprocals takes
    # 3.7 * 8 on one warp, of which a large GPU runs 512 at once.
    return not is_small_m(query) and keys.shape[0] * triton.cdiv(keys.shape[1], 32) > 112


def _pair_tile(query: Tensor, keys: Tensor) -> Configuration:
    """The tile of pairs: one of two configurations, independent of the lengths."""
    Tq = query.shape[1]
    many = Tq > 8 and keys.shape[0] * triton.cdiv(Tq, 16) * triton.cdiv(keys.shape[1], 32) >= 4 * NUM_SMS
    return configuration("scores, many tiles" if many else "scores, few tiles", query)


def _backward_tile(query: Tensor) -> tuple[int, int, int, int]:
    """BLOCK_Q, BLOCK_K, BLOCK_A, warps of the backward: as many queries as fit into registers, one unit per thread."""
    Tq, A = query.shape[1:]
    if is_small_m(query):
        block_q, block_a = small_m_block(Tq), power_of_two(A, 32, 128)
        return block_q, 8 // block_q, block_a, block_a // 32
    chosen = configuration("backward", query)
    block_a = power_of_two(A, 32, chosen["BLOCK_A"])
    return 16 if Tq <= 16 else chosen["BLOCK_Q"], 1, block_a, block_a // 32


def _backward_splits(programs: int, blocks: int, Tk: int, block_k: int) -> tuple[int, int, int, int]:
    """How the backward is split: query blocks per split and splits, steps per split (of block_k) and splits.

    Each split of the queries costs a copy of dkeys, each split of the steps a copy of dquery. So there are only as many
    splits as it takes to fill a GPU.
    """
    splits_q = min(blocks, triton.cdiv(512, programs))
    blocks_per_split = triton.cdiv(blocks, splits_q)
    splits_q = triton.cdiv(blocks, blocks_per_split)
    splits_k = max(1, min(512 // (programs * splits_q), triton.cdiv(Tk, 32)))
    steps_per_split = triton.cdiv(triton.cdiv(Tk, splits_k), block_k) * block_k
    return blocks_per_split, splits_q, steps_per_split, triton.cdiv(Tk, steps_per_split)
