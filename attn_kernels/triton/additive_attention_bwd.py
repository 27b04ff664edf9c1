"""The gradients of the scores of additive attention.

The hidden units are recomputed. With E = exp(2 q) exp(2 k), r = 1 / (1 + E) and ds the gradient of a score,
1 - tanh^2 = 4 E r^2 and tanh = (E - 1) r. So, with exponentials computed once per row,

    dquery = 4 v exp(2 q) (sum of ds r^2 exp(2 k))    dkeys = 4 v exp(2 k) (sum of ds r^2 exp(2 q))
    dv = sum of ds r (E - 1)

There is no cancellation: the error of each term is a few units in its own last place, for any tanh and any v. With many
queries exp(2 k) is written once, in float32, and read by every block of queries; otherwise it is recomputed for each
step. If exp(2 q) or exp(2 k) is too large for such sums, E is clamped and the sums are those of ds (E r) r.

Activations other than tanh (activations.py) have no factored form: each pair computes its own f and f'. With many
queries the mask is not read for each pair: if all attended values are finite, the others are replaced by zeros.

One thread computes one unit for all queries of its block, so the sums need no communication between threads. Only sums
over several blocks are written as partial results and added in order afterwards.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .activations import SATURATED, pair_gradients
from .additive_math import (
    MAX_ABS_BACKWARD,
    MAX_ABS_EXPONENTIAL,
    MAX_EXPONENTIAL_BACKWARD,
    exp2x,
    exp2x_in_range,
)
from .device import attended, kernel, reciprocal, sentence_rows, split_steps

MAX_FACTOR = tl.constexpr(math.exp(2 * MAX_ABS_BACKWARD.value))  # the largest exponential
MAX_FACTOR_CLAMPED = tl.constexpr(math.exp(2 * MAX_ABS_EXPONENTIAL.value))
MAX_FINITE = tl.constexpr(1e38)  # of q + bias, and of k, whose sum is finite


@triton.jit
def _sum_of_products(x):
    """The sum of x (Q, 1, A), a product, over the queries: (1, A).

    tl.sum adds pairs, so that half of the products need a separate addition. Here they are added one after the other,
    each by one multiply-add. There are two sums, of alternate products, because some GPUs add two numbers at once.
    """
    half: tl.constexpr = x.shape[0] // 2
    sums = tl.cumsum(tl.reshape(x, (half, 2, x.shape[2])), axis=0)
    last = (tl.arange(0, half) == half - 1)[:, None, None]
    nothing = tl.zeros(sums.shape, dtype=x.dtype) * -1.0  # x + -0.0 is x: no addition remains. Triton 3.6 has no -0.0
    return tl.sum(tl.sum(tl.where(last, sums, nothing), axis=0), axis=0)[None, :]


@triton.jit
def _size(x, ACTIVATION: tl.constexpr):
    """The size that is compared with MAX_FINITE: for relu only the positive part, since relu(-Inf) is 0."""
    if ACTIVATION != "relu":
        x = tl.abs(x)
    return x


@triton.jit
def _of_unit(total, factor, ACTIVATION: tl.constexpr):
    """factor (A,) * total (N, A): the gradients of units, from the sums over their pairs."""
    gradient = total * factor[None, :]
    if ACTIVATION == "relu":  # 0 if no pair is above 0: 0 times an infinite v would be NaN
        gradient = tl.where(total == 0.0, 0.0, gradient)
    return gradient


@triton.jit
def _walk_steps(
    dkeys, keys, extra, dscores, mask, q, shift, i, u, factor, begin, end, Tq, A, added, padded_q, stride_kk, stride_ka,
    stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GUARDED: tl.constexpr, IN_RANGE: tl.constexpr, CLAMPED: tl.constexpr, EXPONENTIALS: tl.constexpr,
    APPROXIMATE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Processes all steps for a block of queries q (Q, A) and the bias, shift (A,).

    Writes dkeys if it is needed; with SEVERAL blocks, the first ``added`` units are accumulated. Returns dquery /
    factor (Q, A) and dv (A,). factor: of each unit, v, or 4 v for tanh. Pointers are to the first element of the row of
    the batch. GUARDED: whether backward_kernel has checked the attended values. IN_RANGE: whether they are all within
    the limits; with CLAMPED, within the limits of single exponentials. EXPONENTIALS: whether ``keys`` holds exp(2 k),
    then extra is None.
    """
    MASKED: tl.constexpr = mask is not None
    FACTORED: tl.constexpr = IN_RANGE and ACTIVATION == "tanh"
    if ACTIVATION != "tanh":
        q += shift[None, :]
        if IN_RANGE and MASKED:  # a query that attends no step may have any value
            q = tl.where(_size(q, ACTIVATION) <= MAX_FINITE, q, 0.0)
    if FACTORED:  # eq and each product with a key's exponential are finite even in padding, where ds is 0
        eq = tl.minimum(exp2x(q) * exp2x(shift)[None, :], MAX_FACTOR_CLAMPED if CLAMPED else MAX_FACTOR)
    dq = tl.zeros(q.shape, dtype=q.dtype)
    dv = tl.zeros([q.shape[1]], dtype=q.dtype)
    # A sum over the queries in each step takes two more additions, but with a mask, registers cannot hold 32 sums.
    SUM_APART: tl.constexpr = FACTORED and not (MASKED and q.shape[0] > 16)
    dv_of_query = tl.zeros(q.shape, dtype=q.dtype)
    first = begin + tl.arange(0, BLOCK_K).to(tl.int64)
    # Beyond A the last unit is loaded again and its results are dropped, so that no load needs a mask.
    keys += first[:, None] * stride_kk + tl.minimum(u, A - 1)[None, :] * stride_ka
    if extra is not None:
        extra += first[:, None] * stride_ek + tl.minimum(u, A - 1)[None, :] * stride_ea
    if dkeys is not None:
        dkeys += first[:, None] * A + u[None, :]
    dscores += i[:, None] + first[None, :] * padded_q
    for start in range(begin, end, BLOCK_K):
        if BLOCK_K == 1:  # then no step of the loop is out of range
            in_keys = (u < A)[None, :]
            ds = tl.load(dscores)
            k = tl.load(keys).to(q.dtype)
            if extra is not None:
                k += tl.load(extra).to(q.dtype)
        else:
            in_steps = start + tl.arange(0, BLOCK_K) < end
            in_keys = in_steps[:, None] & (u < A)[None, :]
            ds = tl.load(dscores, mask=in_steps[None, :], other=0.0)
            k = tl.load(keys, mask=in_keys, other=0.0).to(q.dtype)
            if extra is not None:
                k += tl.load(extra, mask=in_keys, other=0.0).to(q.dtype)
        if FACTORED:
            ek = k
            if not EXPONENTIALS:
                if MASKED:  # a step that no query attends may have any value
                    k = tl.where(tl.abs(k) <= (MAX_ABS_EXPONENTIAL if CLAMPED else MAX_ABS_BACKWARD), k, 0.0)
                ek = exp2x_in_range(k)
            elif MASKED and not CLAMPED:
                ek = tl.minimum(ek, MAX_FACTOR)
            e = eq[:, None, :] * ek[None, :, :]
            if CLAMPED:
                e = tl.minimum(e, MAX_EXPONENTIAL_BACKWARD)
            r = reciprocal(1.0 + e, APPROXIMATE)
            once = ds[:, :, None] * r
            if CLAMPED:
                gradient = once * (e * r)
                dq += tl.sum(gradient, axis=1)
            else:
                twice = once * r
                dq += tl.sum(twice * ek[None, :, :], axis=1)
            if SUM_APART:
                dv_of_query += tl.sum(once * (e - 1.0), axis=1)
            else:
                dv += tl.sum(_sum_of_products(once * (e - 1.0)), axis=0)
            if dkeys is not None:
                if CLAMPED:
                    dk = _sum_of_products(gradient)
                else:
                    dk = _sum_of_products(twice * eq[:, None, :]) * ek
        else:
            if ACTIVATION != "tanh" and IN_RANGE and MASKED:
                k = tl.where(_size(k, ACTIVATION) <= MAX_FINITE, k, 0.0)
            hidden = q[:, None, :] + k[None, :, :]
            if ACTIVATION == "tanh":
                hidden += shift[None, None, :]
                if MASKED:  # it may be NaN in padding, where ds is 0; if a NaN is attended, ds is NaN too
                    hidden = tl.where(ds[:, :, None] == 0.0, 0.0, hidden)
                hidden = tl.where(tl.abs(hidden) > SATURATED, tl.where(hidden > 0.0, SATURATED, -SATURATED), hidden)
                if keys.dtype.element_ty == tl.float32:  # the error of tl.exp would show in dv where tanh is small
                    e = tl.where(hidden == hidden, exp2x(hidden), hidden)
                else:
                    e = tl.exp(2.0 * hidden)
                r = reciprocal(1.0 + e, APPROXIMATE)
                less = ds[:, :, None] * r
                more = less * e
                gradient = more * r
                dq += tl.sum(gradient, axis=1)
                weighted = more - less
            else:
                if MASKED and not IN_RANGE:
                    if GUARDED:  # at a score of -Inf, ds is also 0; backward_kernel sets dv to NaN there
                        allowed = ds != 0.0
                    else:
                        j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                        allowed = attended(mask, i, j, Tq, end, stride_mq, stride_mk)
                    hidden = tl.where(allowed[:, :, None], hidden, 0.0)
                gradient, weighted = pair_gradients(hidden, ds[:, :, None], slope, ACTIVATION)
                dq += tl.sum(gradient, axis=1)
            if ACTIVATION != "tanh" and BLOCK_K == 1:
                dv += tl.sum(_sum_of_products(weighted), axis=0)
            else:
                dv += tl.sum(tl.sum(weighted, axis=0), axis=0)
            if dkeys is not None:
                if ACTIVATION != "tanh" and BLOCK_K == 1:
                    dk = _sum_of_products(gradient)
                else:
                    dk = tl.sum(gradient, axis=0)
        if dkeys is not None:
            dk = _of_unit(dk, factor, ACTIVATION)
            if SEVERAL:
                dk += tl.load(dkeys, mask=in_keys & (u < added)[None, :], other=0.0)
            tl.store(dkeys, dk, mask=in_keys)
            dkeys += tl.cast(A, tl.int64) * BLOCK_K
        keys += tl.cast(stride_kk, tl.int64) * BLOCK_K
        if extra is not None:
            extra += tl.cast(stride_ek, tl.int64) * BLOCK_K
        dscores += tl.cast(padded_q, tl.int64) * BLOCK_K
    if FACTORED and not CLAMPED:
        dq *= eq
    if SUM_APART:
        dv += tl.sum(dv_of_query, axis=0)
    return dq, dv


