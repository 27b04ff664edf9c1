"""Softmax of the scores and the weighted average of values, and the gradient of the scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import NORMALIZERS, Masks, Options
from .arguments import mask_strides, mask_tensors, rows_aligned, strides_of
from .device import add_product, alignment_rows, attended, batch_offset, kernel, load_rows, sentence_rows, split_steps
from .launch import accumulator, alignments_shape, launch, sum_splits
from .normaliser import (
    LOWEST,
    add_block,
    alignments_of,
    factor,
    log_total_of,
    log_weight_derivative,
    log_weights,
    mean_gradient,
)
from .options import NO_OPTIONS, add_score_bias, clip_and_slope, clip_scores, drop, option_arguments, scale_kept
from .products import product, split, sum_tile
from .tiles import MAX_SMALL_M, packed_split, power_of_two, small_m_block, steps_of_row

# Softmax and context --------------------------------------------------------------------------------------------------


@kernel
def _attend_kernel(
    context,  # (splits, B, Tq, D), contiguous: one for each split of the steps
    alignments,  # (B, Tq, Tk), contiguous, or None
    scores,  # (B, Tq, Tk), contiguous
    values,  # (B, Tk, D)
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    B, Tq, Tk, D,
    steps_per_split,  # a multiple of BLOCK_K
    stride_vb, stride_vk, stride_vd, stride_lengths, stride_mb, stride_mq, stride_mk,
    log_total,  # (B, Tq), contiguous, float32 or float64, or None
    score_bias,  # (B, Tq, Tk) or None; for this and the next arguments, see option_arguments
    stride_sb, stride_sq, stride_sk,
    seed, least, kept_factor, kept_factor_lo, clip, clip_lo, NORMALISER: tl.constexpr, ALIGNED: tl.constexpr,
    SMALL_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    columns,  # of packed alignments, or None: see alignment_rows; packed scores always have the layout for 0
    PACKED: tl.constexpr,
):  # fmt: skip
    """alignments = softmax of the attended scores, context = alignments @ values; zeros where nothing is attended.

    Every program computes the maximum and the sum of its whole rows, which are short, so no results have to be
    combined.
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
    origin, length, width, place = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    scores += origin * Tq + i[:, None] * width
    start_alignments, row_steps, length = alignment_rows(b, Tq, origin, width, length, columns)
    if alignments is not None:
        alignments += start_alignments
    if mask is not None:
        mask += b * stride_mb
    if score_bias is not None:
        score_bias += b * stride_sb

    m_i = tl.full([BLOCK_Q], LOWEST, dtype=accumulate)
    l_i = tl.zeros([BLOCK_Q], dtype=accumulate)
    any_i = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.int32)
    for start in range(0, length, BLOCK_K):
        j = (start + steps).to(tl.int64)
        allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
        s = tl.load(scores + j[None, :], mask=allowed, other=-float("inf"))
        s = clip_scores(s, allowed, clip, clip_lo)
        s = log_weights(add_score_bias(s, score_bias, i, j, allowed, stride_sq, stride_sk), NORMALISER)
        _, _, m_i, l_i = add_block(s, allowed, m_i, l_i)
        any_i = tl.maximum(any_i, allowed.to(tl.int32))
    factor_i = factor(l_i, tl.max(any_i, axis=1))
    if log_total is not None:
        if (tile_d == 0) & (split == 0):
            tl.store(log_total + b * Tq + i, log_total_of(m_i, factor_i), mask=i < Tq)

    if SMALL_M:
        averaged = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_D], dtype=accumulate)
    else:
        averaged = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    begin, end = split_steps(split, splits, steps_per_split, width, BLOCK_K, PACKED)
    for start in range(begin, tl.minimum(end, length), BLOCK_K):
        j = (start + steps).to(tl.int64)
        allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
        s = tl.load(scores + j[None, :], mask=allowed, other=-float("inf"))
        s = clip_scores(s, allowed, clip, clip_lo)
        s = log_weights(add_score_bias(s, score_bias, i, j, allowed, stride_sq, stride_sk), NORMALISER)
        p = alignments_of(s, allowed, m_i[:, None], factor_i[:, None])
        if alignments is not None:
            if tile_d == 0:
                stored = (i[:, None] < Tq) & (j[None, :] < row_steps)
                tl.store(alignments + i[:, None] * row_steps + j[None, :], p, mask=stored)
        rows = load_rows(
            values + batch_offset(place, stride_vb, ALIGNED), j, d, length, D, stride_vk, stride_vd, SMALL_M
        )
        p = drop(p, seed, least, b, i, j, Tq, Tk)
        averaged = add_product(averaged, p, rows, allowed, mask is not None, SMALL_M)
    if SMALL_M:
        averaged = tl.sum(averaged, axis=1)
    averaged = scale_kept(averaged, kept_factor, kept_factor_lo)
    split_context = context + ((split.to(tl.int64) * B + b) * Tq + i[:, None]) * D + d[None, :]
    tl.store(split_context, averaged, mask=(i[:, None] < Tq) & (d[None, :] < D))

    if alignments is not None:  # zeros in the tiles with only padding
        if tile_d == 0:
            if PACKED:  # the splits cover only existing steps, not padding
                begin = split * row_steps
                end = row_steps
            for start in range(tl.maximum(begin, tl.cdiv(length, BLOCK_K) * BLOCK_K), end, BLOCK_K):
                j = (start + steps).to(tl.int64)
                stored = (i[:, None] < Tq) & (j[None, :] < row_steps)
                zeros = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
                tl.store(alignments + i[:, None] * row_steps + j[None, :], zeros, mask=stored)


