"""The scores of additive attention with a gate and several score vectors, and their gradients.

    scores_r = v_r . (f(x) * s),   x = query + key + extra + bias,   s = sigmoid(gate)

The activations of a pair, f(x) s, are computed once for all score vectors. A program of the scores keeps those of a
query and a few steps in registers and multiplies them by one vector after the other. A program is one warp, so that no
sum over the units crosses warps. Keys and gates are read once for several queries.

With t = sum_r ds_r v_r, where ds_r are the gradients of the scores of a pair,

    dquery, dkeys += t s f'(x)    dgate += t f(x) s (1 - s)    dv_r += ds_r f(x) s

A program of the backward processes its steps once, with all queries for a few steps at a time: dkeys and dgate are
complete in registers and written once. With few score vectors it is also one warp. A thread has the same units in all
steps, so that it can sum over the steps alone. With many score vectors, t and dv are matrix products. For several
queries, dquery is accumulated in memory, separately for each program; so is dv, if there are more score vectors than
fit into registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activate_and_gradient, sigmoid_and_slope
from .device import batch_offset, dot, kernel, row_length, tile_of_pairs


@kernel
def gated_scores_kernel(
    scores,  # (B, Tq * R, Tk), contiguous: the rows of a query one after the other
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    v,  # (R, A)
    bias,  # (A,) or None
    gate,  # (B, Tk, A) or None
    extra,  # (B, Tk, A) or None: added to the keys; for this and its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    lengths,  # (B,) or None
    Tq, Tk, A, R,
    stride_qb, stride_qq, stride_qa,
    stride_kb, stride_kk, stride_ka,
    stride_vr, stride_v,
    stride_bias,
    stride_tb, stride_tk, stride_ta,
    stride_lengths,
    slope, slope_lo,  # of "leaky_relu", in two parts, or None
    ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, FLOAT64: tl.constexpr, ALIGNED: tl.constexpr,
    SEVERAL: tl.constexpr,  # whether A takes several blocks of units, which accumulate into the same scores
    QUERIES: tl.constexpr,  # number of queries of a program
    BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Scores of some queries and a few steps, for all score vectors; tiles beyond the length are not written."""
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    b, first_q, first_k = tile_of_pairs(Tq, Tk, QUERIES, BLOCK_K)
    j = first_k.to(tl.int64) + tl.arange(0, BLOCK_K)
    query += batch_offset(b, stride_qb, ALIGNED)
    keys += batch_offset(b, stride_kb, ALIGNED)
    if gate is not None:
        gate += batch_offset(b, stride_tb, ALIGNED)
    if extra is not None:
        extra += batch_offset(b, stride_eb, ALIGNED)
    if slope is not None:
        slope = tl.cast(slope, wide) + tl.cast(slope_lo, wide)
    if first_k < row_length(lengths, b, stride_lengths, Tk):
        for start in range(0, A, BLOCK_A):
            u = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
            in_units = (u < A)[None, :]
            in_steps = (j < Tk)[:, None] & in_units
            k = tl.load(keys + j[:, None] * stride_kk + u[None, :] * stride_ka, mask=in_steps, other=0.0).to(wide)
            if extra is not None:
                k += tl.load(extra + j[:, None] * stride_ek + u[None, :] * stride_ea, mask=in_steps, other=0.0).to(wide)
            if bias is not None:
                k += tl.load(bias + u[None, :] * stride_bias, mask=in_units, other=0.0).to(wide)
            if gate is not None:
                g = tl.load(gate + j[:, None] * stride_tk + u[None, :] * stride_ta, mask=in_steps, other=0.0)
                s, _ = sigmoid_and_slope(g.to(wide), APPROXIMATE)
            for i in range(first_q, tl.minimum(first_q + QUERIES, Tq)):
                row = tl.cast(i, tl.int64)
                q = tl.load(query + row * stride_qq + u[None, :] * stride_qa, mask=in_units, other=0.0).to(wide)
                hidden = activate(q + k, slope, ACTIVATION, APPROXIMATE)
                if gate is not None:
                    hidden *= s
                v_units = v + u[None, :] * stride_v
                out = scores + (b * Tq + row) * R * Tk + j
                for _vector in range(0, R):
                    x = tl.load(v_units, mask=in_units, other=0.0).to(wide)
                    sums = tl.sum(hidden * x, axis=1)
                    if SEVERAL:
                        sums += tl.load(out, mask=(j < Tk) & (start > 0), other=0.0)
                    tl.store(out, sums, mask=j < Tk)
                    v_units += stride_vr
                    out += Tk
            if SEVERAL:
                tl.debug_barrier()  # the next block accumulates into the scores of this one


