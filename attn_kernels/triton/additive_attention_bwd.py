"""The gradients of the scores of additive attention.

The hidden units are computed again: with p = ds r and g = p - p r, dquery and dkeys are sums of 4 v g, and dv is
the sum of ds - 2 p. One thread keeps one unit for all queries of its block, so the sums need no other thread. Only what
crosses blocks is written apart and added in order afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import attended, exp2x, kernel, reciprocal, row_length

SINGLE_REACH = tl.constexpr(40.0)  # largest |q| + |k| for a reciprocal of the product of exponentials: e^80 fits


@triton.jit
def times_4v(sum_g, v4, MASKED: tl.constexpr):
    """sum_g (T, A) times v4 (A,); where nothing was attended, which sums to 0, it stays 0 even for a v of NaN."""
    gradient = sum_g * v4[None, :]
    if MASKED:
        gradient = tl.where(sum_g == 0.0, 0.0, gradient)
    return gradient


@triton.jit
def _walk_steps(
    dkeys, keys, dscores, q, shift, i, u, v4, begin, end, A, added, padded_q, stride_kk, stride_ka,
    MASKED: tl.constexpr, FACTORED: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps for a block of queries q (Q, A) and the bias, shift (A,).

    Writes dkeys, if it is wanted, and adds it to what is there for the first ``added`` units; returns the sums of
    g (Q, A) and p (A,). Pointers are to the first element of the row of the batch.
    """
    if FACTORED:
        eq = exp2x(q) * exp2x(shift)[None, :]
    sum_g = tl.zeros(q.shape, dtype=q.dtype)
    sum_p = tl.zeros([q.shape[1]], dtype=q.dtype)
    lost_p = tl.zeros([q.shape[1]], dtype=q.dtype)
    first = begin + tl.arange(0, BLOCK_K).to(tl.int64)
    keys += first[:, None] * stride_kk + u[None, :] * stride_ka
    if dkeys is not None:
        dkeys += first[:, None] * A + u[None, :]
    dscores += i[:, None] + first[None, :] * padded_q
    for start in range(begin, end, BLOCK_K):
        if BLOCK_K == 1:  # then every step of the loop exists
            in_keys = (u < A)[None, :]
            ds = tl.load(dscores)
        else:
            in_steps = start + tl.arange(0, BLOCK_K) < end
            in_keys = in_steps[:, None] & (u < A)[None, :]
            ds = tl.load(dscores, mask=in_steps[None, :], other=0.0)
        k = tl.load(keys, mask=in_keys, other=0.0).to(q.dtype)
        if FACTORED:
            # exp2x is finite whatever padding holds, and eq not NaN: where ds is 0, so are p and g.
            r = reciprocal(1.0 + eq[:, None, :] * exp2x(k)[None, :, :], APPROXIMATE)
        else:
            r = reciprocal(1.0 + tl.exp(2.0 * (q[:, None, :] + k[None, :, :] + shift[None, None, :])), APPROXIMATE)
            if MASKED:  # r may be NaN in padding, where ds is 0; with a NaN that is attended, ds is NaN too
                r = tl.where(ds[:, :, None] == 0.0, 0.0, r)
        p = ds[:, :, None] * r
        g = p - p * r
        sum_g += tl.sum(g, axis=1)
        # What an addition loses is carried to the next: dv, the sum of ds - 2 p, cancels where the inputs are small.
        term = tl.sum(tl.sum(p, axis=0), axis=0) - lost_p
        new_sum_p = sum_p + term
        lost_p = (new_sum_p - sum_p) - term
        sum_p = new_sum_p
        if dkeys is not None:
            gradient = times_4v(tl.sum(g, axis=0), v4, MASKED)
            gradient += tl.load(dkeys, mask=in_keys & (u < added)[None, :], other=0.0)
            tl.store(dkeys, gradient, mask=in_keys)
            dkeys += tl.cast(A, tl.int64) * BLOCK_K
        keys += tl.cast(stride_kk, tl.int64) * BLOCK_K
        dscores += tl.cast(padded_q, tl.int64) * BLOCK_K
    return sum_g, sum_p


@kernel
def backward_kernel(
    dquery,  # (splits_k, B, Tq, A), contiguous: each split of the steps apart
    dkeys,  # (splits_q, B, Tk, A), contiguous: each split of the queries apart; or None
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
    padded_blocks,  # Tq as padded in dscores, in blocks of BLOCK_Q
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
    padded_q = padded_blocks * BLOCK_Q
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
    if dkeys is not None:
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
        added = 0  # units whose dkeys an earlier block of queries has written: none, or all
        if block > first_block:
            added = A
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
                    dkeys, keys, dscores, q, shift, i, u, v4, begin, end_used, A, added, padded_q, stride_kk,
                    stride_ka, mask is not None, True, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
            else:
                g, p = _walk_steps(
                    dkeys, keys, dscores, q, shift, i, u, v4, begin, end_used, A, added, padded_q, stride_kk,
                    stride_ka, mask is not None, False, APPROXIMATE, BLOCK_K,
                )  # fmt: skip
        else:
            g, p = _walk_steps(
                dkeys, keys, dscores, q, shift, i, u, v4, begin, end_used, A, added, padded_q, stride_kk,
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
    if dkeys is not None:
        for start in range(tl.maximum(begin, length), end, BLOCK_K):
            j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            in_keys = (j[:, None] < end) & (u[None, :] < A)
            tl.store(dkeys + j[:, None] * A + u[None, :], tl.zeros([BLOCK_K, BLOCK_A], dtype=wide), mask=in_keys)
