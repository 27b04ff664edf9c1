"""What additive and dot-product attention share on a GPU: products, softmax with context, and their gradients.

An op is a short chain of kernels. Each tile of scores is made by one program, which is where the work is; scores are
kept in float32, (B, Tq, Tk), small beside the (B, Tq, Tk, A) that no kernel ever stores. Conventions of all of them:

- Programs are counted along axis 0 of the grid only, the one that is not limited to 65535.
- i, j, u are the indices of queries, steps and units (or value columns) of a tile, in 64 bits, because they are
  multiplied by strides. Strides are passed for every tensor of the caller, so none has to be copied.
- Padding is removed by selecting, never by multiplying with zero: it may hold NaN.
- No atomics: what several programs add up is written apart and summed in a fixed order.
- A 2-D mask is a 3-D mask with stride 0 along the queries.
- With FEW queries (and for float64, which tensor cores do not help) a tile is multiplied and summed element by element,
  units along the threads, so that keys and values are read at the speed of memory. Otherwise it is a matrix product.
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETER = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
FEW_QUERIES = 4  # up to here reading keys and values takes longer than computing with them
SIZES = ["Tq", "Tk", "A", "D"]  # a kernel is not compiled again for sizes that are multiples of 16, or 1


# Device code ----------------------------------------------------------------------------------------------------------


@triton.jit
def row_length(lengths, b, stride_lengths, Tk):
    """The steps of row b that may be attended: Tk, or its length, clamped to [0, Tk]."""
    length = Tk
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b * stride_lengths), 0), Tk).to(tl.int32)
    return length


@triton.jit
def attended(mask, i, j, Tq, length, stride_mq, stride_mk):
    """(Q, K): whether query i may attend step j, for i (Q,) and j (K,); mask points to the row's first element."""
    allowed = (i[:, None] < Tq) & (j[None, :] < length)
    if mask is not None:
        allowed = tl.load(mask + i[:, None] * stride_mq + j[None, :] * stride_mk, mask=allowed, other=0) != 0
    return allowed


@triton.jit
def dot(a, b, total):
    """total (M, N) + a (M, X) @ b (X, N), in float32 whatever the dtype of a and b."""
    if INTERPRETER:  # which takes bfloat16 for integers here
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_rows(rows, x, n, X, N, stride_x, stride_n, FEW: tl.constexpr):
    """rows[x, n], (X, N), 0 beyond X and N; with FEW, (1, X, N): so the threads lie along n in the product too."""
    if FEW:
        x = x[None, :, None]
        n = n[None, None, :]
    else:
        x = x[:, None]
        n = n[None, :]
    return tl.load(rows + x * stride_x + n.to(tl.int64) * stride_n, mask=(x < X) & (n < N), other=0.0)


@triton.jit
def add_product(total, weights, rows, allowed, MASKED: tl.constexpr, FEW: tl.constexpr):
    """total (M, N) + weights (M, X) @ rows (X, N) over the allowed (M, X) pairs.

    With FEW, total is (M, X, N) and rows are (1, X, N).

    Weights are 0 where not allowed, but 0 * NaN is NaN: under a mask a row may be padding for one m, not for another.
    """
    if FEW:
        product = weights[:, :, None] * rows.to(weights.dtype)
        if MASKED:
            product = tl.where(allowed[:, :, None], product, 0.0)
        total += product
    elif MASKED:
        used = tl.max(allowed.to(tl.int32), axis=0) > 0
        rows = tl.where(used[:, None], rows, 0.0)
        if tl.max(tl.where(tl.abs(rows.to(tl.float32)) < float("inf"), 0, 1)) == 0:  # all finite
            total = dot(weights.to(rows.dtype), rows, total)
        else:
            for x in range(weights.shape[1]):  # rare and slow: one column of weights at a time
                picked = tl.arange(0, weights.shape[1]) == x
                column = tl.sum(tl.where(picked[None, :], weights, 0.0), axis=1)
                column_allowed = tl.max(tl.where(picked[None, :], allowed.to(tl.int32), 0), axis=1) > 0
                row = tl.sum(tl.where(picked[:, None], rows.to(tl.float32), 0.0), axis=0)
                total += tl.where(column_allowed[:, None], column[:, None] * row[None, :], 0.0)
    else:
        total = dot(weights.to(rows.dtype), rows, total)
    return total