@triton.jit
def _sum_of_vectors(ds, vectors, SMALL_M: tl.constexpr):
    """t (K, A), from ds (R, K) and score vectors (R, A)."""
    if SMALL_M:
        t = tl.sum(ds[:, :, None] * vectors[:, None, :], axis=0)
    else:
        t = dot(tl.trans(ds), vectors, tl.zeros([ds.shape[1], vectors.shape[1]], dtype=tl.float32))
    return t


@triton.jit
def _add_steps(dv, ds, hidden, SMALL_M: tl.constexpr):
    """dv (R, A) + ds (R, K) @ hidden (K, A)."""
    if SMALL_M:
        dv += tl.sum(ds[:, :, None] * hidden[None, :, :], axis=1)
    else:
        dv = dot(ds, hidden, dv)
    return dv


@kernel
def gated_backward_kernel(
    dquery,  # (splits, B, Tq, A), contiguous: one for each split of the steps; zeros if Tq > 1. Or None
    dkeys,  # (B, Tk, A), contiguous, or None
    dgate,  # (B, Tk, A), contiguous, or None
    dv,  # (B, splits, R, A), contiguous; zeros if R > BLOCK_R. None if dquery is None
    dscores,  # (B, Tk, padded_rows), contiguous, the rows of a query one after the other; 0 where not attended
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    v,  # (R, A)
    bias,  # (A,) or None
    gate,  # (B, Tk, A) or None
    extra,  # (B, Tk, A) or None: added to the keys, with the same gradient; with its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    B, Tq, Tk, A, R,
    steps_per_split,  # a multiple of BLOCK_K
    padded_rows,
    stride_qb, stride_qq, stride_qa,
    stride_kb, stride_kk, stride_ka,
    stride_vr, stride_v,
    stride_bias,
    stride_tb, stride_tk, stride_ta,
    stride_lengths,
    stride_mb, stride_mq, stride_mk,
    slope, slope_lo,  # of "leaky_relu", in two parts, or None
    ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, FLOAT64: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # whether BLOCK_R holds all score vectors
    SMALL_M: tl.constexpr,  # of the products with score vectors
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of units, of a split of the steps and all queries; 0 beyond the length."""
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    tiles_a = tl.cdiv(A, BLOCK_A)
    splits = tl.cdiv(Tk, steps_per_split)
    program = tl.program_id(0)
    u = (program % tiles_a).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    split = program // tiles_a % splits
    b = (program // (tiles_a * splits)).to(tl.int64)
    in_units = u < A
    r = tl.arange(0, BLOCK_R)
    length = row_length(lengths, b, stride_lengths, Tk)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, Tk)
    query += batch_offset(b, stride_qb, ALIGNED) + u * stride_qa
    keys += batch_offset(b, stride_kb, ALIGNED) + u[None, :] * stride_ka
    v += u[None, :] * stride_v
    dscores += b * Tk * padded_rows
    if gate is not None:
        gate += batch_offset(b, stride_tb, ALIGNED) + u[None, :] * stride_ta
    if extra is not None:
        extra += batch_offset(b, stride_eb, ALIGNED) + u[None, :] * stride_ea
    if mask is not None:
        mask += b * stride_mb
    if dquery is not None:
        dquery += (split.to(tl.int64) * B + b) * Tq * A + u
        dv += (b * splits + split) * R * A + u[None, :]
    if dkeys is not None:
        dkeys += b * Tk * A + u[None, :]
    if dgate is not None:
        dgate += b * Tk * A + u[None, :]
    if slope is not None:
        slope = tl.cast(slope, wide) + tl.cast(slope_lo, wide)
    shift = tl.zeros([BLOCK_A], dtype=wide)
    if bias is not None:
        shift += tl.load(bias + u * stride_bias, mask=in_units, other=0.0).to(wide)
    if ONE_BLOCK:
        in_block = (r < R)[:, None] & in_units[None, :]
        vectors = tl.load(v + r[:, None].to(tl.int64) * stride_vr, mask=in_block, other=0.0).to(wide)
    all_dquery = tl.zeros([BLOCK_A], dtype=wide)
    all_dv = tl.zeros([BLOCK_R, BLOCK_A], dtype=wide)
    for start in range(begin, tl.minimum(end, length), BLOCK_K):
        steps = start + tl.arange(0, BLOCK_K)
        j = steps.to(tl.int64)
        used = steps < tl.minimum(end, length)
        in_keys = used[:, None] & in_units[None, :]
        k = tl.load(keys + j[:, None] * stride_kk, mask=in_keys, other=0.0).to(wide) + shift[None, :]
        if extra is not None:
            k += tl.load(extra + j[:, None] * stride_ek, mask=in_keys, other=0.0).to(wide)
        s = tl.full([BLOCK_K, BLOCK_A], 1.0, dtype=wide)
        ds_gate = tl.zeros([BLOCK_K, BLOCK_A], dtype=wide)
        if gate is not None:
            g = tl.load(gate + j[:, None] * stride_tk, mask=in_keys, other=0.0).to(wide)
            s, ds_gate = sigmoid_and_slope(g, APPROXIMATE)
        dk = tl.zeros([BLOCK_K, BLOCK_A], dtype=wide)
        dg = tl.zeros([BLOCK_K, BLOCK_A], dtype=wide)
        for i in range(0, 1 if ONE_QUERY else Tq):
            row = tl.cast(i, tl.int64)
            q = tl.load(query + row * stride_qq, mask=in_units, other=0.0).to(wide)
            allowed = used
            if mask is not None:
                allowed = tl.load(mask + row * stride_mq + j * stride_mk, mask=used, other=0) != 0
            # Pairs that are not attended are left out: a product with their gradient of 0 may be NaN.
            allowed = tl.broadcast_to(allowed[:, None], [BLOCK_K, BLOCK_A])
            ds_rows = dscores + row * R + j[None, :] * padded_rows
            if ONE_BLOCK:
                ds = tl.load(ds_rows + r[:, None], mask=(r < R)[:, None] & used[None, :], other=0.0)
                t = _sum_of_vectors(ds, vectors, SMALL_M)
            else:
                t = tl.zeros([BLOCK_K, BLOCK_A], dtype=wide)
                for first in range(0, R, BLOCK_R):
                    vector = (first + r)[:, None].to(tl.int64)
                    x = tl.load(v + vector * stride_vr, mask=(vector < R) & in_units[None, :], other=0.0).to(wide)
                    ds = tl.load(ds_rows + vector, mask=(vector < R) & used[None, :], other=0.0)
                    t += _sum_of_vectors(ds, x, SMALL_M)
            y, gradient = activate_and_gradient(q[None, :] + k, t * s, slope, ACTIVATION, APPROXIMATE)
            gradient = tl.where(allowed, gradient, 0.0)
            dk += gradient
            if dgate is not None:
                dg += tl.where(allowed, t * y * ds_gate, 0.0)
            if dquery is not None:
                dq = tl.sum(gradient, axis=0)
                if ONE_QUERY:
                    all_dquery += dq
                else:
                    dq += tl.load(dquery + row * A, mask=in_units, other=0.0)
                    tl.store(dquery + row * A, dq, mask=in_units)
                hidden = tl.where(allowed, y * s, 0.0)
                if ONE_BLOCK:
                    all_dv = _add_steps(all_dv, ds, hidden, SMALL_M)
                else:
                    for first in range(0, R, BLOCK_R):
                        vector = (first + r)[:, None].to(tl.int64)
                        in_block = (vector < R) & in_units[None, :]
                        ds = tl.load(ds_rows + vector, mask=(vector < R) & used[None, :], other=0.0)
                        dx = tl.load(dv + vector * A, mask=in_block, other=0.0)
                        dx = _add_steps(dx, ds, hidden, SMALL_M)
                        tl.store(dv + vector * A, dx, mask=in_block)
                    tl.debug_barrier()  # the next query accumulates into dv
        if dkeys is not None:
            tl.store(dkeys + j[:, None] * A, dk, mask=in_keys)
        if dgate is not None:
            tl.store(dgate + j[:, None] * A, dg, mask=in_keys)
        if not ONE_QUERY:
            tl.debug_barrier()  # the next steps accumulate into dquery
    if dquery is not None:
        if ONE_QUERY:
            tl.store(dquery, all_dquery, mask=in_units)
        if ONE_BLOCK:
            tl.store(dv + r[:, None].to(tl.int64) * A, all_dv, mask=(r < R)[:, None] & in_units[None, :])
    for start in range(tl.maximum(begin, length), end, BLOCK_K):
        steps = start + tl.arange(0, BLOCK_K)
        pointers = steps[:, None].to(tl.int64) * A
        in_keys = (steps < end)[:, None] & in_units[None, :]
        if dkeys is not None:
            tl.store(dkeys + pointers, tl.zeros([BLOCK_K, BLOCK_A], dtype=wide), mask=in_keys)
        if dgate is not None:
            tl.store(dgate + pointers, tl.zeros([BLOCK_K, BLOCK_A], dtype=wide), mask=in_keys)
