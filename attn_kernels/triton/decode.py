"""Attention of few queries, a step of a decoder or the beams of a sentence: scores, softmax and context in one kernel.

The kernel is limited by reading keys and values, so it reads them once: a program loops over the steps of a row with
all its queries, and rescales its sums when it finds a larger score. If there are fewer rows than processors, the steps
of a row are split over several programs, and a second, small kernel combines their sums in order.

One launch instead of two (scores, then softmax with context) saves more time than any change inside the kernel. A
launch takes the host about 15 microseconds, and a step of 64 sentences of 50 words takes a large GPU about 5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scores import GatedAdditiveScore
from ..types import NORMALIZERS
from .arguments import extra_arguments, mask_strides, mask_tensors, rows_aligned, strides_of, two_parts
from .configurations import configuration
from .device import add_product, alignment_rows, attended, batch_offset, kernel, sentence_rows, split_steps
from .inputs import Inputs
from .launch import accumulator, alignments_shape, has_approximate_reciprocal, launch
from .normaliser import LOWEST, add_block, alignments_of, factor, log_total_of, log_weights, merge, part_factor
from .options import add_score_bias, clip_scores, drop, option_arguments, scale_kept
from .scores import extra_of, finish_scores, parts_of, score_terms
from .tiles import NUM_SMS, packed_split, power_of_two, steps_of_row

MAX_DECODE_QUERIES = 8  # with more queries, the tile and the averages of values do not fit into registers
MAX_VALUE_COLUMNS = 1024  # with more columns, the averages do not fit into registers
MAX_SPLITS = tl.constexpr(128)  # of the steps of a row


@kernel
def decode_kernel(
    context,  # (splits, B, Tq, D), contiguous: one for each split of the steps; with several, not yet divided by total
    alignments,  # (B, Tq, Tk), contiguous, or None
    scores,  # (B, Tq, Tk), contiguous, or None if alignments are not needed: log weights, an output
    tops,  # (splits, B, Tq), contiguous, or None for a single split: the largest log weight
    totals,  # (splits, B, Tq), contiguous, or None: the sum of exp(log weight - top)
    query,  # (B, Tq, A)
    keys,  # (B, Tk, A)
    values,  # (B, Tk, D)
    v,  # (A,), or with VECTORS (R, A); None for dot attention
    bias,  # (A,) or None
    gate,  # (B, Tk, A) or None
    extra,  # (B, Tk, A) or None: added to the keys; for this and its strides, see extra_arguments
    stride_eb, stride_ek, stride_ea,
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    number,  # of the score: see parts_of
    number_lo,  # its rounding error in float32: for float64
    B, Tq, Tk, A, D,
    R,  # score vectors; 1 without VECTORS
    steps_per_split,  # a multiple of BLOCK_K
    stride_qb, stride_qq, stride_qa,
    stride_kb, stride_kk, stride_ka,
    stride_vb, stride_vk, stride_vd, stride_vr, stride_v,
    stride_bias,
    stride_tb, stride_tk, stride_ta,
    stride_lengths,
    stride_mb, stride_mq, stride_mk,
    log_total,  # (B, Tq), contiguous, or None; written for a single split
    score_bias,  # (B, Tq, Tk) or None; for this and the next arguments, see option_arguments
    stride_sb, stride_sq, stride_sk,
    seed, least, kept_factor, kept_factor_lo, clip, clip_lo, SCORE: tl.constexpr, NORMALISER: tl.constexpr,
    APPROXIMATE: tl.constexpr, FLOAT64: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,  # the number of steps of which alignments are written at once
    VECTORS: tl.constexpr,  # rows of v of a program, for one query; None: v (A,), for all queries
    columns,  # of packed alignments and scores, or None: see alignment_rows
    PACKED: tl.constexpr,
):  # fmt: skip
    """The context of all Tq queries of a row of the batch, over one split of its steps.

    With VECTORS, a program computes VECTORS of the R rows of one query.
    """
    wide: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    splits = tl.cdiv(Tk, steps_per_split)
    program = tl.program_id(0)
    split = program % splits
    i = tl.arange(0, BLOCK_Q).to(tl.int64)
    if VECTORS is None:
        b = (program // splits).to(tl.int64)
        rows = Tq  # the number of rows of the program: i < rows
        first_row = 0  # the index of the first of them in the sentence
    else:
        blocks = tl.cdiv(R, VECTORS)
        at = (program // (splits * blocks)).to(tl.int64)
        b = at // Tq
        first_vector = program // splits % blocks * VECTORS
        rows = tl.minimum(R - first_vector, VECTORS)
        first_row = at % Tq * R + first_vector
    d = tl.arange(0, BLOCK_D)[None, None, :]
    # Repeated for each step, although v, bias and query are the same for all steps. So Triton loads them in the layout
    # of keys; otherwise it would exchange elements between the threads.
    units = tl.broadcast_to(tl.arange(0, BLOCK_A)[None, None, :], [1, BLOCK_K, BLOCK_A])
    origin, length, width, place = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    begin, end = split_steps(split, splits, steps_per_split, width, BLOCK_K, PACKED)
    query += batch_offset(b, stride_qb, ALIGNED)
    keys += batch_offset(place, stride_kb, ALIGNED)
    values += batch_offset(place, stride_vb, ALIGNED)
    if gate is not None:
        gate += batch_offset(b, stride_tb, ALIGNED)
    if extra is not None:
        extra += batch_offset(b, stride_eb, ALIGNED)
    if mask is not None:
        mask += b * stride_mb
    if VECTORS is None:
        query += i[:, None, None] * stride_qq
    else:  # beyond the last one, the last one is loaded again, so that no load needs a mask
        query += at % Tq * stride_qq
        v += (first_vector + tl.minimum(i, rows - 1))[:, None, None] * stride_vr
        if mask is not None:
            mask += at % Tq * stride_mq
        stride_mq = 0
    if score_bias is not None:
        score_bias += b * stride_sb + first_row * stride_sq
    in_all = b * Tq * R + first_row  # the index of the program's first row among the rows of all sentences
    start_alignments, row_steps, length = alignment_rows(b, Tq * R, origin, width, length, columns)
    start_alignments += first_row * row_steps
    if alignments is not None:
        alignments += start_alignments
    if scores is not None:
        scores += start_alignments

    m_i = tl.full([BLOCK_Q], LOWEST, dtype=wide)
    l_i = tl.zeros([BLOCK_Q], dtype=wide)
    any_i = tl.zeros([BLOCK_Q], dtype=tl.int32)
    averaged = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_D], dtype=wide)
    for start in range(begin, tl.minimum(end, length), BLOCK_K):
        j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_steps = (j < length)[None, :, None]
        # Loaded before the scores are computed, so that the load overlaps with the computation.
        x = tl.load(
            values + j[None, :, None] * stride_vk + d.to(tl.int64) * stride_vd, mask=in_steps & (d < D), other=0.0
        )
        products = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_A], dtype=wide)
        for first in range(0, A, BLOCK_A):
            u = first + units
            in_units = u < A
            offset = u.to(tl.int64)
            k = tl.load(keys + j[None, :, None] * stride_kk + offset * stride_ka, mask=in_steps & in_units, other=0.0)
            k = k.to(wide)
            if extra is not None:
                k += tl.load(
                    extra + j[None, :, None] * stride_ek + offset * stride_ea, mask=in_steps & in_units, other=0.0
                ).to(wide)
            in_query = in_units
            if VECTORS is None:
                in_query = (i < Tq)[:, None, None] & in_units
            q = tl.load(query + offset * stride_qa, mask=in_query, other=0.0)
            g = None
            if gate is not None:
                g = tl.load(
                    gate + j[None, :, None] * stride_tk + offset * stride_ta, mask=in_steps & in_units, other=0.0
                ).to(wide)
            products += score_terms(
                q.to(wide), k, v, bias, g, number, number_lo, u, A, stride_v, stride_bias, SCORE, APPROXIMATE
            )
        s = finish_scores(tl.sum(products, axis=2), number, number_lo, SCORE)
        allowed = attended(mask, i, j, rows, length, stride_mq, stride_mk)
        s = clip_scores(s, allowed, clip, clip_lo)
        s = log_weights(add_score_bias(s, score_bias, i, j, allowed, stride_sq, stride_sk), NORMALISER)
        if scores is not None:
            tl.store(scores + i[:, None] * row_steps + j[None, :], s, mask=allowed)
        s = tl.where(allowed, s, -float("inf"))
        p, rescale, m_i, l_i = add_block(s, allowed, m_i, l_i)
        p = drop(p, seed, least, 0, in_all + i, j, Tq, Tk)
        averaged = add_product(averaged * rescale[:, None, None], p, x, allowed, mask is not None, True)
        any_i = tl.maximum(any_i, tl.max(allowed.to(tl.int32), axis=1))

    average = scale_kept(tl.sum(averaged, axis=1), kept_factor, kept_factor_lo)
    in_split = split.to(tl.int64) * B * Tq * R + in_all + i
    if tops is None:
        factor_i = factor(l_i, any_i)
        average *= factor_i[:, None]
        if log_total is not None:
            tl.store(log_total + in_all + i, log_total_of(m_i, factor_i), mask=i < rows)
        if alignments is not None:
            tl.debug_barrier()  # the loop below reads scores that other threads have written
            for start in range(0, row_steps, STEPS):
                j = (start + tl.arange(0, STEPS)).to(tl.int64)
                allowed = attended(mask, i, j, rows, length, stride_mq, stride_mk)
                pointers = i[:, None] * row_steps + j[None, :]
                s = tl.load(scores + pointers, mask=allowed, other=0.0)
                p = alignments_of(s, allowed, m_i[:, None], factor_i[:, None])
                tl.store(alignments + pointers, p, mask=(i < rows)[:, None] & (j < row_steps)[None, :])
    else:
        tl.store(tops + in_split, m_i, mask=i < rows)
        tl.store(totals + in_split, tl.where(any_i > 0, l_i, -1.0), mask=i < rows)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(context + in_split[:, None] * D + d, average, mask=(i < rows)[:, None] & (d < D))


@kernel
def combine_kernel(
    context,  # (B, Tq * R, D), contiguous
    alignments,  # (B, Tq * R, Tk), contiguous, or None
    parts,  # (splits, B, Tq * R, D), contiguous
    scores,  # (B, Tq * R, Tk), contiguous, or None: log weights; anything where not attended
    tops,  # (splits, B, Tq * R), contiguous
    totals,  # (splits, B, Tq * R), contiguous; -1 if a split attends nothing, which is different from a sum of 0
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    B, Tq, Tk, D,
    R,  # score vectors: a query has one row for each
    splits,
    tiles,  # the number of tiles of a query: those of its values, then those of its steps
    stride_lengths, stride_mb, stride_mq, stride_mk,
    log_total,  # (B, Tq * R), contiguous, or None
    BLOCK: tl.constexpr,
    columns,  # as in decode_kernel
    PACKED: tl.constexpr,
):  # fmt: skip
    """Combines the results of the splits of the steps, in order: a tile of context or of alignments."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64)  # among the rows of all sentences
    rows = tl.cast(B, tl.int64) * Tq * R
    split = tl.arange(0, MAX_SPLITS).to(tl.int64)
    tops += row
    totals += row
    m_parts = tl.load(tops + split * rows, mask=split < splits, other=LOWEST)
    l_parts = tl.load(totals + split * rows, mask=split < splits, other=-1.0)
    m_i, factor_i = merge(m_parts, l_parts)
    if log_total is not None:
        if tile == 0:
            tl.store(log_total + row, log_total_of(m_i, factor_i))
    tiles_d = tl.cdiv(D, BLOCK)
    if tile < tiles_d:
        d = tile * BLOCK + tl.arange(0, BLOCK)
        average = tl.zeros([BLOCK], dtype=parts.dtype.element_ty)
        for part in range(0, splits):
            at = tl.cast(part, tl.int64) * rows
            each = part_factor(tl.load(tops + at), m_i)
            average += each * tl.load(parts + (at + row) * D + d, mask=d < D, other=0.0)
        tl.store(context + row * D + d, average * factor_i, mask=d < D)
    elif alignments is not None:
        b = row // R // Tq
        i = row // R % Tq + tl.arange(0, 1)
        if mask is not None:
            mask += b * stride_mb
        origin, length, width, _ = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
        start, row_steps, length = alignment_rows(b, Tq * R, origin, width, length, columns)
        start += row % (Tq * R) * row_steps
        # One iteration, except for packed sentences that are longer than the average.
        for first in range((tile - tiles_d) * BLOCK, row_steps, (tiles - tiles_d) * BLOCK):
            j = (first + tl.arange(0, BLOCK)).to(tl.int64)
            allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
            s = tl.load(scores + start + j[None, :], mask=allowed, other=0.0)
            p = alignments_of(s, allowed, m_i, factor_i)
            tl.store(alignments + start + j[None, :], p, mask=(j < row_steps)[None, :])


