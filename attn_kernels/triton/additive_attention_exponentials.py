"""The exponentials for the scores of many queries, with v folded into those of the queries; and for their backward.

v / (1 + E) = 1 / d with d = 1 / v + (e^{2q} / v) e^{2k}. A table holds 1 / v for each unit, in units of the largest v.

The rounding errors of the exponentials are also known, as changes of q and k. _compensated_scores corrects a score by
their effect. This takes a few instructions per row, and only one more number per row is stored.

Activations other than tanh read the rows themselves, in the same layout, and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_math import (
    DENOMINATOR_SCALE,
    DENOMINATOR_SCALE_OF_ROW,
    DROPPED_DENOMINATOR,
    MAX_ABS_EXPONENTIAL,
    MAX_ABS_MAX_V,
    MIN_ABS_MAX_V,
    MIN_RELATIVE_V,
    exp2x_and_rest,
    exp2x_in_range,
    min_abs_bound,
    multiply_add,
)
from .device import batch_offset, kernel, packed_tile, sentence_rows

CHUNK = tl.constexpr(12)  # units with a partial sum of their own: four shared reciprocals
ROW = tl.constexpr(16)  # a row of the table of units: the constants of a chunk, half the sum of its v, padding


@triton.jit
def _largest_v(v, A, stride_v, BLOCK_A: tl.constexpr):
    """The largest |v|, and the power of two above it; both are arbitrary if v holds NaN or Inf."""
    top = tl.zeros([BLOCK_A], dtype=tl.float32)
    for start in range(0, A, BLOCK_A):
        u = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        top = tl.maximum(top, tl.abs(tl.load(v + u * stride_v, mask=u < A, other=0.0).to(tl.float32)))
    largest = tl.max(top, axis=0)
    bits = largest.to(tl.int32, bitcast=True)
    return largest, (((bits >> 23) + 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _folded(x, unit, SCALE: tl.constexpr):
    """1 / x for d = 1 / x + (e^{2q} / x) e^{2k}, relative to unit, scaled; 0 if the hidden unit is dropped."""
    kept = tl.abs(x) >= unit * MIN_RELATIVE_V
    return tl.where(kept, tl.div_rn(unit + tl.zeros_like(x), tl.where(kept, x, 1.0)) * SCALE, 0.0)


@triton.jit
def _write_units(table, v, A, units, stride_v, BLOCK_A: tl.constexpr):
    """The table of v for tiled_scores_kernel: see its argument ``table``."""
    largest, unit = _largest_v(v, A, stride_v, BLOCK_A)
    squares = tl.zeros([ROW], dtype=tl.float32)
    dropped = tl.zeros([ROW], dtype=tl.float32)
    t = tl.arange(0, ROW)
    summary = table + units // CHUNK * ROW
    of_units = summary + ROW
    for first in range(0, units, CHUNK):
        u = (first + t).to(tl.int64)
        x = tl.load(v + u * stride_v, mask=(u < A) & (t < CHUNK), other=0.0).to(tl.float32)
        inverse = _folded(x, unit, DENOMINATOR_SCALE)
        kept = tl.where(inverse != 0.0, x, 0.0)
        squares += x * x
        dropped += tl.abs(x - kept)
        half = tl.sum(kept, axis=0) / unit * (0.5 / DENOMINATOR_SCALE)
        constant = tl.where(inverse != 0.0, inverse, DROPPED_DENOMINATOR)
        tl.store(table + first // CHUNK * ROW + t, tl.where(t < CHUNK, constant, half))
        tl.store(of_units + first + t, constant, mask=t < CHUNK)
        tl.store(of_units + units + first + t, kept / unit, mask=t < CHUNK)  # exact: unit is a power of two
    least = min_abs_bound(tl.sum(squares, axis=0), A)
    # Each dropped hidden unit is below the rounding error of the largest; their sum must be, too.
    in_range = (largest > MIN_ABS_MAX_V) & (largest < MAX_ABS_MAX_V)
    all_dropped = tl.sum(dropped, axis=0)
    exact = in_range & (all_dropped <= unit * MIN_RELATIVE_V)
    tl.store(summary, unit * (-2.0 * DENOMINATOR_SCALE))
    tl.store(summary + 1, tl.where(exact, least, float("inf")))
    # If the tanh of the largest units is small, so is the score: then no unit is below its rounding error.
    tl.store(summary + 2, tl.where(in_range & (all_dropped == 0.0), unit, 0.0))


@triton.jit
def _times(e, lost, x):
    """(e + lost) x, as the rounded product and its rounding error."""
    product = e * x
    return product, multiply_add(e, x, -product) + lost * x


@triton.jit
def _write_exponentials(
    exponentials, abs_max, rests, rows, extra, v, bias, unit, b, i, T, A, units, padded, stride_b, stride_t, stride_a,
    stride_eb, stride_ek, stride_ea, stride_v, stride_bias, FOLDED: tl.constexpr, ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """exponentials[b, i // BLOCK, u, i % BLOCK] = exp(2 (rows[b, i, u] + bias[u])), scaled; FOLDED: with v folded in.

    extra is added to the rows, if there is one. abs_max[b, i] = the maximum over u of |rows| + |bias|. rests[b, i] =
    the sum of v r, where the rounded exponentials are those of rows + bias - r. The exponentials are finite for i >= T,
    the padding of the last tile, and 0 for u >= A, the padding of the last chunk. For activations other than tanh, only
    rows + bias is written.
    """
    largest = tl.zeros([i.shape[0]], dtype=tl.float32)
    all_rests = tl.zeros([i.shape[0]], dtype=tl.float32)
    in_rows = (i < T)[:, None]
    tile = exponentials + (b * padded + i // BLOCK * BLOCK) * units + i % BLOCK
    for start in range(0, units, BLOCK_A):
        u = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        pointers = rows + batch_offset(b, stride_b, ALIGNED) + i[:, None] * stride_t + u[None, :] * stride_a
        x = tl.load(pointers, mask=in_rows & (u < A)[None, :], other=0.0).to(tl.float32)
        if extra is not None:
            pointers = extra + batch_offset(b, stride_eb, ALIGNED) + i[:, None] * stride_ek + u[None, :] * stride_ea
            x += tl.load(pointers, mask=in_rows & (u < A)[None, :], other=0.0).to(tl.float32)
        e = x
        if ACTIVATION == "tanh":
            e, rest = exp2x_and_rest(x)
            lost = tl.zeros_like(x)
        size = tl.abs(x)
        if bias is not None:
            x = tl.load(bias + u * stride_bias, mask=u < A, other=0.0).to(tl.float32)[None, :]
            if ACTIVATION == "tanh":  # a product: keys of opposite sign would expose the rounding error of a sum
                of_bias, rest_of_bias = exp2x_and_rest(x)
                e, lost = _times(e, lost, of_bias)
                rest += rest_of_bias
            else:
                e += x
            size += tl.abs(x)
        if ACTIVATION == "tanh":
            x = tl.load(v + u * stride_v, mask=u < A, other=0.0).to(tl.float32)
            if FOLDED:
                e, lost = _times(e, lost, _folded(x, unit, DENOMINATOR_SCALE / DENOMINATOR_SCALE_OF_ROW)[None, :])
            else:
                e *= DENOMINATOR_SCALE_OF_ROW
            if FOLDED or bias is not None:
                rest += 0.5 * lost / tl.where(e == 0.0, 1.0, e)
            all_rests += tl.sum(x[None, :] * rest, axis=1)
        largest = tl.maximum(largest, tl.max(tl.where(size == size, size, float("inf")), axis=1))
        e = tl.where((u < A)[None, :], e, 0.0)
        stored = (i < padded)[:, None] & (u < units)[None, :]
        tl.store(tile[:, None] + u[None, :] * BLOCK, e, mask=stored)
    if abs_max is not None:
        tl.store(abs_max + b * T + i, largest, mask=i < T)
        tl.store(rests + b * T + i, all_rests, mask=i < T)


@kernel
def exponentials_kernel(
    eq,  # (B, padded_q / BLOCK_Q, units, BLOCK_Q): exp(2 (query + bias)), v folded in, scaled
    ek,  # (B, padded_k / BLOCK_K, units, BLOCK_K): exp(2 (keys + extra)), scaled
    abs_max_q,  # (B, Tq): max over units of |query| + |bias|, inf for NaN; or None
    abs_max_k,  # (B, Tk): max over units of |keys + extra|; or None
    rests_q,  # (B, Tq): the effect of the rounding of eq on each score of the query, to first order; or None
    rests_k,  # (B, Tk): the same for ek; or None
    table,  # (units / CHUNK + 1) * ROW and 2 * units numbers, or units: see tiled_scores_kernel
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    extra,  # (B, Tk, A) or None: added to the keys; for this and its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    v,  # (A,)
    bias,  # (A,) or None
    B, Tq, Tk, A,
    units,  # A, rounded up to a multiple of CHUNK
    stride_qb, stride_qq, stride_qa, stride_kb, stride_kk, stride_ka, stride_v, stride_bias,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr,
    offsets, stride_offsets,  # (B + 1,) of packed keys, or None
):  # fmt: skip
    """The exponentials of all rows, each tile transposed: a tile of pairs reads one unit of all its rows at once.

    For packed keys, ek has one tile for each tile that packed_tile counts.
    """
    padded_q = tl.cdiv(Tq, BLOCK_Q) * BLOCK_Q
    padded_k = tl.cdiv(Tk, BLOCK_K) * BLOCK_K
    tiles_q = tl.cdiv(padded_q, BLOCK_T)
    tiles_k = tl.cdiv(padded_k, BLOCK_T)
    programs_k = B * tiles_k
    if offsets is not None:
        programs_k = (Tk // BLOCK_K + B) * (BLOCK_K // BLOCK_T)
    program = tl.program_id(0)
    if program < B * tiles_q:
        b = (program // tiles_q).to(tl.int64)
        i = (program % tiles_q).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        if ACTIVATION == "tanh":
            _, unit = _largest_v(v, A, stride_v, BLOCK_A)
            _write_exponentials(
                eq, abs_max_q, rests_q, query, None, v, bias, unit, b, i, Tq, A, units, padded_q, stride_qb, stride_qq,
                stride_qa, None, None, None, stride_v, stride_bias, True, ACTIVATION, ALIGNED, BLOCK_Q, BLOCK_A,
            )  # fmt: skip
        else:
            _write_exponentials(
                eq, None, None, query, None, None, bias, 1.0, b, i, Tq, A, units, padded_q, stride_qb, stride_qq,
                stride_qa, None, None, None, 0, stride_bias, False, ACTIVATION, ALIGNED, BLOCK_Q, BLOCK_A,
            )  # fmt: skip
    elif program < B * tiles_q + programs_k:
        program -= B * tiles_q
        if offsets is not None:
            parts: tl.constexpr = BLOCK_K // BLOCK_T  # parts of a tile
            b, tile = packed_tile(offsets, stride_offsets, program // parts, B, BLOCK_K)
            origin, length, _, place = sentence_rows(offsets, b, stride_offsets, Tk, True)
            if tile * BLOCK_K < length:
                j = tile.to(tl.int64) * BLOCK_K + program % parts * BLOCK_T + tl.arange(0, BLOCK_T)
                ek_rows = ek + (program // parts - tile).to(tl.int64) * BLOCK_K * units
                key_rows = keys + batch_offset(place, stride_kb, ALIGNED)
                abs_max_rows = None
                rests_rows = None
                if abs_max_k is not None:
                    abs_max_rows = abs_max_k + origin
                    rests_rows = rests_k + origin
                _write_exponentials(
                    ek_rows, abs_max_rows, rests_rows, key_rows, None, v, None, 1.0, origin * 0, j, length, A, units,
                    (tile + 1) * BLOCK_K, 0, stride_kk, stride_ka, None, None, None, stride_v, 0, False, ACTIVATION,
                    ALIGNED, BLOCK_K, BLOCK_A,
                )  # fmt: skip
        else:
            b = (program // tiles_k).to(tl.int64)
            j = (program % tiles_k).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            _write_exponentials(
                ek, abs_max_k, rests_k, keys, extra, v, None, 1.0, b, j, Tk, A, units, padded_k, stride_kb, stride_kk,
                stride_ka, stride_eb, stride_ek, stride_ea, stride_v, 0, False, ACTIVATION, ALIGNED, BLOCK_K, BLOCK_A,
            )  # fmt: skip
    elif ACTIVATION != "tanh":
        for start in range(0, units, BLOCK_A):
            u = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
            x = tl.load(v + u * stride_v, mask=u < A, other=0.0).to(tl.float32)
            tl.store(table + u, x, mask=u < units)
    else:
        _write_units(table, v, A, units, stride_v, BLOCK_A)


@kernel
def key_exponentials_kernel(
    ek,  # (B, Tk, A), contiguous, float32
    keys,  # (B, Tk, A)
    extra,  # (B, Tk, A) or None: added to the keys; for this and its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    Tk, A,
    stride_kb, stride_kk, stride_ka,
    ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """ek = exp(2 (keys + extra)), and 1 beyond MAX_ABS_EXPONENTIAL and for NaN: finite for any values in padding."""
    tiles_a = tl.cdiv(A, BLOCK_A)
    tiles_k = tl.cdiv(Tk, BLOCK_K)
    program = tl.program_id(0)
    u = (program % tiles_a).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    j = (program // tiles_a % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = (program // (tiles_a * tiles_k)).to(tl.int64)
    in_keys = (j[:, None] < Tk) & (u[None, :] < A)
    keys += batch_offset(b, stride_kb, ALIGNED) + j[:, None] * stride_kk + u[None, :] * stride_ka
    k = tl.load(keys, mask=in_keys, other=0.0).to(tl.float32)
    if extra is not None:
        extra += batch_offset(b, stride_eb, ALIGNED) + j[:, None] * stride_ek + u[None, :] * stride_ea
        k += tl.load(extra, mask=in_keys, other=0.0).to(tl.float32)
    e = exp2x_in_range(tl.where(tl.abs(k) <= MAX_ABS_EXPONENTIAL, k, 0.0))
    tl.store(ek + (b * Tk + j[:, None]) * A + u[None, :], e, mask=in_keys)
