"""Products of rows, q . k for every pair, and weighted sums of rows: the parts of dot attention and of all gradients.

Scores are stored in float32, (B, Tq, Tk). That is small compared with (B, Tq, Tk, A), which no kernel ever stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Masks
from .arguments import mask_strides, mask_tensors, rows_aligned, strides_of, two_parts
from .configurations import configuration, of_width
from .device import (
    add_product,
    alignment_rows,
    attended,
    batch_offset,
    dot,
    kernel,
    load_rows,
    packed_tile,
    sentence_rows,
    split_steps,
    tile_of_pairs,
)
from .launch import accumulator, launch, sum_splits
from .tiles import (
    MAX_SMALL_M,
    NUM_SMS,
    is_small_m,
    packed_split,
    power_of_two,
    small_m_block,
    small_m_tile,
    step_tiles,
)

# Products of rows: scores of dot attention, and the gradient of alignments --------------------------------------------


@kernel
def _product_kernel(
    out,  # (B, Tq, Tk), float32 or float64, contiguous; with PACKED, (Tq length,) of each sentence after the other
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    lengths,  # (B,) or None
    scale,
    scale_lo,  # the rounding error of scale in float32: for float64
    Tq, Tk, A,
    stride_qb, stride_qq, stride_qa, stride_kb, stride_kk, stride_ka, stride_lengths,
    ALIGNED: tl.constexpr, SMALL_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    B,
    PACKED: tl.constexpr,
):  # fmt: skip
    """out[b, i, j] = scale * query[b, i] . keys[b, j]; tiles beyond the length are not written."""
    b, first_q, first = tile_of_pairs(Tq, Tk, BLOCK_Q, BLOCK_K, lengths, stride_lengths, B, PACKED)
    i = first_q.to(tl.int64) + tl.arange(0, BLOCK_Q)
    j = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    u = tl.arange(0, BLOCK_A).to(tl.int64)
    origin, length, width, place = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    if first < length:
        q_rows = query + batch_offset(b, stride_qb, ALIGNED) + i[:, None] * stride_qq + u[None, :] * stride_qa
        k_rows = keys + batch_offset(place, stride_kb, ALIGNED) + j[:, None] * stride_kk + u[None, :] * stride_ka
        if SMALL_M:
            total = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_A], dtype=out.dtype.element_ty)
        else:
            total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
        for start in range(0, A, BLOCK_A):
            in_units = (u + start < A)[None, :]
            q = tl.load(q_rows, mask=(i < Tq)[:, None] & in_units, other=0.0)
            k = tl.load(k_rows, mask=(j < width)[:, None] & in_units, other=0.0)
            if SMALL_M:
                total += q[:, None, :].to(total.dtype) * k[None, :, :].to(total.dtype)
            else:
                total = dot(q, tl.trans(k), total)
            q_rows += tl.cast(stride_qa, tl.int64) * BLOCK_A
            k_rows += tl.cast(stride_ka, tl.int64) * BLOCK_A
        if SMALL_M:
            total = tl.sum(total, axis=2)
        if out.dtype.element_ty == tl.float64:
            total *= tl.cast(scale, tl.float64) + tl.cast(scale_lo, tl.float64)
        else:
            total *= scale
        in_tile = (i[:, None] < Tq) & (j[None, :] < width)
        tl.store(out + origin * Tq + i[:, None] * width + j[None, :], total, mask=in_tile)


def product(query: Tensor, keys: Tensor, scale: float, memory_lengths: Tensor | None, packed: bool = False) -> Tensor:
    """scale * query (B, Tq, A) @ keys (B, Tk, A)^T: (B, Tq, Tk), float32 or float64; undefined beyond the lengths.

    packed: as in packed_attention.py; then the result is (1, Tq, N).
    """
    B, Tq, A = query.shape
    Tk = keys.shape[1]
    out = query.new_empty((keys.shape[0], Tq, Tk), dtype=accumulator(query.dtype))
    small_m = is_small_m(query)
    if small_m:
        block_q, block_k, block_a = small_m_tile(query)
        warps = 4
    else:
        chosen = configuration(of_width("product", query), query)
        block_q, block_k, block_a, warps = (chosen[name] for name in ("BLOCK_Q", "BLOCK_K", "BLOCK_A", "warps"))
        if Tq <= 16:
            block_q = 16
    launch(
        _product_kernel,
        triton.cdiv(Tq, block_q) * step_tiles(Tk, B, block_k, packed),
        (out, query, keys, memory_lengths, *two_parts(scale, query.dtype), Tq, Tk, A),
        (*query.stride(), *keys.stride(), *strides_of(memory_lengths, 1)),
        dict(
            ALIGNED=rows_aligned(query, keys),
            SMALL_M=small_m,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_A=block_a,
            B=B,
            PACKED=packed,
        ),
        warps,
    )
    return out


# Weighted sums of rows: the gradients of values, and of query and keys of dot attention -------------------------------


@kernel
def _weighted_sum_kernel(
    out,  # (splits, B, M, N), contiguous
    weights,  # (B, M, X)
    rows,  # (B, X, N)
    lengths,  # (B,) or None
    mask,  # (B, M, X) or None
    scale, scale_lo, B, M, X, N,
    rows_per_split,  # a multiple of BLOCK_X
    stride_wb, stride_wm, stride_wx,
    stride_rb, stride_rx, stride_rn,
    stride_lengths,
    stride_mb, stride_mm, stride_mx,
    TRANSPOSED: tl.constexpr,  # True: M is Tk and X is Tq. False: M is Tq and X is Tk
    ALIGNED: tl.constexpr, SMALL_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    columns,  # of weights that are packed alignments, or None: see alignment_rows
    PACKED: tl.constexpr,  # if M is Tk, out is then also packed: all sentences one after the other
):  # fmt: skip
    """out[b, m] = scale * the sum over x of weights[b, m, x] * rows[b, x], over the pairs (m, x) that are attended."""
    accumulate: tl.constexpr = tl.float64 if weights.dtype.element_ty == tl.float64 else tl.float32
    tiles_n = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(X, rows_per_split)
    tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = (program // tiles_n) % splits
    if PACKED and TRANSPOSED:
        b, tile_m = packed_tile(lengths, stride_lengths, program // (tiles_n * splits), B, BLOCK_M)
    else:
        tile_m = (program // (tiles_n * splits)) % tiles_m
        b = (program // (tiles_n * splits * tiles_m)).to(tl.int64)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if TRANSPOSED:
        origin, used_m, width_m, place = sentence_rows(lengths, b, stride_lengths, M, PACKED)
        used_x = X
        begin, end = split_steps(split, splits, rows_per_split, X, BLOCK_X, False)
        rows += batch_offset(b, stride_rb, ALIGNED)
        in_out = origin
        all_m = B * tl.cast(M, tl.int64)
        if PACKED:
            all_m = tl.cast(M, tl.int64)
    else:
        origin, used_x, width_x, place = sentence_rows(lengths, b, stride_lengths, X, PACKED)
        used_m = M
        width_m = M
        begin, end = split_steps(split, splits, rows_per_split, width_x, BLOCK_X, PACKED)
        rows += batch_offset(place, stride_rb, ALIGNED)
        in_out = b * M
        all_m = B * tl.cast(M, tl.int64)
    if columns is not None:
        tl.static_assert(TRANSPOSED)
        start_alignments, stride_wx, used_m = alignment_rows(b, X, origin, width_m, used_m, columns)
        weights += start_alignments + m[:, None]
    else:
        weights += place * stride_wb + m[:, None] * stride_wm
    if mask is not None:
        mask += b * stride_mb
    if SMALL_M:
        total = tl.zeros([BLOCK_M, BLOCK_X, BLOCK_N], dtype=accumulate)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, tl.minimum(end, used_x), BLOCK_X):
        x = (start + tl.arange(0, BLOCK_X)).to(tl.int64)
        allowed = attended(mask, m, x, used_m, used_x, stride_mm, stride_mx)
        w = tl.load(weights + x[None, :] * stride_wx, mask=allowed, other=0.0).to(accumulate)
        r = load_rows(rows, x, n, used_x, N, stride_rx, stride_rn, SMALL_M)
        total = add_product(total, w, r, allowed, mask is not None, SMALL_M)
    if SMALL_M:
        total = tl.sum(total, axis=1)
    if accumulate == tl.float64:
        total *= tl.cast(scale, tl.float64) + tl.cast(scale_lo, tl.float64)
    else:
        total *= scale
    total = tl.where(m[:, None] < used_m, total, 0.0)  # in padding, 0 * NaN with an attended NaN gives NaN
    pointers = out + (split * all_m + in_out + m[:, None]) * N + n[None, :]
    tl.store(pointers, total, mask=(m[:, None] < width_m) & (n[None, :] < N))


def weighted_sum(
    weights: Tensor,
    rows: Tensor,
    scale: float,
    masks: Masks,
    transposed: bool,
    packed: bool = False,
    columns: int | None = None,
) -> Tensor:
    """scale * weights @ rows over the attended pairs, in the dtype of rows.

    transposed False: weights (B, Tq, Tk), rows (B, Tk, N), the result (B, Tq, N).
    transposed True: weights are transposed: weights (B, Tq, Tk), rows (B, Tq, N), the result (B, Tk, N).
    packed: as in packed_attention.py; weights (1, Tq, N) are from softmax_backward, or with ``columns`` have the
        offsets of packed alignments.
    """
    of_lengths, of_batch, of_queries, of_steps = mask_strides(masks)
    strides = (of_lengths, of_batch, of_queries, of_steps)
    if transposed:
        weights, strides = weights.transpose(1, 2), (of_lengths, of_batch, of_steps, of_queries)
    B, M, X = weights.shape
    N = rows.shape[2]
    if X == 0:
        return rows.new_zeros((B, M, N))
    batch, of_m, of_x = B, M, X
    if packed:
        assert masks.memory_lengths is not None  # the offsets
        B = masks.memory_lengths.shape[0] - 1
        if transposed:
            of_m = triton.cdiv(M, B)
        else:
            batch, of_x = B, triton.cdiv(X, B)
    small_m, block_m, block_x, block_n, warps = sum_tile(rows, of_m, of_x, N, masks.mask is not None)
    tiles_m = step_tiles(M, B, block_m, packed and transposed)
    programs = tiles_m * triton.cdiv(N, block_n)
    rows_per_split, splits = split(programs, of_x, block_x)
    if packed and not transposed:
        rows_per_split, splits = packed_split(splits, X)
    dtype = accumulator(rows.dtype)
    out = rows.new_empty((splits, batch, M, N), dtype=rows.dtype if splits == 1 else dtype)
    launch(
        _weighted_sum_kernel,
        programs * splits,
        (out, weights, rows, *mask_tensors(masks), *two_parts(scale, dtype), B, M, X, N, rows_per_split),
        (*weights.stride(), *rows.stride(), *strides),
        dict(
            TRANSPOSED=transposed,
            ALIGNED=rows_aligned(rows),
            SMALL_M=small_m,
            BLOCK_M=block_m,
            BLOCK_X=block_x,
            BLOCK_N=block_n,
            columns=columns,
            PACKED=packed,
        ),
        warps,
    )
    return sum_splits(out, rows.dtype)


def values_gradient(
    grad_context: Tensor | None,
    values: Tensor,
    alignments: Tensor,
    masks: Masks,
    needed: bool,
    scale: float = 1.0,
    columns: int | None = None,
) -> Tensor:
    """scale * alignments^T @ grad_context, (B, Tk, D), over the attended pairs; empty if it is not needed.

    columns: of a packed memory; see packed_attention.py. Then the result is (1, N, D).
    """
    if not needed:
        return values.new_empty(0)
    if grad_context is None:
        return values.new_zeros(values.shape)
    if columns is not None:
        weights = alignments.reshape(-1)[:1].expand(1, grad_context.shape[1], values.shape[1])
        return weighted_sum(weights, grad_context, scale, masks, transposed=True, packed=True, columns=columns)
    return weighted_sum(alignments, grad_context, scale, masks, transposed=True)


# Tile sizes: simple rules, so that a first call is fast and the order of summation is the same in every call ----------


def sum_tile(rows: Tensor, M: int, X: int, N: int, masked: bool) -> tuple[bool, int, int, int, int]:
    """The tile of a weighted sum (M, X) @ (X, N): SMALL_M, BLOCK_M, BLOCK_X, BLOCK_N, warps."""
    elements = 2048 if rows.dtype == torch.float64 else 4096
    if rows.dtype == torch.float64 or M <= MAX_SMALL_M or X <= MAX_SMALL_M:
        block_n = power_of_two(N, 32, 128)
        if X <= MAX_SMALL_M:
            block_x = power_of_two(X, 1, MAX_SMALL_M)
            return True, max(4, elements // (block_n * block_x)), block_x, block_n, 4
        block_m = small_m_block(M)
        return True, block_m, max(4, elements // (block_n * block_m)), block_n, 4
    chosen = configuration(of_width("sum", rows, "masked" if masked else ""), rows)
    return False, 16 if M <= 16 else chosen["BLOCK_M"], chosen["BLOCK_X"], chosen["BLOCK_N"], chosen["warps"]


def split(programs: int, steps: int, block: int) -> tuple[int, int]:
    """How a sum over steps is split if there are few programs: steps of a part, a multiple of block, and the parts."""
    parts = 1
    if programs * 4 <= NUM_SMS and steps >= 2048:  # otherwise one more kernel costs more than it saves
        parts = min(NUM_SMS // max(programs, 1), triton.cdiv(steps, 512))
    per_part = triton.cdiv(triton.cdiv(steps, parts), block) * block
    return per_part, triton.cdiv(steps, per_part)