def can_decode(query: Tensor, values: Tensor) -> bool:
    """Whether query (B, Tq, A) has few queries, and values (B, Tk, D) few enough columns to average all at once."""
    return query.shape[1] <= MAX_DECODE_QUERIES and values.shape[2] <= MAX_VALUE_COLUMNS


def decode(
    inputs: Inputs, need_alignments: bool, log_total: Tensor | None = None, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention if ``can_decode``: context (B, Tq, D), alignments (B, Tq, Tk) or empty.

    log_total: (B, Tq) in float32 or float64, contiguous, an output; not written if Tk is 0.
    columns: of a packed memory; see packed_attention.py.

    With R score vectors, all three have Tq * R rows. R is not limited: a program computes 8 rows of a query.
    """
    score, query, keys, values, masks, options = inputs
    name, v, bias, number = parts_of(score)
    gate = score.gate if isinstance(score, GatedAdditiveScore) else None
    extra = extra_of(score)
    beside = [x for x in (gate, extra) if x is not None]  # tensors with the shape of the keys
    B, Tq, A = query.shape
    Tk, D = values.shape[1:]
    R = 1 if v is None or v.dim() == 1 else v.shape[0]
    vectors = None  # score vectors of a program
    if R > 1:
        vectors = triton.cdiv(R, triton.cdiv(R, MAX_DECODE_QUERIES))
    elif v is not None:
        v = v if v.dim() == 1 else v[0]
    rows = B * Tq * R
    alignments = values.new_empty(alignments_shape(B, Tq * R, Tk, columns) if need_alignments else (0,))
    if rows * Tk == 0:
        return values.new_zeros((B, Tq * R, D)), alignments
    wide = accumulator(values.dtype)
    double = wide == torch.float64
    block_q, block_d = (power_of_two(vectors or Tq, 1, MAX_DECODE_QUERIES), power_of_two(D, 32, MAX_VALUE_COLUMNS))
    programs = B if vectors is None else B * Tq * triton.cdiv(R, vectors)
    warps = 4 if block_q * block_d <= 2048 else 8
    elements = (512 if double else 1024) * warps // block_q  # per query: 32 for each thread, 16 in float64
    block_k = max(2, min(16, elements // block_d))
    at_once = 32 * warps * 16 // values.element_size()  # elements that all threads load together, 16 bytes each
    loaded = triton.next_power_of_2(1 + len(beside))  # tensors of which a thread holds elements
    block_a = power_of_two(A, 32, max(elements // loaded, at_once) // block_k)
    of_row, packed = steps_of_row(Tk, B, columns), dict(columns=columns, PACKED=columns is not None)
    row_bytes = of_row * (A * (1 + len(beside)) + D) * values.element_size()
    steps, splits = _split(programs, of_row, block_k, row_bytes, configuration("decode", values)["bytes"])
    if columns is not None:
        steps, splits = packed_split(splits, Tk)
    scores = values.new_empty(alignments.shape, dtype=wide) if need_alignments else None
    parts = values.new_empty((splits, B, Tq * R, D), dtype=values.dtype if splits == 1 else wide)
    tops, totals = (None, None) if splits == 1 else values.new_empty((2, splits, B, Tq * R), dtype=wide)
    launch(
        decode_kernel,
        programs * splits,
        (parts, alignments if need_alignments and splits == 1 else None, scores, tops, totals, query, keys, values),
        (
            *(v, bias, gate, *extra_arguments(extra), *mask_tensors(masks), *two_parts(number, wide)),
            *(B, Tq, Tk, A, D, R, steps),
            *(*query.stride(), *keys.stride(), *values.stride()),
            *(0 if v is None or R == 1 else v.stride(0), 0 if v is None else v.stride(-1), *strides_of(bias, 1)),
            *(*strides_of(gate), *mask_strides(masks)),
            *(log_total if splits == 1 else None, *option_arguments(options, wide)),
        ),
        dict(
            SCORE=name,
            NORMALISER=NORMALIZERS[options.normalizer],
            APPROXIMATE=has_approximate_reciprocal(query),
            FLOAT64=double,
            ALIGNED=rows_aligned(query, keys, values, *beside),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_A=block_a,
            BLOCK_D=block_d,
            STEPS=1024 // block_q,
            VECTORS=vectors,
            **packed,
        ),
        warps,
    )
    if splits == 1:
        return parts[0], alignments
    context = values.new_empty((B, Tq * R, D))
    block = 128
    tiles = triton.cdiv(D, block) + (triton.cdiv(columns or of_row, block) if need_alignments else 0)
    if log_total is not None:
        tiles = max(tiles, 1)
    launch(
        combine_kernel,
        rows * tiles,
        (context, alignments if need_alignments else None, parts, scores, tops, totals, *mask_tensors(masks)),
        (B, Tq, Tk, D, R, splits, tiles, *mask_strides(masks), log_total),
        dict(BLOCK=block, **packed),
        4,
    )
    return context, alignments


def _split(programs: int, Tk: int, block_k: int, row_bytes: int, bytes_of_program: int) -> tuple[int, int]:
    """How the steps of a row are split: steps of a split, a multiple of block_k, and the number of splits."""
    splits = min(triton.cdiv(NUM_SMS, programs), triton.cdiv(row_bytes, bytes_of_program), MAX_SPLITS.value)
    steps = triton.cdiv(triton.cdiv(Tk, max(splits, 1)), block_k) * block_k
    return steps, triton.cdiv(Tk, steps)
