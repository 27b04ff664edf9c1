"""The scores of additive attention: v . tanh(query + keys + extra + bias).

Many queries. tanh(q + k) = 1 - 2 r with r = 1 / (1 + E), and E = exp(2 q) exp(2 k) is a product of exponentials that
are computed once per row. With v folded into them, v r is the reciprocal of one multiply-add, and three units share one
reciprocal over their common denominator. That is 9 instructions for three hidden units, one of them a special function;
tanh costs about 15, two of them special functions, for each unit. This form is valid if no product overflows, and if
||v|| is so small that an error of one rounding of 1 in each unit is negligible. Each tile checks the largest |q| + |k|
of its attended pairs. Beyond the limits it uses the compensated form, with 5 or 7 instructions per unit. If that form
is out of range, too, or if there is NaN, it uses tanh itself (the exact form).

Few queries. The kernel is limited by reading keys and values, so tanh is computed directly, with units along the
threads.

relu and other activations (activations.py) have no exponentials and no limits. The rows of queries and keys themselves
replace the exponentials. For relu, one unit of a pair takes an addition, a maximum and a multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .additive_attention_exponentials import CHUNK, ROW
from .additive_math import (
    MAX_ABS_CLAMPED,
    MAX_BOUND_THREE,
    MAX_BOUND_UNCLAMPED,
    MAX_SCALED_NUMERATOR,
    multiply_add,
    tanh,
)
from .device import attended, batch_offset, kernel, packed_tile, reciprocal, sentence_rows, tile_of_pairs

# Many queries ---------------------------------------------------------------------------------------------------------


@triton.jit
def _factored_scores(eq, ek, table, units, APPROXIMATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """v . tanh of a tile in units of the scale; three units share a reciprocal. eq, ek: pointers to the first unit.

    With v folded in, v / (1 + E) is 1 / d, and the sum of three is ((d1 + d2) d3 + d1 d2) / (d1 d2 d3). Half the sum of
    v is subtracted from each chunk, so that partial sums are not larger than the score.
    """
    total = tl.zeros([ek.shape[0], eq.shape[1], ek.shape[2], ek.shape[3]], dtype=tl.float32)
    for _ in range(0, units, CHUNK):
        part = tl.zeros(total.shape, dtype=tl.float32) - tl.load(table + CHUNK)
        for t in tl.static_range(0, CHUNK, 3):
            d1 = tl.load(table + t) + tl.load(eq) * tl.load(ek)
            d2 = tl.load(table + t + 1) + tl.load(eq + BLOCK_Q) * tl.load(ek + BLOCK_K)
            d3 = tl.load(table + t + 2) + tl.load(eq + 2 * BLOCK_Q) * tl.load(ek + 2 * BLOCK_K)
            d12 = d1 * d2
            part += ((d1 + d2) * d3 + d12) * reciprocal(d12 * d3, APPROXIMATE)
            eq += 3 * BLOCK_Q
            ek += 3 * BLOCK_K
        total += part
        table += ROW
    return total


@triton.jit
def _numerator(q, k, constant, CLAMPED: tl.constexpr):
    n = multiply_add(q, k, -constant)
    if CLAMPED:
        n = tl.minimum(tl.maximum(n, -MAX_SCALED_NUMERATOR), MAX_SCALED_NUMERATOR)
    return n


@triton.jit
def _compensated_scores(
    eq, ek, table, units, CLAMPED: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """v . tanh of a tile in units of the largest v, from the same exponentials; CLAMPED: for products of any size.

    tanh = n / (n + 2 / v) with n = (E - 1) / v. A multiply-add computes n with one rounding, so nothing cancels in it.
    The rounding errors of the exponentials are corrected by the sums of rests. For two units,

        v1 n1 / d1 + v2 n2 / d2 = (n1 ((v1 + v2) n2 + 2 v1 / v2) + (2 v2 / v1) n2) / (d1 d2),    d = n + 2 / v

    where the terms of the sum in the numerator are together at most three times as large as the sum.
    """
    total = tl.zeros([ek.shape[0], eq.shape[1], ek.shape[2], ek.shape[3]], dtype=tl.float32)
    table += units // CHUNK * ROW + ROW
    for _ in range(0, units, 6):
        part = tl.zeros(total.shape, dtype=tl.float32)
        for t in range(0, 6, 2):  # not unrolled: unrolling takes so many registers that fewer warps fit
            c1 = tl.load(table + t)
            c2 = tl.load(table + t + 1)
            v1 = tl.load(table + units + t)
            v2 = tl.load(table + units + t + 1)
            n1 = _numerator(tl.load(eq), tl.load(ek), c1, CLAMPED)
            n2 = _numerator(tl.load(eq + BLOCK_Q), tl.load(ek + BLOCK_K), c2, CLAMPED)
            numerator = n1 * ((v1 + v2) * n2 + 2.0 * v1 * c2) + (2.0 * v2 * c1) * n2
            part += numerator * reciprocal((n1 + 2.0 * c1) * (n2 + 2.0 * c2), APPROXIMATE)
            eq += 2 * BLOCK_Q
            ek += 2 * BLOCK_K
        total += part
        table += 6
    return total


@triton.jit
def _activated_scores(
    q, k, v, slope, units, ACTIVATION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """v . activation of a tile. q, k: pointers to the first unit of the rows. v (units,) is 0 beyond A."""
    total = tl.zeros([k.shape[0], q.shape[1], k.shape[2], k.shape[3]], dtype=tl.float32)
    for _ in range(0, units, CHUNK):
        part = tl.zeros(total.shape, dtype=tl.float32)
        for t in tl.static_range(0, CHUNK):
            part += activate(tl.load(q) + tl.load(k), slope, ACTIVATION, False) * tl.load(v + t)
            q += BLOCK_Q
            k += BLOCK_K
        total += part
        v += CHUNK
    return total


@triton.jit
def _exact_scores(
    query, keys, extra, v, bias, in_query, in_keys, A, stride_qa, stride_ka, stride_ea, stride_v, stride_bias,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """v . tanh of a tile, with one tanh for each unit. query, keys, extra: pointers to the first unit.

    The sum is compensated (Kahan): with a large v, one unit may be much larger than the others.
    """
    total = tl.zeros([in_keys.shape[0], in_query.shape[1], in_query.shape[2], in_keys.shape[3]], dtype=tl.float32)
    lost = tl.zeros(total.shape, dtype=tl.float32)
    for _ in range(0, A):
        q = tl.load(query, mask=in_query, other=0.0).to(tl.float32)
        k = tl.load(keys, mask=in_keys, other=0.0).to(tl.float32)
        if extra is not None:
            k += tl.load(extra, mask=in_keys, other=0.0).to(tl.float32)
            extra += stride_ea
        hidden = q + k
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


@triton.jit
def _spread(eq, ek):
    """The pointers for loading a tile's exponentials: (1, THREAD_Q, THREADS_Q, 1) and (THREAD_K, 1, 1, THREADS_K).

    ek is repeated for each thread. Triton would distribute the load of a smaller tensor over the threads, and would
    then have to exchange the elements between them.
    """
    ek = tl.broadcast_to(ek, [ek.shape[0], 1, eq.shape[2], ek.shape[3]])
    if eq.shape[1] <= 4:
        eq = tl.broadcast_to(eq, [1, eq.shape[1], eq.shape[2], ek.shape[3]])
    return eq, ek


@kernel
def tiled_scores_kernel(
    scores,  # (B, Tq, Tk), contiguous
    eq,  # (B, padded_q / BLOCK_Q, units, BLOCK_Q)
    ek,  # (B, padded_k / BLOCK_K, units, BLOCK_K); with PACKED, (tiles, units, BLOCK_K)
    abs_max_q,  # (B, Tq) or None; like all arguments with None here, for tanh only
    abs_max_k,  # (B, Tk) or None
    rests_q,  # (B, Tq) or None: correction of the compensated form for a query
    rests_k,  # (B, Tk) or None: and for a step
    table,  # (units / CHUNK + 1, ROW): the constants of d = constant + eq ek of each unit, half the sum of v. Last row:
    # scale, least bound, scale of the compensated form, or 0 if v does not permit it. Then, for that form, the
    # constants and v / scale, each (units,). For activations other than tanh: v, (units,)
    query,  # (B, Tq, A) or None
    keys,  # (B, Tk, A) or None
    extra,  # (B, Tk, A) or None: added to the keys; None if keys is None. Its strides: see extra_arguments
    stride_eb, stride_ek, stride_ea,
    v,  # (A,) or None
    bias,  # (A,) or None
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    Tq, Tk, A,
    units,  # A, rounded up to a multiple of CHUNK
    stride_qb, stride_qq, stride_qa,
    stride_kb, stride_kk, stride_ka,
    stride_v, stride_bias, stride_lengths,
    stride_mb, stride_mq, stride_mk,
    slope,  # of "leaky_relu", or None
    ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    THREAD_Q: tl.constexpr, THREAD_K: tl.constexpr, B, PACKED: tl.constexpr,
):  # fmt: skip
    """scores[b, i, j] of a tile of queries and steps; tiles with nothing to attend are not written.

    A thread computes THREAD_Q queries by THREAD_K steps of the tile.
    """
    tiles_k = tl.cdiv(Tk, BLOCK_K)
    tiles_q = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    if PACKED:
        tiles_k = Tk // BLOCK_K + B
        tile_in_all = program % tiles_k
        b, tile_k = packed_tile(lengths, stride_lengths, tile_in_all, B, BLOCK_K)
        tile_q = b * tiles_q + program // tiles_k
        ek += tile_in_all.to(tl.int64) * units * BLOCK_K
    else:
        tile_q = program // tiles_k
        tile_k = program % tiles_k
        b = (tile_q // tiles_q).to(tl.int64)
        ek += (b * tiles_k + tile_k) * units * BLOCK_K
    first_q = (tile_q % tiles_q).to(tl.int64) * BLOCK_Q
    first_k = tile_k.to(tl.int64) * BLOCK_K
    origin, length, width, place = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    if mask is not None:
        mask += b * stride_mb
    all_i = first_q + tl.arange(0, BLOCK_Q)
    all_j = first_k + tl.arange(0, BLOCK_K)
    allowed = attended(mask, all_i, all_j, Tq, length, stride_mq, stride_mk)
    if ACTIVATION == "tanh":
        size_q = tl.load(abs_max_q + b * Tq + all_i, mask=all_i < Tq, other=0.0)[:, None]
        size_k = tl.load(abs_max_k + origin + all_j, mask=all_j < width, other=0.0)[None, :]
        bound = size_q + size_k
    else:
        bound = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
    bound = tl.max(tl.where(allowed, bound, -1.0))  # padding must not influence the choice
    if bound >= 0.0:
        # The tile is (THREAD_K, THREAD_Q, *, *). Triton distributes the last dimensions over the threads. Each thread
        # has all of the first two, so that it loads several rows at once.
        THREADS_Q: tl.constexpr = BLOCK_Q // THREAD_Q
        THREADS_K: tl.constexpr = BLOCK_K // THREAD_K
        in_q = (tl.arange(0, THREAD_Q)[:, None] + THREAD_Q * tl.arange(0, THREADS_Q)[None, :])[None, :, :, None]
        in_k = (tl.arange(0, THREAD_K)[:, None] + THREAD_K * tl.arange(0, THREADS_K)[None, :])[:, None, None, :]
        in_tile_q = in_q < (Tq - first_q).to(tl.int32)
        in_tile_k = in_k < (width - first_k).to(tl.int32)
        eq += tile_q.to(tl.int64) * units * BLOCK_Q
        summary = table + units // CHUNK * ROW
        if ACTIVATION != "tanh":
            eq_tile, ek_tile = _spread(eq + in_q, ek + in_k)
            total = _activated_scores(eq_tile, ek_tile, table, slope, units, ACTIVATION, BLOCK_Q, BLOCK_K)
        else:
            eq_tile, ek_tile = _spread(eq + in_q, ek + in_k)
            least = tl.load(summary + 1)
            if (bound >= least) & (bound <= MAX_BOUND_THREE):
                total = _factored_scores(eq_tile, ek_tile, table, units, APPROXIMATE, BLOCK_Q, BLOCK_K)
                total *= tl.load(summary)
            else:
                unit = tl.load(summary + 2)
                side = tl.max(tl.where(allowed, tl.maximum(size_q, size_k), -1.0))
                if (unit > 0.0) & (side <= MAX_ABS_CLAMPED):
                    if bound <= MAX_BOUND_UNCLAMPED:
                        total = _compensated_scores(
                            eq_tile, ek_tile, table, units, False, APPROXIMATE, BLOCK_Q, BLOCK_K
                        )
                    else:
                        total = _compensated_scores(eq_tile, ek_tile, table, units, True, APPROXIMATE, BLOCK_Q, BLOCK_K)
                    total *= unit
                    total += tl.load(rests_q + b * Tq + first_q + in_q, mask=in_tile_q, other=0.0)
                    total += tl.load(rests_k + origin + first_k + in_k, mask=in_tile_k, other=0.0)
                else:
                    extra_rows = extra
                    if extra is not None:
                        extra_rows += b * stride_eb + (first_k + in_k) * stride_ek
                    total = _exact_scores(
                        query + b * stride_qb + (first_q + in_q) * stride_qq,
                        keys + place * stride_kb + (first_k + in_k) * stride_kk,
                        extra_rows,
                        v,
                        bias,
                        in_tile_q,
                        in_tile_k,
                        A,
                        stride_qa,
                        stride_ka,
                        stride_ea,
                        stride_v,
                        stride_bias,
                        APPROXIMATE,
                    )
        scores += origin * Tq + first_q * width + first_k
        tl.store(scores + in_q.to(tl.int64) * width + in_k, total, mask=in_tile_q & in_tile_k)


# Few queries ----------------------------------------------------------------------------------------------------------


@kernel
def small_q_scores_kernel(
    scores,  # (B, Tq, Tk), contiguous
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    extra,  # (B, Tk, A) or None: added to the keys; for this and its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    v,  # (A,)
    bias,  # (A,) or None
    lengths,  # (B,) or None
    Tq, Tk, A,
    stride_qb, stride_qq, stride_qa, stride_kb, stride_kk, stride_ka, stride_v, stride_bias, stride_lengths,
    slope, slope_lo,  # of "leaky_relu", in two parts, or None
    ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, FLOAT64: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, B, PACKED: tl.constexpr,
):  # fmt: skip
    """scores[b, i, j] of a few queries and a few steps; tiles beyond the length are not written."""
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    b, first_q, first = tile_of_pairs(Tq, Tk, BLOCK_Q, BLOCK_K, lengths, stride_lengths, B, PACKED)
    i = first_q.to(tl.int64) + tl.arange(0, BLOCK_Q)
    origin, length, width, place = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    j = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    u = tl.arange(0, BLOCK_A).to(tl.int64)
    if slope is not None:
        slope = tl.cast(slope, wide) + tl.cast(slope_lo, wide)
    if first < length:
        q_rows = query + batch_offset(b, stride_qb, ALIGNED) + i[:, None] * stride_qq + u[None, :] * stride_qa
        k_rows = keys + batch_offset(place, stride_kb, ALIGNED) + j[:, None] * stride_kk + u[None, :] * stride_ka
        if extra is not None:
            e_rows = extra + batch_offset(b, stride_eb, ALIGNED) + j[:, None] * stride_ek + u[None, :] * stride_ea
        v_units = v + u * stride_v
        if bias is not None:
            bias_units = bias + u * stride_bias
        total = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_A], dtype=wide)
        for start in range(0, A, BLOCK_A):
            in_units = u + start < A
            k = tl.load(k_rows, mask=(j < width)[:, None] & in_units[None, :], other=0.0).to(wide)
            if extra is not None:
                k += tl.load(e_rows, mask=(j < width)[:, None] & in_units[None, :], other=0.0).to(wide)
                e_rows += tl.cast(stride_ea, tl.int64) * BLOCK_A
            q = tl.load(q_rows, mask=(i < Tq)[:, None] & in_units[None, :], other=0.0).to(wide)
            hidden = q[:, None, :] + k[None, :, :]
            if bias is not None:
                hidden += tl.load(bias_units, mask=in_units, other=0.0).to(wide)[None, None, :]
                bias_units += tl.cast(stride_bias, tl.int64) * BLOCK_A
            x = tl.load(v_units, mask=in_units, other=0.0).to(wide)[None, None, :]
            total += x * activate(hidden, slope, ACTIVATION, APPROXIMATE)
            q_rows += tl.cast(stride_qa, tl.int64) * BLOCK_A
            k_rows += tl.cast(stride_ka, tl.int64) * BLOCK_A
            v_units += tl.cast(stride_v, tl.int64) * BLOCK_A
        in_tile = (i[:, None] < Tq) & (j[None, :] < width)
        tl.store(scores + origin * Tq + i[:, None] * width + j[None, :], tl.sum(total, axis=2), mask=in_tile)
