"""additive_attention and additive_scores in Triton: scores = v . tanh(query + keys + bias), softmax, context.

Many queries. tanh(q + k) = 1 - 2 r with r = 1 / (1 + E), and E = exp(2 q) exp(2 k) is a product of exponentials that
are made once per row. Three units share one reciprocal over their common denominator: 11 instructions for three hidden
units, one of them a special function, where tanh costs about 15 and two for each. It holds while no product overflows,
and while ||v|| is so small that an error of a rounding of 1 in each unit does not count. Each tile looks at the largest
|q| + |k| among its attended pairs, and takes tanh itself beyond the limits and where there is NaN.

Few queries. Reading keys and values is what takes the time, so tanh is computed directly, units along the threads.

Backward. The hidden units are computed again: with p = ds r and g = ds (r - r r), dquery and dkeys are sums of 4 v g,
and dv is the sum of ds - 2 p. One thread keeps one unit for all queries of its block, so the sums need no other thread.
Only what crosses blocks is written apart and added in order afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend import (
    SIZES,
    accumulator,
    attend,
    attended,
    bytes_of,
    few_block,
    few_tile,
    has_approximate_reciprocal,
    is_few,
    launch,
    lengths_stride,
    mask_strides,
    padded_scores,
    power_of_two,
    row_length,
    softmax_backward,
    sum_splits,
    weighted_sum,
)

CHUNK = tl.constexpr(12)  # units whose partial sum is kept apart: four shared reciprocals
SHARED_REACH = tl.constexpr(22.0)  # largest |q| + |k| for three sharers: (2^-31 e^44)^3 and its inverse fit in float32
SINGLE_REACH = tl.constexpr(40.0)  # for one: e^80 fits
LARGEST_V_SQUARED = tl.constexpr(16.0)  # of ||v||^2: above, tanh itself is needed for the accuracy of the plain formula


# Device code ----------------------------------------------------------------------------------------------------------


@triton.jit
def reciprocal(x, APPROXIMATE: tl.constexpr):
    """1 / x to one unit in the last place. The plain division of NVIDIA GPUs is several times as long."""
    if APPROXIMATE:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / x
    return r


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """tanh(x); to two units in the last place in float32, and to a rounding of 1 in float64."""
    magnitude = tl.abs(x)
    result = 1.0 - 2.0 * reciprocal(1.0 + tl.exp(2.0 * magnitude), APPROXIMATE)
    result = tl.where(x < 0.0, -result, result)
    if x.dtype == tl.float32:  # 1 - 2 r loses the small ones: a polynomial, fitted to relative error 1.4e-8 on [0, 0.9]
        s = x * x
        p = 0.00131424297 * s - 0.00688467104
        p = p * s + 0.0209260591
        p = p * s - 0.0537303689
        p = p * s + 0.133305171
        p = p * s - 0.333332212
        result = tl.where(magnitude < 0.9, x + x * s * p, result)
    return result


@triton.jit
def exp2x(x):
    """exp(2 x) in float32 to one unit in the last place, for |x| <= 43; finite for others.

    2 x = n ln 2 + f with n ln 2 exact, so that the error does not grow with x as that of exp2(2 x log2 e) would.
    """
    x = tl.where(tl.abs(x) <= 43.0, x, 0.0)
    n = tl.floor(x * 2.8853900817779268 + 0.5)
    f = (2.0 * x - n * 0.693145751953125) - n * 1.42860677e-06
    p = 0.00139561 * f + 0.00837513
    p = p * f + 0.04166608
    p = p * f + 0.16666415
    p = p * f + 0.50000002
    p = p * f + 1.0
    p = p * f + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


# Forward, many queries ------------------------------------------------------------------------------------------------


@triton.jit
def _write_exponentials(
    exponentials, reach, rows, bias, b, i, T, A, units, padded, stride_b, stride_t, stride_a, stride_bias, factor,
    BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """exponentials[b, i // BLOCK, u, i % BLOCK] = factor * exp(2 (rows[b, i, u] + bias[u])).

    reach[b, i] = the maximum over u of |rows| + |bias|. The exponentials are finite for i >= T, which fills up the last
    tile, and 0 for u >= A, which fills up the last chunk.
    """
    largest = tl.zeros([i.shape[0]], dtype=tl.float32)
    in_rows = (i < T)[:, None]
    tile = exponentials + (b * padded + i // BLOCK * BLOCK) * units + i % BLOCK
    for start in range(0, units, BLOCK_A):
        u = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        pointers = rows + b * stride_b + i[:, None] * stride_t + u[None, :] * stride_a
        x = tl.load(pointers, mask=in_rows & (u < A)[None, :], other=0.0).to(tl.float32)
        e = factor * exp2x(x)
        size = tl.abs(x)
        if bias is not None:  # a product, because the sum would round what keys of the other sign cancel
            x = tl.load(bias + u * stride_bias, mask=u < A, other=0.0).to(tl.float32)[None, :]
            e *= exp2x(x)
            size += tl.abs(x)
        largest = tl.maximum(largest, tl.max(tl.where(size == size, size, float("inf")), axis=1))
        e = tl.where((u < A)[None, :], e, 0.0)
        stored = (i < padded)[:, None] & (u < units)[None, :]
        tl.store(tile[:, None] + u[None, :] * BLOCK, e, mask=stored)
    tl.store(reach + b * T + i, largest, mask=i < T)


@triton.jit(do_not_specialize=SIZES)
def _exponentials_kernel(
    eq,  # (B, padded_q / BLOCK_Q, units, BLOCK_Q): 2^-31 exp(2 (query + bias))
    ek,  # (B, padded_k / BLOCK_K, units, BLOCK_K): exp(2 keys)
    reach_q,  # (B, Tq): max over units of |query| + |bias|, inf for NaN
    reach_k,  # (B, Tk): max over units of |keys|
    v_squared,  # (1,): ||v||^2
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    v,  # (A,)
    bias,  # (A,) or None
    B,
    Tq,
    Tk,
    A,
    units,  # A, rounded up to a multiple of CHUNK
    padded_q,  # Tq, rounded up to a multiple of BLOCK_Q
    padded_k,
    stride_qb,
    stride_qq,
    stride_qa,
    stride_kb,
    stride_kk,
    stride_ka,
    stride_v,
    stride_bias,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """The exponentials of all rows, each tile transposed: a tile of pairs reads one unit of all its rows at once."""
    tiles_q = tl.cdiv(padded_q, BLOCK_T)
    tiles_k = tl.cdiv(padded_k, BLOCK_T)
    program = tl.program_id(0)
    if program < B * tiles_q:
        b = (program // tiles_q).to(tl.int64)
        i = (program % tiles_q).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        _write_exponentials(
            eq, reach_q, query, bias, b, i, Tq, A, units, padded_q, stride_qb, stride_qq, stride_qa, stride_bias,
            4.656612873077393e-10, BLOCK_Q, BLOCK_A,
        )  # fmt: skip
    else:
        program -= B * tiles_q
        b = (program // tiles_k).to(tl.int64)
        j = (program % tiles_k).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        _write_exponentials(
            ek, reach_k, keys, None, b, j, Tk, A, units, padded_k, stride_kb, stride_kk, stride_ka, 0, 1.0,
            BLOCK_K, BLOCK_A,
        )  # fmt: skip
    if tl.program_id(0) == 0:
        squares = tl.zeros([BLOCK_A], dtype=tl.float32)
        for start in range(0, A, BLOCK_A):
            u = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
            x = tl.load(v + u * stride_v, mask=u < A, other=0.0).to(tl.float32)
            squares += x * x
        tl.store(v_squared, tl.sum(squares))


@triton.jit
def _shared_scores(
    eq, ek, v, A, units, stride_v, APPROXIMATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(Q, K): v . tanh, from eq (Q,) and ek (K,), pointers to the first unit; three units to a reciprocal.

    va / da + vb / db + vc / dc = (vc da db + dc (va db + vb da)) / (da db dc). The constant 2^-31 in every denominator
    keeps the product of three within float32. Sums of v r - v / 2 instead of v r: they stay as small as the score.
    """
    total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
    for first in range(0, units, CHUNK):
        unit = v
        half_v = 0.0
        for t in tl.static_range(CHUNK):
            half_v += tl.load(unit, mask=first + t < A, other=0.0).to(tl.float32)
            unit += stride_v
        part = tl.full([BLOCK_Q, BLOCK_K], 0.0, dtype=tl.float32) - 1073741824.0 * half_v
        for t in tl.static_range(0, CHUNK, 3):
            va = tl.load(v, mask=first + t < A, other=0.0).to(tl.float32)
            v += stride_v
            vb = tl.load(v, mask=first + t + 1 < A, other=0.0).to(tl.float32)
            v += stride_v
            vc = tl.load(v, mask=first + t + 2 < A, other=0.0).to(tl.float32)
            v += stride_v
            da = 4.656612873077393e-10 + tl.load(eq)[:, None] * tl.load(ek)[None, :]
            db = 4.656612873077393e-10 + tl.load(eq + BLOCK_Q)[:, None] * tl.load(ek + BLOCK_K)[None, :]
            dc = 4.656612873077393e-10 + tl.load(eq + 2 * BLOCK_Q)[:, None] * tl.load(ek + 2 * BLOCK_K)[None, :]
            dadb = da * db
            numerator = vc * dadb + dc * (va * db + vb * da)
            part += numerator * reciprocal(dadb * dc, APPROXIMATE)
            eq += 3 * BLOCK_Q
            ek += 3 * BLOCK_K
        total += part
    return total * -9.313225746154785e-10


@triton.jit
def _plain_scores(
    query, keys, v, bias, in_query, in_keys, A, stride_qa, stride_ka, stride_v, stride_bias, APPROXIMATE: tl.constexpr
):  # fmt: skip
    """(Q, K): v . tanh, from query (Q,) and keys (K,), pointers to the first unit; one tanh for each unit.

    What each addition loses is carried to the next: with a large v one unit may be much larger than the others.
    """
    total = tl.zeros([in_query.shape[0], in_keys.shape[0]], dtype=tl.float32)
    lost = tl.zeros([in_query.shape[0], in_keys.shape[0]], dtype=tl.float32)
    for _ in range(0, A):
        q = tl.load(query, mask=in_query, other=0.0).to(tl.float32)
        k = tl.load(keys, mask=in_keys, other=0.0).to(tl.float32)
        hidden = q[:, None] + k[None, :]
        if bias is not None:
            hidden += tl.load(bias).to(tl.float32)
            bias += stride_bias
        term = tl.load(v).to(tl.float32) * tanh(hidden, APPROXIMATE) - lost
        new_total = total + term
        lost = tl.where(tl.abs(new_total) < float("inf"), (new_total - total) - term, 0.0)
        total = new_total
        query += stride_qa
        keys += stride_ka
        v += stride_v
    return total


@triton.jit(do_not_specialize=SIZES)
def _many_scores_kernel(
    scores,  # (B, Tq, Tk), contiguous
    eq,  # (B, padded_q / BLOCK_Q, units, BLOCK_Q)
    ek,  # (B, padded_k / BLOCK_K, units, BLOCK_K)
    reach_q,  # (B, Tq)
    reach_k,  # (B, Tk)
    v_squared,  # (1,)
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    v,  # (A,)
    bias,  # (A,) or None
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    Tq,
    Tk,
    A,
    units,  # A, rounded up to a multiple of CHUNK
    stride_qb,
    stride_qq,
    stride_qa,
    stride_kb,
    stride_kk,
    stride_ka,
    stride_v,
    stride_bias,
    stride_lengths,
    stride_mb,
    stride_mq,
    stride_mk,
    APPROXIMATE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scores[b, i, j] of a tile of queries and steps; tiles with nothing to attend are left as they are."""
    tiles_k = tl.cdiv(Tk, BLOCK_K)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    b = (program // (tiles_k * tiles_q)).to(tl.int64)
    i = ((program // tiles_k) % tiles_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = (program % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    eq += (program // tiles_k).to(tl.int64) * units * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ek += (b * tiles_k + program % tiles_k) * units * BLOCK_K + tl.arange(0, BLOCK_K)
    if mask is not None:
        mask += b * stride_mb
    length = row_length(lengths, b, stride_lengths, Tk)
    allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
    reach = (
        tl.load(reach_q + b * Tq + i, mask=i < Tq, other=0.0)[:, None]
        + tl.load(reach_k + b * Tk + j, mask=j < Tk, other=0.0)[None, :]
    )
    reach = tl.max(tl.where(allowed, reach, -1.0))  # padding decides nothing, whatever it holds
    if reach >= 0.0:
        if (reach <= SHARED_REACH) & (tl.load(v_squared) <= LARGEST_V_SQUARED):
            total = _shared_scores(eq, ek, v, A, units, stride_v, APPROXIMATE, BLOCK_Q, BLOCK_K)
        else:
            total = _plain_scores(
                query + b * stride_qb + i * stride_qq, keys + b * stride_kb + j * stride_kk, v, bias, i < Tq, j < Tk,
                A, stride_qa, stride_ka, stride_v, stride_bias, APPROXIMATE,
            )  # fmt: skip
        in_tile = (i[:, None] < Tq) & (j[None, :] < Tk)
        tl.store(scores + (b * Tq + i[:, None]) * Tk + j[None, :], total, mask=in_tile)


# Forward, few queries -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _few_scores_kernel(
    scores,  # (B, Tq, Tk), contiguous
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    v,  # (A,)
    bias,  # (A,) or None
    lengths,  # (B,) or None
    Tq,
    Tk,
    A,
    stride_qb,
    stride_qq,
    stride_qa,
    stride_kb,
    stride_kk,
    stride_ka,
    stride_v,
    stride_bias,
    stride_lengths,
    APPROXIMATE: tl.constexpr,
    FLOAT64: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """scores[b, i, j] of a few queries and a few steps; tiles beyond the length are left as they are."""
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
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
        v_units = v + u * stride_v
        if bias is not None:
            bias_units = bias + u * stride_bias
        total = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_A], dtype=wide)
        for start in range(0, A, BLOCK_A):
            in_units = u + start < A
            k = tl.load(k_rows, mask=(j < Tk)[:, None] & in_units[None, :], other=0.0).to(wide)
            q = tl.load(q_rows, mask=(i < Tq)[:, None] & in_units[None, :], other=0.0).to(wide)
            hidden = q[:, None, :] + k[None, :, :]
            if bias is not None:
                hidden += tl.load(bias_units, mask=in_units, other=0.0).to(wide)[None, None, :]
                bias_units += BLOCK_A * stride_bias
            total += tl.load(v_units, mask=in_units, other=0.0).to(wide)[None, None, :] * tanh(hidden, APPROXIMATE)
            q_rows += BLOCK_A * stride_qa
            k_rows += BLOCK_A * stride_ka
            v_units += BLOCK_A * stride_v
        in_tile = (i[:, None] < Tq) & (j[None, :] < Tk)
        tl.store(scores + (b * Tq + i[:, None]) * Tk + j[None, :], tl.sum(total, axis=2), mask=in_tile)


# Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def times_4v(sum_g, v4, MASKED: tl.constexpr):
    """sum_g (T, A) times v4 (A,); where nothing was attended, which sums to 0, it stays 0 even for a v of NaN."""
    gradient = sum_g * v4[None, :]
    if MASKED:
        gradient = tl.where(sum_g == 0.0, 0.0, gradient)
    return gradient


@triton.jit
def _walk_steps(
    dkeys, keys, dscores, q, shift, i, u, v4, begin, end, length, A, added, padded_q, stride_kk, stride_ka,
    MASKED: tl.constexpr, FACTORED: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps for a block of queries q (Q, A) and the bias, shift (A,).

    Writes dkeys, and adds it to what is there for the first ``added`` steps; returns the sums of g (Q, A) and p (A,).
    Pointers are to the first element of the row of the batch.
    """
    if FACTORED:
        eq = exp2x(q) * exp2x(shift)[None, :]
    sum_g = tl.zeros(q.shape, dtype=q.dtype)
    sum_p = tl.zeros([q.shape[1]], dtype=q.dtype)
    for start in range(begin, end, BLOCK_K):
        j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_keys = (j[:, None] < length) & (u[None, :] < A)
        k = tl.load(keys + j[:, None] * stride_kk + u[None, :] * stride_ka, mask=in_keys, other=0.0).to(q.dtype)
        ds = tl.load(dscores + i[:, None] + j[None, :] * padded_q, mask=j[None, :] < length, other=0.0)
        if FACTORED:
            e = eq[:, None, :] * exp2x(k)[None, :, :]
        else:
            e = tl.exp(2.0 * (q[:, None, :] + k[None, :, :] + shift[None, None, :]))
        r = reciprocal(1.0 + e, APPROXIMATE)
        if MASKED:  # r may be NaN in padding, where ds is 0; with a NaN that is attended, ds is NaN too
            r = tl.where(ds[:, :, None] == 0.0, 0.0, r)
        p = ds[:, :, None] * r
        g = ds[:, :, None] * (r - r * r)
        sum_g += tl.sum(g, axis=1)
        sum_p += tl.sum(tl.sum(p, axis=0), axis=0)
        pointers = dkeys + j[:, None] * A + u[None, :]
        gradient = times_4v(tl.sum(g, axis=0), v4, MASKED)
        gradient += tl.load(pointers, mask=in_keys & (j[:, None] < added), other=0.0)
        tl.store(pointers, gradient, mask=in_keys)
    return sum_g, sum_p


@triton.jit(do_not_specialize=[*SIZES, "steps_per_split", "blocks_per_split"])
def _backward_kernel(
    dquery,  # (splits_k, B, Tq, A), contiguous: each split of the steps apart
    dkeys,  # (splits_q, B, Tk, A), contiguous: each split of the queries apart
    sum_p,  # (B, splits_q, splits_k, A), contiguous
    dbias,  # (B, splits_q, splits_k, A), contiguous
    dscores,  # (B, Tk, padded_q), contiguous, 0 where not attended
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    v,  # (A,)
    bias,  # (A,) or None
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    B,
    Tq,
    Tk,
    A,
    blocks_per_split,  # of queries
    steps_per_split,  # a multiple of BLOCK_K
    padded_q,  # Tq, rounded up to a multiple of BLOCK_Q
    stride_qb,
    stride_qq,
    stride_qa,
    stride_kb,
    stride_kk,
    stride_ka,
    stride_v,
    stride_bias,
    stride_lengths,
    stride_mb,
    stride_mq,
    stride_mk,
    FACTORED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    FLOAT64: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """dquery = 4 v sum_j g, dkeys = 4 v sum_i g, sums of p and of dquery, for a block of units; 0 beyond the length."""
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    tiles_a = tl.cdiv(A, BLOCK_A)
    splits_k = tl.cdiv(Tk, steps_per_split)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    splits_q = tl.cdiv(tiles_q, blocks_per_split)
    program = tl.program_id(0)
    u = (program % tiles_a).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    split_k = (program // tiles_a) % splits_k
    split_q = (program // (tiles_a * splits_k)) % splits_q
    b = (program // (tiles_a * splits_k * splits_q)).to(tl.int64)
    length = row_length(lengths, b, stride_lengths, Tk)
    begin = split_k * steps_per_split
    end = tl.minimum(begin + steps_per_split, Tk)
    end_used = tl.minimum(end, length)
    v4 = 4.0 * tl.load(v + u * stride_v, mask=u < A, other=0.0).to(wide)
    shift = tl.zeros([BLOCK_A], dtype=wide)
    if bias is not None:
        shift += tl.load(bias + u * stride_bias, mask=u < A, other=0.0).to(wide)
    query += b * stride_qb + u[None, :] * stride_qa
    keys += b * stride_kb
    dscores += b * Tk * padded_q
    dquery += (split_k.to(tl.int64) * B + b) * Tq * A + u[None, :]
    dkeys += (split_q.to(tl.int64) * B + b) * Tk * A
    if mask is not None:
        mask += b * stride_mb
    all_p = tl.zeros([BLOCK_A], dtype=wide)
    all_dquery = tl.zeros([BLOCK_A], dtype=wide)
    first_block = split_q * blocks_per_split
    for block in range(first_block, tl.minimum(first_block + blocks_per_split, tiles_q)):
        i = (block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        in_query = (i[:, None] < Tq) & (u[None, :] < A)
        q = tl.load(query + i[:, None] * stride_qq, mask=in_query, other=0.0).to(wide)
        added = 0  # steps whose dkeys an earlier block of queries has written
        if block > first_block:
            added = length
        if FACTORED:
            # The largest |q| + |k| of what is attended: beyond the limit, or with NaN, exp(2 (q + k)) of each pair.
            used_q = tl.zeros([BLOCK_Q], dtype=tl.int32)
            reach_k = tl.zeros([16, BLOCK_A], dtype=tl.float32)
            for start in range(begin, end_used, 16):
                j = (start + tl.arange(0, 16)).to(tl.int64)
                in_keys = (j[:, None] < end_used) & (u[None, :] < A)
                if mask is not None:
                    allowed = attended(mask, i, j, Tq, end_used, stride_mq, stride_mk).to(tl.int32)
                    used_q = tl.maximum(used_q, tl.max(allowed, axis=1))
                    in_keys = in_keys & (tl.max(allowed, axis=0) > 0)[:, None]
                else:
                    used_q += 1
                k = tl.load(keys + j[:, None] * stride_kk + u[None, :] * stride_ka, mask=in_keys, other=0.0)
                k = k.to(tl.float32)
                reach_k = tl.maximum(reach_k, tl.where(k == k, tl.abs(k), float("inf")))
            used = (used_q > 0)[:, None] & (u[None, :] < A)
            reach_q = tl.abs(q) + tl.abs(shift)[None, :]
            reach = tl.max(reach_k) + tl.max(tl.where(used, tl.where(reach_q == reach_q, reach_q, float("inf")), 0.0))
            if reach <= SINGLE_REACH:
                g, p = _walk_steps(
                    dkeys, keys, dscores, q, shift, i, u, v4, begin, end_used, length, A, added, padded_q, stride_kk,
                    stride_ka, mask is not None, True, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
            else:
                g, p = _walk_steps(
                    dkeys, keys, dscores, q, shift, i, u, v4, begin, end_used, length, A, added, padded_q, stride_kk,
                    stride_ka, mask is not None, False, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
        else:
            g, p = _walk_steps(
                dkeys, keys, dscores, q, shift, i, u, v4, begin, end_used, length, A, added, padded_q, stride_kk,
                stride_ka, mask is not None, False, APPROXIMATE, BLOCK_K,
            )  # fmt: skip
        g = times_4v(g, v4, (mask is not None) or (lengths is not None))
        tl.store(dquery + i[:, None] * A, g, mask=in_query)
        all_dquery += tl.sum(g, axis=0)
        all_p += p
        tl.debug_barrier()  # the next block adds to the dkeys of this one
    parts = ((b * splits_q + split_q) * splits_k + split_k) * A + u
    tl.store(sum_p + parts, all_p, mask=u < A)
    tl.store(dbias + parts, all_dquery, mask=u < A)
    for start in range(tl.maximum(begin, length), end, BLOCK_K):
        j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_keys = (j[:, None] < end) & (u[None, :] < A)
        tl.store(dkeys + j[:, None] * A + u[None, :], tl.zeros([BLOCK_K, BLOCK_A], dtype=wide), mask=in_keys)


# Launchers ------------------------------------------------------------------------------------------------------------


def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    prepared: None,  # nothing is prepared for Triton: see prepare_keys
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    need_alignments: bool,
) -> tuple[Tensor, Tensor]:
    """query (B, Tq, A), keys (B, Tk, A), values (B, Tk, D) -> context (B, Tq, D), alignments (B, Tq, Tk) or empty."""
    scores = _scores(query, keys, v, bias, memory_lengths, mask, accumulator(query.dtype))
    return attend(scores, values, memory_lengths, mask, need_alignments)


def additive_attention_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    bias: Tensor | None,
    prepared: None,  # nothing is prepared for Triton: see prepare_keys
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    alignments: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_context (B, Tq, D), grad_alignments (B, Tq, Tk) -> the gradients of query, keys, values, v and bias."""
    dscores = softmax_backward(grad_context, grad_alignments, values, memory_lengths, mask, alignments)
    dquery, dkeys, dv, dbias = _scores_backward(dscores, query, keys, v, bias, memory_lengths, mask)
    if grad_context is None:
        dvalues = values.new_zeros(values.shape)
    else:
        dvalues = weighted_sum(alignments, grad_context, 1.0, memory_lengths, mask, of_steps=True)
    return dquery, dkeys, dvalues, dv, dbias


def additive_scores(query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """query (B, Tq, A), keys (B, Tk, A) -> scores (B, Tq, Tk)."""
    return _scores(query, keys, v, bias, None, None, query.dtype)


def additive_scores_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_scores (B, Tq, Tk) -> the gradients of query, keys, v and bias."""
    dscores = padded_scores(query, keys)
    filler = dscores.as_strided((query.shape[0], dscores.stride(2), keys.shape[1]), dscores.stride())
    filler.zero_()
    dscores.copy_(grad_scores)
    return _scores_backward(dscores, query, keys, v, bias, None, None)


def _scores(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(B, Tq, Tk) in the given dtype; undefined where a whole tile is padding."""
    B, Tq, A = query.shape
    Tk = keys.shape[1]
    scores = query.new_empty((B, Tq, Tk), dtype=dtype)
    if scores.numel() == 0:
        return scores
    approximate = has_approximate_reciprocal(query)
    row_strides = (*query.stride(), *keys.stride(), v.stride(0), 0 if bias is None else bias.stride(0))
    if is_few(query):
        block_q, block_k, block_a = few_tile(query)
        launch(
            _few_scores_kernel,
            B * triton.cdiv(Tq, block_q) * triton.cdiv(Tk, block_k),
            (scores, query, keys, v, bias, memory_lengths, Tq, Tk, A),
            (*row_strides, lengths_stride(memory_lengths)),
            dict(
                APPROXIMATE=approximate,
                FLOAT64=query.dtype == torch.float64,
                BLOCK_Q=block_q,
                BLOCK_K=block_k,
                BLOCK_A=block_a,
            ),
            4,
        )
        return scores
    block_q, block_k, warps = _pair_tile(B, Tq, Tk)
    padded_q, padded_k = (triton.cdiv(T, block) * block for T, block in ((Tq, block_q), (Tk, block_k)))
    units = triton.cdiv(A, CHUNK.value) * CHUNK.value
    eq = query.new_empty((B, padded_q, units), dtype=torch.float32)
    ek = query.new_empty((B, padded_k, units), dtype=torch.float32)
    reach_q = query.new_empty((B, Tq), dtype=torch.float32)
    reach_k = query.new_empty((B, Tk), dtype=torch.float32)
    v_squared = query.new_empty((1,), dtype=torch.float32)
    prepared = (eq, ek, reach_q, reach_k, v_squared)
    block_t = 16
    launch(
        _exponentials_kernel,
        B * (triton.cdiv(padded_q, block_t) + triton.cdiv(padded_k, block_t)),
        (*prepared, query, keys, v, bias, B, Tq, Tk, A, units, padded_q, padded_k),
        row_strides,
        dict(BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_T=block_t, BLOCK_A=128),
        4,
    )
    launch(
        _many_scores_kernel,
        B * triton.cdiv(Tq, block_q) * triton.cdiv(Tk, block_k),
        (scores, *prepared, query, keys, v, bias, memory_lengths, bytes_of(mask), Tq, Tk, A, units),
        (*row_strides, lengths_stride(memory_lengths), *mask_strides(mask)),
        dict(APPROXIMATE=approximate, BLOCK_Q=block_q, BLOCK_K=block_k),
        warps,
    )
    return scores


def _scores_backward(
    dscores: Tensor,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    bias: Tensor | None,
    memory_lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dscores (B, Tq, Tk), made by padded_scores, 0 where not attended -> the gradients of query, keys, v, bias."""
    B, Tq, A = query.shape
    Tk = keys.shape[1]
    dtype, wide = query.dtype, accumulator(query.dtype)
    if B * Tq * Tk * A == 0:
        dbias = v.new_zeros(v.shape if bias is not None else (0,))
        return query.new_zeros(query.shape), keys.new_zeros(keys.shape), v.new_zeros(v.shape), dbias
    block_q, block_k, block_a, warps = _backward_tile(query)
    blocks = triton.cdiv(Tq, block_q)
    blocks_per_split, splits_q, steps_per_split, splits_k = _backward_splits(
        B * triton.cdiv(A, block_a), blocks, Tk, block_k
    )
    dquery = query.new_empty((splits_k, B, Tq, A), dtype=dtype if splits_k == 1 else wide)
    dkeys = query.new_empty((splits_q, B, Tk, A), dtype=dtype if blocks == 1 else wide)
    sum_p = query.new_empty((B, splits_q, splits_k, A), dtype=wide)
    dbias = torch.empty_like(sum_p)
    launch(
        _backward_kernel,
        B * splits_q * splits_k * triton.cdiv(A, block_a),
        (dquery, dkeys, sum_p, dbias, dscores, query, keys, v, bias, memory_lengths, bytes_of(mask), B, Tq, Tk, A),
        (
            blocks_per_split,
            steps_per_split,
            dscores.stride(2),
            *query.stride(),
            *keys.stride(),
            v.stride(0),
            0 if bias is None else bias.stride(0),
            lengths_stride(memory_lengths),
            *mask_strides(mask),
        ),
        dict(
            FACTORED=not is_few(query),
            APPROXIMATE=has_approximate_reciprocal(query),
            FLOAT64=dtype == torch.float64,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_A=block_a,
        ),
        warps,
    )
    sum_ds = dscores.sum(1).sum()  # rows first: the sum of everything at once loses more in float32
    dv = (sum_ds - 2.0 * sum_p.view(-1, A).sum(0)).to(dtype)
    dbias = dbias.view(-1, A).sum(0).to(dtype) if bias is not None else v.new_empty((0,))
    return sum_splits(dquery, dtype), sum_splits(dkeys, dtype), dv, dbias


# Sizes of tiles: simple rules, so that a first call is fast and every call adds up in the same order ------------------


def _pair_tile(B: int, Tq: int, Tk: int) -> tuple[int, int, int]:
    """BLOCK_Q, BLOCK_K and warps of a tile of pairs: that with the least padding and idle processors for its cost."""
    best, least = (0, 0, 0), float("inf")
    # The cost is the instructions a pair, read from compiled code: a thread has one step and all queries of the tile.
    for block_q, block_k, warps, cost in ((16, 64, 2, 4.4), (16, 32, 1, 4.4), (8, 32, 1, 5.2)):
        tiles = B * triton.cdiv(Tq, block_q) * triton.cdiv(Tk, block_k)
        busy = min(1.0, tiles * warps / 1024)  # warps that keep a large GPU occupied
        estimate = cost * tiles * block_q * block_k / busy
        if estimate < least:
            best, least = (block_q, block_k, warps), estimate
    return best


def _backward_tile(query: Tensor) -> tuple[int, int, int, int]:
    """BLOCK_Q, BLOCK_K, BLOCK_A, warps of the backward: as many queries as registers hold, one unit to a thread."""
    Tq, A = query.shape[1:]
    block_a = power_of_two(A, 32, 128)
    if is_few(query):
        block_q = few_block(Tq)
        return block_q, 16 // block_q, block_a, block_a // 32
    # An instruction for a step costs about as much as three queries: exponential of the key, sum, store.
    block_q = min((8, 16, 32), key=lambda block: triton.cdiv(Tq, block) * (block + 3))
    return block_q, 1, block_a, block_a // 32


def _backward_splits(programs: int, blocks: int, Tk: int, block_k: int) -> tuple[int, int, int, int]:
    """How the backward is cut: blocks of queries per split and splits, steps per split (of block_k) and splits.

    Each split of the queries costs a copy of dkeys, each split of the steps one of dquery: only as many as fill a GPU.
    """
    splits_q = min(blocks, triton.cdiv(512, programs))
    blocks_per_split = triton.cdiv(blocks, splits_q)
    splits_q = triton.cdiv(blocks, blocks_per_split)
    splits_k = max(1, min(512 // (programs * splits_q), triton.cdiv(Tk, 32)))
    steps_per_split = triton.cdiv(triton.cdiv(Tk, splits_k), block_k) * block_k
    return blocks_per_split, splits_q, steps_per_split, triton.cdiv(Tk, steps_per_split)
