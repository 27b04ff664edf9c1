"""The scores of additive attention: v . tanh(query + keys + bias).

Many queries. tanh(q + k) = 1 - 2 r with r = 1 / (1 + E), and E = exp(2 q) exp(2 k) is a product of exponentials that
are made once per row. Three units share one reciprocal over their common denominator: 11 instructions for three hidden
units, one of them a special function, where tanh costs about 15 and two for each. It holds while no product overflows,
and while ||v|| is so small that an error of a rounding of 1 in each unit does not count. Each tile looks at the largest
|q| + |k| among its attended pairs, and takes tanh itself beyond the limits and where there is NaN.

Few queries. Reading keys and values is what takes the time, so tanh is computed directly, units along the threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import SIZES, attended, exp2x, reciprocal, row_length, tanh

CHUNK = tl.constexpr(12)  # units whose partial sum is kept apart: four shared reciprocals
SHARED_REACH = tl.constexpr(22.0)  # largest |q| + |k| for three sharers: (2^-31 e^44)^3 and its inverse fit in float32
LARGEST_V_SQUARED = tl.constexpr(16.0)  # of ||v||^2: above, tanh itself is needed for the accuracy of the plain formula


# Many queries ---------------------------------------------------------------------------------------------------------


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
def exponentials_kernel(
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
def many_scores_kernel(
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


# Few queries ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def few_scores_kernel(
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