# Products of rows: scores of dot attention, and the gradient of alignments --------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _product_kernel(
    out,  # (B, Tq, Tk), float32 or float64, contiguous
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    lengths,  # (B,) or None
    scale,
    scale_rest,  # what float32 lost of the scale: for float64
    Tq,
    Tk,
    A,
    stride_qb,
    stride_qq,
    stride_qa,
    stride_kb,
    stride_kk,
    stride_ka,
    stride_lengths,
    FEW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """out[b, i, j] = scale * query[b, i] . keys[b, j], except tiles beyond the length, which are left as they are."""
    tiles_k = tl.cdiv(Tk, BLOCK_K)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // (tiles_k * tiles_q)).to(tl.int64)
    i = ((program // tiles_k) % tiles_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = (program % tiles_k) * BLOCK_K
    j = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    u = tl.arange(0, BLOCK_A).to(tl.int64)
    if first < row_length(lengths, b, stride_lengths, Tk):
        q_rows = query + b * stride_qb + i[:, None] * stride_qq + u[None, :] * stride_qa
        k_rows = keys + b * stride_kb + j[:, None] * stride_kk + u[None, :] * stride_ka
        if FEW:
            total = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_A], dtype=out.dtype.element_ty)
        else:
            total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
        for start in range(0, A, BLOCK_A):
            in_units = (u + start < A)[None, :]
            q = tl.load(q_rows, mask=(i < Tq)[:, None] & in_units, other=0.0)
            k = tl.load(k_rows, mask=(j < Tk)[:, None] & in_units, other=0.0)
            if FEW:
                total += q[:, None, :].to(total.dtype) * k[None, :, :].to(total.dtype)
            else:
                total = dot(q, tl.trans(k), total)
            q_rows += BLOCK_A * stride_qa
            k_rows += BLOCK_A * stride_ka
        if FEW:
            total = tl.sum(total, axis=2)
        if out.dtype.element_ty == tl.float64:
            total *= tl.cast(scale, tl.float64) + tl.cast(scale_rest, tl.float64)
        else:
            total *= scale
        in_tile = (i[:, None] < Tq) & (j[None, :] < Tk)
        tl.store(out + (b * Tq + i[:, None]) * Tk + j[None, :], total, mask=in_tile)


def product(query: Tensor, keys: Tensor, scale: float, memory_lengths: Tensor | None) -> Tensor:
    """scale * query (B, Tq, A) @ keys (B, Tk, A)^T: (B, Tq, Tk), float32 or float64; undefined beyond the lengths."""
    B, Tq, A = query.shape
    Tk = keys.shape[1]
    out = query.new_empty((B, Tq, Tk), dtype=accumulator(query.dtype))
    few = is_few(query)
    if few:
        block_q, block_k, block_a = few_tile(query)
        warps = 4
    else:
        most = 32 if query.dtype == torch.float32 else 64  # what registers hold
        block_q, block_k, block_a, warps = power_of_two(Tq, 16, most), 64, 32, 4
    rest = scale - torch.tensor(scale, dtype=torch.float32).item() if query.dtype == torch.float64 else 0.0
    launch(
        _product_kernel,
        B * triton.cdiv(Tq, block_q) * triton.cdiv(Tk, block_k),
        (out, query, keys, memory_lengths, float(scale), rest, Tq, Tk, A),
        (*query.stride(), *keys.stride(), lengths_stride(memory_lengths)),
        dict(FEW=few, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_A=block_a),
        warps,
    )
    return out