def attend(
    scores: Tensor,
    values: Tensor,
    masks: Masks,
    need_alignments: bool,
    options: Options = NO_OPTIONS,
    log_total: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the attended scores and the weighted average of values.

    Args: scores (B, Tq, Tk) in float32 or float64, contiguous, arbitrary where not attended; values (B, Tk, D);
    log_total (B, Tq) in float32 or float64, contiguous, an output, not written if Tk is 0.
    columns: of a packed memory, whose scores are (1, Tq, N); see packed_attention.py.
    Returns: context (B, Tq, D), and alignments (B, Tq, Tk) or an empty tensor; in the dtype of values.
    """
    B, Tq, Tk = scores.shape
    if columns is not None:
        assert masks.memory_lengths is not None  # the offsets
        B = masks.memory_lengths.shape[0] - 1
    D = values.shape[2]
    alignments = values.new_empty(alignments_shape(B, Tq, Tk, columns) if need_alignments else (0,))
    if Tk == 0:
        return values.new_zeros((B, Tq, D)), alignments
    of_row = steps_of_row(Tk, B, columns)
    small_m, block_m, block_k, block_d, warps = sum_tile(values, Tq, of_row, D, masks.mask is not None)
    programs = B * triton.cdiv(Tq, block_m) * max(1, triton.cdiv(D, block_d))
    steps_per_split, splits = split(programs, of_row, block_k)
    if columns is not None:
        steps_per_split, splits = packed_split(splits, Tk)
    context = values.new_empty((splits, B, Tq, D), dtype=values.dtype if splits == 1 else scores.dtype)
    launch(
        _attend_kernel,
        programs * splits,
        (context, alignments if need_alignments else None, scores, values, *mask_tensors(masks)),
        (
            *(B, Tq, Tk, D, steps_per_split, *values.stride(), *mask_strides(masks)),
            *(log_total, *option_arguments(options, scores.dtype)),
        ),
        dict(
            NORMALISER=NORMALIZERS[options.normalizer],
            ALIGNED=rows_aligned(values),
            SMALL_M=small_m,
            BLOCK_Q=block_m,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            columns=columns,
            PACKED=columns is not None,
        ),
        warps,
    )
    return sum_splits(context, values.dtype), alignments


# The gradient of scores -----------------------------------------------------------------------------------------------


@kernel
def _softmax_backward_kernel(
    dscores,  # (B, Tk, padded Tq), contiguous
    dproduct,  # (B, Tq, Tk), contiguous: grad_context @ values^T, or None
    grad_alignments,  # (B, Tq, Tk), or None
    alignments,  # (B, Tq, Tk)
    lengths,  # (B,) or None
    mask,  # (B, Tq, Tk) or None
    Tq, Tk,
    padded_blocks,  # the padded Tq of dscores, in blocks of BLOCK_Q
    stride_gb, stride_gq, stride_gk,
    stride_ab, stride_aq, stride_ak,
    stride_lengths,
    stride_mb, stride_mq, stride_mk,
    dscore_bias,  # (B, Tq, Tk), contiguous, or None
    kept,  # (B, Tq, Tk), contiguous, or None: the alignments that dropout keeps
    grad_log_total,  # (B, Tq), contiguous, or None
    scores,  # (B, Tq, Tk), contiguous, without clip and bias; None if log weights are equal to the scores
    score_bias,  # (B, Tq, Tk) or None; for this and the next arguments, see option_arguments
    stride_sb, stride_sq, stride_sk,
    seed, least, kept_factor, kept_factor_lo, clip, clip_lo, NORMALISER: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    columns,  # of packed alignments and their gradients, contiguous, or None: see alignment_rows
    PACKED: tl.constexpr,
):  # fmt: skip
    """dscores = alignments * (g - mean of g), g = dproduct + grad_alignments; 0 where not attended.

    The mean is sum_j alignments * g over the sum of alignments, which is 1 except for their rounding to the input
    dtype.

    With options: dproduct is of the weights that dropout keeps; the gradient of log_total is added; and the result is
    multiplied by the derivative of the log weights. dscore_bias is dscores before the factor of the clip.
    """
    accumulate: tl.constexpr = dscores.dtype.element_ty
    padded_q = padded_blocks * BLOCK_Q
    program = tl.program_id(0)
    b = (program // padded_blocks).to(tl.int64)
    i = (program % padded_blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    origin, length, width, _ = sentence_rows(lengths, b, stride_lengths, Tk, PACKED)
    start_alignments, row_steps, length = alignment_rows(b, Tq, origin, width, length, columns)
    dscores += origin * padded_q + i[:, None]
    if PACKED:
        alignments += start_alignments + i[:, None] * row_steps
    else:
        alignments += b * stride_ab + i[:, None] * stride_aq
    if dproduct is not None:
        dproduct += origin * Tq + i[:, None] * width
    if grad_alignments is not None:
        if PACKED:
            grad_alignments += start_alignments + i[:, None] * row_steps
        else:
            grad_alignments += b * stride_gb + i[:, None] * stride_gq
    if mask is not None:
        mask += b * stride_mb
    if score_bias is not None:
        score_bias += b * stride_sb
    if dscore_bias is not None:
        dscore_bias += (b * Tq + i[:, None]) * Tk
    if kept is not None:
        kept += (b * Tq + i[:, None]) * Tk
    if scores is not None:
        scores += (b * Tq + i[:, None]) * Tk
    mean = tl.zeros([BLOCK_Q], dtype=accumulate)
    products = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
    total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
    for apply in tl.static_range(2):  # first the sums of the rows, then the gradient
        if apply == 1:
            mean = mean_gradient(products, total)
        for start in range(0, length if apply == 0 else width, BLOCK_K):
            j = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            allowed = attended(mask, i, j, Tq, length, stride_mq, stride_mk)
            g = tl.zeros([BLOCK_Q, BLOCK_K], dtype=accumulate)
            if dproduct is not None:
                product_gradient = tl.load(dproduct + j[None, :], mask=allowed, other=0.0)
                product_gradient = drop(product_gradient, seed, least, b, i, j, Tq, Tk)
                g += scale_kept(product_gradient, kept_factor, kept_factor_lo)
            if grad_alignments is not None:
                g += tl.load(grad_alignments + j[None, :] * stride_gk, mask=allowed, other=0.0).to(accumulate)
            p = tl.load(alignments + j[None, :] * stride_ak, mask=allowed, other=0.0).to(accumulate)
            if apply == 0:
                products += p * g
                total += p
            else:
                gradient = p * (g - mean[:, None])
                if grad_log_total is not None:
                    gradient += p * tl.load(grad_log_total + b * Tq + i, mask=i < Tq, other=0.0)[:, None]
                if scores is not None:
                    s = tl.load(scores + j[None, :], mask=allowed, other=0.0)
                    if clip is not None:
                        s, slope = clip_and_slope(s, clip, clip_lo)
                    if NORMALISER != "softmax":
                        s = add_score_bias(s, score_bias, i, j, allowed, stride_sq, stride_sk)
                        gradient *= log_weight_derivative(s, NORMALISER)
                gradient = tl.where(allowed, gradient, 0.0)
                in_rows = (i[:, None] < Tq) & (j[None, :] < Tk)
                if dscore_bias is not None:
                    tl.store(dscore_bias + j[None, :], gradient, mask=in_rows)
                if clip is not None:
                    gradient = tl.where(allowed, gradient * slope, 0.0)
                stored = (i[:, None] < padded_q) & (j[None, :] < width)
                tl.store(dscores + j[None, :] * padded_q, gradient, mask=stored)
                if kept is not None:
                    tl.store(kept + j[None, :], drop(p, seed, least, b, i, j, Tq, Tk), mask=in_rows)


def padded_scores(scores: Tensor) -> Tensor:
    """An empty tensor like scores, (B, Tq, Tk), in float32 or float64, with the memory layout (B, Tk, Tq rounded up).

    The backward of additive scores loops over the steps and loads all queries of a step at once, without a mask.
    """
    B, Tq, Tk = scores.shape
    padded_q = small_m_block(Tq) if Tq <= MAX_SMALL_M else triton.cdiv(Tq, 32) * 32
    return scores.new_empty((B, Tk, padded_q), dtype=accumulator(scores.dtype)).transpose(1, 2)[:, :Tq]


def padded_gradient(grad_scores: Tensor) -> Tensor:
    """grad_scores (B, Tq, Tk) in a tensor of ``padded_scores``, padded with zeros."""
    B, _, Tk = grad_scores.shape
    dscores = padded_scores(grad_scores)
    filler = dscores.as_strided((B, dscores.stride(2), Tk), dscores.stride())
    filler.zero_()
    return dscores.copy_(grad_scores)


def softmax_backward(
    grad_context: Tensor | None,
    grad_alignments: Tensor | None,
    values: Tensor,
    masks: Masks,
    alignments: Tensor,
    options: Options = NO_OPTIONS,
    grad_log_total: Tensor | None = None,
    scores: Tensor | None = None,
    dscore_bias: Tensor | None = None,
    kept: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """The gradient of the scores: (B, Tq, Tk), float32 or float64, 0 where not attended.

    Its memory layout is that of ``padded_scores``, padded with zeros.

    With options: scores (B, Tq, Tk) without clip and bias, for a clip or a normaliser other than softmax. Outputs:
    dscore_bias, and kept, the alignments that dropout keeps; both (B, Tq, Tk), contiguous.

    columns: of a packed memory; see packed_attention.py. Then the result is (1, Tq, N).
    """
    if columns is not None:
        assert masks.memory_lengths is not None  # the offsets
        B, Tk = masks.memory_lengths.shape[0] - 1, values.shape[1]
        Tq = alignments.shape[1] if columns else alignments.numel() // Tk
        dscores = padded_scores(values.new_empty(()).expand(1, Tq, Tk))
        dscores = dscores.as_strided(dscores.shape, (dscores.stride(2), *dscores.stride()[1:]))  # see device.py
        alignments = alignments.contiguous().view(B if columns else 1, Tq, -1)
        grad_alignments = None if grad_alignments is None else grad_alignments.contiguous().view(alignments.shape)
    else:
        B, Tq, Tk = alignments.shape
        dscores = padded_scores(alignments)
    dproduct = None
    if grad_context is not None:
        dproduct = product(grad_context, values, 1.0, masks.memory_lengths, columns is not None)
    block_q = power_of_two(Tq, 1, 16)
    padded_blocks = dscores.stride(2) // block_q
    # Options read and write more arrays, and dropout computes with 64-bit integers: both take registers.
    elements = 1024 if options is NO_OPTIONS else 256 if dscores.dtype == torch.float64 else 512
    launch(
        _softmax_backward_kernel,
        B * padded_blocks if dscores.numel() else 0,
        (dscores, dproduct, grad_alignments, alignments, *mask_tensors(masks), Tq, Tk),
        (
            padded_blocks,
            *strides_of(grad_alignments),
            *alignments.stride(),
            *mask_strides(masks),
            *(dscore_bias, kept, grad_log_total, scores, *option_arguments(options, dscores.dtype)),
        ),
        dict(
            NORMALISER=NORMALIZERS[options.normalizer],
            BLOCK_Q=block_q,
            BLOCK_K=elements // block_q,
            columns=columns,
            PACKED=columns is not None,
        ),
        4,
    )
    return dscores