@triton.jit
def _walk_in_range(
    dkeys, keys, extra, ek, dscores, mask, q, shift, i, u, factor, begin, end, Tq, A, added, padded_q, stride_kk,
    stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL: tl.constexpr, ACTIVATION: tl.constexpr,
    GUARDED: tl.constexpr, CLAMPED: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """_walk_steps for inputs within the limits. Reads the exponentials of keys, ``ek``, if they are precomputed."""
    if ek is not None:
        dq, dv = _walk_steps(
            dkeys, ek, None, dscores, mask, q, shift, i, u, factor, begin, end, Tq, A, added, padded_q, A, 1, None,
            None, stride_mq, stride_mk, slope, SEVERAL, ACTIVATION, GUARDED, True, CLAMPED, True, APPROXIMATE, BLOCK_K,
        )  # fmt: skip
    else:
        dq, dv = _walk_steps(
            dkeys, keys, extra, dscores, mask, q, shift, i, u, factor, begin, end, Tq, A, added, padded_q, stride_kk,
            stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL, ACTIVATION, GUARDED, True, CLAMPED,
            False, APPROXIMATE, BLOCK_K,
        )  # fmt: skip
    return dq, dv


@kernel
def backward_kernel(
    dquery,  # (splits_k, B, Tq, A), contiguous: one for each split of the steps; None if dv and dbias are None
    dkeys,  # (splits_q, B, Tk, A), contiguous: one for each split of the queries; or None
    dv,  # (B, splits_q, splits_k, A), contiguous
    dbias,  # (B, splits_q, splits_k, A), contiguous
    dscores,  # (B, Tk, padded_q), contiguous, 0 where not attended
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    extra,  # (B, Tk, A) or None: added to the keys; for this and its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    ek,  # (B, Tk, A), contiguous: from key_exponentials_kernel; or None
    v,  # (A,)
    bias,  # (A,) or None
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    B, Tq, Tk, A,
    blocks_per_split,  # of queries
    steps_per_split,  # a multiple of BLOCK_K
    padded_blocks,  # the padded Tq of dscores, in blocks of BLOCK_Q
    stride_qb, stride_qq, stride_qa,
    stride_kb, stride_kk, stride_ka,
    stride_v, stride_bias, stride_lengths,
    stride_mb, stride_mq, stride_mk,
    slope, slope_lo,  # of "leaky_relu", in two parts, or None
    ACTIVATION: tl.constexpr,
    SEVERAL: tl.constexpr,  # whether a split has several blocks of queries, which accumulate into the same dkeys
    GUARDED: tl.constexpr,  # whether attended values are compared with the limits first
    APPROXIMATE: tl.constexpr, FLOAT64: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PACKED: tl.constexpr,  # then dkeys is (splits_q, N, A), dscores (N, padded_q) and ek (N, A)
):  # fmt: skip
    """dquery and dkeys, and partial sums of dv and dbias, for a block of units; 0 beyond the length."""
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    tiles_a = tl.cdiv(A, BLOCK_A)
    splits_k = tl.cdiv(Tk, steps_per_split)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    padded_q = padded_blocks * BLOCK_Q
    splits_q = tl.cdiv(tiles_q, blocks_per_split)
    program = tl.program_id(0)
    u = (program % tiles_a).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    split_k = (program // tiles_a) % splits_k
    split_q = (program // (tiles_a * splits_k)) % splits_q
    b = (program // (tiles_a * splits_k * splits_q)).to(tl.int64)
    origin, length, width, place = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    begin, end = split_steps(split_k, splits_k, steps_per_split, width, BLOCK_K, PACKED)
    end_used = tl.minimum(end, length)
    factor = tl.load(v + u * stride_v, mask=u < A, other=0.0).to(wide)
    if ACTIVATION == "tanh":
        factor = 4.0 * factor
    if slope is not None:
        slope = tl.cast(slope, wide) + tl.cast(slope_lo, wide)
    if (mask is not None) or (lengths is not None):
        # If nothing is attended, the gradient must be 0, not 0 * Inf. If a NaN or Inf is attended, ds is NaN anyway.
        factor = tl.where(tl.abs(factor) < float("inf"), factor, 0.0)
    shift = tl.zeros([BLOCK_A], dtype=wide)
    if bias is not None:
        shift += tl.load(bias + u * stride_bias, mask=u < A, other=0.0).to(wide)
    query += b * stride_qb + u[None, :] * stride_qa
    keys += place * stride_kb
    if extra is not None:
        extra += b * stride_eb
    dscores += origin * padded_q
    if ek is not None:
        ek += origin * A
    if dquery is not None:
        dquery += (split_k.to(tl.int64) * B + b) * Tq * A + u[None, :]
    if dkeys is not None:
        if PACKED:
            dkeys += (split_q.to(tl.int64) * Tk + origin) * A
        else:
            dkeys += (split_q.to(tl.int64) * B + b) * Tk * A
    if mask is not None:
        mask += b * stride_mb
    all_dv = tl.zeros([BLOCK_A], dtype=wide)
    all_dquery = tl.zeros([BLOCK_A], dtype=wide)
    first_block = split_q * blocks_per_split
    for block in range(first_block, tl.minimum(first_block + blocks_per_split, tiles_q)):
        i = (block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        in_query = (i[:, None] < Tq) & (u[None, :] < A)
        q = tl.load(query + i[:, None] * stride_qq, mask=in_query, other=0.0).to(wide)
        added = 0  # number of units whose dkeys an earlier block of queries has written: 0 or A
        if block > first_block:
            added = A
        if GUARDED:
            limit: tl.constexpr = MAX_ABS_BACKWARD if ACTIVATION == "tanh" else MAX_FINITE
            # The largest attended value selects the form: beyond the limits, or with NaN, exp(2 (q + k)) for each pair.
            used_q = tl.zeros([BLOCK_Q], dtype=tl.int32)
            abs_max_k = tl.zeros([16, BLOCK_A], dtype=tl.float32)
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
                if extra is not None:
                    extra_rows = extra + j[:, None] * stride_ek + u[None, :] * stride_ea
                    k += tl.load(extra_rows, mask=in_keys, other=0.0).to(tl.float32)
                size_k = tl.abs(k) if ACTIVATION == "tanh" else _size(k, ACTIVATION)
                abs_max_k = tl.maximum(abs_max_k, tl.where(k == k, size_k, float("inf")))
            used = (used_q > 0)[:, None] & (u[None, :] < A)
            size_q = (
                tl.abs(q) + tl.abs(shift)[None, :] if ACTIVATION == "tanh" else _size(q + shift[None, :], ACTIVATION)
            )
            size_q = tl.where(used, tl.where(size_q == size_q, size_q, float("inf")), 0.0)
            largest = tl.maximum(tl.max(abs_max_k), tl.max(size_q))
            if largest <= limit:
                dq, dv_part = _walk_in_range(
                    dkeys, keys, extra, ek, dscores, mask, q, shift, i, u, factor, begin, end_used, Tq, A, added,
                    padded_q, stride_kk, stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL,
                    ACTIVATION, GUARDED, False, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
            elif ACTIVATION != "tanh":
                infinite = tl.maximum(tl.max(abs_max_k, axis=0), tl.max(size_q, axis=0)) == float("inf")
                dq, dv_part = _walk_steps(
                    dkeys, keys, extra, dscores, mask, q, shift, i, u, factor, begin, end_used, Tq, A, added, padded_q,
                    stride_kk, stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL, ACTIVATION,
                    GUARDED, False, False, False, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
                dv_part = tl.where(infinite, float("nan"), dv_part)
            elif largest <= MAX_ABS_EXPONENTIAL:
                dq, dv_part = _walk_in_range(
                    dkeys, keys, extra, ek, dscores, mask, q, shift, i, u, factor, begin, end_used, Tq, A, added,
                    padded_q, stride_kk, stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL,
                    ACTIVATION, GUARDED, True, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
            else:
                dq, dv_part = _walk_steps(
                    dkeys, keys, extra, dscores, mask, q, shift, i, u, factor, begin, end_used, Tq, A, added, padded_q,
                    stride_kk, stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL, ACTIVATION,
                    GUARDED, False, False, False, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
        else:
            dq, dv_part = _walk_steps(
                dkeys, keys, extra, dscores, mask, q, shift, i, u, factor, begin, end_used, Tq, A, added, padded_q,
                stride_kk, stride_ka, stride_ek, stride_ea, stride_mq, stride_mk, slope, SEVERAL, ACTIVATION, GUARDED,
                False, False, False, APPROXIMATE, BLOCK_K,
            )  # fmt: skip
        if dquery is not None:
            dq = _of_unit(dq, factor, ACTIVATION)
            tl.store(dquery + i[:, None] * A, dq, mask=in_query)
            all_dquery += tl.sum(dq, axis=0)
            all_dv += dv_part
        tl.debug_barrier()  # the next block accumulates into the dkeys of this one
    if dquery is not None:
        parts = ((b * splits_q + split_q) * splits_k + split_k) * A + u
        tl.store(dv + parts, all_dv, mask=u < A)
        tl.store(dbias + parts, all_dquery, mask=u < A)
    if dkeys is not None:
        for start in range(tl.maximum(begin, length), end, BLOCK_K):
            j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            in_keys = (j[:, None] < end) & (u[None, :] < A)
            tl.store(dkeys + j[:, None] * A + u[None, :], tl.zeros([BLOCK_K, BLOCK_A], dtype=wide), mask=in_keys)