# Softmax and context --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "steps_per_split"])
def _attend_kernel(
    context,  # (splits, B, Tq, D), contiguous: each split of the steps apart
    alignments,  # (B, Tq, Tk), contiguous, or None
    scores,  # (B, Tq, Tk), contiguous
    values,  # (B, Tk, D)
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    B,
    Tq,
    Tk,
    D,
    steps_per_split,  # a multiple of BLOCK_K
    stride_vb,
    stride_vk,
    stride_vd,
    stride_lengths,
    stride_mb,
    stride_mq,
    stride_mk,
    FEW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """alignments = softmax of the attended scores, context = alignments @ values; zeros where nothing is attended.

    Every program takes the maximum and the sum of its whole rows, which are short, so that no two have to be combined.
    """
    accumulate: tl.constexpr = scores.dtype.element_ty
    tiles_d = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    splits = tl.cdiv(Tk, steps_per_split)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    tile_d = program % tiles_d
    split = (program // tiles_d) % splits
    i = ((program // (tiles_d * splits)) % tiles_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (program // (tiles_d * splits * tiles_q)).to(tl.int64)
    steps = tl.arange(0, BLOCK_K)
    d = tile_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    length = row_length(lengths, b, stride_lengths, Tk)
    scores += (b * Tq + i[:, None]) * Tk
    if mask is not None:
        mask += b * stride_mb

    # Not -inf: exp(-inf - -inf) is NaN. Scores that are all -inf sum to 0 then, and 1 / 0 makes them NaN, as in eager.
    top = tl.full([BLOCK_Q], -3.4e38, dtype=accumulate)
    total = tl.zeros([BLOCK_Q], dtype=accumulate)
    used = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.int32)
    for start in range(0, length, BLOCK_K):
        j = (start + steps).to(tl.int64)
        allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
        s = tl.load(scores + j[None, :], mask=allowed, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        exponentials = tl.where(allowed, tl.exp(s - new_top[:, None]), 0.0)
        total = total * tl.exp(top - new_top) + tl.sum(exponentials, axis=1)
        used = tl.maximum(used, allowed.to(tl.int32))
        top = new_top
    inverse = tl.where(tl.max(used, axis=1) > 0, 1.0 / total, 0.0)

    if FEW:
        averaged = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_D], dtype=accumulate)
    else:
        averaged = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, Tk)
    for start in range(begin, tl.minimum(end, length), BLOCK_K):
        j = (start + steps).to(tl.int64)
        allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
        s = tl.load(scores + j[None, :], mask=allowed, other=-float("inf"))
        p = tl.where(allowed, tl.exp(s - top[:, None]) * inverse[:, None], 0.0)
        if alignments is not None:
            if tile_d == 0:
                stored = (i[:, None] < Tq) & (j[None, :] < Tk)
                tl.store(alignments + (b * Tq + i[:, None]) * Tk + j[None, :], p, mask=stored)
        rows = load_rows(values + b * stride_vb, j, d, length, D, stride_vk, stride_vd, FEW)
        averaged = add_product(averaged, p, rows, allowed, mask is not None, FEW)
    if FEW:
        averaged = tl.sum(averaged, axis=1)
    split_context = context + ((split.to(tl.int64) * B + b) * Tq + i[:, None]) * D + d[None, :]
    tl.store(split_context, averaged, mask=(i[:, None] < Tq) & (d[None, :] < D))

    if alignments is not None:  # zeros in the tiles that are padding altogether
        if tile_d == 0:
            for start in range(tl.maximum(begin, tl.cdiv(length, BLOCK_K) * BLOCK_K), end, BLOCK_K):
                j = (start + steps).to(tl.int64)
                stored = (i[:, None] < Tq) & (j[None, :] < Tk)
                zeros = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
                tl.store(alignments + (b * Tq + i[:, None]) * Tk + j[None, :], zeros, mask=stored)


def attend(
    scores: Tensor, values: Tensor, memory_lengths: Tensor | None, mask: Tensor | None, need_alignments: bool
) -> tuple[Tensor, Tensor]:
    """Softmax over the attended scores and the average of values.

    Args: scores (B, Tq, Tk) in float32 or float64, contiguous, anything where not attended; values (B, Tk, D);
        memory_lengths (B,); mask (B, Tk) or (B, Tq, Tk).
    Returns: context (B, Tq, D), and alignments (B, Tq, Tk) or an empty tensor; in the dtype of values.
    """
    B, Tq, Tk = scores.shape
    D = values.shape[2]
    alignments = values.new_empty((B, Tq, Tk) if need_alignments else (0,))
    if Tk == 0:
        return values.new_zeros((B, Tq, D)), alignments
    few, block_m, block_k, block_d, warps = _sum_tile(values, Tq, Tk, D, mask is not None)
    programs = B * triton.cdiv(Tq, block_m) * max(1, triton.cdiv(D, block_d))
    steps_per_split, splits = _split(programs, Tk, block_k)
    context = values.new_empty((splits, B, Tq, D), dtype=values.dtype if splits == 1 else scores.dtype)
    launch(
        _attend_kernel,
        programs * splits,
        (context, alignments if need_alignments else None, scores, values, memory_lengths, bytes_of(mask)),
        (B, Tq, Tk, D, steps_per_split, *values.stride(), lengths_stride(memory_lengths), *mask_strides(mask)),
        dict(FEW=few, BLOCK_Q=block_m, BLOCK_K=block_k, BLOCK_D=block_d),
        warps,
    )
    return sum_splits(context, values.dtype), alignments


# The gradient of scores -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _softmax_backward_kernel(
    dscores,  # (B, Tk, padded Tq), contiguous
    dproduct,  # (B, Tq, Tk), contiguous: grad_context @ values^T, or None
    grad_alignments,  # (B, Tq, Tk), or None
    alignments,  # (B, Tq, Tk)
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    Tq,
    Tk,
    padded_q,
    stride_gb,
    stride_gq,
    stride_gk,
    stride_ab,
    stride_aq,
    stride_ak,
    stride_lengths,
    stride_mb,
    stride_mq,
    stride_mk,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dscores = alignments * (g - mean of g), g = dproduct + grad_alignments; 0 where not attended.

    The mean is sum_j alignments * g over the sum of alignments: 1, but for their rounding to the dtype of the inputs.
    """
    accumulate: tl.constexpr = dscores.dtype.element_ty
    tiles_q = tl.cdiv(padded_q, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // tiles_q).to(tl.int64)
    i = (program % tiles_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    length = row_length(lengths, b, stride_lengths, Tk)
    dscores += b * Tk * padded_q + i[:, None]
    alignments += b * stride_ab + i[:, None] * stride_aq
    if dproduct is not None:
        dproduct += (b * Tq + i[:, None]) * Tk
    if grad_alignments is not None:
        grad_alignments += b * stride_gb + i[:, None] * stride_gq
    if mask is not None:
        mask += b * stride_mb
    mean = tl.zeros([BLOCK_Q], dtype=accumulate)
    products = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
    total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
    for apply in tl.static_range(2):  # first the sums of the rows, then the gradient
        if apply == 1:
            mean = tl.sum(products, axis=1) / tl.maximum(
                tl.sum(total, axis=1), 1e-30
            )  # 0 / 0 where nothing is attended
        for start in range(0, length if apply == 0 else Tk, BLOCK_K):
            j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
            g = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
            if dproduct is not None:
                g += tl.load(dproduct + j[None, :], mask=allowed, other=0.0)
            if grad_alignments is not None:
                g += tl.load(grad_alignments + j[None, :] * stride_gk, mask=allowed, other=0.0).to(accumulate)
            p = tl.load(alignments + j[None, :] * stride_ak, mask=allowed, other=0.0).to(accumulate)
            if apply == 0:
                products += p * g
                total += p
            else:
                gradient = tl.where(allowed, p * (g - mean[:, None]), 0.0)
                stored = (i[:, None] < padded_q) & (j[None, :] < Tk)
                tl.store(dscores + j[None, :] * padded_q, gradient, mask=stored)


def padded_scores(query: Tensor, keys: Tensor) -> Tensor:
    """An empty (B, Tq, Tk) in float32 or float64 that lies as (B, Tk, Tq rounded up) in memory.

    The backward of additive scores walks the steps and loads all queries of one at once, without a mask.
    """
    B, Tq = query.shape[:2]
    Tk = keys.shape[1]
    padded_q = few_block(Tq) if Tq <= FEW_QUERIES else triton.cdiv(Tq, 32) * 32
    return query.new_empty((B, Tk, padded_q), dtype=accumulator(query.dtype)).transpose(1, 2)[:, :Tq]


def softmax_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    values: Tensor,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
) -> Tensor:
    """The gradient of the scores: (B, Tq, Tk), float32 or float64, 0 where not attended.

    Its memory is that of ``padded_scores``, filled up with zeros.
    """
    B, Tq, Tk = alignments.shape
    dscores = padded_scores(alignments, values)
    dproduct = None if grad_context is None else product(grad_context, values, 1.0, memory_lengths)
    block_q = power_of_two(Tq, 1, 16)
    launch(
        _softmax_backward_kernel,
        B * triton.cdiv(dscores.stride(2), block_q) if dscores.numel() else 0,
        (dscores, dproduct, grad_alignments, alignments, memory_lengths, bytes_of(mask), Tq, Tk),
        (
            dscores.stride(2),
            *((0, 0, 0) if grad_alignments is None else grad_alignments.stride()),
            *alignments.stride(),
            lengths_stride(memory_lengths),
            *mask_strides(mask),
        ),
        dict(BLOCK_Q=block_q, BLOCK_K=1024 // block_q),
        4,
    )
    return dscores


# Weighted sums of rows: the gradients of values, and of query and keys of dot attention -------------------------------


@triton.jit(do_not_specialize=["M", "X", "N", "rows_per_split"])
def _weighted_sum_kernel(
    out,  # (splits, B, M, N), contiguous
    weights,  # (B, M, X)
    rows,  # (B, X, N)
    lengths,  # (B,) or None
    mask,  # (B, M, X) or None
    scale,
    scale_rest,
    B,
    M,
    X,
    N,
    rows_per_split,  # a multiple of BLOCK_X
    stride_wb,
    stride_wm,
    stride_wx,
    stride_rb,
    stride_rx,
    stride_rn,
    stride_lengths,
    stride_mb,
    stride_mm,
    stride_mx,
    OF_STEPS: tl.constexpr,  # whether M is Tk and X is Tq, or the other way round
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[b, m] = scale * the sum over x of weights[b, m, x] * rows[b, x], over the pairs (m, x) that are attended."""
    accumulate: tl.constexpr = tl.float64 if weights.dtype.element_ty == tl.float64 else tl.float32
    tiles_n = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(X, rows_per_split)
    tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = (program // tiles_n) % splits
    m = ((program // (tiles_n * splits)) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (program // (tiles_n * splits * tiles_m)).to(tl.int64)
    if OF_STEPS:
        used_m = row_length(lengths, b, stride_lengths, M)
        used_x = X
    else:
        used_m = M
        used_x = row_length(lengths, b, stride_lengths, X)
    weights += b * stride_wb + m[:, None] * stride_wm
    rows += b * stride_rb
    if mask is not None:
        mask += b * stride_mb
    if FEW:
        total = tl.zeros([BLOCK_M, BLOCK_X, BLOCK_N], dtype=accumulate)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    begin = split * rows_per_split
    for start in range(begin, tl.minimum(begin + rows_per_split, used_x), BLOCK_X):
        x = (start + tl.arange(0, BLOCK_X)).to(tl.int64)
        allowed = attended(mask, m, x, used_m, used_x, stride_mm, stride_mx)
        w = tl.load(weights + x[None, :] * stride_wx, mask=allowed, other=0.0).to(accumulate)
        r = load_rows(rows, x, n, used_x, N, stride_rx, stride_rn, FEW)
        total = add_product(total, w, r, allowed, mask is not None, FEW)
    if FEW:
        total = tl.sum(total, axis=1)
    if accumulate == tl.float64:
        total *= tl.cast(scale, tl.float64) + tl.cast(scale_rest, tl.float64)
    else:
        total *= scale
    total = tl.where(m[:, None] < used_m, total, 0.0)  # padding of 0 * a NaN that is real elsewhere
    pointers = out + ((split.to(tl.int64) * B + b) * M + m[:, None]) * N + n[None, :]
    tl.store(pointers, total, mask=(m[:, None] < M) & (n[None, :] < N))


def weighted_sum(
    weights: Tensor, rows: Tensor, scale: float, memory_lengths: Tensor | None, mask: Tensor | None, of_steps: bool
) -> Tensor:
    """scale * weights @ rows over the attended pairs, in the dtype of rows.

    of_steps False: weights (B, Tq, Tk), rows (B, Tk, N), the result (B, Tq, N).
    of_steps True: weights are transposed: weights (B, Tq, Tk), rows (B, Tq, N), the result (B, Tk, N).
    """
    strides = mask_strides(mask)
    if of_steps:
        weights, strides = weights.transpose(1, 2), (strides[0], strides[2], strides[1])
    B, M, X = weights.shape
    N = rows.shape[2]
    if X == 0:
        return rows.new_zeros((B, M, N))
    few, block_m, block_x, block_n, warps = _sum_tile(rows, M, X, N, mask is not None)
    programs = B * triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    rows_per_split, splits = _split(programs, X, block_x)
    dtype = accumulator(rows.dtype)
    out = rows.new_empty((splits, B, M, N), dtype=rows.dtype if splits == 1 else dtype)
    rest = scale - torch.tensor(scale, dtype=torch.float32).item() if dtype == torch.float64 else 0.0
    launch(
        _weighted_sum_kernel,
        programs * splits,
        (out, weights, rows, memory_lengths, bytes_of(mask), float(scale), rest, B, M, X, N, rows_per_split),
        (*weights.stride(), *rows.stride(), lengths_stride(memory_lengths), *strides),
        dict(OF_STEPS=of_steps, FEW=few, BLOCK_M=block_m, BLOCK_X=block_x, BLOCK_N=block_n),
        warps,
    )
    return sum_splits(out, rows.dtype)


# Sizes of tiles: simple rules, so that a first call is fast and every call adds up in the same order ------------------


def is_few(query: Tensor) -> bool:
    """Whether query (B, Tq, *) takes the kernels that multiply element by element."""
    return query.shape[1] <= FEW_QUERIES or query.dtype == torch.float64


def few_block(queries: int) -> int:
    """The queries of a tile with few queries: 1, 2 or 4."""
    return power_of_two(queries, 1, FEW_QUERIES)


def few_tile(query: Tensor) -> tuple[int, int, int]:
    """BLOCK_Q, BLOCK_K, BLOCK_A of scores of few queries (B, Tq, A): 32 elements a thread, 16 in float64."""
    block_q, block_a = few_block(query.shape[1]), power_of_two(query.shape[2], 32, 256)
    elements = 2048 if query.dtype == torch.float64 else 4096
    return block_q, max(2, elements // (block_q * block_a)), block_a


def _sum_tile(rows: Tensor, M: int, X: int, N: int, masked: bool) -> tuple[bool, int, int, int, int]:
    """Tile of a weighted sum (M, X) @ (X, N): whether it is FEW, BLOCK_M, BLOCK_X, BLOCK_N, warps."""
    elements = 2048 if rows.dtype == torch.float64 else 4096
    if rows.dtype == torch.float64 or M <= FEW_QUERIES or X <= FEW_QUERIES:
        block_n = power_of_two(N, 32, 128)
        if X <= FEW_QUERIES:
            block_x = power_of_two(X, 1, FEW_QUERIES)
            return True, max(4, elements // (block_n * block_x)), block_x, block_n, 4
        block_m = few_block(M)
        return True, block_m, max(4, elements // (block_n * block_m)), block_n, 4
    if masked:  # its check and its pairs take registers
        return False, 16, 32, 32, 4
    return False, 16 if M <= 16 else 32, 32, 64, 4


def _split(programs: int, steps: int, block: int) -> tuple[int, int]:
    """How a sum over steps is cut where there are few programs: steps of a part, a multiple of block, and the parts."""
    parts = 1
    if programs * 4 <= _PROCESSORS and steps >= 2048:  # else one more kernel costs more than it saves
        parts = min(_PROCESSORS // max(programs, 1), triton.cdiv(steps, 512))
    per_part = triton.cdiv(triton.cdiv(steps, parts), block) * block
    return per_part, triton.cdiv(steps, per_part)


_PROCESSORS = 128  # about what a large GPU has; asking for the number would make results depend on the device


# Launching ------------------------------------------------------------------------------------------------------------


def launch(kernel, programs: int, arguments: tuple, strides: tuple, constants: dict, warps: int) -> None:
    """Runs that many programs of a kernel on the device of its first argument."""
    if programs > 0:
        with _device_of(arguments[0]):
            kernel[(programs,)](*arguments, *strides, **constants, num_warps=warps, enable_fp_fusion=True)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    if tensor.device.type == "xpu":
        return torch.xpu.device_of(tensor)
    return contextlib.nullcontext()


def has_approximate_reciprocal(tensor: Tensor) -> bool:
    """Whether a kernel on the device of tensor may use the PTX instruction rcp.approx: NVIDIA GPUs, not float64."""
    return tensor.is_cuda and torch.version.hip is None and tensor.dtype != torch.float64


def sum_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, *) -> (*): the sum, always in the same order, in the given dtype."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A bool mask as bytes, not copied."""
    return None if mask is None else mask.view(torch.uint8)


def mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Strides of a mask along batch, queries and steps; a 2-D mask does not change along the queries."""
    if mask is None:
        return 0, 0, 0
    if mask.dim() == 2:
        return mask.stride(0), 0, mask.stride(1)
    return mask.stride()


def lengths_stride(memory_lengths: Tensor | None) -> int:
    return 0 if memory_lengths is None else memory_lengths.stride(0)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds size, within [least, most]."""
    return min(most, max(least, triton.next_power_of_2(size)))
